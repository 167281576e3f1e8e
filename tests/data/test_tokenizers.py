"""Tokenizers: every text comes back from its ids."""

import numpy as np
import numpy.typing as npt
import pytest

from jaxlm import data

TEXTS = [b"", b"Hi", "žluťoučký kůň 馬".encode(), bytes(range(256)), b"\xff\xfe\x00 broken \xc3"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_decode_inverts_encode(text: bytes, dtype: npt.DTypeLike) -> None:
    tokenizer = data.ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode(text).astype(dtype)) == text


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_the_bytes_between_start_and_end(text: bytes) -> None:
    tokenizer = data.ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids.tolist() == [tokenizer.start, *text, tokenizer.end]
    assert ids.max() < tokenizer.vocab
    assert len({*range(256), tokenizer.start, tokenizer.end}) == tokenizer.vocab


def test_documents_in_a_row_decode_to_their_text() -> None:
    tokenizer = data.ByteTokenizer()
    ids = np.concatenate([tokenizer.encode(text) for text in TEXTS])
    assert tokenizer.decode(ids) == b"".join(TEXTS)


def test_tokenizer_of_finds_by_name() -> None:
    tokenizer = data.tokenizer_of(data.ByteTokenizer().name)
    assert isinstance(tokenizer, data.ByteTokenizer)


@pytest.mark.parametrize("name", ["", "gpt2", "Bytes"])
def test_tokenizer_of_names_what_it_does_not_know(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name!r}.*'bytes'"):
        data.tokenizer_of(name)
