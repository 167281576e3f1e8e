"""The token store: what goes in comes out, and nothing half-written goes unnoticed."""

import contextlib
import hashlib
import math
import resource
import shutil
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpora import BYTES, RAW, ShiftedBytes, named, random_texts, texts_of, write
from jaxtyping import Integer

from jaxlm import data
from jaxlm.data import ingest
from jaxlm.data.corpus import KINDS
from jaxlm.files import read_signed


@pytest.mark.parametrize("heldout", [0.0, 0.3])
@pytest.mark.parametrize(
    "tokenizer",
    [BYTES, RAW, ShiftedBytes(2**16 - 256, 2**16), ShiftedBytes(2**16, 2**16 + 256), ShiftedBytes(2**32 - 256, 2**32)],
)
def test_documents_come_back_in_order(tmp_path: Path, tokenizer: data.Tokenizer, heldout: float) -> None:
    texts = random_texts()
    write(tmp_path / "corpus", texts, tokenizer, heldout)
    found = texts_of(tmp_path / "corpus", "heldout", tokenizer) if heldout else []
    assert bool(found) == bool(heldout)
    assert found == [text for text in texts if text in found]
    assert texts_of(tmp_path / "corpus", "train", tokenizer) == [text for text in texts if text not in found]


@pytest.mark.parametrize(("vocab", "dtype"), [(2, np.uint16), (2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_ids_take_two_bytes_if_the_vocabulary_allows(tmp_path: Path, vocab: int, dtype: type) -> None:
    corpus = write(tmp_path / "corpus", [b"\0\1"], ShiftedBytes(vocab - 2, vocab))
    assert corpus.tokens.dtype == dtype
    assert corpus.tokens.tolist() == [vocab - 2, vocab - 1]
    assert corpus.vocab == vocab


def test_lengths_and_rate_are_of_the_documents(tmp_path: Path) -> None:
    corpus = write(tmp_path / "corpus", [b"12345", b"1", b"1234"])
    assert corpus.lengths.tolist() == [7, 3, 6]  # with start and end
    assert [ids.tolist() for ids in corpus] == [BYTES.encode(text).tolist() for text in (b"12345", b"1", b"1234")]
    assert corpus.bits_per_byte(3 * math.log(2)) == pytest.approx(3 * (6 + 2 + 5) / 10)
    assert corpus.summary == "3 documents, 10 bytes (not UTF-8: none)"


def test_held_out_depends_on_the_text_only(tmp_path: Path) -> None:
    texts = random_texts()
    write(tmp_path / "once", texts, heldout=0.3)
    documents = [data.Document(f"renamed/{i}", text) for i, text in enumerate(2 * texts[::-1])]
    data.write_corpus(tmp_path / "copied", documents, RAW, heldout=0.3)
    for split in data.corpus.SPLITS:
        once = texts_of(tmp_path / "once", split)
        assert texts_of(tmp_path / "copied", split, RAW) == 2 * once[::-1]


@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_about_the_share_is_held_out(tmp_path: Path, share: float) -> None:
    num = 3000
    write(tmp_path / "corpus", (b"%d" % i for i in range(num)), heldout=share)
    deviation = (num * share * (1 - share)) ** 0.5
    assert abs(len(data.open_corpus(tmp_path / "corpus", "heldout")) - num * share) < 3 * deviation


def test_manifest_counts_and_hashes_what_is_in_the_files(tmp_path: Path) -> None:
    texts = [b"", *random_texts(), b"", b""]
    manifest = write(tmp_path / "corpus", texts, heldout=0.3).manifest
    assert manifest == read_signed(tmp_path / "corpus" / "manifest.json")
    assert (manifest["documents"], manifest["empty"], manifest["tokenizer"]) == (len(texts), 3, "bytes")
    assert len(list((tmp_path / "corpus").iterdir())) == 7
    for split in data.corpus.SPLITS:
        written = texts_of(tmp_path / "corpus", split)
        num_bytes = sum(len(text) for text in written)
        files = {kind: (tmp_path / "corpus" / f"{split}.{kind}.bin").read_bytes() for kind in KINDS}
        assert manifest[split] == {
            "documents": len(written),
            "bytes": num_bytes,
            "tokens": num_bytes + 2 * len(written),
            "sha256": {kind: hashlib.sha256(content).hexdigest() for kind, content in files.items()},
        }


def test_text_that_is_not_utf8_is_kept_counted_and_named(tmp_path: Path) -> None:
    texts = [b"fine", *(b"\xff%d" % i for i in range(103)), "fine à".encode()]
    corpus = write(tmp_path / "corpus", texts)
    assert texts_of(tmp_path / "corpus", "train") == texts
    assert corpus.manifest["not_utf8"] == 103
    assert corpus.manifest["not_utf8_names"] == [f"{i}.txt" for i in range(1, 101)]


def test_without_a_share_none_is_held_out(tmp_path: Path) -> None:
    write(tmp_path / "corpus", random_texts(), heldout=0.0)
    with pytest.raises(ValueError, match="no document in its heldout split"):
        data.open_corpus(tmp_path / "corpus", "heldout")


@pytest.mark.parametrize(
    ("texts", "tokenizer"),
    [
        ([b"aab", b"cc"], RAW),  # a token
        ([b"aa", b"bc"], RAW),  # where a document ends
        ([b"c", b"aab"], RAW),  # their order
        ([b"aab", b"c"], ShiftedBytes(name="other")),
        ([b"aab", b"c"], ShiftedBytes(vocab=2**17)),  # same ids in another width
    ],
)
def test_fingerprint_changes_with_the_content(
    tmp_path: Path, texts: Sequence[bytes], tokenizer: data.Tokenizer
) -> None:
    one, other = write(tmp_path / "one", [b"aab", b"c"], RAW), write(tmp_path / "other", texts, tokenizer)
    assert one.fingerprint != other.fingerprint


def test_fingerprint_is_the_same_under_other_names(tmp_path: Path) -> None:
    one = write(tmp_path / "one", random_texts())
    data.write_corpus(tmp_path / "other", (data.Document("", text) for text in random_texts()), BYTES, heldout=0.0)
    assert one.fingerprint == data.open_corpus(tmp_path / "other").fingerprint


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch, lambda path: write(path, random_texts())])
def test_write_refuses_a_path_that_exists(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "corpus")
    before = sorted(tmp_path.rglob("*"))
    documents = named([b"abc"])
    with pytest.raises(FileExistsError, match="delete it or give another name"):
        data.write_corpus(tmp_path / "corpus", documents, BYTES)
    assert sorted(tmp_path.rglob("*")) == before
    assert next(documents).text == b"abc"  # nothing was read in vain


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("after", [0, 1, 40])
def test_an_interrupted_write_leaves_nothing(tmp_path: Path, error: type[BaseException], after: int) -> None:
    def interrupted() -> Iterator[bytes]:
        yield from random_texts()[:after]
        assert not (tmp_path / "corpus").exists()
        raise error

    with pytest.raises(error):
        write(tmp_path / "corpus", interrupted())
    assert not list(tmp_path.iterdir())
    assert len(write(tmp_path / "corpus", random_texts())) == 50


def test_of_two_writers_one_fails_and_the_corpus_is_whole(tmp_path: Path) -> None:
    def overtaken() -> Iterator[bytes]:
        write(tmp_path / "corpus", random_texts())
        yield b"late"

    with pytest.raises(OSError, match="corpus"):
        write(tmp_path / "corpus", overtaken())
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]
    assert texts_of(tmp_path / "corpus", "train") == random_texts()


