"""The token store: what goes in comes out, and nothing half-written or damaged goes unnoticed."""

import contextlib
import copy
import dataclasses
import hashlib
import json
import math
import resource
import shutil
import tracemalloc
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from jaxtyping import Integer

from jaxlm import data
from jaxlm.data.corpus import BLOCK, KINDS, Split
from jaxlm.files import read_signed, signed


@dataclasses.dataclass(frozen=True)
class ShiftedBytes:
    """A tokenizer with any vocabulary, which gives no start and no end."""

    shift: int = 0
    vocab: int = 256
    name: str = "shifted"
    start: int = 0
    end: int = 0

    def encode(self, text: bytes) -> Integer[np.ndarray, " T"]:
        return np.frombuffer(text, np.uint8).astype(np.int64) + self.shift

    def decode(self, ids: Integer[np.ndarray, " T"]) -> bytes:
        return (ids.astype(np.int64) - self.shift).astype(np.uint8).tobytes()


BYTES = data.ByteTokenizer()
RAW = ShiftedBytes()


def random_texts(num: int = 50) -> list[bytes]:
    """Different texts of 1 to 200 bytes, most of them not UTF-8."""
    rng = np.random.default_rng(0)
    return [i.to_bytes(2, "big")[-1 if i < 10 else 0 :] + rng.bytes(rng.integers(198)) for i in range(num)]


def named(texts: Iterable[bytes]) -> Iterator[data.Document]:
    return (data.Document(f"{i}.txt", text) for i, text in enumerate(texts))


def write(path: Path, texts: Iterable[bytes], tokenizer: data.Tokenizer = BYTES, heldout: float = 0.0) -> data.Corpus:
    data.write_corpus(path, named(texts), tokenizer, heldout=heldout)
    return data.open_corpus(path)


def texts_of(path: Path, split: Split, tokenizer: data.Tokenizer = BYTES) -> list[bytes]:
    corpus = data.open_corpus(path, split)
    texts = [tokenizer.decode(corpus[i]) for i in range(len(corpus))]
    assert corpus.text(tokenizer) == b"".join(texts)
    return texts


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


