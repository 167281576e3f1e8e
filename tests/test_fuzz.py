"""No file makes the library fail otherwise than by an error of its own that names it, wherever the file is damaged."""

import contextlib
import copy
import dataclasses
import functools
import gc
import io
import json
import pickle
import resource
import shutil
import signal
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from jaxlm import checkpoint, data, files, generate, metrics, models, train
from jaxlm.data import ingest
from jaxlm.fingerprint import fingerprints

SECONDS = 20  # for one file; those that are whole take less than one
ROOM = 2**30  # bytes of address space beyond what is there before; the files have some thousands
BAIT = "/etc/passwd", "../../../../../../../../etc/passwd", "../bait"
SIGNED = "jaxlm.json", "manifest.json"  # with a checksum of their own
DEEP = {"@900@": 900, "@100000@": 100_000}  # what JSON is nested so deep that json.dumps couldn't write it
VALUES = [None, True, -1, 0, 1, 7, 2**31, 2**63, 10**400, -0.5, 1e308, float("inf"), float("nan")]
VALUES += ["", "a", "\0", "\ud800", "x" * 100_000, [], {}, [[]], [None], {"a": None}, *BAIT, *DEEP]


class Format(NamedTuple):
    """Files that belong together, and what reads them."""

    make: Callable[[Path], None]
    """Writes them into a folder."""
    files: tuple[str, ...]
    """Patterns of the names of those to damage."""
    read: Callable[[Path], str]
    """Reads them as a run does. Returns what it has said besides."""
    signed: Callable[[Any], str] = json.dumps
    """Writes JSON so that it isn't its checksum that is refused."""
    share: int | float = 1
    """Of the examples, where each takes long."""


def texts() -> list[data.Document]:
    return [data.Document(f"{i}.txt", b" ".join([b"some", b"words", b"%d" % i] * (i + 1))) for i in range(12)]


@functools.cache
def subwords() -> data.SubwordTokenizer:
    pytest.importorskip("tokenizers")
    return data.train_bpe(texts(), 300)


def read_corpus(folder: Path) -> str:
    for split in ("train", "heldout"):
        corpus = data.open_corpus(folder / "corpus", split)
        batches = data.Batches(corpus, data.pack(corpus.lengths, (16,), 64, 0), count=2)
        assert all(batches[i]["tokens"].shape == (4, 16) for i in range(2))
        assert corpus.fingerprint
        assert corpus.summary
        assert corpus.bits_per_byte(1.0) >= 0
        corpus.verify()
    assert data.tokenizer_of(folder / "corpus").name
    return ""


def make_tokenizer(folder: Path) -> None:
    data.save_tokenizer(subwords(), folder)


def read_tokenizer(folder: Path) -> str:
    tokenizer = data.tokenizer_of(folder)
    ids = tokenizer.encode(b"some more words")
    assert ids.max() < tokenizer.vocab
    tokenizer.decode(ids)
    return ""


def make_ranks(folder: Path) -> None:
    import base64

    tokens = [bytes([i]) for i in range(256)] + [b"so", b"some", b"me", b"words"]
    lines = [base64.b64encode(token).decode() + f" {rank}" for rank, token in enumerate(tokens)]
    (folder / "words.tiktoken").write_text("\n".join(lines))


def read_ranks(folder: Path) -> str:
    data.rank_file(folder / "words.tiktoken", data.GPT2_PATTERN).encode(b"some words")
    return ""


def make_gpt2(folder: Path) -> None:
    vocabulary = json.loads(subwords().content)["model"]
    (folder / "encoder.json").write_text(json.dumps(vocabulary["vocab"]))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in vocabulary["merges"]]
    (folder / "vocab.bpe").write_text("\n".join(["#version: 0.2", *merges]))


def read_gpt2(folder: Path) -> str:
    data.gpt2_files(folder).encode(b"some words")
    return ""


CONFIG = {"layers": 2, "rows": [16, 32], "text": None, "rate": 0.1}


def make_run(folder: Path) -> None:
    metrics.open_run(folder, CONFIG, __file__)
    metrics.note_start(folder, 0, data="f00")
    with metrics.Log(folder, 0, steps=8) as log:
        for step in range(1, 7):
            log.write(step, {"loss": 5 / step, "learning_rate": 0.1, "weight": 64, "heldout": 1.0})


def read_run(folder: Path) -> str:
    metrics.open_run(folder, CONFIG, __file__, free=["rate"])
    metrics.note_start(folder, 4, data="f00")
    with metrics.Log(folder, 4, steps=8) as log:
        for step in range(5, 7):
            log.write(step, {"loss": 5 / step, "learning_rate": 0.1, "weight": 64, "heldout": 1.0})
    return ""


def read_report(folder: Path) -> str:
    report = pytest.importorskip("jaxlm.report", exc_type=ImportError)
    report.write_report(folder, {"loss": "1"})
    return ""


MODEL = models.TransformerConfig(vocab=258, layers=1, width=8, heads=2)


