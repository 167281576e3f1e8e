"""The main job: interrupted and resumed it equals the uninterrupted one, and bad input is refused before it costs."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from processes import listening

from jaxlm import data, generate, metrics
from jaxlm.data.ingest import is_heldout

SCRIPT = Path(__file__).parents[1] / "experiments" / "pretrain.py"
SMALL = [
    "--layers=1",
    "--width=16",
    "--row-lengths",
    "32",
    "64",
    "--tokens-per-batch=512",
    "--save-every=20",
    "--steps=300",
]


@pytest.fixture(scope="module")
def straight(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was never interrupted."""
    folder = tmp_path_factory.mktemp("straight")
    finish(start(folder, text))
    return folder / "runs" / "pretrain"


def start(folder: Path, text: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), "--text", str(text), *SMALL, *arguments],
        cwd=folder,
        env=os.environ | {"JAXLM_CACHE": str(SCRIPT.parents[1] / ".cache"), "COLUMNS": "200", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output
    return output


def wait_for_lines(log: Path, lines: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 200
    while not (log.exists() and log.read_text().count("\n") >= lines):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)], ids=lambda number: number.name
)
def test_interrupted_and_run_again_writes_the_same_metrics_and_compiles_nothing_once_begun(
    number: signal.Signals, straight: Path, text: Path, tmp_path: Path
) -> None:
    process = start(tmp_path, text)
    run = tmp_path / "runs" / "pretrain"
    wait_for_lines(run / "metrics.jsonl", 47, process)
    assert sys.platform != "linux" or not [*listening(process.pid)]
    process.send_signal(number)
    if number == signal.SIGKILL:
        process.communicate()
    else:
        assert "To go on: " in finish(process, 75)
        assert 47 <= len((run / "metrics.jsonl").read_text().splitlines()) < 300
    until_then = (run / "timing.jsonl").read_text().splitlines()[:20]
    output = finish(start(tmp_path, text, JAX_LOG_COMPILES="1"))
    assert (run / "timing.jsonl").read_text().splitlines()[:20] == until_then  # it went on, and didn't begin anew
    for name in ("metrics.jsonl", "results.json"):
        assert (run / name).read_text() == (straight / name).read_text()
    begun, ended = output.index(" tok/s "), output.index("300/300")
    assert "Compiling" in output[:begun]
    assert "Compiling" not in output[begun:ended]


