"""The report is one page that stands alone."""

import re
from pathlib import Path

import numpy as np
import pytest

from jaxlm import metrics

report = pytest.importorskip("jaxlm.report", exc_type=ImportError)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = metrics.open_run(tmp_path / "run <1>", {"steps": 30, "text": "<script>"}, __file__)
    metrics.note_start(folder, 0)
    with metrics.Log(folder, 0, steps=30) as log:
        for step in range(1, 31):
            glance = {"heldout": 8 / step} if step % 10 == 1 else {}
            log.write(step, {"loss": 5 / step, "learning_rate": 1e-3, "weight": 100.0, **glance})
    return folder


def test_a_page_with_results_curves_and_sample_and_nothing_from_elsewhere(run: Path) -> None:
    path = report.write_report(run, {"held-out bits per byte": "1.9", "sample": "def <f>(): &"})
    page = path.read_text()
    assert "def &lt;f&gt;(): &amp;" in page
    assert "<script" not in page
    assert "run &lt;1&gt;" in page
    assert not re.search(r'(src|href)="(?!#)', page.replace('xlink:href="#', ""))
    for title in ("Loss", "Learning rate", "Throughput", "held-out bits per byte", "optax"):
        assert title in page
    assert page.count("<svg") == page.count("</svg>") == 1


def test_a_run_without_a_step_has_a_page(tmp_path: Path) -> None:
    folder = metrics.open_run(tmp_path / "run", {}, __file__)
    assert "No step was taken" in report.write_report(folder, {}).read_text()


def test_smooth_is_the_mean_of_the_last_values() -> None:
    values = np.random.default_rng(0).normal(size=20).tolist()
    expected = [np.mean(values[max(0, i - 4) : i + 1]) for i in range(20)]
    np.testing.assert_allclose(report.smooth(values, 5), expected, rtol=1e-12, atol=1e-12)
    assert report.smooth([], 5).shape == (0,)  # as of a run whose times are lost


def test_a_run_that_diverged_has_a_page(tmp_path: Path) -> None:
    folder = metrics.open_run(tmp_path / "run", {}, __file__)
    with metrics.Log(folder, 0, steps=4) as log:
        for step, loss in enumerate([2.0, 1.0, float("nan"), float("inf")], start=1):
            log.write(step, {"loss": loss, "learning_rate": 1.0, "weight": 1.0, "heldout": loss})
    assert "<svg" in report.write_report(folder, {}).read_text()
