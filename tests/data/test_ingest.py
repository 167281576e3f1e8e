"""Ingest: however it is cut into shards, interrupted or shared out, the corpus is the same, bit for bit."""

import contextlib
import dataclasses
import functools
import gzip
import json
import os
import re
import resource
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from jaxtyping import Integer

from jaxlm import data
from jaxlm.data import ingest
from jaxlm.files import read_signed, signed

BYTES = data.ByteTokenizer()


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest, "PART", 1000)
    monkeypatch.setattr(ingest, "CHUNK", 500)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve files of JSON lines, with empty documents, copies, and some that aren't ASCII."""
    folder = tmp_path / "source"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(12):
        lines = [chr(int(c)) * int(n) for c, n in zip(rng.integers(97, 300, 20), rng.integers(0, 40, 20), strict=True)]
        lines = ["", *lines, "a copy in each file", lines[3]]
        (folder / f"{i:02}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return folder


def documents(folder: Path) -> list[data.Document]:
    return [document for shard in data.shards(folder) for document in shard.open()]


def content(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def unfinished(path: Path) -> Path:
    return path.parent / f".{path.name}.unfinished"


def parts(path: Path) -> set[str]:
    """The names of the finished parts."""
    return {part.name for part in unfinished(path).iterdir() if re.fullmatch("[0-9a-f]{32}", part.name)}


@dataclasses.dataclass(frozen=True)
class Failing:
    """Bytes, until it is asked for one text too many."""

    left: list[int]
    name: str = "bytes"
    vocab: int = 258
    end: int = 257

    def encode(self, text: bytes) -> Integer[np.ndarray, " T"]:
        self.left[0] -= 1
        if self.left[0] < 0:
            raise KeyboardInterrupt
        return BYTES.encode(text)

    def decode(self, ids: Integer[np.ndarray, " T"]) -> bytes:
        return BYTES.decode(ids)


@pytest.mark.parametrize("heldout", [0.0, 0.3])
def test_shards_make_the_corpus_that_their_documents_make(folder: Path, tmp_path: Path, heldout: float) -> None:
    data.write_corpus(tmp_path / "shards", data.shards(folder), BYTES, heldout=heldout)
    data.write_corpus(tmp_path / "documents", documents(folder), BYTES, heldout=heldout)
    assert content(tmp_path / "shards") == content(tmp_path / "documents")
    texts = [text for _, text in documents(folder) if text]
    for split in ingest.SPLITS[: 2 if heldout else 1]:
        corpus = data.open_corpus(tmp_path / "shards", split)
        corpus.verify()
        assert [BYTES.decode(ids) for ids in corpus] == [
            text for text in texts if data.is_heldout(text, heldout) == (split == "heldout")
        ]
    assert not unfinished(tmp_path / "shards").exists()


def test_interrupted_anywhere_it_goes_on_after_what_is_finished(folder: Path, tmp_path: Path) -> None:
    data.write_corpus(tmp_path / "straight", data.shards(folder), BYTES)
    path = tmp_path / "corpus"
    finished: set[str] = set()
    attempts = 0
    while not path.exists():
        attempts += 1
        before = {name: os.stat(unfinished(path) / name / "tokens.bin") for name in finished}
        with contextlib.suppress(KeyboardInterrupt):
            data.write_corpus(path, data.shards(folder), Failing([37]))
        if not path.exists():
            assert finished < parts(path)
            assert len(list(unfinished(path).iterdir())) == len(parts(path))  # nothing half-written is left
            finished = parts(path)
            for name, stat in before.items():
                assert os.stat(unfinished(path) / name / "tokens.bin") == stat
    assert attempts > 3
    assert content(path) == content(tmp_path / "straight")
    assert not unfinished(path).exists()


KILLED = """
import os, signal, sys
from jaxlm import data
from jaxlm.data import ingest

ingest.PART, ingest.CHUNK = 1000, 500
folder, path, kills = sys.argv[1], sys.argv[2], [int(number) for number in sys.argv[3:]]

class Killed(data.ByteTokenizer):
    left = 0
    def encode(self, text):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode(text)

for left in kills:
    if (child := os.fork()) == 0:
        Killed.left = left
        data.write_corpus(path, data.shards(folder), Killed())
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print(os.WIFSIGNALED(status) and os.WTERMSIG(status), os.path.exists(path))
"""


def test_killed_and_run_again_it_is_the_same(folder: Path, tmp_path: Path) -> None:
    data.write_corpus(tmp_path / "straight", data.shards(folder), BYTES)
    path = tmp_path / "corpus"
    kills = np.random.default_rng().integers(1, 40, 4).tolist()
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(folder), str(path), *map(str, [*kills, 50])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == 5 * ["9 False"], kills
    assert 0 < len(parts(path)) < len(list(unfinished(path).iterdir()))  # it was amid a part
    opened: list[str] = []

    def watched(shard: data.Shard) -> Iterator[data.Document]:
        opened.append(shard.name)
        return shard.open()

    shards = [shard._replace(open=functools.partial(watched, shard)) for shard in data.shards(folder)]
    data.write_corpus(path, shards, BYTES)
    assert opened
    assert opened == [shard.name for shard in shards][-len(opened) :]
    assert len(opened) < len(shards)
    assert content(path) == content(tmp_path / "straight")
    assert not unfinished(path).exists()


def interrupt(path: Path, folder: Path) -> set[str]:
    with pytest.raises(KeyboardInterrupt) as caught:
        data.write_corpus(path, data.shards(folder), Failing([100]))
    assert f"{len(parts(path))} of 12 parts are kept in {unfinished(path)}" in caught.value.__notes__[0]
    return parts(path)


def test_another_tokenizer_begins_anew(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "corpus"
    interrupt(path, folder)
    other = data.SubwordTokenizer(bpe(folder).content)
    data.write_corpus(path, data.shards(folder), other)
    data.write_corpus(tmp_path / "straight", data.shards(folder), other)
    assert content(path) == content(tmp_path / "straight")
    assert not unfinished(path).exists()


def test_what_another_reader_has_read_is_read_again(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "corpus"
    source.mkdir()
    for i in range(4):
        (source / f"{i}.jsonl").write_text(json.dumps({"title": f"wrong {i}", "text": f"right {i}"}) + "\n")

    def shards(field: str) -> list[data.Shard]:
        return data.shards(source, [data.json_lines(field)])

    def broken() -> Iterator[data.Document]:
        raise KeyboardInterrupt

    *some, last = shards("title")
    with pytest.raises(KeyboardInterrupt):
        data.write_corpus(out, [*some, last._replace(open=broken)], data.ByteTokenizer(), heldout=0.0)
    data.write_corpus(out, shards("text"), data.ByteTokenizer(), heldout=0.0)
    assert b"wrong" not in data.open_corpus(out).text(data.ByteTokenizer())


def test_a_file_that_has_changed_is_read_again(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "corpus"
    interrupt(path, folder)
    (folder / "00.jsonl").write_text('{"text": "changed"}\n')
    data.write_corpus(path, data.shards(folder), BYTES)
    data.write_corpus(tmp_path / "straight", data.shards(folder), BYTES)
    assert content(path) == content(tmp_path / "straight")


@pytest.mark.parametrize("name", ["tokens.bin", "records.bin"])
def test_a_part_that_is_no_longer_whole_is_written_again(folder: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / "corpus"
    for part in interrupt(path, folder):
        os.truncate(unfinished(path) / part / name, 10)
    data.write_corpus(path, data.shards(folder), BYTES)
    data.write_corpus(tmp_path / "straight", data.shards(folder), BYTES)
    assert content(path) == content(tmp_path / "straight")


def test_other_options_need_no_text_read_again(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "corpus"
    with pytest.raises(ValueError, match="no documents in the heldout split"):
        data.write_corpus(path, data.shards(folder), BYTES, heldout=1e-9)
    assert len(parts(path)) == 12
    data.write_corpus(path, data.shards(folder), Failing([0]), heldout=0.2)
    data.write_corpus(tmp_path / "straight", data.shards(folder), BYTES, heldout=0.2)
    assert content(path) == content(tmp_path / "straight")


def test_a_full_disk_keeps_what_is_finished(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "corpus"
    (folder / "07.jsonl").write_text(json.dumps({"text": "large" * 2000}))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    try:
        with pytest.raises(OSError, match=r"File too large.*\n7 of 12 parts are kept in .*: the same call goes on"):
            data.write_corpus(path, data.shards(folder), BYTES)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(parts(path)) == len(list(unfinished(path).iterdir())) == 7
    data.write_corpus(path, data.shards(folder), BYTES)
    data.write_corpus(tmp_path / "straight", data.shards(folder), BYTES)
    assert content(path) == content(tmp_path / "straight")


def test_a_disk_that_is_full_when_parts_are_joined_keeps_them(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "corpus"
    largest = 8 * len(documents(folder))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, hard))
    try:
        with pytest.raises(OSError, match=r"File too large.*\n12 of 12 parts are kept"):
            data.write_corpus(path, data.shards(folder), BYTES)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not path.exists()
    assert len(parts(path)) == len(list(unfinished(path).iterdir())) == 12
    data.write_corpus(path, data.shards(folder), Failing([0]))


def test_an_unreadable_shard_is_named_at_its_turn_or_left_out(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "corpus"
    whole = (folder / "05.jsonl").read_text()
    monkeypatch.setattr(ingest, "PART", 6000)  # the unreadable ones are in parts with others
    (folder / "05.jsonl").write_text(whole + "{")
    (folder / "06.jsonl.gz").write_bytes(gzip.compress(whole.encode())[:-9])
    (folder / "99.jsonl").write_text(whole + "{")  # nothing comes after it
    unreadable = ["05.jsonl", "06.jsonl.gz", "99.jsonl"]
    shards = data.shards(folder)
    with pytest.raises(data.UnreadableError, match=r"05.jsonl can't be read: line 24 is not JSON"):
        data.write_corpus(path, shards, BYTES)
    assert parts(path)
    data.write_corpus(path, shards, BYTES, skip_unreadable=True)
    fine = [shard for shard in shards if shard.name not in unreadable]
    data.write_corpus(tmp_path / "straight", fine, BYTES)
    manifest = data.open_corpus(path).manifest
    assert (manifest["unreadable"], manifest["unreadable_names"]) == (3, unreadable)
    straight = data.open_corpus(tmp_path / "straight").manifest
    assert manifest == {**straight, "unreadable": 3, "unreadable_names": unreadable}
    found, expected = content(path), content(tmp_path / "straight")
    del found["manifest.json"], expected["manifest.json"]
    assert found == expected


def test_what_was_left_out_is_no_longer_once_it_must_not_be(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "corpus"
    whole = (folder / "05.jsonl").read_text()
    (folder / "05.jsonl").write_text(whole + "{")
    with pytest.raises(KeyboardInterrupt):
        data.write_corpus(path, data.shards(folder), Failing([150]), skip_unreadable=True)
    with pytest.raises(data.UnreadableError, match=r"05.jsonl"):
        data.write_corpus(path, data.shards(folder), BYTES)
    (folder / "05.jsonl").write_text(whole)
    data.write_corpus(path, data.shards(folder), BYTES)
    assert data.open_corpus(path).manifest["unreadable"] == 0
    assert len(documents(folder)) == data.open_corpus(path).manifest["documents"]


@pytest.mark.parametrize("drop", [False, True])
def test_exact_copies_are_counted_and_dropped_on_request(folder: Path, tmp_path: Path, drop: bool) -> None:
    path = tmp_path / "corpus"
    data.write_corpus(path, data.shards(folder), BYTES, heldout=0.3, drop_duplicates=drop)
    texts = [text for _, text in documents(folder) if text]
    once = list(dict.fromkeys(texts))
    assert len(once) < len(texts) - 20
    manifest = data.open_corpus(path).manifest
    assert manifest["duplicates"] == len(texts) - len(once)
    assert manifest["dropped"] == drop * manifest["duplicates"]
    for split in ingest.SPLITS:
        corpus = data.open_corpus(path, split)
        corpus.verify()
        wanted = [text for text in (once if drop else texts) if data.is_heldout(text, 0.3) == (split == "heldout")]
        assert [BYTES.decode(ids) for ids in corpus] == wanted
        assert manifest[split]["bytes"] == sum(map(len, wanted))


def bpe(folder: Path) -> data.SubwordTokenizer:
    pytest.importorskip("tokenizers")
    return data.train_bpe(documents(folder), 300)


def test_a_corpus_holds_its_tokenizer(folder: Path, tmp_path: Path) -> None:
    path, tokenizer = tmp_path / "corpus", bpe(folder)
    data.write_corpus(path, data.shards(folder), tokenizer, heldout=0.0)
    assert data.tokenizer_of(path) == tokenizer
    texts = [text for _, text in documents(folder) if text]
    assert [data.tokenizer_of(path).decode(ids) for ids in data.open_corpus(path)] == texts
    (path / "tokenizer.json").write_text(tokenizer.content.replace('"!":1', '"!":2').replace('"\\"":2', '"\\"":1'))
    with pytest.raises(ValueError, match=f"and the corpus was written with {tokenizer.name}"):
        data.tokenizer_of(path)
    data.write_corpus(tmp_path / "bytes", data.shards(folder), BYTES)
    assert isinstance(data.tokenizer_of(tmp_path / "bytes"), data.ByteTokenizer)


@pytest.mark.slow
def test_workers_write_the_same(folder: Path, tmp_path: Path) -> None:
    tokenizer = bpe(folder)
    for workers in (1, 2):
        data.write_corpus(tmp_path / str(workers), data.shards(folder), tokenizer, workers=workers)
    assert content(tmp_path / "1") == content(tmp_path / "2")
    (folder / "03.jsonl").write_text("{")
    with pytest.raises(data.UnreadableError, match=r"03.jsonl can't be read"):
        data.write_corpus(tmp_path / "3", data.shards(folder), tokenizer, workers=2)
    assert len(parts(tmp_path / "3")) >= 3


def test_progress_tells_of_all(folder: Path, tmp_path: Path) -> None:
    told: list[Sequence[int]] = []
    with pytest.raises(KeyboardInterrupt):
        data.write_corpus(tmp_path / "corpus", data.shards(folder), Failing([100]))
    data.write_corpus(tmp_path / "corpus", data.shards(folder), BYTES, progress=lambda *numbers: told.append(numbers))
    texts = [text for _, text in documents(folder)]
    stored = sum(file.stat().st_size for file in folder.iterdir())
    assert [sum(numbers) for numbers in zip(*told, strict=True)] == [len(texts), sum(map(len, texts)), stored]


def test_memory_is_bounded_whatever_the_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    file = tmp_path / "a.jsonl"
    with file.open("w") as lines:
        for i in range(300):
            lines.write(json.dumps({"text": f"{i} " * 8000}) + "\n")
    tracemalloc.start()
    try:
        data.write_corpus(tmp_path / "corpus", data.shards(file), BYTES)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert file.stat().st_size > 8_000_000
    assert peak < 4_000_000


@pytest.mark.usefixtures("unchecked_types")
def test_wrong_use_is_refused(folder: Path, tmp_path: Path) -> None:
    for workers in 0, 1.5:
        with pytest.raises(ValueError, match=f"workers is {workers}; use a whole number"):
            data.write_corpus(tmp_path / "corpus", data.shards(folder), BYTES, workers=cast(Any, workers))
    with pytest.raises(ValueError, match="2 workers share out shards; give a list of them, or use 1"):
        data.write_corpus(tmp_path / "corpus", iter(documents(folder)), BYTES, workers=2)
    with pytest.raises(ValueError, match="no documents in the train split, out of 0"):
        data.write_corpus(tmp_path / "corpus", [], BYTES)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_manifest_with_another_width_is_refused(folder: Path, tmp_path: Path) -> None:
    data.write_corpus(tmp_path / "corpus", data.shards(folder), BYTES)
    file = tmp_path / "corpus" / "manifest.json"
    for dtype in ("object", "int64", None):
        file.write_text(signed({**read_signed(file), "dtype": dtype}))
        with pytest.raises(ValueError, match="damaged"):
            data.open_corpus(tmp_path / "corpus")
