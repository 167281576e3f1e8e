"""What of a corpus isn't as it was written is refused by name, before it is used."""

import copy
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from corpora import BYTES, ShiftedBytes, random_texts, write

from jaxlm import data
from jaxlm.data.corpus import BLOCK, KINDS, Split
from jaxlm.files import read_signed, signed


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


@pytest.mark.parametrize(
    "manifest", [{"format": 2}, {"format": 2, "train": 3, "dtype": "uint16"}, {"format": 2, "dtype": "none"}]
)
def test_a_manifest_with_parts_missing_is_refused(tmp_path: Path, manifest: dict[str, object]) -> None:
    write(tmp_path / "corpus", [b"a"])
    (tmp_path / "corpus" / "manifest.json").write_text(signed(manifest))
    with pytest.raises(ValueError, match="damaged"):
        data.open_corpus(tmp_path / "corpus")


def test_a_vocabulary_that_is_not_the_tokenizers_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "corpus"
    manifest = write(path, [b"a"]).manifest
    assert data.tokenizer_of(path).vocab == 258
    (path / "manifest.json").write_text(signed({**manifest, "vocab": 2**16}))
    with pytest.raises(ValueError, match=r"manifest.json is damaged: its vocab is 65536, its tokenizer's 258"):
        data.tokenizer_of(path)


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