@pytest.mark.parametrize("split", data.corpus.SPLITS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", [0, -1])
def test_verify_finds_a_flipped_bit(tmp_path: Path, split: Split, kind: str, place: int) -> None:
    write(tmp_path / "corpus", random_texts(), heldout=0.3)
    corpus = data.open_corpus(tmp_path / "corpus", split)
    corpus.verify()
    flip(corpus.file(kind), place)
    with pytest.raises(ValueError, match=f"{split}.{kind}.bin is damaged"):
        corpus.verify()
    if kind != "tokens":
        with pytest.raises(ValueError, match=f"{split}.{kind}.bin is damaged"):
            data.open_corpus(tmp_path / "corpus", split)


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


LENGTHS = [1, 3, 40_000, 65_531, 2, 200_000, 7]  # bytes, in blocks of 65,536


@pytest.mark.parametrize("tokenizer", [BYTES, ShiftedBytes(2**16, 2**17)], ids=["uint16", "uint32"])
@pytest.mark.parametrize("chunk", [64, 1000, data.ingest.CHUNK])
def test_a_flipped_bit_is_found_in_each_document_of_its_block_and_in_no_other(
    tmp_path: Path, tokenizer: data.Tokenizer, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data.ingest, "CHUNK", chunk)
    texts = [bytes([65 + i]) * length for i, length in enumerate(LENGTHS)]
    corpus = write(tmp_path / "corpus", texts, tokenizer)
    for i, text in enumerate(texts):
        assert tokenizer.decode(corpus[i]) == text
    size = corpus.tokens.itemsize
    content = corpus.file("tokens").read_bytes()
    assert len(content) > 5 * BLOCK
    for place in (0, BLOCK - 1, BLOCK, 3 * BLOCK + 5, len(content) - 1):
        flip(corpus.file("tokens"), place)
        begin = place // BLOCK * BLOCK
        damaged = data.open_corpus(tmp_path / "corpus")
        for i in range(len(texts)):
            if damaged.offsets[i + 1] * size <= begin or damaged.offsets[i] * size >= begin + BLOCK:
                assert tokenizer.decode(damaged[i]) == texts[i]
            else:
                for _ in range(2):  # it isn't passed by asking again
                    with pytest.raises(ValueError, match=rf"train.tokens.bin is damaged .* byte {begin} on"):
                        damaged[i]
        corpus.file("tokens").write_bytes(content)


def test_files_of_another_corpus_and_out_of_order_are_refused(tmp_path: Path) -> None:
    one = write(tmp_path / "one", [b"abc" * 50_000, b"defg"])
    other = write(tmp_path / "other", [b"abd" * 50_000, b"defg"])
    for kind in ("offsets", "checks", "tokens"):
        if one.file(kind).read_bytes() != other.file(kind).read_bytes():
            shutil.copytree(tmp_path / "one", tmp_path / kind)
            shutil.copy(other.file(kind), tmp_path / kind)
            with pytest.raises(ValueError, match=f"train.{kind}.bin is damaged"):
                data.open_corpus(tmp_path / kind)[0]
    content = one.file("tokens").read_bytes()
    one.file("tokens").write_bytes(content[BLOCK : 2 * BLOCK] + content[:BLOCK] + content[2 * BLOCK :])
    with pytest.raises(ValueError, match="is damaged somewhere in 65536 bytes from byte 0 on"):
        data.open_corpus(tmp_path / "one")[0]


def shorten(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def lengthen(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


def another_format(file: Path) -> None:
    file.write_text(json.dumps({**read_signed(file), "format": 1}))


def another_vocabulary(file: Path) -> None:
    file.write_text(file.read_text().replace('"vocab": 258', '"vocab": 259'))


@pytest.mark.parametrize(
    ("name", "damage", "error", "message"),
    [
        ("manifest.json", Path.unlink, FileNotFoundError, "not a corpus: .* write_corpus"),
        ("manifest.json", shorten, ValueError, "manifest.json is damaged"),
        ("manifest.json", lambda file: file.write_bytes(b"\xff\0"), ValueError, "manifest.json is damaged"),
        ("manifest.json", lambda file: file.write_text("[1]"), ValueError, "manifest.json is damaged"),
        ("manifest.json", another_format, ValueError, "not of format 2"),
        ("manifest.json", another_vocabulary, ValueError, "doesn't have the checksum that it says"),
        ("train.tokens.bin", shorten, ValueError, r"train.tokens.bin has 9 bytes, not 10"),
        ("train.tokens.bin", lengthen, ValueError, r"train.tokens.bin has 11 bytes, not 10"),
        ("train.offsets.bin", shorten, ValueError, r"train.offsets.bin has 15 bytes, not 16"),
        ("train.offsets.bin", Path.unlink, FileNotFoundError, "train.offsets.bin"),
    ],
)
def test_open_refuses(
    tmp_path: Path, name: str, damage: Callable[[Path], object], error: type[Exception], message: str
) -> None:
    write(tmp_path / "corpus", [b"abc"])
    damage(tmp_path / "corpus" / name)
    with pytest.raises(error, match=message):
        data.open_corpus(tmp_path / "corpus")


def test_open_refuses_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="write_corpus"):
        data.open_corpus(tmp_path / "corpus")


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


@pytest.mark.parametrize(
    "manifest", [{"format": 2}, {"format": 2, "train": 3, "dtype": "uint16"}, {"format": 2, "dtype": "none"}]
)
def test_a_manifest_with_parts_missing_is_refused(tmp_path: Path, manifest: dict[str, object]) -> None:
    write(tmp_path / "corpus", [b"a"])
    (tmp_path / "corpus" / "manifest.json").write_text(signed(manifest))
    with pytest.raises(ValueError, match="damaged"):
        data.open_corpus(tmp_path / "corpus")


def test_offsets_out_of_order_are_refused(tmp_path: Path) -> None:
    corpus = write(tmp_path / "corpus", [b"ab", b"cd", b"ef"])
    offsets = np.array(corpus.offsets)
    offsets[1] = -offsets[1]
    offsets.tofile(corpus.file("offsets"))
    manifest = copy.deepcopy(corpus.manifest)
    manifest["train"]["sha256"]["offsets"] = hashlib.sha256(offsets.tobytes()).hexdigest()
    (tmp_path / "corpus" / "manifest.json").write_text(signed(manifest))
    with pytest.raises(ValueError, match="offsets"):
        data.open_corpus(tmp_path / "corpus")
