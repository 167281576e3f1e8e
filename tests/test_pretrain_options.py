"""What pretrain.py refuses, and in what order it does things, seen from within."""

import dataclasses
import importlib.util
import json
import math
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from jaxlm import checkpoint, files, metrics
from jaxlm.checkpoint import _folder
from jaxlm.types import TrainState

SCRIPT = Path(__file__).parents[1] / "experiments" / "pretrain.py"


@pytest.fixture
def pretrain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The script as a module, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location("pretrain", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setenv("JAXLM_CACHE", str(SCRIPT.parents[1] / ".cache"))
    return module


FROZEN = {
    "name": "another",
    "text": "elsewhere",
    "heldout": 0.1,
    "layers": 3,
    "width": 64,
    "heads": 1,
    "row_lengths": (64, 128),
    "tokens_per_batch": 1024,
    "steps": 999,
    "learning_rate": 1e-3,
    "seed": 1,
    "products": "int8",
    "spikes": 6.0,
    "smoke": True,
}
FREE = {"save_every": 10, "microbatches": 4, "zero": 3, "mesh": (1, -1, 2), "patience": 60.0}
OF_ONE_START = {"debug_nans", "join"}


def test_each_option_is_held_to_or_may_change(pretrain: ModuleType, tmp_path: Path) -> None:
    config, open_run = dataclasses.asdict(pretrain.Config()), partial(metrics.open_run, free=pretrain.FREE)
    assert config.keys() == FROZEN.keys() | FREE.keys() | OF_ONE_START
    open_run(tmp_path / "run", config, SCRIPT)
    (tmp_path / "run" / "metrics.jsonl").touch()
    for name, value in FROZEN.items():
        with pytest.raises(ValueError, match=f"belongs to another configuration: {name} is .* there and .* here"):
            open_run(tmp_path / "run", config | {name: value}, SCRIPT)
    for name, value in FREE.items():
        open_run(tmp_path / "run", config | {name: value}, SCRIPT)
    open_run(tmp_path / "run", config | FREE, SCRIPT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, "width 128 is not divisible by 3 heads"),
        ({"tokens_per_batch": 200}, "200 tokens per batch don't hold a row of 256"),
        ({"microbatches": 3}, "not divisible over 8 devices in 3 microbatches"),
        ({"tokens_per_batch": 256 * 4}, "4 rows of 256 tokens can't be divided over 8 devices"),
        ({"row_lengths": (1,)}, r"row lengths \[1\]"),
        ({"save_every": 0}, "save_every is 0; use 1 <= save_every < inf"),
        ({"steps": 0}, "steps is 0; use 1 <= steps"),
        ({"debug_nans": 0}, "debug_nans is 0; use 1 <= debug_nans < 1001"),
        ({"debug_nans": 1001}, "debug_nans is 1001"),
        ({"learning_rate": math.nan}, "learning_rate is nan; use 0 <= learning_rate < inf"),
        ({"learning_rate": -1e-3}, "learning_rate is -0.001"),
        ({"seed": 2**32}, "seed is 4294967296; use 0 <= seed < 4294967296"),
    ],
    ids=str,
)
def test_bad_numbers_are_refused_by_name(
    change: dict[str, Any], message: str, pretrain: ModuleType, text: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        pretrain.main(pretrain.Config(text=str(text), **change))


def test_a_folder_without_text_is_refused_and_no_corpus_is_left(pretrain: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no text"):
        pretrain.main(pretrain.Config(text="empty"))
    (tmp_path / "empty" / "one.txt").write_text("")
    with pytest.raises(ValueError, match="no documents in the train split"):
        pretrain.main(pretrain.Config(text="empty"))
    assert not list(tmp_path.rglob("*.bin"))


def test_a_refused_command_does_not_stand_in_the_way_of_the_right_one(
    pretrain: ModuleType, text: Path, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    for i in range(80):
        (tmp_path / "other" / f"{i}.txt").write_bytes(b"\xff" * (i + 3))
    with pytest.raises(ValueError, match="not divisible by 3 heads"):
        pretrain.main(pretrain.Config(text=str(text), heads=3))
    pretrain.main(pretrain.Config(text="other", layers=1, width=16, row_lengths=(64,), steps=1, microbatches=1))
    manifest = json.loads((tmp_path / "runs" / "pretrain" / "corpus" / "manifest.json").read_text())
    assert manifest["not_utf8"] == 80


TINY: dict[str, Any] = {"layers": 1, "width": 16, "row_lengths": (64,), "microbatches": 1}


def test_a_checkpoint_is_saved_before_it_is_evaluated_and_gets_its_score_when_the_run_goes_on(
    pretrain: ModuleType, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = pretrain.Config(text=str(text), **TINY, steps=3, save_every=1)
    evaluate, folder = pretrain.evaluate, tmp_path / "runs" / "pretrain" / "checkpoints"
    save, after = checkpoint.Checkpoints.save, list[Any]()

    def note(checkpoints: checkpoint.Checkpoints, state: TrainState, **given: Any) -> None:
        after.append(given.get("after"))
        save(checkpoints, state, **given)

    monkeypatch.setattr(checkpoint.Checkpoints, "save", note)

    def fail_at_first_step(*given: Any) -> Any:
        if (tmp_path / "runs" / "pretrain" / "metrics.jsonl").exists():
            raise RuntimeError("the lights went out")
        return evaluate(*given)

    monkeypatch.setattr(pretrain, "evaluate", fail_at_first_step)
    with pytest.raises(RuntimeError, match="the lights went out"):
        pretrain.main(config)
    assert _folder.whole(folder) == [1]
    assert after[0].__func__ is metrics.Log.sync  # so that metrics are on the disk before the checkpoint is
    assert not _folder.read_scores(folder)
    monkeypatch.setattr(pretrain, "evaluate", evaluate)
    pretrain.main(config)
    assert _folder.read_scores(folder).keys() == {1, 2}


def test_what_was_to_be_skipped_is_read_or_refused(pretrain: ModuleType, text: Path, tmp_path: Path) -> None:
    config = pretrain.Config(text=str(text), **TINY, steps=1)
    (tmp_path / "runs" / "pretrain").mkdir(parents=True)
    skips = tmp_path / "runs" / "pretrain" / "skips.json"
    good = files.signed({"batches": [[0, 2], [5, 9]]})
    for text_of_it in ("{}", "[]", "", good[:-9], good.replace("5", "6")):
        skips.write_text(text_of_it)
        with pytest.raises(ValueError, match=r"skips.json is damaged"):
            pretrain.main(config)
    lists = [3], [[1]], [[0, 2.0]], [[0, 1, 2], [3]], [[0, 10**400]], [["a", "b"]], ["ab"], [[2, 1]]
    for batches in (None, 3, {}, *lists):
        skips.write_text(files.signed({"batches": batches}))
        with pytest.raises(ValueError, match=r"skips.json is damaged: .* are no ranges of batches"):
            pretrain.main(config)
    skips.write_text(good)
    pretrain.main(config)
    (start,) = metrics.read_starts(skips.parent)
    assert start["skips"] == [[0, 2], [5, 9]]
