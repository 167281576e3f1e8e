"""Each format of files that jaxlm reads: what writes an example, and what reads it as a run does."""

import contextlib
import dataclasses
import functools
import gzip
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import optax
import pytest

from jaxlm import checkpoint, data, files, generate, metrics, models, train
from jaxlm.data import ingest
from jaxlm.fingerprint import fingerprints


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


def make_shards(folder: Path) -> None:
    lines = [json.dumps({"text": d.text.decode(), "more": [i]}) for i, d in enumerate(texts())]
    (folder / "a.jsonl").write_text("\n".join(lines))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress((folder / "a.jsonl").read_bytes()))


def make_tables(folder: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = arrow.table({"id": list(range(12)), "text": [d.text for d in texts()]})
    for codec in ("none", "snappy", "zstd"):
        parquet.write_table(table, folder / f"{codec}.parquet", compression=codec, row_group_size=5)
    lines = b"\n".join(b'{"text": "%d"}' % i for i in range(100))
    (folder / "c.jsonl.zst").write_bytes(arrow.compress(lines, "zstd", asbytes=True))


def make_records(folder: Path) -> None:
    module = pytest.importorskip("array_record.python.array_record_module")
    writer = module.ArrayRecordWriter(str(folder / "a.array_record"), "group_size:5")
    for document in texts():
        writer.write(document.text)
    writer.close()
    read_shards(folder)  # starts its threads, which need room for their stacks


def read_shards(folder: Path) -> str:
    for shard in data.shards(folder):
        assert len([document.text for document in shard.open()]) < 10_000
    return ""


def make_skips(folder: Path) -> None:
    data.write_skips(folder / "skips.json", [[20, 40], [100, 300]])


def read_skips(folder: Path) -> str:
    data.write_corpus(folder / "corpus", texts(), data.ByteTokenizer(), heldout=0.4)
    corpus = data.open_corpus(folder / "corpus")
    plan = data.pack(corpus.lengths, (16,), 64, 0)
    batches = data.Batches(corpus, plan, count=2, skip=data.read_skips(folder / "skips.json"))
    assert all(batches[i]["tokens"].shape == (4, 16) for i in range(2))
    return ""


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
    "lines": Format(make_shards, ("*.jsonl*",), read_shards),
    "tables": Format(make_tables, ("*.parquet", "*.zst"), read_shards),
    "records": Format(make_records, ("*.array_record",), read_shards),
    "skips": Format(make_skips, ("skips.json",), read_skips, sign),
    "run": Format(make_run, ("config.json", "*.jsonl"), read_run),
    "report": Format(make_run, ("config.json", "*.jsonl"), read_report, share=0.2),
    "checkpoint": Format(make_checkpoint, ("0/jaxlm.json", "scores.json"), read_checkpoint, sign, share=0.5),
    "arrays": Format(make_arrays, ("0/_*", "0/params/**/*", "0/rest/**/*"), read_checkpoint, share=0.5),
}
