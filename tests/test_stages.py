"""Stages: what each is, how long it takes, and what schedules make of it."""

from typing import Any

import numpy as np
import pytest

from jaxlm import schedules, stages
from jaxlm.stages import Stage


def test_a_stage_ends_at_the_first_batch_after_its_tokens() -> None:
    several = [Stage([8], 100, until_tokens=250), Stage([8], 30, until_tokens=400), Stage([8], 50, until_tokens=421)]
    assert stages.steps(several) == [3, 4, 1]
    before = [stages.tokens_before(several, step) for step in range(9)]
    assert before == [0, 100, 200, 300, 330, 360, 390, 420, 470]
    with pytest.raises(ValueError, match="end 2 steps earlier"):
        stages.tokens_before(several, 10)


def test_schedules_count_tokens_and_are_scaled_by_stage() -> None:
    several = [Stage([8], 64, 640, learning_rate=0.25), Stage([8], 128, 1280, learning_rate=0.5), Stage([8], 256)]
    schedule = schedules.in_stages(schedules.linear(1, 0, 100), several, unit=64)
    for step in (0, 3, 9, 10, 12, 14, 15, 20, 30):
        scale = several[0 if step < 10 else 1 if step < 15 else 2].learning_rate
        tokens = stages.tokens_before(several, step)
        assert float(schedule(step)) == pytest.approx(scale * (1 - tokens / 6400), rel=1e-6)


def test_schedules_of_stages_that_end_keep_their_last_value() -> None:
    several = [Stage([8], 64, 640), Stage([8], 128, 1280, learning_rate=0.5)]
    schedule = schedules.in_stages(schedules.linear(1, 0, 10), several, unit=128)
    np.testing.assert_allclose([schedule(9), schedule(10), schedule(15)], [0.6, 0.25, 0.0], atol=1e-7)


def test_presets() -> None:
    warmup = stages.length_warmup([256, 64, 1024], 4096, tokens=10**6)
    assert [stage.row_lengths for stage in warmup] == [(64,), (64, 256), (64, 256, 1024)]
    assert [stage.until_tokens for stage in warmup] == [500_000, 10**6, None]
    assert stages.length_warmup([64], 4096, tokens=10**6) == [Stage([64], 4096)]
    ramp = stages.batch_ramp([64], 4096, 3 * 10**5, first=512)
    assert [stage.tokens_per_batch for stage in ramp] == [512, 1024, 2048, 4096]
    assert [stage.until_tokens for stage in ramp] == [10**5, 2 * 10**5, 3 * 10**5, None]
    np.testing.assert_allclose([stage.learning_rate for stage in ramp], [8**-0.5, 0.5, 2**-0.5, 1])
    assert stages.batch_ramp([64], 512, 3, first=512) == [Stage([64], 512)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"row_lengths": []}, "1 to 6"),
        ({"row_lengths": [1, 4]}, r"\[1, 4\].*2 or more"),
        ({"row_lengths": [2, 3, 4, 5, 6, 7, 8]}, "1 to 6"),
        ({"tokens_per_batch": 7}, "7 tokens per batch don't hold a row of 8"),
        ({"until_tokens": 0}, "until_tokens is 0"),
        ({"until_tokens": 1.5}, "until_tokens is 1.5; use a whole number"),
        ({"window": 0}, "window is 0"),
        ({"window": True}, "window is True"),
        ({"row_lengths": [8.5]}, r"row lengths \[8.5\]; use 1 to 6, whole"),
        ({"tokens_per_batch": 64.0}, "tokens_per_batch is 64.0"),
        ({"learning_rate": float("inf")}, "learning_rate is inf"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"weights": {"a": 0, "b": 0}}, "weights are"),
        ({"weights": {"a": -1, "b": 2}}, "weights are"),
        ({"weights": {"a": float("inf"), "b": 1}}, "weights are"),
        ({"weights": {}}, "weights are"),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_refuses_a_stage(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Stage(**({"row_lengths": [8], "tokens_per_batch": 64} | options))


@pytest.mark.parametrize(
    ("several", "message"),
    [
        ([], "there is none"),
        ([Stage([8], 64), Stage([8], 64)], "stage 0 of 2 has no end"),
        ([Stage([8], 64, 100), Stage([8], 64, 128)], "stage 1 ends at 128 tokens, when 128 have gone"),
    ],
)
def test_refuses_stages(several: list[Stage], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stages.steps(several)


def test_a_ramp_doubles() -> None:
    with pytest.raises(ValueError, match="1536 tokens per batch isn't 500 times a power of two"):
        stages.batch_ramp([8], 1536, 1000, first=500)
