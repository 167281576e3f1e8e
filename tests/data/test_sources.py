"""Sources: each format against what was put into it, and damage is named with its file and line."""

import gzip
import io
import itertools
import json
import os
import pickle
import tracemalloc
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from jaxlm import data
from jaxlm.data import sources
from jaxlm.data.sources import Reader

TEXTS = ["A first text.", "", "Zwei\nZeilen ž 馬 \U0001f600", "three\r\n\x00\u2028", "last"]


def documents(shards: Iterable[data.Shard]) -> list[data.Document]:
    return [document for shard in shards for document in shard.open()]


def texts(shards: Iterable[data.Shard]) -> list[str]:
    return [document.text.decode() for document in documents(shards)]


def zstd(content: bytes) -> bytes:
    arrow = pytest.importorskip("pyarrow")
    sink = arrow.BufferOutputStream()
    with arrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def json_lines(values: Sequence[str], field: str = "text") -> bytes:
    return b"".join(json.dumps({"id": i, field: value}).encode() + b"\n" for i, value in enumerate(values))


def write_parquet(file: Path, column: Any, **options: Any) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"id": list(range(len(column))), "text": column}), file, **options)


def write_records(file: Path, values: Sequence[bytes]) -> None:
    module = pytest.importorskip("array_record.python.array_record_module")
    writer = module.ArrayRecordWriter(str(file), "group_size:2")
    for value in values:
        writer.write(value)
    writer.close()


def test_files_of_all_formats_are_shards_in_order_of_their_names(tmp_path: Path) -> None:
    (tmp_path / "b" / "c").mkdir(parents=True)
    (tmp_path / "left").mkdir()
    (tmp_path / "z.txt").write_text("z")
    (tmp_path / "b" / "c" / "a.md").write_bytes(b"\xff no UTF-8")
    (tmp_path / "b" / "lines.jsonl").write_bytes(json_lines(["one", "two"]))
    (tmp_path / "left" / "out.txt").write_text("no")
    (tmp_path / "image.png").write_text("no")
    (tmp_path / "a.py.gz").write_bytes(gzip.compress(b"packed"))
    found = data.shards(tmp_path, leave_out=["left"])
    assert [shard.name for shard in found] == ["a.py.gz", "b/c/a.md", "b/lines.jsonl", "z.txt"]
    assert documents(found) == [
        ("a.py.gz", b"packed"),
        ("b/c/a.md", b"\xff no UTF-8"),
        ("b/lines.jsonl:1", b"one"),
        ("b/lines.jsonl:2", b"two"),
        ("z.txt", b"z"),
    ]
    assert [shard.size for shard in found] == [len((tmp_path / shard.name).read_bytes()) for shard in found]
    assert documents(pickle.loads(pickle.dumps(found))) == documents(found)


