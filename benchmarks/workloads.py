"""What every contestant trains: the models, their batches, and how many operations a step of each takes."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Final, Literal

import numpy as np

DType = Literal["float32", "bfloat16"]
CHECKED_STEPS: Final = 4
"""How many first steps of all contestants must agree."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """A SwiGLU decoder of the Llama family, untied, and the batches that it trains on."""

    name: str
    vocab: int
    layers: int
    width: int
    heads: int
    hidden: int
    rows: int
    length: int
    dtype: DType
    """What products are computed in; weights, gradients and the optimizer's state are float32 always."""

    @property
    def tokens(self) -> int:
        """Positions in a batch."""
        return self.rows * self.length

    @property
    def matrix_parameters(self) -> int:
        """Parameters that are multiplied with activations: the head is one, the embedding is only read."""
        block = 4 * self.width * self.width + 3 * self.width * self.hidden
        return self.layers * block + self.width * self.vocab

    @property
    def flops(self) -> int:
        """Floating point operations that a training step needs, causal attention counted half."""
        attention = 12 * self.layers * self.width * self.length // 2
        return self.tokens * (6 * self.matrix_parameters + attention)

    def batches(self) -> Iterator[np.ndarray]:
        """The same endless sequence for every contestant: `[rows length]` random token ids, uint16."""
        ids = np.random.default_rng(0).integers(0, self.vocab, (8, self.rows, self.length), np.uint16)
        while True:
            yield from ids


@dataclasses.dataclass(frozen=True)
class Hyperparameters:
    """AdamW's, and the gradient's largest norm. Matrices decay but for the embedding; scales don't."""

    learning_rate: float = 1e-3
    b1: float = 0.9
    b2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    max_norm: float = 1.0


def _default(name: str, rows: int, length: int) -> Workload:
    """A model of bytes, of the size that experiments/pretrain.py trains by default, on 4096 tokens at a time."""
    return Workload(
        name=name, vocab=258, layers=4, width=128, heads=2, hidden=352, rows=rows, length=length, dtype="float32"
    )


def _gpt(name: str, layers: int, width: int, heads: int, hidden: int, rows: int) -> Workload:
    """A model of GPT-2's size, with its vocabulary padded to a multiple of 128."""
    return Workload(
        name=name,
        vocab=50304,
        layers=layers,
        width=width,
        heads=heads,
        hidden=hidden,
        rows=rows,
        length=1024,
        dtype="bfloat16",
    )


ON_CPU: Final = (_default("default", 16, 256), _default("default-64", 64, 64))
ON_GPU: Final = (_gpt("124M", 12, 768, 12, 2048, 64), _gpt("350M", 24, 1024, 16, 2752, 32))
SMOKE: Final = Workload(
    name="smoke", vocab=64, layers=2, width=32, heads=2, hidden=96, rows=4, length=32, dtype="float32"
)

_PEAKS: Final[Mapping[str, float]] = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
_NOT_SXM: Final = ("PCIE", "NVL")  # these run at lower clocks; their peaks are not in the table


def peak_flops(device: str) -> float | None:
    """The dense bfloat16 peak of a device by its name, in operations a second; None where it isn't known."""
    if any(form in device.upper() for form in _NOT_SXM):
        return None
    return next((peak for name, peak in _PEAKS.items() if name in device), None)


def matmul_size(dtype: DType) -> int:
    """The side of the square matrices that a device's speed is taken from: large enough to keep it busy."""
    return 8192 if dtype == "bfloat16" else 1536
