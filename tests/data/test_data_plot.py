"""A picture of a plan shows what `describe` tells."""

import io

import numpy as np
import pytest

from jaxlm import data

pytest.importorskip("matplotlib")

ROWS = [64, 256, 1024]


def lengths(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).lognormal(4, 1, 500).astype(int) + 2


@pytest.mark.parametrize("count", [None, 5])
def test_a_plot_shows_documents_rows_and_real_tokens(count: int | None) -> None:
    plan = data.pack({"one": lengths(0), "two": lengths(1)}, ROWS, 2048)
    described = data.describe(plan, count)
    figure = data.plot(plan, count)
    documents, rows, real = figure.axes
    assert sum(bar.get_height() for bar in documents.patches) == 1000
    assert [line.get_xdata()[0] for line in documents.lines] == ROWS
    assert [text.get_text() for text in documents.get_legend().get_texts()] == ["one", "two"]
    assert [bar.get_height() for bar in rows.patches] == [row["rows"] for row in described.rows.values()]
    shares = [bar.get_height() for bar in real.patches]
    np.testing.assert_allclose(shares, [100 * row["real"] for row in described.rows.values()])
    assert f"{described.real:.2%}".rstrip("%") in real.get_title()
    figure.savefig(drawn := io.BytesIO(), format="png")
    assert drawn.getvalue().startswith(b"\x89PNG")


def test_a_document_longer_than_all_rows_is_in_the_picture() -> None:
    figure = data.plot(data.bucket(np.array([3, 5000]), [64], 64, passes=1))
    assert sum(bar.get_height() for bar in figure.axes[0].patches) == 2
    assert figure.axes[0].get_legend() is None
