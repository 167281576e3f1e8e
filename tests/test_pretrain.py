"""The main job: interrupted and resumed it equals the uninterrupted one, and bad input is refused before it costs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "experiments" / "pretrain.py"
SMALL = [
    "--layers=1",
    "--width=16",
    "--heads=2",
    "--row-lengths",
    "32",
    "64",
    "--tokens-per-batch=512",
    "--save-every=20",
]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for i in range(80):
        (folder / f"{i}.txt").write_text("".join(f"{i * j % 17} times {j} " for j in range(i % 30 + 5)))
    return folder


def command(folder: Path, text: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = os.environ | {"JAXLM_CACHE": str(SCRIPT.parents[1] / ".cache"), "COLUMNS": "200"}
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), "--text", str(text), *SMALL, *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output
    return output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_interrupted_and_run_again_writes_the_same_metrics(number: signal.Signals, text: Path, tmp_path: Path) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    straight.mkdir()
    broken.mkdir()
    finish(command(straight, text, "--steps", "90"))

    process = command(broken, text, "--steps", "90")
    log = broken / "runs" / "pretrain" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not (log.exists() and log.read_text().count("\n") >= 47):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(number)
    if number == signal.SIGKILL:
        process.communicate()
    else:
        assert "To go on: " in finish(process, 75)
        assert 47 <= len(log.read_text().splitlines()) < 90
    assert "going on from step" in finish(command(broken, text, "--steps", "90"))

    for name in ("metrics.jsonl", "results.json"):
        ours, theirs = (folder / "runs" / "pretrain" / name for folder in (straight, broken))
        assert ours.read_text() == theirs.read_text()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 91))
    assert [line["step"] for line in lines if "heldout" in line] == [1, 21, 41, 61, 81]
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]


def test_a_run_leaves_all_that_it_takes_to_repeat_it(text: Path, tmp_path: Path) -> None:
    finish(command(tmp_path, text, "--steps", "3"))
    run = tmp_path / "runs" / "pretrain"
    names = {path.name for path in run.iterdir()}
    assert names >= {"config.json", "versions.json", "pretrain.py", "metrics.jsonl", "timing.jsonl", "report.html"}
    assert (run / "pretrain.py").read_text() == SCRIPT.read_text()
    assert json.loads((run / "config.json").read_text())["steps"] == 3
    assert "jax" in json.loads((run / "versions.json").read_text())
    page = (run / "report.html").read_text()
    assert page.count("<svg") == 1
    assert "http" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    ).replace("https://matplotlib.org", "")

    output = finish(command(tmp_path, text, "--steps", "4"), 1)
    assert "belongs to another configuration: steps is 3 there and 4 here" in output
    assert "going on from step 3" in finish(command(tmp_path, text, "--steps", "3"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--heads", "3"], "width 16 is not divisible by 3 heads"),
        (["--tokens-per-batch", "500"], "500 tokens per batch is not a positive multiple"),
        (["--microbatches", "3"], "not divisible into 3 microbatches"),
        (["--row-lengths", "1"], "row lengths [1]"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_numbers_are_refused_by_name(arguments: list[str], message: str, text: Path, tmp_path: Path) -> None:
    assert message in finish(command(tmp_path, text, *arguments), 1)


def test_a_folder_without_text_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "has no text" in finish(command(tmp_path, tmp_path / "empty"), 1)
    (tmp_path / "empty" / "one.txt").write_text("")
    assert "no documents in the train split" in finish(command(tmp_path, tmp_path / "empty"), 1)
    (tmp_path / "empty" / "one.txt").unlink()
    assert not list(tmp_path.rglob("*.bin"))