def test_a_single_file_is_a_shard(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    assert documents(data.shards(tmp_path / "a.txt")) == [("a.txt", b"text")]
    assert documents(data.shards(f"file://{tmp_path}/a.txt")) == [("a.txt", b"text")]
    (tmp_path / "LICENSE").write_text("text")
    assert documents(data.shards(tmp_path / "LICENSE", [data.plain_text([""])])) == [("LICENSE", b"text")]


def test_the_version_changes_with_the_file(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("text")
    (before,), (same,) = data.shards(tmp_path), data.shards(tmp_path)
    assert before.version == same.version
    file.write_text("text of another length")
    (longer,) = data.shards(tmp_path)
    os.utime(file, ns=(0, 0))
    (older,) = data.shards(tmp_path)
    assert len({before.version, longer.version, older.version}) == 3


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstd, lambda content: 2 * zstd(content)])
def test_json_lines_equal_what_was_written(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    suffix = {bytes: "", gzip.compress: ".gz"}.get(pack, ".zst")
    many = [f"{text}{i}" for i in range(2000) for text in TEXTS]
    (tmp_path / f"a.jsonl{suffix}").write_bytes(pack(json_lines(many, "body")))
    found = texts(data.shards(tmp_path, [data.json_lines("body")]))
    assert found == many * (len(found) // len(many))
    assert len(found) == len(many) * (1 if pack in (bytes, gzip.compress, zstd) else 2)


def test_json_lines_may_be_blank_and_hold_half_characters(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\n{"text": "a"}\n  \n{"text": "\\ud800"}')
    assert documents(data.shards(tmp_path)) == [("a.jsonl:2", b"a"), ("a.jsonl:4", b"\xed\xa0\x80")]


@pytest.mark.parametrize("kind", ["string", "large_string", "binary", "dictionary"])
def test_parquet_equals_what_was_written(tmp_path: Path, kind: str) -> None:
    arrow = pytest.importorskip("pyarrow")
    many = [f"{text}{i}" for i in range(100) for text in TEXTS]
    column = arrow.array(many)
    column = column.dictionary_encode() if kind == "dictionary" else column.cast(kind)
    write_parquet(tmp_path / "a.parquet", column, row_group_size=70)
    assert texts(data.shards(tmp_path)) == many
    assert [d.name for d in documents(data.shards(tmp_path))][:2] == ["a.parquet:1", "a.parquet:2"]


def test_parquet_without_a_value_is_an_empty_document(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ["a", None, "b"])
    assert texts(data.shards(tmp_path)) == ["a", "", "b"]


def read_all(folder: Path) -> tuple[int, int]:
    """The bytes of a shard's documents, and how many of Python's are in memory at most while they are read."""
    tracemalloc.start()
    try:
        size = sum(len(document.text) for document in data.shards(folder)[0].open())
        return size, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_parquet_is_read_by_row_groups(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ["x" * 100_000] * 200, row_group_size=10, use_dictionary=False)
    size, peak = read_all(tmp_path)
    assert (size, peak < size / 2) == (20_000_000, True)


def test_of_long_texts_that_parquet_stores_once_few_are_in_memory(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ["x" * 1_000_000] * 50)
    assert (tmp_path / "a.parquet").stat().st_size < 100_000
    size, peak = read_all(tmp_path)
    assert (size, peak < 6_000_000) == (50_000_000, True)


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet", "array_record"])
def test_a_document_that_is_too_long_is_refused(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "LARGEST_DOCUMENT", 99)
    file = tmp_path / f"a.{kind}"
    write = {
        "txt": lambda: file.write_text("x" * 100),
        "jsonl": lambda: file.write_text(json.dumps({"text": "x" * 100})),
        "parquet": lambda: write_parquet(file, ["x" * 100]),
        "array_record": lambda: write_records(file, [b"x" * 100]),
    }
    write[kind]()
    with pytest.raises(data.UnreadableError, match="is longer than the 99 bytes of a document; cut it up"):
        texts(data.shards(tmp_path))


def test_array_records_equal_what_was_written(tmp_path: Path) -> None:
    file = tmp_path / "a.array_record"
    write_records(file, [b'{"t": %d}' % i for i in range(50)])
    found = data.shards(tmp_path, [data.array_record(lambda record: b"%d" % json.loads(record)["t"])])
    assert texts(found) == [str(i) for i in range(50)]
    file.with_suffix(".array_record.gz").write_bytes(gzip.compress(file.read_bytes()))
    file.unlink()
    with pytest.raises(data.UnreadableError, match=r"a\.array_record\.gz can't be read: .*unpack it"):
        texts(data.shards(tmp_path))


def test_hugging_face_datasets_equal_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    many = [f"{text}{i}" for i in range(50) for text in TEXTS]
    table = datasets.Dataset.from_dict({"id": list(range(250)), "body": many})
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table, "test": table.select(range(3))}).save_to_disk(tmp_path / "two")
    found = data.hugging_face(tmp_path / "one", column="body", rows=100)
    assert [len(list(shard.open())) for shard in found] == [100, 100, 50]
    assert texts(found) == many
    assert len({shard.version for shard in found}) == 1
    assert texts(data.hugging_face(tmp_path / "two", split="test", column="body")) == many[:3]
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: {("hub/name", "train"): table}[name, split])
    assert texts(data.hugging_face("hub/name", column="body")) == many
    with pytest.raises(ValueError, match="no column 'text'; it has id, body"):
        data.hugging_face(tmp_path / "one")
    with pytest.raises(ValueError, match="no split 'dev'; it has train, test"):
        data.hugging_face(tmp_path / "two", split="dev", column="body")
    with pytest.raises(data.UnreadableError, match=r"one:train:0 can't be read: row 0 has int, not a string, in 'id'"):
        documents(data.hugging_face(tmp_path / "one", column="id"))


