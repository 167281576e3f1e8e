"""Documents come in order, one at a time, and from nowhere else than asked."""

import itertools
import platform
import shutil
import sysconfig
from collections.abc import Iterable
from pathlib import Path

import pytest

from jaxlm import data


def make_files(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def test_text_files_are_in_order_of_their_names(tmp_path: Path) -> None:
    make_files(tmp_path, ["b.py", "a/z.md", "c.txt", "a/b/c.txt", "a.txt", "d.bin", "txt", "e.py~"])
    (tmp_path / "folder.txt").mkdir()
    documents = list(data.text_files(tmp_path))
    assert [document.name for document in documents] == ["a/b/c.txt", "a/z.md", "a.txt", "b.py", "c.txt"]
    assert all(document.text.decode() == document.name for document in documents)
    assert [document.name for document in data.text_files(tmp_path, [".bin", ".py"])] == ["b.py", "d.bin"]


def test_links_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "folder" / "a.txt").write_text("a")
    (tmp_path / "folder" / "b.txt").symlink_to("a.txt")
    (tmp_path / "folder" / "c.txt").symlink_to("../secret")
    with pytest.raises(ValueError, match=r"c.txt is a link to .*secret, out of the folder"):
        data.text_files(tmp_path / "folder")
    found = list(data.text_files(tmp_path / "folder", leave_out=["c.txt"]))
    assert [(document.name, document.text) for document in found] == [("a.txt", b"a"), ("b.txt", b"a")]


def test_text_files_are_read_when_they_are_asked_for(tmp_path: Path) -> None:
    make_files(tmp_path, ["a.txt", "b.txt"])
    documents = data.text_files(tmp_path)
    next(documents)
    (tmp_path / "b.txt").write_text("changed")
    assert next(documents).text == b"changed"


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("missing", FileNotFoundError, "missing is not a folder"),
        ("folder/image.png", FileNotFoundError, "image.png is not a folder"),
        ("folder", ValueError, r"folder has no text: .*'\.md'"),
    ],
)
def test_text_files_refuses_at_once(tmp_path: Path, name: str, error: type[Exception], message: str) -> None:
    make_files(tmp_path, ["folder/image.png"])
    with pytest.raises(error, match=message):
        data.text_files(tmp_path / name)


def test_python_library_leaves_out_tests_and_what_was_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = ["json/decoder.py", "os.py", "testing.py", "unittest/case.py"]
    unwanted = [
        "test/a.py",
        "json/tests/a.py",
        "idlelib/idle_test/a.py",
        "site-packages/a/b.py",
        "os.pyc",
        "README.txt",
    ]
    make_files(tmp_path, wanted + unwanted)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert [document.name for document in data.python_library()] == wanted


def test_python_library_reads_only_what_it_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_files(tmp_path, ["os.py", "site-packages/a/b.py"])
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    documents = data.python_library()
    shutil.rmtree(tmp_path / "site-packages")
    assert [document.name for document in documents] == ["os.py"]


def test_python_library_is_there() -> None:
    documents = list(itertools.islice(data.python_library(), 200))
    assert len({document.name for document in documents}) == 200
    assert sum(len(document.text) for document in documents) > 1e6


def test_each_python_has_its_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "library").mkdir()
    for i in range(100):
        (tmp_path / "library" / f"{i}.py").write_text(str(i))
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "library")})
    paths: set[Path] = set()
    for version in ("3.11.7", "3.13.0"):
        monkeypatch.setattr(platform, "python_version", lambda version=version: version)
        paths |= {data.python_library_corpus(tmp_path / "cache", data.ByteTokenizer())}
    assert len(paths) == 2
    assert {data.open_corpus(path).manifest["documents"] for path in paths} == {100}


def test_a_file_that_is_no_document_for_its_size_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "b.txt").open("wb") as file:
        file.truncate(2**30 + 1)  # of nothing
    (tmp_path / "a.txt").write_bytes(b"fine")
    documents = data.text_files(tmp_path)
    assert next(documents).text == b"fine"
    with pytest.raises(ValueError, match=r"b.txt has 1073741825 bytes, and a document 1073741824 at most; cut it"):
        next(documents)
