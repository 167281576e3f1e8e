"""Text to token ids and back."""

import base64
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
from jaxtyping import Integer

from jaxlm import files
from jaxlm.optional import optional

END = "<|endoftext|>"
GROWTH = 2**12
"""Times that the rules of a tokenizer's JSON may lengthen a text: each alone may be harmless, and all make millions."""


@runtime_checkable
class Tokenizer(Protocol):
    """Turns a document into ids below `vocab` and back."""

    @property
    def name(self) -> str:
        """Tells this tokenizer from others; it is saved with the corpora and the models that use it."""
        ...

    @property
    def vocab(self) -> int: ...

    @property
    def end(self) -> int:
        """The id that every document ends with."""
        ...

    def encode(self, text: bytes) -> Integer[np.ndarray, " T"]: ...

    def decode(self, ids: Integer[np.ndarray, " T"]) -> bytes: ...


class ByteTokenizer:
    """Each byte is its own id; a document begins with 256 and ends with 257.

    >>> ids = ByteTokenizer().encode(b"Hi")
    >>> ids.tolist(), ByteTokenizer().decode(ids)
    ([256, 72, 105, 257], b'Hi')
    """

    name = "bytes"
    vocab = 258
    start = 256
    end = 257

    def encode(self, text: bytes) -> Integer[np.ndarray, " T"]:
        ids = np.empty(len(text) + 2, np.uint16)
        ids[0], ids[1:-1], ids[-1] = self.start, np.frombuffer(text, np.uint8), self.end
        return ids

    def decode(self, ids: Integer[np.ndarray, " T"]) -> bytes:
        return np.asarray(ids)[np.asarray(ids) < self.start].astype(np.uint8).tobytes()


@dataclasses.dataclass(frozen=True)
class SubwordTokenizer:
    """A tokenizer in the JSON format of Hugging Face's `tokenizers`, which is saved with every corpus that it makes.

    A document has the ids that `tokenizers` gives its text, between two ends: so its first token is predicted too.
    Names of special tokens in a text are text. What isn't UTF-8 becomes U+FFFD, so it doesn't come back; all else
    does, if the vocabulary is one of bytes.

    Args:
        content: that of a `tokenizer.json`.
        end_token: the token that every document ends with.
        encoder: None, or what makes of `content` a function from a text to its ids; see `faster`.

    Raises:
        ImportError: `tokenizers` isn't installed.
        ValueError: it isn't such JSON, its vocabulary lacks the end token, or its rules would make a text far longer.
    """

    content: str = dataclasses.field(repr=False)
    end_token: str = END
    encoder: Callable[[str], Callable[[str], Any]] | None = None

    def __post_init__(self) -> None:
        if self.end_token not in self._ids:
            special = [token.content for token in self._model.get_added_tokens_decoder().values()]
            raise ValueError(
                f"the tokenizer has no token {self.end_token!r:.80}; its special tokens are {special!s:.300}"
            )

    def __reduce__(self) -> Any:
        return type(self), (self.content, self.end_token, self.encoder)

    @property
    def name(self) -> str:
        content = json.dumps([self.end_token, self.content]).encode()
        return f"subword-{hashlib.sha256(content).hexdigest()[:16]}"

    @property
    def vocab(self) -> int:
        return self._vocab

    @property
    def end(self) -> int:
        return self._ids[self.end_token]

    @property
    def files(self) -> Mapping[str, str]:
        """What is saved with a corpus: its name and its content, as `transformers` has them too."""
        return {"tokenizer.json": self.content, "tokenizer_config.json": json.dumps({"eos_token": self.end_token})}

    def encode(self, text: bytes) -> Integer[np.ndarray, " T"]:
        try:
            found = self._encode(text.decode(errors="replace"))
        except BaseException as error:  # what Rust raises, and its panics, which are no Exceptions
            if type(error).__name__ not in ("Exception", "PanicException"):
                raise
            raise ValueError(f"the tokenizer can't cut up a text of {len(text)} bytes: {error!s:.300}") from None
        ids = np.empty(len(found) + 2, np.uint32)
        ids[0], ids[1:-1], ids[-1] = self.end, found, self.end
        return ids

    def decode(self, ids: Integer[np.ndarray, " T"]) -> bytes:
        return self._model.decode(ids[ids != self.end].tolist(), skip_special_tokens=False).encode()

    @functools.cached_property
    def _model(self) -> Any:
        try:
            model = optional("tokenizers").Tokenizer.from_str(self.content)
        except ImportError:
            raise
        except Exception as error:  # it raises nothing more precise
            raise ValueError(f"this is not the JSON of a tokenizer: {error!s:.300}") from None
        rules = [
            json.loads(part.__getstate__()) for part in (model.normalizer, model.pre_tokenizer, model.decoder) if part
        ]
        if (times := _growth(rules)) > GROWTH:
            raise ValueError(f"its rules could make a text {times:.3g} times as long; {GROWTH} times are allowed")
        if getattr(model.model, "dropout", None):  # which would cut up a text otherwise each time
            model.model.dropout = None
        model.no_truncation()
        model.no_padding()
        model.encode_special_tokens = True
        return model

    @functools.cached_property
    def _encode(self) -> Callable[[str], Any]:
        if self.encoder is not None:
            return self.encoder(self.content)
        # Batches of one, since only batches do without each token's place in the text, which takes time.
        return lambda text: self._model.encode_batch_fast([text], add_special_tokens=False)[0].ids

    @functools.cached_property
    def _vocab(self) -> int:
        return max(self._ids.values()) + 1

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        return self._model.get_vocab()