def test_urls_are_read_as_files_are(tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    write_parquet(tmp_path / "p.parquet", TEXTS)
    write_records(tmp_path / "r.array_record", [b"record"])
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.jsonl.gz").write_bytes(gzip.compress(json_lines(TEXTS)))
    (tmp_path / "folder" / "b.jsonl.zst").write_bytes(zstd(json_lines(TEXTS)))
    (tmp_path / "t.txt").write_text("text")
    try:
        memory.put(str(tmp_path), "/corpus", recursive=True)
        found = data.shards("memory://corpus")
        assert [shard.name for shard in found] == [shard.name for shard in data.shards(tmp_path)]
        assert documents(found) == documents(data.shards(tmp_path)) == documents(data.shards(f"file://{tmp_path}"))
        assert documents(data.shards("memory://corpus/t.txt")) == [("t.txt", b"text")]
        before = found[-1].version
        assert data.shards("memory://corpus")[-1].version == before
        memory.pipe("/corpus/t.txt", b"texts")
        assert data.shards("memory://corpus")[-1].version != before
        with pytest.raises(FileNotFoundError, match="memory://nothing"):
            data.shards("memory://nothing")
    finally:
        memory.store.clear()


@pytest.mark.parametrize("name", ["../evil.txt", "a/../../evil.txt"])
def test_names_that_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    pytest.importorskip("fsspec")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as packed:
        packed.writestr("fine.txt", "fine")
        packed.writestr(name, "evil")
    with pytest.raises(ValueError, match=r"leaves it, '.*evil.txt'; rename or remove it"):
        data.shards(f"zip://::file://{tmp_path}/a.zip")


def test_links_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "folder" / "a.txt").write_text("a")
    (tmp_path / "folder" / "b.txt").symlink_to(tmp_path / "folder" / "a.txt")
    assert texts(data.shards(tmp_path / "folder")) == ["a", "a"]
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    assert texts(data.shards(tmp_path / "link")) == ["a", "a"]  # it was named itself
    (tmp_path / "folder" / "c.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"c.txt is a link to .*secret, out of the folder"):
        data.shards(tmp_path / "folder")


@pytest.mark.parametrize("read", [data.shards, data.text_files])
def test_links_to_folders_and_to_nothing_are_refused_unless_what_they_lead_to_is_read(
    read: Any, tmp_path: Path
) -> None:
    for name in ("in/folder", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.txt").write_text("a")
    (tmp_path / "in" / "again").symlink_to("folder")
    assert len(list(read(tmp_path / "in"))) == 1
    (tmp_path / "in" / "more").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"more is a link to .*elsewhere, out of the folder"):
        read(tmp_path / "in")
    assert len(list(read(tmp_path / "in", leave_out=["more"]))) == 1
    (tmp_path / "in" / "more").unlink()
    (tmp_path / "in" / "gone.txt").symlink_to("folder/gone.txt")
    with pytest.raises(ValueError, match=r"gone.txt is a link to .*gone.txt, where nothing is"):
        read(tmp_path / "in")


def test_what_would_block_for_ever_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(ValueError, match=r"a.txt is not a regular file"):
        data.shards(tmp_path)


def test_nothing_to_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "image.png").touch()
    with pytest.raises(ValueError, match=r"has no text: no file's name ends in one of .txt, .md, .*.parquet"):
        data.shards(tmp_path)
    with pytest.raises(FileNotFoundError, match="missing is neither a file nor a folder"):
        data.shards(tmp_path / "missing")


def test_a_column_that_is_not_there_is_named(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", TEXTS)
    with pytest.raises(data.UnreadableError, match="no column 'body'; there is id, text"):
        documents(data.shards(tmp_path, [data.parquet("body")]))


def test_a_package_that_is_missing_is_named_with_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").touch()
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pyarrow isn't there .*pip install 'jaxlm\[data\]'"):
        documents(data.shards(tmp_path))
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'jaxlm\[datasets\]'"):
        data.hugging_face("name")


def test_a_reader_of_ones_own_reads_any_format(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("1,one\n2,two\n")

    def read(stream: Iterable[bytes], name: str) -> Iterable[data.Document]:
        for line in itertools.islice(stream, None):
            yield data.Document(name, line.rstrip().partition(b",")[2])

    assert texts(data.shards(tmp_path, [Reader((".csv",), read)])) == ["one", "two"]


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz", "a.txt.zst", "a.jsonl.zst", "a.txt", "a.jsonl"])
def test_what_unpacks_to_more_than_a_document_may_have_is_refused_before_it_is_in_memory(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit, unit = ("LARGEST_DOCUMENT", "document") if ".txt" in name else ("LARGEST", "line")
    monkeypatch.setattr(sources, limit, 2**21)
    pack = {".gz": gzip.compress, ".zst": zstd}.get(name[name.rindex(".") :], bytes)

    def shard(size: int) -> data.Shard:
        text = b"a" * size if ".txt" in name else b'{"text": "' + b"a" * (size - 13) + b'"}\n'
        (tmp_path / name).write_bytes(pack(text))
        (found,) = data.shards(tmp_path)
        return found

    (document,) = shard(2**21).open()
    assert set(document.text) == {ord("a")}
    small, large = shard(2**21 + 1), 2**27
    with pytest.raises(data.UnreadableError, match=f"is longer than the 2097152 bytes of a {unit}; cut it"):
        list(small.open())
    bomb = shard(large)
    assert bomb.size < large / 500 or pack is bytes
    tracemalloc.start()
    try:
        with pytest.raises(data.UnreadableError, match="is longer than the 2097152 bytes"):
            list(bomb.open())
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


class Remote(io.RawIOBase):
    """What some file systems of fsspec's open: its `readline` takes no size."""

    def __init__(self, content: bytes):
        self.content = io.BytesIO(content)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self.content.readinto(buffer)

    def readline(self) -> bytes:  # type: ignore[override]
        return self.content.readline()


def test_lines_are_read_from_files_whose_readline_takes_no_size() -> None:
    read = data.json_lines().read(Remote(json_lines(TEXTS)), "a.jsonl")
    assert [document.text.decode() for document in read] == TEXTS
