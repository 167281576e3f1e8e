"""What of a source can't be read is named, with its file and line, and never left out without a word."""

import errno
import gzip
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_sources import TEXTS, documents, json_lines, write_parquet, write_records, zstd

from jaxlm import data


@pytest.mark.parametrize("read", [data.shards, data.text_files])
def test_a_folder_that_cannot_be_read_is_not_left_out(
    read: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scandir(path: Path, scandir: Callable[[Path], Any] = os.scandir) -> Any:
        if Path(path).name == "locked":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return scandir(path)

    (tmp_path / "locked").mkdir()
    (tmp_path / "a.txt").write_text("a")
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError, match="locked"):
        read(tmp_path)


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def parquet_bytes(folder: Path, column: Any = TEXTS) -> bytes:
    write_parquet(folder / "whole", column)
    return (folder / "whole").read_bytes()


def record_bytes(folder: Path) -> bytes:
    write_records(folder / "whole", [b"%d" % i * 50 for i in range(999)])
    return (folder / "whole").read_bytes()


def flipped(content: bytes) -> bytes:
    return content[:9000] + bytes([content[9000] ^ 255]) + content[9001:]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", lambda _: b'{"text": "a"}\n{"text": "b', "line 2 is not JSON"),
        ("a.jsonl", lambda _: b'{"text": "a"}\n\n[1]\n', "line 3 is not an object with a field 'text'"),
        ("a.jsonl", lambda _: b'{"body": "a"}\n', "line 1 is not an object with a field 'text'"),
        ("a.jsonl", lambda _: b'{"text": null}\n', "line 1 has NoneType, not a string, in 'text'"),
        ("a.jsonl", lambda _: b'{"text": "\xff"}\n', "line 1 is not JSON"),
        ("a.jsonl", lambda _: b"[" * 100_000, "line 1 is not JSON"),
        ("a.jsonl.gz", lambda _: cut(gzip.compress(json_lines(TEXTS * 99))), "ended before the end-of-stream marker"),
        ("a.jsonl.gz", lambda _: gzip.compress(json_lines(TEXTS))[:-8], "ended before the end-of-stream marker"),
        ("a.jsonl.gz", lambda _: json_lines(TEXTS), "Not a gzipped file"),
        ("a.jsonl.gz", lambda _: b"", "it is empty"),
        ("a.jsonl.zst", lambda _: cut(zstd(json_lines(TEXTS * 99))), "Truncated"),
        ("a.jsonl.zst", lambda _: zstd(json_lines(TEXTS))[:-1], "Truncated"),
        ("a.jsonl.zst", lambda _: json_lines(TEXTS), "ZSTD decompress failed"),
        ("a.jsonl.zst", lambda _: b"", "it is empty"),
        ("a.parquet", lambda folder: cut(parquet_bytes(folder)), "Parquet magic bytes not found"),
        ("a.parquet", lambda _: b"PAR1", "[Pp]arquet"),
        ("a.parquet", lambda folder: parquet_bytes(folder, [1, 2]), "[Cc]ast"),
        ("a.array_record", lambda folder: cut(record_bytes(folder)), "no whole ArrayRecord file"),
        ("a.array_record", lambda folder: flipped(record_bytes(folder)), "Corrupted"),
    ],
)
def test_damage_is_named_with_its_file(
    tmp_path: Path, name: str, content: Callable[[Path], bytes], message: str
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / name).write_bytes(content(tmp_path))
    with pytest.raises(data.UnreadableError, match=rf"{name} can't be read: .*{message}"):
        documents(data.shards(tmp_path / "folder"))
