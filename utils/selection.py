"""Which training rows GRPO draws, by a score that an earlier pass put into their `kwargs` (`data.select`).

Rows that a model always or never answers well teach nothing: all completions of a group earn the same. So the drawn
scores shall follow a Gaussian around a middling one, as TimeLens does (arXiv:2512.14698). A Gaussian weight alone would
give Gaussian times histogram, and of a skewed set mostly its peak; so the weight is divided by the density of the
scores. Scores are made by `scripts/score_difficulty.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from utils.common import UserError, nearest
from utils.config import SelectConfig
from utils.logging_utils import get_logger
from utils.rows import Row

Values = NDArray[np.float64]

BINS_PER_STD = 4
"""Bins of the histogram that measures density: narrow beside the Gaussian, wide beside the steps between scores."""
MET_IN_FULL = 0.75
"""Without `num_rows`: as many rows are drawn as give this share of the Gaussian its full due."""
SMALLEST = 1e-200
"""Stands for a Gaussian too far out for a float, so that such a row may still fill up `num_rows`."""


def select_rows(rows: Sequence[Row], select: SelectConfig) -> list[Row]:
    """The rows that `select` draws, in their order; the same rows and `select` always give the same.

    Rows without a score, and those under `select.min_iou`, are left out; one log line counts them.
    Raises UserError when no row has a score, when one is no number, and when fewer than `select.num_rows` are left.
    """
    scores = [score_of(row, select.by) for row in rows]
    scored = [(row, score) for row, score in zip(rows, scores, strict=True) if score is not None]
    if not scored:
        raise UserError(_no_score(rows, select.by))
    eligible = [(row, score) for row, score in scored if score >= select.min_iou]
    _require_enough(eligible, scored, select)
    values = np.array([score for _, score in eligible])
    places = draw(values, select)
    if not len(places):
        raise UserError(
            f"data.select draws none of {len(values)} rows: too few scores lie near data.select.mean={select.mean:g} "
            f"(std {select.std:g}); mend these, or set data.select.num_rows"
        )
    _report(values[places], select, num_rows=len(rows), num_scored=len(scored), num_eligible=len(eligible))
    return [eligible[place][0] for place in places]


def score_of(row: Row, key: str) -> float | None:
    """The row's score, or None where it has none. Raises UserError for one that is no number."""
    value = row.kwargs.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Real):
        raise UserError(
            f"{row.file}:{row.line}: kwargs.{key} must be a number to select by, got {value!r}; mend the row, or name "
            "another key in data.select.by"
        )
    return float(value)


def draw(scores: Values, select: SelectConfig) -> NDArray[np.intp]:
    """Which of `scores` (N,) are drawn: sorted places, seeded by `select.seed`. `select.num_rows` is at most N.

    With `num_rows`, Pareto sampling (Rosen, 1997): that many, with inclusion probabilities very nearly the wanted ones.
    Without, each row is kept or not by itself.
    """
    chances = inclusion_chances(scores, select)
    luck = np.random.default_rng(select.seed).random(len(scores))
    if select.num_rows is None:
        return np.flatnonzero(luck < chances)
    ranks = luck / (1 - luck) * (1 - chances) / chances  # 0 where the chance is 1
    return np.sort(np.argsort(ranks, kind="stable")[: select.num_rows])


def inclusion_chances(scores: Values, select: SelectConfig) -> Values:
    """Probability (N,) in (0, 1] that each row is drawn: Gaussian / density, scaled, 1 at most.

    With `num_rows` they add up to it. Without, the scale is such that a quarter of the Gaussian, where rows are
    scarcest, keeps all it has: of evenly spread scores a row is kept about with the Gaussian's height as probability.
    """
    heights = np.maximum(np.exp(-0.5 * ((scores - select.mean) / select.std) ** 2), SMALLEST)
    weights = heights / _rows_per_bin(scores, select)
    if select.num_rows is not None:
        return _capped(weights, select.num_rows)
    falling = -np.sort(-weights)  # scarcest first; the weights of a bin add up to its part of the Gaussian
    scarce = np.searchsorted(falling.cumsum(), (1 - MET_IN_FULL) * falling.sum())
    return np.maximum(np.minimum(weights / falling[scarce], 1.0), SMALLEST)


def _rows_per_bin(scores: Values, select: SelectConfig) -> Values:
    """(N,): how many rows share a row's bin. A bin is centred on the mean, so that equal scores there stay together."""
    bins = np.rint((scores - select.mean) / (select.std / BINS_PER_STD))
    _, places, counts = np.unique(bins, return_inverse=True, return_counts=True)
    return counts[places].astype(np.float64)


def _capped(weights: Values, total: int) -> Values:
    """`min(1, scale * weights)` with the scale that makes the sum `total` (at most the number of weights)."""
    order = np.argsort(-weights)
    falling = weights[order]
    rest = falling[::-1].cumsum()[::-1]  # what the row and all lighter ones weigh
    scales = (total - np.arange(len(falling))) / rest  # when as many heavier rows are certain
    fits = np.flatnonzero(scales * falling <= 1)
    num_certain = int(fits[0]) if len(fits) else len(falling)
    chances = np.ones_like(weights)
    if num_certain < len(falling):
        chances[order[num_certain:]] = np.clip(scales[num_certain] * falling[num_certain:], SMALLEST, 1.0)
    return chances


# ---------------------------------------------------------------------------------------------- words
def _report(drawn: Values, select: SelectConfig, *, num_rows: int, num_scored: int, num_eligible: int) -> None:
    get_logger().info(
        "data.select: %d of %d rows drawn, %s %.2f on average with std %.2f (asked for: %g, %g); left out: "
        "%d without a score, %d under min_iou=%g",
        len(drawn), num_rows, select.by, drawn.mean(), drawn.std(), select.mean, select.std,
        num_rows - num_scored, num_scored - num_eligible, select.min_iou,
    )  # fmt: skip


def _no_score(rows: Sequence[Row], key: str) -> str:
    file = rows[0].file if rows else "data.train"
    names = dict.fromkeys(name for row in rows for name, value in row.kwargs.items() if _is_number(value))
    match = nearest(key, names)
    scored = Path(file).with_suffix(".scored.jsonl")  # beside it, where relative video paths are found
    hint = f"; did you mean {match}?" if match else f" (numbers it has: {', '.join(names) or 'none'})"
    return (
        f"data.select: no row of {file} has a number in kwargs.{key} (data.select.by){hint}. Scores are made by: "
        f"python scripts/score_difficulty.py --model_path CHECKPOINT --annotations {file} --output {scored}, "
        f"and data.train={scored} then reads them"
    )


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _require_enough(
    eligible: Sequence[tuple[Row, float]], scored: Sequence[tuple[Row, float]], select: SelectConfig
) -> None:
    if len(eligible) >= (select.num_rows or 1):
        return
    best = max(score for _, score in scored)
    wanted = "" if select.num_rows is None else f" for data.select.num_rows={select.num_rows}"
    raise UserError(
        f"data.select: {len(eligible)} of {len(scored)} scored rows have {select.by} >= data.select.min_iou="
        f"{select.min_iou:g} (the highest has {best:.3g}), too few{wanted}; lower min_iou or num_rows, or train the "
        "model further first"
    )
