"""No file makes the library fail otherwise than by an error of its own that names it, wherever the file is damaged."""

import contextlib
import copy
import io
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from formats import FORMATS, Format
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from jaxlm import data

UNRAISABLE = "pytest.PytestUnraisableExceptionWarning"
SECONDS = 20  # for one file; those that are whole take less than one
ROOM = 2**30  # bytes of address space beyond what is there before; the files have some thousands
BAIT = "/etc/passwd", "../../../../../../../../etc/passwd", "../bait"
SIGNED = "jaxlm.json", "manifest.json", "skips.json"  # with a checksum of their own
DEEP = {"@900@": 900, "@100000@": 100_000}  # what JSON is nested so deep that json.dumps couldn't write it
VALUES = [None, True, -1, 0, 1, 7, 2**31, 2**63, 10**400, -0.5, 1e308, float("inf"), float("nan")]
VALUES += ["", "a", "\0", "\ud800", "x" * 100_000, [], {}, [[]], [None], {"a": None}, *BAIT, *DEEP]


opened: list[str] = []  # by this process, while `watching` holds
watching = False


def note(event: str, arguments: tuple[Any, ...]) -> None:
    if watching and event == "open":
        opened.append(str(arguments[0]))


@pytest.fixture(scope="module", autouse=True)
def audited() -> None:
    sys.addaudithook(note)  # which stays


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """With little time and memory."""
    global watching

    def late(*_: object) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    pages = int(Path("/proc/self/statm").read_text().split()[0]) if sys.platform == "linux" else None
    before, limit = signal.signal(signal.SIGALRM, late), resource.getrlimit(resource.RLIMIT_AS)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    opened.clear()
    try:
        if pages is not None:
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, limit[1]))
        watching = True
        yield
    finally:
        watching = False
        resource.setrlimit(resource.RLIMIT_AS, limit)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def check(form: Format, path: Path, folder: Path) -> None:
    """Reads them, the file `path` being damaged."""
    named = [path.name, str(path.parent), f"{folder} has no model"]
    named += [f"checkpoint 0 {what} " for what in ("is damaged", "says", "has")]
    with bounded():
        try:
            said = form.read(folder)
        except (ValueError, RuntimeError, FileNotFoundError) as error:
            if type(error) not in (ValueError, RuntimeError, FileNotFoundError, data.UnreadableError):
                raise  # such as JSON's own error, which is a ValueError too
            said = "\n".join([str(error), *getattr(error, "__notes__", [])])
            if len(said) > 2000 or not any(name in said for name in named):
                raise
    assert not [file for file in opened if file.endswith(("passwd", "bait"))], said


def places(part: Any) -> Iterator[tuple[Any, Any]]:
    """Where a value stands: its container, and its key or index."""
    for key, value in part.items() if isinstance(part, dict) else enumerate(part):
        yield part, key
        if isinstance(value, dict | list):
            yield from places(value)


@st.composite
def damaged_json(draw: st.DrawFn, content: Any, write: Callable[[Any], str]) -> bytes:
    """With a value replaced, removed, added or moved to another name; or as a whole another one."""
    content = copy.deepcopy(content)
    found = list(places(content)) if isinstance(content, dict | list) else []
    if not found or draw(st.integers(0, 19)) == 0:
        content = draw(st.sampled_from(VALUES))
    else:
        # Half of them near the root, where there are few.
        part, key = draw(st.sampled_from(found[:12] if draw(st.booleans()) else found))
        how = draw(st.sampled_from(["replace"] * 5 + ["remove", "rename", "add"]))
        if how == "replace":
            part[key] = draw(st.sampled_from(VALUES))
        elif how == "remove":
            del part[key]
        elif isinstance(part, dict):
            value = part.pop(key) if how == "rename" else draw(st.sampled_from(VALUES))
            part[draw(st.sampled_from(["", "a", "../bait", "x" * 3000, "\0"]))] = value
        else:
            part.insert(0, draw(st.sampled_from(VALUES)))
    text = write(content)
    for mark, deep in DEEP.items():
        text = text.replace(f'"{mark}"', "[" * deep + "]" * deep)
    return text.encode()


@st.composite
def damaged_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """With some bits flipped, bytes cut off, put in, removed, or repeated."""
    found = bytearray(content)
    for how in draw(st.lists(st.sampled_from(["flip", "cut", "insert", "remove", "repeat"]), min_size=1, max_size=3)):
        if not found:
            break
        begin = draw(st.integers(0, len(found) - 1))
        end = min(begin + draw(st.integers(1, 64)), len(found))
        if how == "flip":
            found[begin] ^= 1 << draw(st.integers(0, 7))
        elif how == "cut":
            del found[begin:]
        elif how == "insert":
            found[begin:begin] = draw(st.binary(max_size=16))
        elif how == "remove":
            del found[begin:end]
        else:
            found[begin:begin] = found[begin:end] * draw(st.sampled_from([1, 1000]))
    return bytes(found)


