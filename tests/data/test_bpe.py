"""Byte pairs: ids are those of `tokenizers` and tiktoken, text comes back, and damaged files are refused."""

import base64
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm import data
from jaxlm.data.tokenizers import END

tokenizers = pytest.importorskip("tokenizers")

HARD = [
    "",
    " ",
    "don't they're I'LL",
    "  two   spaces \t\n\r\n\n  end ",
    "žluťoučký kůň 馬 \U0001f469\u200d\U0001f680 e\u0301 \u00a0\u3000\u2028",
    "x" * 500 + " " * 500 + "1234567890" * 20,
    f"a {END} in the text",
    "\x00\x01\x7f\ufffd\ufeff",
    "aaaaaaaaaaaaa aaaaaa aaa ababababa",
]
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(" \n\taeiou<|>'")) | st.sampled_from(HARD)


def library(number: int) -> list[data.Document]:
    return [document for document, _ in zip(data.python_library(), range(number), strict=False)]


@pytest.fixture(scope="module")
def trained() -> data.SubwordTokenizer:
    return data.train_bpe(library(30), 700)


@pytest.fixture(scope="module")
def ranks(trained: data.SubwordTokenizer) -> dict[bytes, int]:
    """The trained vocabulary as tiktoken has it: bytes and ranks, without special tokens."""
    model = tokenizers.Tokenizer.from_str(trained.content)
    by_character = {}
    seen = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = iter(range(256, 512))
    for byte in range(256):
        by_character[chr(byte if byte in seen else next(others))] = byte
    ids = {token: i for token, i in model.get_vocab().items() if token != END}
    ordered = sorted(ids, key=lambda token: ids[token])
    return {bytes(by_character[c] for c in token): rank for rank, token in enumerate(ordered)}


def write_ranks(file: Path, ranks: dict[bytes, int]) -> Path:
    file.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()))
    return file


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory, trained: data.SubwordTokenizer) -> Path:
    """The trained vocabulary as GPT-2 has it: `encoder.json` and `vocab.bpe`."""
    folder = tmp_path_factory.mktemp("gpt2")
    model = json.loads(trained.content)["model"]
    ids = sorted(model["vocab"], key=lambda token: model["vocab"][token])
    ids = [*(token for token in ids if token != END), END]  # GPT-2's is the last
    (folder / "encoder.json").write_text(json.dumps({token: i for i, token in enumerate(ids)}))
    lines = "\n".join(" ".join(pair) for pair in model["merges"])
    (folder / "vocab.bpe").write_text(f"#version: 0.2\n{lines}\n")
    return folder


def test_training_is_deterministic(trained: data.SubwordTokenizer) -> None:
    assert data.train_bpe(library(30), 700) == trained


@pytest.mark.slow
def test_training_is_the_same_in_another_process(trained: data.SubwordTokenizer) -> None:
    program = (
        "from jaxlm import data; import itertools; "
        "print(data.train_bpe(itertools.islice(data.python_library(), 30), 700).name)"
    )
    again = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert again.stdout.strip() == trained.name


def test_training_gives_the_vocabulary_that_was_asked_for(trained: data.SubwordTokenizer) -> None:
    assert trained.vocab == 700
    text = b"".join(document.text for document in library(30))
    assert len(trained.encode(text)) < len(text) / 2
    assert data.train_bpe([], 257).vocab == 257
    with pytest.raises(ValueError, match="vocab is 256; use 257 or more"):
        data.train_bpe([], 256)


@settings(deadline=None, max_examples=300)
@given(text=ANY_TEXT)
def test_text_comes_back(trained: data.SubwordTokenizer, text: str) -> None:
    for tokenizer in (trained, data.ByteTokenizer()):
        ids = tokenizer.encode(text.encode())
        assert tokenizer.decode(ids) == text.encode()
        assert ids[-1] == tokenizer.end
        assert ids.max() < tokenizer.vocab
        assert np.count_nonzero(ids == tokenizer.end) == (1 if tokenizer is not trained else 2)


