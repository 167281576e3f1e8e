"""One process writes to a folder: the second is refused at once, whatever ended the first lets go of it."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxlm import checkpoint, files, metrics
from jaxlm.watchdog import watching

HOLD = "import pathlib, runpy, sys, time; lock = runpy.run_path(sys.argv[1])['lock'](pathlib.Path(sys.argv[2])); "
HOLD += "print('held', flush=True); time.sleep(100)"


def holder(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLD, files.__file__, str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_file_that_is_too_large_to_be_read_whole_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "manifest.json").open("wb") as file:
        file.truncate(files.LARGEST + 1)  # of nothing
    for read in (files.read_json, files.read_signed, files.read_small):
        with pytest.raises(ValueError, match=f"manifest.json has {files.LARGEST + 1} bytes, more than any such file"):
            read(tmp_path / "manifest.json")


@pytest.mark.parametrize("change", [lambda text: text.replace("1", "2"), lambda text: text + " ", str.upper])
def test_what_is_signed_is_read_as_it_was_written_or_not_at_all(change: Callable[[str], str], tmp_path: Path) -> None:
    content = {"a": [1, 2.5, None, "\ud800 ž"], "b": {"c": True}}
    path = tmp_path / "x.json"
    path.write_text(text := files.signed(content))
    assert files.read_signed(path) == content
    path.write_text(change(text))
    with pytest.raises(ValueError, match=r"x.json is damaged"):
        files.read_signed(path)


def test_a_second_process_is_refused_in_a_second_and_told_who_holds_it(tmp_path: Path) -> None:
    process = holder(tmp_path)
    try:
        begun = time.perf_counter()
        with pytest.raises(RuntimeError, match=f"in use by process {process.pid} on .*; wait until that ends"):
            files.lock(tmp_path)
        with pytest.raises(RuntimeError, match="in use by"):
            files.lock(tmp_path)
        assert time.perf_counter() - begun < 1
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    files.lock(tmp_path)()


def test_a_run_in_progress_loses_nothing_to_a_second_start(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"heads": 3}')
    (tmp_path / "corpus").mkdir()
    process = holder(tmp_path)
    try:
        with pytest.raises(RuntimeError, match="in use by"):
            metrics.open_run(tmp_path, {"heads": 2}, __file__)
    finally:
        process.kill()
        process.communicate()
    assert (tmp_path / "corpus").exists()
    assert (tmp_path / "config.json").read_text() == '{"heads": 3}'


def test_the_same_process_may_hold_it_again_and_lets_go_as_often(tmp_path: Path) -> None:
    first, second = files.lock(tmp_path), files.lock(tmp_path / "." / "")
    first()
    child = subprocess.run([sys.executable, "-c", HOLD, files.__file__, str(tmp_path)], capture_output=True, text=True)
    assert f"in use by process {os.getpid()}" in child.stderr
    second()
    process = holder(tmp_path)
    process.kill()
    process.communicate()


def test_a_place_without_a_folder_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="none"):
        files.lock(tmp_path / "none")


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "file"
    files.write_whole(path, "before")
    with pytest.raises(UnicodeEncodeError):
        files.write_whole(path, "\ud800")
    assert path.read_text() == "before"
    files.write_whole(path, "after")
    assert path.read_text() == "after"


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"3", b'{"a": ', b"\xff{}", b'{"a": ' + b"9" * 5000 + b"}", b'{"a": ' * 101 + b"1" + b"}" * 101]
    + [b'{"a": ' + b"[" * n + b"]" * n + b"}" for n in (100, 900, 100_000)],
    ids=[
        "nothing",
        "list",
        "number",
        "cut off",
        "no UTF-8",
        "huge",
        "objects",
        *map("{} lists".format, (100, 900, 10**5)),
    ],
)
def test_json_that_is_no_object_or_too_deep_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"some.json is damaged: ") as error:
        files.read_json(path)
    assert type(error.value) is ValueError


def test_json_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    deep = functools.reduce(lambda inner, _: [inner], range(98), 1)
    found = {"name": "\udcff é", "deep": deep, "nan": None, "counts": [1, 2**62]}
    path.write_text(json.dumps(found))
    assert files.read_json(path) == found


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, str], ids=["pipe", "folder", "nothing"])
def test_what_is_no_file_is_not_waited_for(make: Callable[[Path], object], tmp_path: Path) -> None:
    make(tmp_path / "some.json")
    with pytest.raises(FileNotFoundError, match=r"some.json is not there, or no file"):
        files.read_json(tmp_path / "some.json")


@pytest.mark.parametrize("name", [".lock", ".notes.json.unfinished", "stacks.txt", "3.unfinished"])
def test_nothing_is_written_through_links_in_a_folder_from_elsewhere(name: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    precious = tmp_path / "precious"
    precious.write_text("precious")
    (tmp_path / "run" / name).symlink_to(precious)
    if name == ".lock":
        with pytest.raises(OSError, match=r"symbolic links: .*run/.lock"):
            checkpoint.Checkpoints(tmp_path / "run", {})
    else:
        files.write_whole(tmp_path / "run" / "notes.json", "{}")
        with watching(tmp_path / "run" / "stacks.txt", seconds=100), checkpoint.Checkpoints(tmp_path / "run", {}):
            pass
        assert not (tmp_path / "run" / name).is_symlink()
    assert precious.read_text() == "precious"


@pytest.mark.parametrize(
    ("text", "without"),
    [
        ("s3://me:hush@host/x", "s3://...@host/x"),
        ("s3://me:hu/sh@host/x", "s3://...@host/x"),
        ("see https://me@host and s3://you:hu+/sh=@host", "see https://...@host and s3://...@host"),
        ("https://host/a@b", "https://host/a@b"),
        ("https://host:8080/a@b", "https://host:8080/a@b"),
        ("https://host?token=hush&part=2", "https://host?token=...&part=2"),
        ("https://host/x#access_token=hush", "https://host/x#access_token=..."),
        ("https://host/x;Password=hush;part=2?auth=hush", "https://host/x;Password=...;part=2?auth=..."),
        ("https://host/x?author=me", "https://host/x?author=me"),
        ('"s3://host?token=\\"', '"s3://host?token=..."'),
    ],
)
def test_secrets_of_urls_are_left_out_and_nothing_else(text: str, without: str) -> None:
    assert files.redacted(text) == without
    assert files.redacted({"a": [text, 1], "b": (None, {"c": text})}) == {
        "a": [without, 1],
        "b": [None, {"c": without}],
    }
