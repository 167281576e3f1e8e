"""What a compiled program sends between devices, read from its text."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

COMPUTATION: Final = re.compile(r"^(?:ENTRY )?%([\w.\-]+) \([^\n]*\{\n(.*?)^\}", re.MULTILINE | re.DOTALL)
COLLECTIVE: Final = re.compile(
    r'^  (?:ROOT )?%([\w.\-]+) = ([^"\n]*?) '  # no quotation mark, so that it isn't one which metadata tells of
    r"(all-reduce|reduce-scatter|all-gather|all-to-all|collective-permute)(-start)?\((.*?)\)(.*)",
    re.MULTILINE,
)
CALL: Final = re.compile(r"\b(calls|to_apply|body|condition|\w+_computations?)=\{?((?:%[\w.\-]+(?:, )?)+)")
START: Final = re.compile(r"-start\([^\n]*")


class Collective(NamedTuple):
    """One array in one operation between devices; an operation that XLA has combined has several."""

    kind: str
    """`all-reduce`, `reduce-scatter`, `all-gather`, `all-to-all` or `collective-permute`."""
    dtype: str
    """HLO's: `f32`, `bf16`. It is what is sent: the CPU sends bfloat16 as float32."""
    shape: tuple[int, ...]
    """Of the whole array on one device: of an all-gather's result, of a reduce-scatter's operand."""
    devices: int
    """How many are in each group."""
    in_loop: bool
    """Whether a while loop runs it, in its body or condition or in what they call, however deep."""
    asynchronous: bool
    """Whether it is started and awaited apart, with other work in between."""
    operation: str
    """The name of the HLO instruction, the same for all arrays of one operation."""

    @property
    def nbytes(self) -> int:
        """Of the whole array on one device."""
        bits = 8 if self.dtype == "pred" else int(re.sub(r"^\D+(\d+).*", r"\1", self.dtype))
        return -(-math.prod(self.shape) * bits // 8)

    @property
    def sent(self) -> float:
        """The bytes that each device sends, see `sent`."""
        return sent(self.kind, self.nbytes, self.devices)


def sent(kind: str, nbytes: int, devices: int) -> float:
    """The bytes that each device sends by the ring algorithm.

    With n devices that is (n-1)/n of the array, twice for an all-reduce. A permutation sends all of it.

    >>> sent("all-reduce", 800, 8)
    1400.0
    """
    if kind == "collective-permute":
        return float(nbytes)
    return (2 if kind == "all-reduce" else 1) * nbytes * (devices - 1) / devices


def collectives(program: str) -> list[Collective]:
    """The operations between devices in a program compiled for CPUs, GPUs or TPUs.

    An operation stands here once however it is run: at once, in the halves that start and await it, in the pieces of a
    TPU's asynchronous fusions. It stands here as XLA runs it, which joins arrays on GPUs and replaces reduce-scatters
    by all-reduces on some TPUs. Operations among groups of one device are left out.

    Args:
        program: the text of an optimized HLO module: `jax.jit(f).lower(...).compile().as_text()`.

    Returns:
        One entry for each array, in the order of the text. A loop's entries are as many as its body has.

    Raises:
        ValueError: a text without computations.

    >>> program = '''HloModule jit_f, num_partitions=8
    ...
    ... ENTRY %main (param: bf16[64,256]) -> bf16[8,256] {
    ...   %param = bf16[64,256]{1,0} parameter(0)
    ...   ROOT %scatter = bf16[8,256]{1,0} reduce-scatter(%param), replica_groups=[1,8]<=[8], dimensions={0}
    ... }'''
    >>> [found] = collectives(program)
    >>> found.kind, found.dtype, found.shape, found.devices, found.sent
    ('reduce-scatter', 'bf16', (64, 256), 8, 28672.0)
    """
    computations = dict(COMPUTATION.findall(program))
    if not computations:
        raise ValueError(f"collectives: no computation in {program[:50]!r}; give what `compile().as_text()` returns")
    header = program[: program.index("\n")]
    everyone = math.prod(int(n) for n in re.findall(r"(?:replica_count|num_partitions)=(\d+)", header))
    calls = {name: set(_called(body)) for name, body in computations.items()}
    in_loop = _reached(_called(program, "body", "condition"), calls)
    apart = _reached(_called("\n".join(START.findall(program))), calls)

    found: list[Collective] = []
    for name, body in computations.items():
        for operation, result, kind, start, operands, attributes in COLLECTIVE.findall(body):
            fused_apart = "async_collective_fusion_config" in attributes
            if fused_apart and "AsyncCollectiveStart" not in body:
                continue  # a later piece of what another fusion starts
            devices = _devices(attributes, everyone)
            if devices == 1:
                continue
            asynchronous = name in apart or fused_apart or (bool(start) and '"is_sync":true' not in attributes)
            arrays = [
                (dtype, tuple(int(side) for side in sides.split(",") if side))
                for dtype, sides in re.findall(r"(\w+)\[([\d,]*)\]", result)
            ]
            if start and kind != "all-reduce":  # the operands, the results, a TPU's semaphores
                arrays = arrays[(n := operands.count("%")) : 2 * n]
            scattered = re.search(r"dimensions=\{(\d+)", attributes)
            if kind == "all-reduce" and "all-reduce-scatter" in name:  # a TPU's, fused with a slice of its result
                kind = "reduce-scatter"
            elif kind == "reduce-scatter" and scattered:
                axis = int(scattered[1])
                arrays = [(d, (*s[:axis], s[axis] * devices, *s[axis + 1 :])) for d, s in arrays]
            elif kind == "all-to-all" and not scattered:  # a piece of one array for each device
                arrays = [(arrays[0][0], (len(arrays), *arrays[0][1]))]
            found += [
                Collective(kind, dtype, shape, devices, name in in_loop, asynchronous, operation)
                for dtype, shape in arrays
            ]
    return found


def _called(text: str, *attributes: str) -> list[str]:
    """The computations that instructions name, in any attribute or in these."""
    return [
        name
        for attribute, names in CALL.findall(text)
        if attribute in attributes or not attributes
        for name in re.findall(r"%([\w.\-]+)", names)
    ]


def _reached(names: Iterable[str], calls: Mapping[str, set[str]]) -> set[str]:
    """These computations and all that they call."""
    reached: set[str] = set()
    queue = set(names)
    while queue:
        reached |= queue
        queue = set[str]().union(*(calls.get(name, ()) for name in queue)) - reached
    return reached


def _devices(attributes: str, everyone: int) -> int:
    """How many devices are in each group; in the largest if they differ."""
    if found := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", attributes):
        linked: dict[str, set[str]] = {}
        for source, target in re.findall(r"(\d+),(\d+)", found[1]):
            group = linked.get(source, {source}) | linked.get(target, {target})
            linked |= dict.fromkeys(group, group)
        return max(map(len, linked.values()), default=1)
    if found := re.search(r"replica_groups=\{((?:\{[\d,]+\},?)+)\}", attributes):
        return max(len(group.split(",")) for group in re.findall(r"\{([\d,]+)\}", found[1]))
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[(.*?)\].*?\{(.*?)\}", attributes):  # sizes of axes, then some of them
        sizes = dict(re.findall(r"'([^']*)'=(\d+)", found[1]))
        # 'axis':(2)4 is that part of an axis which has 4 devices, after one of 2.
        axes = re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return everyone
