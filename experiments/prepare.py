"""Makes a corpus to train on from text files, JSON lines, Parquet, ArrayRecord or Hugging Face datasets.

    python experiments/prepare.py FOLDER gs://bucket/more.jsonl.zst --out corpus --tokenizer train:32000
    python experiments/pretrain.py --text corpus

PATHS are files, folders, or URLs that fsspec knows; folders that a dataset was saved to; dataset:NAME for one by name.
Stopped, by whatever, the same command goes on after the parts that are finished.
"""

import dataclasses
import random
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import tyro
from rich import progress

from jaxlm import data

SAMPLE = 1_000_000  # bytes of text that gigatoken must give the same ids for


@dataclasses.dataclass(frozen=True)
class Config:
    paths: tyro.conf.Positional[tuple[str, ...]] = ()
    """Where the text is."""
    out: str = "corpus"
    """The folder to make."""
    tokenizer: str = "bytes"
    """bytes; train:SIZE, to learn one from this text; or the path of a tokenizer.json, of a folder with GPT-2's
    encoder.json and vocab.bpe, of a .tiktoken file (with --pattern), or of a corpus, to use its."""
    pattern: str | None = None
    """The regular expression that cuts text into pieces, for a .tiktoken file."""
    end_token: str | None = None
    """What documents end with, where a tokenizer.json has no <|endoftext|> and nothing beside it tells."""
    fast: bool = False
    """Tokenize with gigatoken, if it gives the same ids for a sample of this text."""
    field: str = "text"
    """Where the text is in JSON lines, Parquet files and datasets."""
    split: str = "train"
    """Which split of a dataset."""
    heldout: float = 0.04
    """The share of documents to hold out, which no model ever learns from."""
    drop_duplicates: bool = False
    """Leave out exact copies of earlier documents."""
    skip_unreadable: bool = False
    """Leave out files that can't be read to their end, rather than stop."""
    workers: int = 1
    """Processes that tokenize."""
    learn_from: int = 2**28
    """Bytes of text to learn a vocabulary from, of files drawn at random: their words are held in memory."""
    smoke: bool = False
    """Only show that everything works: some files of Python's library, in a temporary folder."""


def main(config: Config) -> None:
    if config.smoke:
        some, out = Path(sysconfig.get_paths()["stdlib"], "importlib"), tempfile.mkdtemp()
        config = dataclasses.replace(config, paths=(str(some),), out=f"{out}/corpus", heldout=0.1)
    if not config.paths:
        sys.exit("Give at least one path: a file, a folder, a URL, or dataset:NAME")
    shards = [shard for path in config.paths for shard in shards_of(path, config)]
    size = sum(shard.size for shard in shards)
    print(f"{len(shards):,} shards of {size:,} bytes")
    tokenizer = tokenizer_of(config, shards)
    begun, documents = time.monotonic(), 0
    rate = progress.TextColumn("{task.fields[rate]:,.0f} documents/s")
    with progress.Progress(
        progress.BarColumn(), progress.DownloadColumn(), rate, progress.TimeRemainingColumn()
    ) as bar:
        task = bar.add_task("", total=size, rate=0)

        def tell(read: int, text: int, stored: int) -> None:
            del text
            nonlocal documents
            documents += read
            bar.update(task, advance=stored, rate=documents / (time.monotonic() - begun))

        names = ("heldout", "drop_duplicates", "skip_unreadable", "workers")
        options = {name: getattr(config, name) for name in names}
        data.write_corpus(config.out, shards, tokenizer, progress=tell, **options)
    found = summary(data.open_corpus(config.out), time.monotonic() - begun)
    print(found.encode(errors="backslashreplace").decode())  # names of files needn't be UTF-8


def shards_of(path: str, config: Config) -> list[data.Shard]:
    saved = any((Path(path) / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))
    if saved or path.startswith("dataset:"):
        return data.hugging_face(path.removeprefix("dataset:"), split=config.split, column=config.field)
    readers = [data.plain_text(), data.json_lines(config.field), data.parquet(config.field), data.array_record()]
    return data.shards(path, readers)


def tokenizer_of(config: Config, shards: list[data.Shard]) -> data.Tokenizer:
    name, path = config.tokenizer, Path(config.tokenizer)
    if name.startswith("train:"):
        size = int(name.removeprefix("train:"))
        print(f"Learning {size:,} tokens")
        found = data.train_bpe(sample(shards, config.learn_from, config.heldout), size)
    elif (path / "encoder.json").is_file():
        found = data.gpt2_files(path)
    elif config.pattern is not None:
        found = data.rank_file(path, config.pattern)
    else:
        found = data.tokenizer_of(name, end_token=config.end_token)
    if config.fast and isinstance(found, data.SubwordTokenizer):
        try:
            return data.faster(found, (document.text for document in sample(shards, SAMPLE, 0.0)))
        except (ImportError, ValueError) as error:
            print(f"Without --fast: {error}")
    return found


def sample(shards: list[data.Shard], size: int, heldout: float) -> Iterator[data.Document]:
    """About so many bytes of documents that aren't held out: always the same ones."""
    for shard in random.Random(0).sample(shards, len(shards)):
        try:
            for document in shard.open():
                if size > 0 and document.text and not data.is_heldout(document.text, heldout):
                    size -= len(document.text)
                    yield document
        except data.UnreadableError as error:
            print(f"Not in the sample: {error}")
        if size <= 0:
            return


def summary(corpus: data.Corpus, seconds: float) -> str:
    manifest, train = corpus.manifest, corpus.manifest["train"]
    tokens, text = (train[name] + manifest["heldout"][name] for name in ("tokens", "bytes"))
    lines = {
        "documents": f"{manifest['documents']:,}, {manifest['empty']:,} of them empty",
        "tokens": f"{tokens:,} of {manifest['tokenizer']}, {manifest['vocab']:,} different ones",
        "bytes per token": f"{text / tokens:.3f}",
        "held out": f"{manifest['heldout']['documents']:,} documents, {manifest['heldout']['tokens']:,} tokens",
        "duplicates": f"{manifest['duplicates']:,}, {manifest['dropped']:,} of them dropped",
        "not UTF-8": ", such as ".join(str(x) for x in [manifest["not_utf8"], *manifest["not_utf8_names"][:1]]),
        "unreadable": ", such as ".join(str(x) for x in [manifest["unreadable"], *manifest["unreadable_names"][:1]]),
        "speed": f"{text / seconds / 1e6:.1f} MB/s",
        "where": str(corpus.path),
    }
    return "\n".join(f"{name:16}{value}" for name, value in lines.items())


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