# SIGTERM while the last checkpoint is being written. Before a state is restored there is none on the devices.
SIGTERM_AT_THE_END = """
import os, runpy, signal, sys, time
import jax
from jaxlm.checkpoint import Checkpoints, _folder
def restore(self, like, restore=Checkpoints.restore, **options):
    assert sum(array.nbytes for array in jax.live_arrays()) < 1000
    return restore(self, like, **options)
Checkpoints.restore = restore
def commit(folder, step, manifest, commit=_folder.commit):
    if step == 30:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)
    commit(folder, step, manifest)
_folder.commit = commit
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_signal_during_the_last_save_loses_nothing(text: Path, tmp_path: Path) -> None:
    program = [sys.executable, "-c", SIGTERM_AT_THE_END, str(SCRIPT)]
    command = [*program, "--text", str(text), *SMALL, "--steps=30"]
    cache = os.environ | {"JAXLM_CACHE": str(SCRIPT.parents[1] / ".cache")}
    done = subprocess.run(command, cwd=tmp_path, env=cache, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/pretrain/checkpoints/30").exists()


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_loses_nothing(straight: Path, text: Path, tmp_path: Path) -> None:
    limit = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)); "
    program = limit + "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    process = start(tmp_path, text)
    wait_for_lines(tmp_path / "runs" / "pretrain" / "metrics.jsonl", 25, process)
    process.kill()
    process.communicate()
    limited = [sys.executable, "-c", program, *process.args[1:]]  # type: ignore[index]
    cache = os.environ | {"JAXLM_CACHE": str(tmp_path / "cache")}  # a full disk must not cut off what others use
    failed = subprocess.run(limited, cwd=tmp_path, env=cache, capture_output=True, text=True, check=False)
    assert failed.returncode == 75
    assert "checkpoint 40 was not saved: File too large; the older ones are intact" in failed.stderr
    assert "OSError: [Errno 27] File too large" in failed.stderr  # of the metrics, without which there is no run
    finish(start(tmp_path, text))
    metrics = "runs/pretrain/metrics.jsonl"
    assert (tmp_path / metrics).read_text() == (straight / "metrics.jsonl").read_text()


@pytest.mark.slow
def test_a_second_start_is_refused_and_other_devices_go_on(straight: Path, text: Path, tmp_path: Path) -> None:
    process = start(tmp_path, text)
    run = tmp_path / "runs" / "pretrain"
    wait_for_lines(run / "metrics.jsonl", 25, process)
    process.send_signal(signal.SIGSTOP)  # or it would be done before the other has begun
    assert f"is in use by process {process.pid} on " in finish(start(tmp_path, text), 1)
    assert process.poll() is None
    process.kill()
    process.communicate()
    finish(start(tmp_path, text, "--zero=3", "--save-every=150", JAX_NUM_CPU_DEVICES="4"))
    assert json.loads((run / "config.json").read_text())["save_every"] == 150
    ours, theirs = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (run, straight)
    )
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    assert [line["loss"] for line in ours[:30]] == pytest.approx([line["loss"] for line in theirs[:30]], rel=1e-4)


def test_the_metrics_have_a_line_for_each_step_and_the_loss_falls(straight: Path) -> None:
    lines = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 301))
    assert [line["step"] for line in lines if "heldout" in line] == list(range(1, 301, 20))
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]


def test_a_run_leaves_all_that_it_takes_to_repeat_it(straight: Path, text: Path) -> None:
    assert (straight / "pretrain.py").read_text() == SCRIPT.read_text()
    assert json.loads((straight / "config.json").read_text())["steps"] == 300
    (begun,) = metrics.read_starts(straight)
    assert begun["step"] == 0
    assert begun.keys() > {"command", "sources", "data", "jax", "devices"}
    assert "<svg" in (straight / "report.html").read_text()
    output = finish(start(straight.parents[1], text, "--steps", "301"), 1)
    assert "belongs to another configuration: steps is 300 there and 301 here" in output


def corpus_with_noise(path: Path, batch: int) -> None:
    """A corpus of lines that are alike, but for those in a batch, whose letters are random."""
    texts = [f"{i % 1000} is followed by {i % 1000 + 1}, which is followed by".encode() for i in range(6000)]
    data.write_corpus(path, (data.Document(str(i), text) for i, text in enumerate(texts)), data.ByteTokenizer())
    corpus, rng = data.open_corpus(path), np.random.default_rng(0)
    pieces = data.pack(corpus.lengths, (32, 64), 512, 0).batch(batch).pieces
    noisy = set(np.searchsorted(corpus.offsets, pieces["start"], "right") - 1)
    kept = iter(range(len(corpus)))
    shutil.rmtree(path)
    for i, text in enumerate(texts):
        if not is_heldout(text, 0.04) and next(kept) in noisy:
            while is_heldout(texts[i], 0.04) or texts[i] == text:
                texts[i] = rng.integers(33, 127, len(text), np.uint8).tobytes()
    data.write_corpus(path, (data.Document(str(i), text) for i, text in enumerate(texts)), data.ByteTokenizer())


@pytest.mark.slow
def test_a_spike_is_gone_back_from_and_its_batches_left_out(tmp_path: Path) -> None:
    run, corpus = tmp_path / "runs" / "pretrain", tmp_path / "corpus"
    corpus_with_noise(corpus, batch=200)
    output = finish(start(tmp_path, corpus, "--spikes=6"), 75)
    said = r"the loss of step 201 is .*: back to step 100, without the batches \[\(100, 301\)\]"
    assert re.search(said, output), output
    finish(start(tmp_path, corpus, "--spikes=6"))
    assert json.loads((run / "skips.json").read_text())["batches"] == [[100, 301]]
    assert [(begun["step"], begun["skips"]) for begun in metrics.read_starts(run)] == [(0, []), (100, [[100, 301]])]
    assert [line["step"] for line in metrics.read_log(run / "metrics.jsonl")] == list(range(1, 301))
    never = tmp_path / "never" / "runs" / "pretrain"  # had those batches
    never.mkdir(parents=True)
    shutil.copy(run / "skips.json", never)
    finish(start(tmp_path / "never", corpus))
    assert (never / "metrics.jsonl").read_bytes() == (run / "metrics.jsonl").read_bytes()
    one, other = (generate.load_model(folder / "checkpoints") for folder in (never, run))
    jax.tree.map(np.testing.assert_array_equal, one[1], other[1])


@pytest.mark.slow
def test_one_core_computes_the_same_bits(straight: Path, text: Path, tmp_path: Path) -> None:
    process = start(tmp_path, text, NPROC="1")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(process.pid, {min(os.sched_getaffinity(0))})
    finish(process)
    assert (tmp_path / "runs/pretrain/metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()


OUTSIDE = ["", ".", "..", "/", "/elsewhere", "../elsewhere", "a/..", "a/../..", "a/../../b", "./../b", "a/./b", "a//b"]
OUTSIDE += ["a/", "/a/", "//a", "~", "~/a", "$HOME/a", "a\0b", "a\nb", "a b", "a\\..\\b", "..\\b", "C:\\b", "C:b"]
OUTSIDE += ["\u2024\u2024/a", "\uff0e\uff0e/a", "..\uff0fa", "a/.hidden", ".hidden", "-rf", "%2e%2e/a", "file:///a"]
OUTSIDE += ["s3://a/b", "link", "link/a", "a" * 300, "/".join("abcdefghijkl")]


def test_a_run_stays_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location("pretrain_alone", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    pretrain = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, pretrain)
    spec.loader.exec_module(pretrain)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "link").symlink_to(tmp_path / "elsewhere")
    for name in OUTSIDE:
        with pytest.raises(ValueError, match="must be a folder within runs"):
            pretrain.main(pretrain.Config(name=name))
    assert not any((tmp_path / "elsewhere").iterdir())
    assert {path.name for path in tmp_path.iterdir()} == {"elsewhere", "runs"}
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"link"}


@pytest.mark.slow
def test_a_nan_is_found_by_the_number_of_its_step_alone(text: Path, tmp_path: Path) -> None:
    wrong = ("--steps=40", "--learning-rate=1e30")
    output = finish(start(tmp_path, text, *wrong), 1)
    assert "the loss or gradient of steps 2 to 21 isn't finite" in output
    run = tmp_path / "runs" / "pretrain"

    def record() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in run.glob("[!.]*") if path.is_file()}

    before = record()
    output = finish(start(tmp_path, text, *wrong, "--debug-nans=2"))
    assert re.search(r"Step 2, which takes batch 1: \w+, in the backward pass, .*jaxlm/.*\.py:\d+", output)
    assert record() == before


@pytest.mark.slow
def test_no_secret_is_written_or_said(text: Path, tmp_path: Path) -> None:
    secrets = {"TOKEN": "canary-of-the-environment"}
    url = "s3://canary:canary@host/x?X-Amz-Signature=canary&part=2"
    said = finish(start(tmp_path, text, "--text", url, "--name", "refused", **secrets), 1)
    said += finish(start(tmp_path, text, "--steps=40", "--learning-rate=1e30", **secrets), 1)
    hangs = start(tmp_path, text, "--name", "hangs", "--patience=6", **secrets)
    wait_for_lines(tmp_path / "runs" / "hangs" / "metrics.jsonl", 2, hangs)
    hangs.send_signal(signal.SIGSTOP)
    said += finish(hangs, -signal.SIGKILL)
    stopped = start(tmp_path, text, "--name", "stopped", "--steps=3000", **secrets)
    wait_for_lines(tmp_path / "runs" / "stopped" / "metrics.jsonl", 2, stopped)
    stopped.terminate()
    said += finish(stopped, 75)
    aborted = start(tmp_path, text, "--name", "aborted", "--steps=3000", **secrets)
    wait_for_lines(tmp_path / "runs" / "aborted" / "metrics.jsonl", 2, aborted)
    aborted.send_signal(signal.SIGABRT)  # as the watchdog does
    said += finish(aborted, -signal.SIGABRT)
    assert (tmp_path / "runs" / "aborted" / "stacks-0.txt").stat().st_size > 1000
    assert "s3://...@host/x?X-Amz-Signature=...&part=2 is not a folder" in said
    assert "made no progress" in said
    assert "canary" not in said
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 50
    assert not [path for path in written if b"canary" in path.read_bytes()]


@pytest.mark.slow
def test_a_corpus_is_learnt_with_its_own_tokenizer(text: Path, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    tokenizer = data.train_bpe(data.text_files(text), 300)
    data.write_corpus(tmp_path / "corpus", data.shards(text), tokenizer, heldout=0.2)
    output = finish(start(tmp_path, tmp_path / "corpus", "--steps=3"))
    assert "sample: def" in output
    _, _, found = generate.load_model(tmp_path / "runs" / "pretrain" / "checkpoints")
    assert found == tokenizer
    assert not (tmp_path / "runs" / "pretrain" / "corpus").exists()
