"""Two evaluations of the same queries, paired query by query: what one gains on the other, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from inference.report_data import Evaluation
from utils.common import UserError
from utils.metrics import METRICS, bootstrap_interval

SAME = 1e-9
"""Scores closer than this are a tie: they differ by float noise."""
NUM_NAMED = 5


@dataclass(frozen=True)
class Difference:
    """One metric on the queries that count in both evaluations, in percent."""

    num_pairs: int
    ours: float
    theirs: float
    interval: tuple[float, float]
    """95 % bootstrap interval of the mean of the paired differences."""

    @property
    def difference(self) -> float:
        """Ours minus theirs."""
        return self.ours - self.theirs

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.interval[0] > 0 or self.interval[1] < 0


@dataclass(frozen=True)
class Comparison:
    """`ours` against `theirs`, both judged by the protocol of `ours`."""

    theirs: Evaluation
    metrics: Mapping[str, Difference]
    """By metric; those without a pair are left out."""
    changes: Mapping[str, float]
    """Ours minus theirs of `Judged.score`, in [-1, 1], by the qids that both have."""
    only_ours: int
    only_theirs: int

    @property
    def num_wins(self) -> int:
        """Queries that we score higher."""
        return sum(change > SAME for change in self.changes.values())

    @property
    def num_losses(self) -> int:
        """Queries that they score higher."""
        return sum(change < -SAME for change in self.changes.values())


def compare(ours: Evaluation, theirs: Evaluation) -> Comparison:
    """Pair two evaluations by qid; queries that only one of them has are counted and left out.

    Raises UserError for evaluations of different annotations, and for two without a query in common.
    """
    _check_annotations(ours, theirs)
    shared = [qid for qid in ours.rows if qid in theirs.rows]
    if not shared:
        raise UserError(
            f"--vs {theirs.folder}: none of its {len(theirs.rows)} queries is among the {len(ours.rows)} of "
            f"{ours.folder} (the first there: {next(iter(theirs.rows))!r}); evaluate both on the same queries"
        )
    _check_labels(ours, theirs, shared)
    return Comparison(
        theirs,
        {name: found for name in METRICS if (found := _difference(ours, theirs, shared, name))},
        {qid: ours.rows[qid].score - theirs.rows[qid].score for qid in shared},
        len(ours.rows) - len(shared),
        len(theirs.rows) - len(shared),
    )


def _difference(ours: Evaluation, theirs: Evaluation, qids: list[str], name: str) -> Difference | None:
    scores = [(ours.rows[qid].scores, theirs.rows[qid].scores) for qid in qids]
    pairs = [(100 * a[name], 100 * b[name]) for a, b in scores if name in a and name in b]
    if not pairs:
        return None
    means = [math.fsum(values) / len(pairs) for values in zip(*pairs, strict=True)]
    return Difference(len(pairs), means[0], means[1], bootstrap_interval([a - b for a, b in pairs]))


def _check_annotations(ours: Evaluation, theirs: Evaluation) -> None:
    files = [run.get("annotations") or {} for run in (ours.run, theirs.run)]
    if files[0].get("sha256") != files[1].get("sha256"):
        names = [f"{file.get('name')} ({str(file.get('sha256'))[:8]})" for file in files]
        raise UserError(
            f"--vs {theirs.folder} is an evaluation of {names[1]}, {ours.folder} one of {names[0]}: only answers to "
            "the same annotation file can be paired; evaluate one of them again"
        )


def _check_labels(ours: Evaluation, theirs: Evaluation, shared: list[str]) -> None:
    """The same file read with another `data.trim` has other windows."""
    differing = [qid for qid in shared if ours.rows[qid].record["gt"] != theirs.rows[qid].record["gt"]]
    if differing:
        named = ", ".join(map(repr, differing[:NUM_NAMED])) + (", ..." if len(differing) > NUM_NAMED else "")
        trims = [run.get("data.trim") for run in (ours.run, theirs.run)]
        raise UserError(
            f"--vs {theirs.folder}: {len(differing)} of {len(shared)} queries have other labels there ({named}; "
            f"data.trim is {trims[1]}, here {trims[0]}); evaluate one of them again"
        )