@contextlib.contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Writing more to a file fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("room", "num_bytes"),
    [(4096, 100_000), (4096, 3_000), (256, 10)],
    ids=["at a document", "at the end", "at the manifest"],
)
def test_a_full_disk_leaves_nothing(tmp_path: Path, room: int, num_bytes: int) -> None:
    with largest_file(room), pytest.raises(OSError, match="File too large"):
        write(tmp_path / "corpus", [num_bytes * b"a"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("inside", ["corpus", "folder/corpus"])
def test_a_place_that_cannot_be_written_to_is_an_os_error(tmp_path: Path, inside: str) -> None:
    (tmp_path / "file").write_text("content")
    with pytest.raises(OSError, match="file"):
        write(tmp_path / "file" / inside, random_texts())
    assert [file.read_text() for file in tmp_path.iterdir()] == ["content"]


@pytest.mark.parametrize(
    ("texts", "heldout", "message"),
    [
        ([], 0.0, r"train split, out of 0 \(0 of them empty\)"),
        ([b"", b""], 0.0, r"train split, out of 2 \(2 of them empty\)"),
        ([b"abc", b"def"], 1 - 1e-12, "train split, out of 2"),
        ([b"abc"], 1.0, "heldout is 1.0"),
        ([b"abc"], -0.1, "heldout is -0.1"),
        ([b"abc"], math.nan, "heldout is nan"),
        ([b"abc", b""], 1e-9, r"heldout split, out of 2 \(1 of them empty\)"),
    ],
)
def test_a_split_without_documents_is_refused(
    tmp_path: Path, texts: Sequence[bytes], heldout: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "corpus", texts, heldout=heldout)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", [-1, 256, 2**16 + 1])  # the last would be 1 in two bytes
def test_an_id_beyond_the_vocabulary_is_refused(tmp_path: Path, wrong: int) -> None:
    class Wrong(ShiftedBytes):
        def encode(self, text: bytes) -> Integer[np.ndarray, " T"]:
            return np.where(super().encode(text) == ord("x"), wrong, 0)

    with pytest.raises(ValueError, match=rf"'shifted' gave the id {wrong} for '1.txt'.* 256"):
        write(tmp_path / "corpus", [b"abc", b"abxc", b"x"], Wrong())
    assert not list(tmp_path.iterdir())


def test_documents_are_read_one_at_a_time(tmp_path: Path) -> None:
    log: list[str] = []

    class Logging(ShiftedBytes):
        def encode(self, text: bytes) -> Integer[np.ndarray, " T"]:
            log.append("encode")
            return super().encode(text)

    write(tmp_path / "corpus", (log.append("read") or b"abc" for _ in range(5)), Logging())
    assert log == 5 * ["read", "encode"]


def test_memory_is_that_of_a_document(tmp_path: Path) -> None:
    num_bytes = 100_000
    tracemalloc.start()
    try:
        corpus = write(tmp_path / "corpus", (bytes([i]) * num_bytes for i in range(100)), heldout=0.3)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert corpus.manifest["documents"] == 100
    assert peak < 20 * num_bytes


def test_a_cached_corpus_is_written_once(tmp_path: Path) -> None:
    calls: list[Iterator[data.Document]] = []

    def documents() -> Iterator[data.Document]:
        calls.append(named(random_texts()))
        return calls[-1]

    for _ in range(2):
        assert data.cached_corpus(tmp_path / "corpus", documents, BYTES, heldout=0.0) == tmp_path / "corpus"
    assert len(calls) == 1
    assert texts_of(tmp_path / "corpus", "train") == random_texts()


def test_a_corpus_that_another_process_cached_meanwhile_is_taken(tmp_path: Path) -> None:
    def overtaken() -> Iterator[data.Document]:
        write(tmp_path / "corpus", random_texts())
        yield data.Document("late.txt", b"late")

    data.cached_corpus(tmp_path / "corpus", overtaken, BYTES, heldout=0.0)
    assert texts_of(tmp_path / "corpus", "train") == random_texts()


def test_a_moved_corpus_opens(tmp_path: Path) -> None:
    write(tmp_path / "corpus", random_texts())
    shutil.move(tmp_path / "corpus", tmp_path / "moved")
    assert texts_of(tmp_path / "moved", "train") == random_texts()


def test_documents_are_counted_from_the_front(tmp_path: Path) -> None:
    corpus = write(tmp_path / "corpus", [b"a", b"b"])
    for document in (-1, 2):
        with pytest.raises(IndexError, match=f"document {document} of 2"):
            corpus[document]


def test_a_part_that_another_worker_writes_meanwhile_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a folder is given twice, to see it twice as often."""
    (tmp_path / "a.txt").write_text("a text")
    shards, write_documents = data.shards(tmp_path / "a.txt"), ingest._write_documents

    def first_the_other(*given: Any) -> Any:
        monkeypatch.setattr(ingest, "_write_documents", write_documents)
        ingest._write_part(tmp_path, BYTES, False, shards)
        return write_documents(*given)

    monkeypatch.setattr(ingest, "_write_documents", first_the_other)
    part = ingest._write_part(tmp_path, BYTES, False, shards)
    assert ingest._is_whole(part)
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", part.name}
