"""A look at a plan: what its batches hold."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from jaxlm.data.plan import Plan


@dataclasses.dataclass(frozen=True)
class Description:
    """What some batches of a plan hold. `print` shows it as tables."""

    batches: int
    corpora: Mapping[str, Mapping[str, int | float]]
    """Of each: `documents`, `tokens`, `longest`, documents that are `cut`, that are `too short` to predict anything in;
    `epochs`, how often the batches go through it; `share` of the batches' tokens."""
    rows: Mapping[int, Mapping[str, int | float]]
    """By length: `rows`, `batches`, `real`, the share of positions that hold tokens; `documents` in a row."""
    real: float
    """The share of all positions that hold tokens."""
    waiting: int
    """Tokens that were taken and fill no batch: the next ones would have them."""

    def __str__(self) -> str:
        lines = [
            f"{'corpus':12}{'documents':>12}{'tokens':>16}{'longest':>10}{'cut':>9}{'too short':>11}"
            f"{'epochs':>9}{'share':>8}"
        ]
        for name, c in self.corpora.items():
            lines.append(
                f"{name:12}{c['documents']:12,}{c['tokens']:16,}{c['longest']:10,}{c['cut']:9,}{c['too short']:11,}"
                f"{c['epochs']:9.2f}{c['share']:8.1%}"
            )
        lines += ["", f"{'row length':>12}{'batches':>12}{'rows':>16}{'documents a row':>19}{'real tokens':>13}"]
        for length, r in self.rows.items():
            lines.append(f"{length:12,}{r['batches']:12,}{r['rows']:16,}{r['documents']:19.1f}{r['real']:13.2%}")
        lines += [
            "",
            f"{self.real:.2%} of positions hold tokens, in {self.batches:,} batches; {self.waiting:,} tokens wait",
        ]
        return "\n".join(lines)


def describe(plan: Plan, count: int | None = None) -> Description:
    """What the first batches of a plan hold.

    Args:
        plan: any.
        count: how many batches; None: all, or of an endless plan those that are planned until each document has come.
    """
    rows = {
        length: np.zeros(4) for stage in plan.stages for length in stage.row_lengths
    }  # batches, rows, documents, tokens
    tokens, predicted = np.zeros((2, len(plan.documents)))
    positions = batches = waiting = 0
    for part in plan.parts():
        held = np.add.reduceat(part.pieces["length"], part.begins[:-1]) if len(part.pieces) else np.empty(0)
        used = np.zeros(len(part.begins) - 1, bool)
        for length, these in part.batches[: None if count is None else count - batches]:
            rows[length] += 1, len(these), (part.begins[these + 1] - part.begins[these]).sum(), held[these].sum()
            positions += plan.stages[part.start.stage].tokens_per_batch // length * length
            used[these] = True
            batches += 1
        pieces = part.pieces[np.repeat(used, np.diff(part.begins))]
        tokens += np.bincount(pieces["source"], pieces["length"], len(tokens))
        predicted += np.bincount(pieces["source"], pieces["length"] - 1, len(tokens))
        waiting = int(held[~used].sum())
        sizes = [len(documents) for documents in plan.documents.values()]
        if batches == count or (
            count is plan.count is None
            and part.after is not None
            and all(taken >= size for taken, size in zip(part.after.taken, sizes, strict=True))
        ):
            break
    longest = plan.stages[-1].row_lengths[-1]
    corpora: dict[str, Mapping[str, int | float]] = {}
    for i, (name, documents) in enumerate(plan.documents.items()):
        lengths = documents["length"]
        corpora[name] = {
            "documents": len(documents) + plan.too_short[name],
            "tokens": int(lengths.sum()),
            "longest": int(lengths.max()),
            "cut": int((lengths > longest).sum()),
            "too short": plan.too_short[name],
            "epochs": float(predicted[i] / (lengths - 1).sum()),
            "share": float(tokens[i] / max(1, tokens.sum())),
        }
    by_length = {
        length: {"batches": int(n), "rows": int(r), "documents": float(d / r), "real": float(t / (r * length))}
        for length, (n, r, d, t) in sorted(rows.items())
        if n
    }
    return Description(batches, corpora, by_length, float(tokens.sum() / max(1, positions)), waiting)
