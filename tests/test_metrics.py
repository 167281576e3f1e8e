"""A run's record: the same lines however often the run was interrupted."""

import errno
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import pytest
from states import ABOUT, state_at

from jaxlm import checkpoint, metrics


def lines(folder: Path, name: str = "metrics") -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_each_step_has_a_line_and_is_written_one_step_late(tmp_path: Path) -> None:
    with metrics.Log(tmp_path, 0, steps=3) as log:
        for step in (1, 2, 3):
            log.write(step, {"loss": jnp.float32(step / 2), "weight": 10})
            assert [line["step"] for line in lines(tmp_path)] == list(range(1, step))
    assert lines(tmp_path) == [{"step": step, "loss": step / 2, "weight": 10.0} for step in (1, 2, 3)]
    assert all(line["seconds"] >= 0 for line in lines(tmp_path, "timing"))


def test_the_time_that_batches_are_waited_for_is_that_of_their_step(tmp_path: Path) -> None:
    def batches() -> Iterator[int]:
        for batch in range(3):
            time.sleep(0.1 * batch)
            yield batch

    with metrics.Log(tmp_path, 0, steps=3) as log:
        given = []
        for step, batch in enumerate(log.timed(batches())):
            given.append(batch)
            log.write(step + 1, {"loss": 0.0})
            log.flush()
    assert given == [0, 1, 2]
    waited = [line["waited"] for line in lines(tmp_path, "timing")]
    assert waited[0] < 0.1 <= waited[1] < 0.2 <= waited[2]
    assert all(line["waited"] <= line["seconds"] for line in lines(tmp_path, "timing"))


@pytest.mark.parametrize("cut", ["", '{"step": 9, "lo', "\0" * 50 + "\n", '{"step": "?"}\n{"step": 10}\n'])
def test_lines_after_the_checkpoint_and_a_line_cut_off_are_removed(cut: str, tmp_path: Path) -> None:
    with metrics.Log(tmp_path, 0, steps=9) as log:
        for step in range(1, 9):
            log.write(step, {"loss": 1 / step})
    before = lines(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(cut)
    with metrics.Log(tmp_path, 5, steps=9) as log:
        for step in range(6, 9):
            log.write(step, {"loss": 1 / step})
    assert lines(tmp_path) == before
    assert len(lines(tmp_path, "timing")) == 8


def test_a_float32_survives_exactly(tmp_path: Path) -> None:
    value = jnp.float32(1) / 3
    with metrics.Log(tmp_path, 0, steps=1) as log:
        log.write(1, {"loss": value})
    assert jnp.float32(lines(tmp_path)[0]["loss"]) == value


def test_each_start_is_noted_without_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hush")
    monkeypatch.setattr(sys, "argv", ["a.py", "--text", "s3://me:hush@host/x?X-Amz-Signature=hush&part=2", "it's"])
    for step in (0, 7):
        metrics.note_start(tmp_path, step, data="f00")
    written = (tmp_path / "starts.jsonl").read_text()
    assert "hush" not in written
    first, second = map(json.loads, written.splitlines())
    assert first["command"] == """a.py --text 's3://...@host/x?X-Amz-Signature=...&part=2' 'it'"'"'s'"""
    assert (first["step"], second["step"], second["data"], second["devices"][1]) == (0, 7, "f00", 8)
    assert {**first, "step": 7} == second
    config = {"text": "https://host/x?token=hush"}
    folder = metrics.open_run(tmp_path / "run", config, __file__)
    assert json.loads((folder / "config.json").read_text()) == {"text": "https://host/x?token=..."}
    assert metrics.open_run(tmp_path / "run", config, __file__) == folder


def test_a_run_folder_belongs_to_one_configuration(tmp_path: Path) -> None:
    config = {"steps": 3, "rows": (1, 2), "text": None}
    source = Path(__file__)
    folder = metrics.open_run(tmp_path / "run", config, source)
    assert metrics.open_run(tmp_path / "run", config, source) == folder
    assert (folder / source.name).read_text() == source.read_text()
    (folder / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match="rows is \\[1, 2\\] there and \\[1, 3\\] here"):
        metrics.open_run(folder, {**config, "rows": (1, 3)}, source)
    with pytest.raises(ValueError, match="seed is None there and 0 here"):
        metrics.open_run(folder, {**config, "seed": 0}, source)


def test_what_is_free_may_change_and_is_recorded(tmp_path: Path) -> None:
    metrics.open_run(tmp_path, {"seed": 1, "save_every": 10}, __file__)
    (tmp_path / "metrics.jsonl").touch()
    metrics.open_run(tmp_path, {"seed": 1, "save_every": 20}, __file__, free=["save_every"])
    assert json.loads((tmp_path / "config.json").read_text()) == {"seed": 1, "save_every": 20}
    with pytest.raises(ValueError, match="seed is 1 there and 2 here"):
        metrics.open_run(tmp_path, {"seed": 2, "save_every": 20}, __file__, free=["save_every"])
    with pytest.raises(ValueError, match="save_every is 20 there and 30 here"):
        metrics.open_run(tmp_path, {"seed": 1, "save_every": 30}, __file__)


def test_a_folder_whose_run_has_not_begun_is_made_anew(tmp_path: Path) -> None:
    metrics.open_run(tmp_path / "run", {"heads": 3}, __file__)
    (tmp_path / "run" / "corpus").mkdir()
    other = metrics.open_run(tmp_path / "run" / "wide" / "first", {"heads": 3}, __file__)
    folder = metrics.open_run(tmp_path / "run", {"heads": 2}, __file__)
    assert json.loads((folder / "config.json").read_text()) == {"heads": 2}
    assert not (folder / "corpus").exists()
    assert (other / "config.json").exists()  # of a run of its own


@pytest.mark.parametrize("then", [2, 3], ids=["the same command comes again", "the first one does"])
def test_a_folder_that_was_not_made_anew_to_the_end_is_made_anew_again(then: int, tmp_path: Path) -> None:
    clear = metrics._clear

    def cut_off(path: Path) -> None:
        clear(path)
        (path / "corpus").mkdir()  # as if that were the half that is left
        raise KeyboardInterrupt

    metrics.open_run(tmp_path, {"heads": 3}, __file__)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "_clear", cut_off)
        with pytest.raises(KeyboardInterrupt):
            metrics.open_run(tmp_path, {"heads": 2}, __file__)
    metrics.open_run(tmp_path, {"heads": then}, __file__)
    assert json.loads((tmp_path / "config.json").read_text()) == {"heads": then}
    assert not (tmp_path / "corpus").exists()