@settings(deadline=None, max_examples=300)
@given(text=st.binary())
def test_any_bytes_come_back_from_bytes_and_what_is_not_utf8_is_replaced(
    trained: data.SubwordTokenizer, text: bytes
) -> None:
    tokenizer = data.ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert trained.decode(trained.encode(text)) == text.decode(errors="replace").encode()


def test_documents_in_a_row_decode_to_their_text(trained: data.SubwordTokenizer) -> None:
    assert trained.decode(np.concatenate([trained.encode(text.encode()) for text in HARD])) == "".join(HARD).encode()


@settings(deadline=None, max_examples=200)
@given(text=ANY_TEXT)
def test_ids_are_those_of_tokenizers(trained: data.SubwordTokenizer, text: str) -> None:
    model = tokenizers.Tokenizer.from_str(trained.content)
    found = trained.encode(text.encode()).tolist()
    assert found[0] == found[-1] == model.token_to_id(END)
    if END in text:  # its name is text, and not the token
        assert found.count(trained.end) == 2
    else:
        assert found[1:-1] == model.encode(text).ids


@pytest.fixture(scope="module", params=[data.GPT2_PATTERN, data.CL100K_PATTERN], ids=["gpt2", "cl100k"])
def with_oracle(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, ranks: dict[bytes, int]
) -> tuple[data.SubwordTokenizer, Any]:
    """A tokenizer from a rank file, and tiktoken's."""
    tiktoken = pytest.importorskip("tiktoken")
    file = write_ranks(tmp_path_factory.mktemp("ranks") / "a.tiktoken", ranks)
    oracle = tiktoken.Encoding("oracle", pat_str=request.param, mergeable_ranks=ranks, special_tokens={})
    return data.rank_file(file, request.param), oracle


@settings(deadline=None, max_examples=300)
@given(text=ANY_TEXT | st.text("ab "))
def test_ids_are_those_of_tiktoken(with_oracle: tuple[data.SubwordTokenizer, Any], text: str) -> None:
    found, oracle = with_oracle
    assert found.encode(text.encode())[1:-1].tolist() == oracle.encode_ordinary(text)
    assert found.decode(found.encode(text.encode())) == text.encode()


def test_ids_of_a_library_are_those_of_tiktoken(
    with_oracle: tuple[data.SubwordTokenizer, Any], ranks: dict[bytes, int]
) -> None:
    found, oracle = with_oracle
    assert (found.end, found.vocab) == (len(ranks), len(ranks) + 1)
    for document in library(40):
        assert found.encode(document.text)[1:-1].tolist() == oracle.encode_ordinary(document.text.decode())


def test_ids_of_gpt2s_files_are_those_of_its_ranks(gpt2: Path, tmp_path: Path, ranks: dict[bytes, int]) -> None:
    found = data.gpt2_files(gpt2)
    other = data.rank_file(write_ranks(tmp_path / "a.tiktoken", ranks), data.GPT2_PATTERN)
    assert (found.end, found.vocab) == (other.end, other.vocab)
    for text in [*(text.encode() for text in HARD), *(document.text for document in library(10))]:
        np.testing.assert_array_equal(found.encode(text), other.encode(text))


def test_the_fast_path_gives_the_same_ids_or_is_refused(trained: data.SubwordTokenizer) -> None:
    pytest.importorskip("gigatoken")
    sample = [document.text for document in library(60)]
    fast = data.faster(trained, sample)
    assert (fast.name, fast.vocab, fast.end) == (trained.name, trained.vocab, trained.end)
    for text in [*(text.encode() for text in HARD), *sample]:
        np.testing.assert_array_equal(fast.encode(text), trained.encode(text))
    assert pickle.loads(pickle.dumps(fast)) == fast
    lowered = json.loads(trained.content) | {"normalizer": {"type": "Lowercase"}}
    with pytest.raises(ValueError, match=r"(?s)gigatoken can't stand in for .*use the tokenizer as it is"):
        data.faster(data.SubwordTokenizer(json.dumps(lowered)), [b"SHOUTING Text"])


