"""Vocabularies of byte pairs: learnt from documents, or read from the files of GPT-2 and tiktoken."""

import base64
import binascii
import functools
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

from jaxlm.data.text import Document
from jaxlm.data.tokenizers import END, SubwordTokenizer
from jaxlm.files import read_small
from jaxlm.optional import optional

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""How GPT-2 cuts text into pieces, which tokens never cross; also that of the rank files r50k and p50k."""
CL100K_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
"""That of the rank file cl100k."""

LONGEST = 4096
"""Characters in base64 of the longest token that a rank file may have; that of cl100k has 172."""


def train_bpe(documents: Iterable[Document], vocab: int) -> SubwordTokenizer:
    """Learns a byte-level BPE with GPT-2's pieces: any UTF-8 text has ids, and comes back from them.

    The same documents give the same tokenizer, token for token.

    Args:
        documents: what to learn from; they are read once, and the words in them are held in memory.
        vocab: how many tokens, the end token and the 256 bytes included; there may be fewer if the text is short.

    Raises:
        ImportError: `tokenizers` isn't installed.
        ValueError: `vocab` is less than 257.
    """
    if vocab < 257:
        raise ValueError(f"train_bpe: vocab is {vocab}; use 257 or more, for the bytes and the end token")
    library = optional("tokenizers")
    model = _byte_level(library.models.BPE(), None)
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    model.train_from_iterator((document.text.decode(errors="replace") for document in documents), trainer)
    return SubwordTokenizer(model.to_str())


def gpt2_files(folder: str | os.PathLike[str]) -> SubwordTokenizer:
    """The BPE of `encoder.json` and `vocab.bpe` in a folder, as GPT-2 has them.

    Raises:
        ImportError: `tokenizers` isn't installed.
        ValueError: the files aren't such, or don't belong together.
    """
    encoder, merges_file = Path(folder) / "encoder.json", Path(folder) / "vocab.bpe"
    try:
        ids = cast(dict[str, int], json.loads(read_small(encoder)))
        lines = read_small(merges_file).decode().splitlines()
        merges = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
        _check_ids(list(ids.values()))
        model = _byte_level(optional("tokenizers").models.BPE(ids, merges), None)
    except ImportError:
        raise
    except Exception as error:  # from `tokenizers` comes nothing more precise
        raise ValueError(f"{encoder} and {merges_file} are not a vocabulary and its merges: {error!s:.300}") from None
    model.add_special_tokens([END])
    return SubwordTokenizer(model.to_str())


def rank_file(path: str | os.PathLike[str], pattern: str) -> SubwordTokenizer:
    """The BPE of a `.tiktoken` file: lines of a token in base64 and its rank. The end token follows the last rank.

    Args:
        path: the file.
        pattern: how text is cut into pieces, a regular expression: the file doesn't tell. See `GPT2_PATTERN`.

    Raises:
        ImportError: `tokenizers` isn't installed.
        ValueError: the file isn't such, or a byte has no rank.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_small(Path(path)).splitlines(), 1):
        try:
            token, rank = line.split()
            if len(token) > LONGEST:  # each place to cut it is tried, which takes the square of its length
                raise ValueError(f"a token of {len(token)} characters; {LONGEST} at most")
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ValueError(f"{path}: line {number} is not a token in base64 and its rank ({error})") from None
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(f"{path} is damaged: it has no rank for {len(missing)} bytes, such as {missing[0]}")
    try:
        _check_ids(list(ranks.values()))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    # The pair with the lowest rank of its result is merged first: so all pairs that give a token, in order of ranks.
    merges = [
        (token[:cut], token[cut:])
        for token in sorted(ranks, key=lambda token: ranks[token])
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    vocabulary = {_printable(token): rank for token, rank in ranks.items()}
    printable = [(_printable(left), _printable(right)) for left, right in merges]
    model = _byte_level(optional("tokenizers").models.BPE(vocabulary, printable, ignore_merges=True), pattern)
    model.add_special_tokens([END])
    return SubwordTokenizer(model.to_str())


def _byte_level(model: Any, pattern: str | None) -> Any:
    """A tokenizer whose characters stand for bytes; without a pattern its pieces are GPT-2's."""
    library = optional("tokenizers")
    tokenizer = library.Tokenizer(model)
    before = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    if pattern is not None:
        split = library.pre_tokenizers.Split(library.Regex(pattern), "isolated")
        before = library.pre_tokenizers.Sequence([split, before])
    tokenizer.pre_tokenizer = before
    tokenizer.decoder = library.decoders.ByteLevel()
    return tokenizer


@functools.cache
def _characters() -> list[str]:
    """GPT-2's character for each byte: itself if it is seen when printed, else one from 256 on."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others: Iterator[int] = itertools.count(256)
    return [chr(byte if byte in seen else next(others)) for byte in range(256)]


def _printable(token: bytes) -> str:
    return "".join(_characters()[byte] for byte in token)


def _check_ids(ids: list[int]) -> None:
    if sorted(ids) != list(range(len(ids))):
        raise ValueError("its ids are not 0, 1, 2 and so on, each once")