def test_what_the_same_command_has_made_before_it_was_ended_is_kept(tmp_path: Path) -> None:
    for i, rate in enumerate((1, 1, 2)):
        config = {"heads": 3, "rows": (1, 2), "rate": rate}
        folder = metrics.open_run(tmp_path / "run", config, __file__, free=["rate"])
        (folder / "corpus").mkdir(exist_ok=True)
        (folder / "corpus" / f"{i}.bin").touch()
        assert len(list((folder / "corpus").iterdir())) == i + 1


def test_lines_are_on_the_disk_before_a_checkpoint_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    with metrics.Log(tmp_path, 0, steps=9) as log:
        monkeypatch.setattr("os.fsync", lambda file: synced.append(Path(os.readlink(f"/proc/self/fd/{file}")).name))
        log.write(1, {"loss": 1.0})
        log.sync()
        assert lines(tmp_path) == [{"step": 1, "loss": 1.0}]
        assert synced == ["metrics.jsonl", "timing.jsonl"]
    assert synced == 2 * ["metrics.jsonl", "timing.jsonl"]  # and when it is closed


def test_once_the_disk_has_dropped_lines_no_checkpoint_counts(tmp_path: Path) -> None:
    """Linux says once that it could not keep what was written, and has forgotten both by the next time."""

    def fail(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    (tmp_path / "run").mkdir()
    log = metrics.Log(tmp_path / "run", 0, steps=9)
    with checkpoint.Checkpoints(tmp_path / "run" / "checkpoints", ABOUT) as checkpoints:
        log.write(1, {"loss": 1.0})
        checkpoints.save(state_at(1), after=log.sync)
        checkpoints.wait()
        log.write(2, {"loss": 1.0})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("os.fsync", fail)
            checkpoints.save(state_at(2), after=log.sync)
        checkpoints.save(state_at(3), after=log.sync)
        assert checkpoints.latest == 1
        with pytest.raises(OSError, match="Input/output error: lines of metrics are lost"):
            log.write(3, {"loss": 1.0})
        with pytest.raises(OSError, match="Input/output error: lines of metrics are lost"):
            log.close()
        with metrics.Log(tmp_path / "run", 1, steps=9) as log:  # as a new process does
            checkpoints.save(state_at(2), after=log.sync)
        assert checkpoints.latest == 2


def test_an_error_in_the_run_is_not_hidden_by_one_of_closing_the_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run() -> None:
        with metrics.Log(tmp_path, 0, steps=9) as log:
            log.write(1, {"loss": "as of a step that has failed"})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()
    assert "metrics are not all written: " in capsys.readouterr().err


def test_nothing_is_removed_from_a_folder_that_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"editor": "theirs"}')
    (tmp_path / "precious").touch()
    for _ in range(2):
        with pytest.raises(ValueError, match="belongs to another configuration: editor is 'theirs' there"):
            metrics.open_run(tmp_path, {"steps": 1}, __file__)
    assert (tmp_path / "precious").exists()


def test_a_place_that_cannot_be_written_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        metrics.open_run(tmp_path / "file" / "run", {}, __file__)


def test_a_log_that_is_not_there_has_no_lines(tmp_path: Path) -> None:
    assert metrics.read_log(tmp_path / "none.jsonl") == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux")
def test_while_the_disk_is_full_lines_stay_in_memory(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with metrics.Log(tmp_path, 0, steps=500) as log:
        files = [file.fileno() for file in log._files]
        kept, full = [os.dup(file) for file in files], os.open("/dev/full", os.O_WRONLY)
        for step in range(1, 501):
            if step in (100, 400):
                for file, disk in zip(files, kept, strict=True):
                    os.dup2(full if step == 100 else disk, file)
            log.write(step, {"loss": 1 / step})
        assert len(lines(tmp_path)) == 499
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 501))
    assert len(lines(tmp_path, "timing")) == 500
    assert capfd.readouterr().err.count("metrics stay in memory for now") == 1
    for file in [*kept, full]:
        os.close(file)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux")
def test_a_disk_that_stays_full_is_an_error_in_the_end(tmp_path: Path) -> None:
    log = metrics.Log(tmp_path, 0, steps=1)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, log._files[0].fileno())
    os.close(full)
    log.write(1, {"loss": 1.0})
    with pytest.raises(OSError, match="No space left"):
        log.close()


@pytest.mark.parametrize(
    "line", ["[1]", "{", '{"loss": 1}', '{"step": 2.5}', '{"step": 2, "loss": "low"}', '{"step": 1' + "0" * 400 + "}"]
)
def test_a_damaged_line_is_named(line: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl: line 2 is damaged: .*; remove the line"):
        metrics.read_log(tmp_path / "metrics.jsonl")