def _growth(rules: Any) -> int | float:
    """How many times as long a text can become by rules that put strings into it, one after another."""
    match rules:
        case {"type": "Replace", "pattern": {"String": str(found)}, "content": str(by)} if found:
            return max(1.0, len(by) / len(found))
        case {"type": "Replace", "content": str(by)}:  # an expression may match between any two letters
            return 1.0 + len(by)
        case {"type": "Prepend", "prepend": str(text)}:
            return 1.0 + len(text)
        case {"type": "ByteLevel"}:  # a letter for each byte
            return 4.0
        case {"type": "BertNormalizer"}:  # a space on each side
            return 3.0
        case {"type": "Precompiled", "precompiled_charsmap": str(table)}:  # a trie, and then what it leads to
            content = base64.b64decode(table)
            strings = content[4 + int.from_bytes(content[:4], "little") :].split(b"\0")
            return max(1.0, *map(len, strings))
        case dict():
            return math.prod(map(_growth, cast(dict[str, Any], rules).values()), start=1.0)
        case list():
            return math.prod(map(_growth, cast(list[Any], rules)), start=1.0)
        case _:
            return 1.0


def _gigatoken(content: str) -> Callable[[str], Any]:
    # It would take the names of added tokens in a text for these tokens.
    plain = {**json.loads(content), "added_tokens": []}
    return optional("gigatoken", "gigatoken").Tokenizer.from_json(json.dumps(plain)).encode


def faster(tokenizer: SubwordTokenizer, sample: Iterable[bytes]) -> SubwordTokenizer:
    """The same tokenizer, with ids from gigatoken, which is many times as fast, if they are the same on a sample.

    Args:
        tokenizer: what it must equal.
        sample: texts to compare on, best of the corpus itself.

    Raises:
        ImportError: `gigatoken` isn't installed.
        ValueError: it can't read this tokenizer, or gives other ids for a text of the sample.
    """
    fast = dataclasses.replace(tokenizer, encoder=_gigatoken)
    hard = [b"", b" \t\n\r\n  x", "a\u0301 \u1d54a \U0001f469\u200d\U0001f680 \u00a0\u3000".encode(), b"don't  1234567"]
    hard += [tokenizer.end_token.encode(), bytes(range(256))]
    try:
        for number, text in enumerate(itertools.chain(hard, sample)):
            if not np.array_equal(fast.encode(text), tokenizer.encode(text)):
                where = f"text {number - len(hard)} of the sample" if number >= len(hard) else f"the text {text!r}"
                raise ValueError(f"it gives other ids for {where}")
    except ImportError:
        raise
    except Exception as error:
        raise ValueError(f"gigatoken can't stand in for this tokenizer: {error}; use the tokenizer as it is") from error
    return fast


def tokenizer_of(name: str | os.PathLike[str], *, end_token: str | None = None) -> Tokenizer:
    """The tokenizer of that name, or the one in a corpus, in a folder or in a `tokenizer.json`.

    Args:
        name: `bytes`, or a path.
        end_token: what documents end with, for a `tokenizer.json`; None: what a `tokenizer_config.json` beside it
            says, or else `<|endoftext|>`.

    Raises:
        ImportError: `tokenizers` isn't installed.
        ValueError: there is no such tokenizer, or it is damaged, or isn't the one that the corpus was written with.
    """
    path = Path(name)
    if os.fspath(name) == ByteTokenizer.name:
        return ByteTokenizer()
    manifest = path / "manifest.json"
    about = files.read_json(manifest) if files.is_file(manifest) else {}
    wanted = about.get("tokenizer")
    if not isinstance(wanted, str | None):
        raise ValueError(f"{manifest} is damaged: its tokenizer is {wanted!r:.80}")
    found = ByteTokenizer() if wanted == ByteTokenizer.name else _subwords_of(name, wanted, end_token)
    vocab = found.vocab if wanted is None else about.get("vocab")
    if vocab != found.vocab:  # as large as the manifest says a model would be
        raise ValueError(f"{manifest} is damaged: its vocab is {vocab!r:.80}, its tokenizer's {found.vocab}")
    return found


def _subwords_of(name: str | os.PathLike[str], wanted: str | None, end_token: str | None) -> SubwordTokenizer:
    path = Path(name)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(
            f"tokenizer_of: unknown tokenizer {os.fspath(name)!r}; there is {ByteTokenizer.name!r}, "
            "or give the path of a corpus or a tokenizer.json"
        )
    if file.suffix == ".tiktoken":
        raise ValueError(f"tokenizer_of: {file} doesn't tell how text is cut into pieces; use rank_file")
    content = files.read_small(file)
    try:
        found = SubwordTokenizer(content.decode(), end_token or _end_beside(file))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    if wanted not in (None, found.name):
        raise ValueError(
            f"{file} is {found.name}, and the corpus was written with {wanted:.80}; write the corpus again"
        )
    return found


def save_tokenizer(tokenizer: Tokenizer, folder: str | os.PathLike[str]) -> None:
    """Writes what `tokenizer_of` needs, if that is more than a name, into a folder."""
    os.makedirs(folder, exist_ok=True)
    for name, content in getattr(tokenizer, "files", {}).items():
        files.write_whole(Path(folder) / name, content)


def _end_beside(file: Path) -> str:
    config = file.parent / "tokenizer_config.json"
    found = files.read_json(config).get("eos_token") if config.is_file() else None
    content = cast(dict[str, Any], found).get("content") if isinstance(found, dict) else found
    if not isinstance(content, str | None):
        raise ValueError(f"{config} is damaged: its eos_token is {found!r:.80}")
    return content or END