def test_the_fast_path_is_held_against_the_sample(
    trained: data.SubwordTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(content: str) -> Callable[[str], Any]:
        exact = data.SubwordTokenizer(content)
        return lambda text: exact.encode(text.replace("rare", "other").encode())[1:-1]

    monkeypatch.setattr("jaxlm.data.tokenizers._gigatoken", wrong)
    assert data.faster(trained, [b"a", b"b"]).encoder is wrong
    with pytest.raises(ValueError, match="other ids for text 1 of the sample"):
        data.faster(trained, [b"a", b"a rare word"])


def test_a_tokenizer_pickles_and_keeps_what_it_does(trained: data.SubwordTokenizer) -> None:
    again = pickle.loads(pickle.dumps(trained))
    for text in HARD:
        np.testing.assert_array_equal(again.encode(text.encode()), trained.encode(text.encode()))


def test_a_text_always_has_the_same_ids(trained: data.SubwordTokenizer) -> None:
    content = json.loads(trained.content)
    content["model"]["dropout"] = 0.5
    drops, text = data.SubwordTokenizer(json.dumps(content)), HARD[-1].encode() + b" some words of a text"
    for _ in range(5):
        np.testing.assert_array_equal(drops.encode(text), trained.encode(text))


def test_settings_of_the_json_that_change_a_document_are_off(trained: data.SubwordTokenizer) -> None:
    model = tokenizers.Tokenizer.from_str(trained.content)
    model.enable_truncation(3)
    model.enable_padding(length=10)
    model.post_processor = tokenizers.processors.TemplateProcessing(f"{END} $A", special_tokens=[(END, 0)])
    changed = data.SubwordTokenizer(model.to_str())
    assert changed.name != trained.name
    for text in HARD:
        np.testing.assert_array_equal(changed.encode(text.encode()), trained.encode(text.encode()))


def test_tokenizer_of_finds_by_path(tmp_path: Path, trained: data.SubwordTokenizer) -> None:
    (tmp_path / "tokenizer.json").write_text(trained.content)
    assert data.tokenizer_of(tmp_path) == data.tokenizer_of(tmp_path / "tokenizer.json") == trained
    other = trained.content.replace(END, "</s>")
    (tmp_path / "tokenizer.json").write_text(other)
    with pytest.raises(ValueError, match=r"has no token '<\|endoftext\|>'; its special tokens are \['</s>'\]"):
        data.tokenizer_of(tmp_path)
    expected = data.SubwordTokenizer(other, "</s>")
    assert data.tokenizer_of(tmp_path, end_token="</s>") == expected
    for token in ("</s>", {"content": "</s>"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": token}))
        assert data.tokenizer_of(tmp_path) == expected


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff\xfe", b'{"model": 3}'])
def test_a_damaged_tokenizer_is_refused(tmp_path: Path, content: bytes, trained: data.SubwordTokenizer) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_bytes(content or trained.content.encode()[:-100])
    with pytest.raises(ValueError, match=r"tokenizer.json: "):
        data.tokenizer_of(tmp_path)


def test_a_pattern_that_never_ends_is_an_error_and_no_panic(trained: data.SubwordTokenizer) -> None:
    content = json.loads(trained.content)
    endless = {"type": "Split", "pattern": {"Regex": "(a|a|aa)+$"}, "behavior": "Isolated", "invert": False}
    found = data.SubwordTokenizer(json.dumps({**content, "pre_tokenizer": endless}), trained.end_token)
    with pytest.raises(ValueError, match=r"can't cut up a text of 31 bytes: .*retry-limit"):
        found.encode(b"a" * 30 + b"d")


CHARSMAP = base64.b64encode(bytes(4) + b"a" * 100 + b"\0").decode()


@pytest.mark.parametrize(
    "rules",
    [
        [{"type": "Replace", "pattern": {"String": a}, "content": 17 * b} for a, b in ("ab", "bc", "cd")],
        [{"type": "Replace", "pattern": {"Regex": "x*"}, "content": "yyyyyyy"}] * 500,  # more than any float
        [{"type": "Prepend", "prepend": "x" * 64}] * 2,
        [{"type": "ByteLevel"}] * 7,
        [{"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "lowercase": True}] * 8,
        [{"type": "Precompiled", "precompiled_charsmap": CHARSMAP}] * 3,
    ],
    ids=lambda rules: rules[0]["type"],
)
def test_rules_that_would_make_millions_of_letters_of_one_are_refused(
    trained: data.SubwordTokenizer, rules: list[Any]
) -> None:
    content = json.loads(trained.content)
    for some in ([], rules[:1]):
        normalizer = {"type": "Sequence", "normalizers": some}
        data.SubwordTokenizer(json.dumps({**content, "normalizer": normalizer}), trained.end_token)
    normalizer = {"type": "Sequence", "normalizers": rules}
    with pytest.raises(ValueError, match=r"its rules could make a text .* times as long; 4096 times are allowed"):
        data.SubwordTokenizer(json.dumps({**content, "normalizer": normalizer}), trained.end_token)


def test_what_is_too_large_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(2**40)  # takes no room
    with pytest.raises(ValueError, match=r"has 1099511627776 bytes, more than any such file"):
        data.tokenizer_of(tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda lines: [*lines[:5], "QQ", *lines[6:]], "line 6 is not a token in base64 and its rank"),
        (lambda lines: [*lines[:5], "Q* 5", *lines[6:]], "line 6 is not a token in base64 and its rank"),
        (lambda lines: [*lines[:5], "QQ== x", *lines[6:]], "line 6 is not a token in base64 and its rank"),
        (lambda lines: lines[:100], "no rank for 156 bytes, such as"),
        (lambda lines: [*lines[:-1], "enp6enp6 99999999999999"], "ids are not 0, 1, 2"),
        (lambda lines: [*lines[:-1], "enp6enp6 5"], "ids are not 0, 1, 2"),
    ],
)
def test_a_damaged_rank_file_is_refused(
    tmp_path: Path, ranks: dict[bytes, int], damage: Callable[[list[str]], list[str]], message: str
) -> None:
    file = write_ranks(tmp_path / "a.tiktoken", ranks)
    file.write_text("\n".join(damage(file.read_text().splitlines())))
    with pytest.raises(ValueError, match=message):
        data.rank_file(file, data.GPT2_PATTERN)
    with pytest.raises(ValueError, match=r"doesn't tell how text is cut into pieces; use rank_file"):
        data.tokenizer_of(file)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("encoder.json", b'{"a": 0, "b": 7}'),
        ("encoder.json", b'{"a": "b"}'),
        ("encoder.json", b"[]"),
        ("encoder.json", b'{"a": 0'),
        ("vocab.bpe", b"#version\nno such\n"),
        ("vocab.bpe", b"#version\none\n"),
        ("vocab.bpe", b"x" * 5000 + b" y\n"),
    ],
)
def test_damaged_files_of_gpt2_are_refused(tmp_path: Path, gpt2: Path, name: str, content: bytes) -> None:
    for file in gpt2.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="are not a vocabulary and its merges") as raised:
        data.gpt2_files(tmp_path)
    assert len(str(raised.value)) < 1000


def test_without_gigatoken_it_is_said_what_to_install(
    trained: data.SubwordTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    with pytest.raises(ImportError, match=r"pip install 'jaxlm\[gigatoken\]'"):
        data.faster(trained, [b"some text"])


@pytest.mark.parametrize("name", ["pre_tokenizer", "decoder"])
def test_rules_before_and_after_the_vocabulary_are_bounded_too(name: str, trained: data.SubwordTokenizer) -> None:
    each = {"pre_tokenizer": {"type": "ByteLevel"}, "decoder": {"type": "Replace", "pattern": {"String": "a"}}}[name]
    defaults = {"add_prefix_space": False, "trim_offsets": False, "use_regex": False, "content": 9 * "b"}
    kind = {"pre_tokenizer": "pretokenizers", "decoder": "decoders"}[name]
    for number in (1, 7):
        rules = {"type": "Sequence", kind: [defaults | each] * number}
        content = json.dumps({**json.loads(trained.content), name: rules})
        if number == 1:
            data.SubwordTokenizer(content, trained.end_token)
        else:
            with pytest.raises(ValueError, match=r"its rules could make a text .* times as long"):
                data.SubwordTokenizer(content, trained.end_token)