@st.composite
def damaged(draw: st.DrawFn, name: str, content: bytes, write: Callable[[Any], str]) -> bytes:
    """In either way; of JSON lines one."""
    if draw(st.integers(0, 2)) == 0 or not content.startswith(b"{"):
        return draw(damaged_bytes(content))
    if not name.endswith(".jsonl"):
        return draw(damaged_json(json.loads(content), write))
    lines = content.splitlines(keepends=True)
    i = draw(st.integers(0, len(lines) - 1))
    lines[i] = draw(damaged_json(json.loads(lines[i]), json.dumps)) + b"\n"
    return b"".join(lines)


def fuzz(name: str, folder: Path, examples: int) -> None:
    form, original, trial = FORMATS[name], folder / "original", folder / "trial"
    original.mkdir()
    form.make(original)
    (original / ".lock").unlink(missing_ok=True)
    with bounded():  # so that it isn't all refused
        form.read(copied(original, trial))
    paths = sorted({path for pattern in form.files for path in original.glob(pattern) if path.is_file()})
    paths = [path for path in paths if path.stat().st_size]
    assert paths

    @settings(
        max_examples=max(1, int(examples * form.share)),
        derandomize=False,  # but drawn by --hypothesis-seed
        phases=[Phase.generate],
        report_multiple_bugs=False,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def each(choose: st.DataObject) -> None:
        path = choose.draw(st.sampled_from(paths))
        content = choose.draw(damaged(path.name, path.read_bytes(), form.signed if path.name in SIGNED else json.dumps))
        target = copied(original, trial) / path.relative_to(original)
        target.write_bytes(content)
        check(form, target, trial)

    each()


def copied(original: Path, trial: Path) -> Path:
    """The files as they were, but for a lock, which this process holds for good."""
    for path in trial.glob("*"):
        if path.name != ".lock":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copytree(original, trial, dirs_exist_ok=True)
    return trial


def runs_apart(request: pytest.FixtureRequest, fails_orbax: bool) -> bool:
    """Whether a test has been run in a process of its own, as what makes Orbax fail is.

    Where one of many reads fails it leaves coroutines behind that nobody waits for, of which Python warns when it
    collects them: in whatever test that is.
    """
    if not fails_orbax or "APART" in os.environ:
        return False
    place = Path(__file__).with_name(request.node.nodeid.rpartition("/")[2])
    seed = f"--hypothesis-seed={request.config.getoption('hypothesis_seed')}"
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-W", f"ignore::{UNRAISABLE}", seed, str(place)]
    done = subprocess.run(command, env=os.environ | {"APART": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    return True


@pytest.mark.parametrize("name", FORMATS)
def test_a_sample_of_damage(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if not runs_apart(request, name == "arrays"):
        fuzz(name, tmp_path, 25)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_a_thousand_kinds_of_damage_to_each_format(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if not runs_apart(request, name in ("arrays", "checkpoint")):
        fuzz(name, tmp_path, 1000)


class Bait:
    """What leaves a file behind if it is unpickled."""

    def __reduce__(self) -> Any:
        return open, ("ran", "w")


def pickled(kind: str) -> bytes:
    if kind.isdecimal():
        return pickle.dumps(Bait(), int(kind))
    packed = io.BytesIO()
    if kind == ".pt":
        with zipfile.ZipFile(packed, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(Bait(), 2))
            archive.writestr("archive/version", "3")
    else:
        np.save(packed, np.array([Bait()], object), allow_pickle=True)
    return packed.getvalue()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, marks=pytest.mark.slow if name == "arrays" and kind != "2" else [])
        for name in FORMATS
        for kind in ("2", ".pt", ".npy")
    ],
)
def test_nothing_is_ever_unpickled(
    name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if runs_apart(request, name == "arrays"):
        return
    monkeypatch.chdir(tmp_path)
    if kind.isdecimal():  # so that it is a bait
        pickle.loads(pickled(kind)).close()
        Path("ran").unlink()
    form, original = FORMATS[name], tmp_path / "original"
    original.mkdir()
    form.make(original)
    (original / ".lock").unlink(missing_ok=True)
    for path in {path for pattern in form.files for path in original.glob(pattern) if path.is_file()}:
        target = copied(original, tmp_path / "trial") / path.relative_to(original)
        target.write_bytes(pickled(kind))
        check(form, target, tmp_path / "trial")
    assert not list(tmp_path.rglob("ran"))