@functools.cache
def state() -> Any:
    return train.start(models.transformer(MODEL)[0](jax.random.key(0)), optax.sgd(0.1, momentum=0.9))


def about() -> dict[str, Any]:
    return {"model": dataclasses.asdict(MODEL), "tokenizer": "bytes", "data": "none"}


def make_checkpoint(folder: Path) -> None:
    with checkpoint.Checkpoints(folder, about()) as checkpoints:
        checkpoints.save(state())
        checkpoints.score(0, 1.5)


def read_checkpoint(folder: Path) -> str:
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        for read in (generate.load_model, restore):
            try:
                read(folder)
            except (ValueError, RuntimeError) as error:
                if not isinstance(error, RecursionError):
                    error.add_note(said.getvalue())
                raise
    return said.getvalue()


def restore(folder: Path) -> None:
    with checkpoint.Checkpoints(folder, about()) as checkpoints:
        restored = checkpoints.restore(state())
    assert restored is None or fingerprints(restored) == fingerprints(state())


def make_arrays(folder: Path) -> None:
    """A checkpoint whose files are held against nothing before Orbax reads them."""
    make_checkpoint(folder)
    path = folder / "0" / "jaxlm.json"
    path.write_text(files.signed({**files.read_signed(path), "files": {}}))


def sign(manifest: Any) -> str:
    if isinstance(manifest, dict):
        return files.signed({name: value for name, value in manifest.items() if name != "checksum"})
    return json.dumps(manifest)


def make_parts(folder: Path) -> None:
    """A corpus whose writing was interrupted before its last shard."""
    for name in ("text", "straight"):
        (folder / name).mkdir()
    for document in texts():
        (folder / "text" / document.name).write_bytes(document.text)

    def fail() -> Iterator[data.Document]:
        raise data.UnreadableError("gone")

    shards = data.shards(folder / "text")
    last = shards[-1]._replace(open=fail)
    with mock.patch.object(ingest, "PART", 150), pytest.raises(data.UnreadableError):
        data.write_corpus(folder / "corpus", [*shards[:-1], last], data.ByteTokenizer(), heldout=0.3)
    data.write_corpus(folder / "straight" / "corpus", shards, data.ByteTokenizer(), heldout=0.3)


def read_parts(folder: Path) -> str:
    with mock.patch.object(ingest, "PART", 150):
        data.write_corpus(folder / "corpus", data.shards(folder / "text"), data.ByteTokenizer(), heldout=0.3)
    for path in (folder / "corpus").iterdir():  # whatever was damaged, it is what it would have been
        assert path.read_bytes() == (folder / "straight" / "corpus" / path.name).read_bytes()
    return ""


def make_corpus(tokenizer: Callable[[], data.Tokenizer], folder: Path) -> None:
    data.write_corpus(folder / "corpus", texts(), tokenizer(), heldout=0.4)


FORMATS = {
    "corpus of bytes": Format(functools.partial(make_corpus, data.ByteTokenizer), ("corpus/*",), read_corpus, sign),
    "corpus": Format(functools.partial(make_corpus, subwords), ("corpus/*",), read_corpus, sign),
    "parts of a corpus": Format(make_parts, (".corpus.unfinished/*/*",), read_parts, share=0.4),
    "tokenizer": Format(make_tokenizer, ("tokenizer*.json",), read_tokenizer),
    "ranks": Format(make_ranks, ("words.tiktoken",), read_ranks),
    "GPT-2's files": Format(make_gpt2, ("encoder.json", "vocab.bpe"), read_gpt2),
    "run": Format(make_run, ("config.json", "*.jsonl"), read_run),
    "report": Format(make_run, ("config.json", "*.jsonl"), read_report, share=0.2),
    "checkpoint": Format(make_checkpoint, ("0/jaxlm.json", "scores.json"), read_checkpoint, sign, share=0.5),
    "arrays": Format(make_arrays, ("0/_*", "0/params/**/*", "0/rest/**/*"), read_checkpoint, share=0.5),
}
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
    named = path.name, str(path.parent), "checkpoint 0 is damaged", "checkpoint 0 says", f"{folder} has no model"
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
        derandomize=True,
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
    gc.collect()  # what Orbax has left, see ORBAX


def copied(original: Path, trial: Path) -> Path:
    """The files as they were, but for a lock, which this process holds for good."""
    for path in trial.glob("*"):
        if path.name != ".lock":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copytree(original, trial, dirs_exist_ok=True)
    return trial


# Where one of many reads fails it leaves coroutines behind that nobody waits for, of which Python warns.
ORBAX = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
NAMES = [pytest.param(name, marks=ORBAX) if name == "arrays" else name for name in FORMATS]


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_of_damage(name: str, tmp_path: Path) -> None:
    fuzz(name, tmp_path, 25)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_thousand_kinds_of_damage_to_each_format(name: str, tmp_path: Path) -> None:
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


@pytest.mark.parametrize("kind", ["2", ".pt", ".npy"])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_ever_unpickled(name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    gc.collect()
    assert not list(tmp_path.rglob("ran"))
