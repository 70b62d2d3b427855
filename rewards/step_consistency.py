"""Thinking whose windows come closer to the event, step by step."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from rewards.base import Reward
from rewards.segment_overlap import single_windows
from rewards.span_tensors import span_iou
from utils.spans import Span, parse_spans, temporal_iou

_THINK_START = re.compile(r"<think\s*>", re.IGNORECASE)
_THINK_END = re.compile(r"</think\s*>", re.IGNORECASE)
_ANCHOR = re.compile(r"<timestamp\s*>(.*?)</timestamp\s*>", re.IGNORECASE | re.DOTALL)

ROUNDING = 1e-9
"""A step that restates a window in other digits is no worse."""


class StepConsistency(Reward):
    """`scale * IoU(answer) * k / n`: n windows in the thinking lead to the answer by n steps, of which k end no worse
    than they start. A window's worth is its IoU with the labelled window it fits best.

    After the timestamp anchors of TAR-TVG (Guo et al., arXiv:2508.07683), which must grow more accurate along the
    thinking. There each anchor is rewarded too; here they only weigh the answer's IoU, so that neither many anchors nor
    repeating a poor one pays. Anchors are what stands in `<timestamp>` tags or, without any, all windows of the
    thinking; in seconds or as clock times.

    Nothing to judge earns nothing: with thinking off every window earns 0, which leaves the advantages of a group as
    they are, and with thinking on it never pays to leave the anchors out. An absence rightly stated earns `scale`.

    >>> text = "<think>Between 0 and 40 s, rather 10 to 30 s.</think><answer>From 12.0 to 20.0 seconds.</answer>"
    >>> StepConsistency().compute_from_text([text, text], [(12, 22), (0, 16)])  # 0.25, 0.5, 0.8; 0.4, 0.2, 0.2
    tensor([0.8000, 0.1000], dtype=torch.float64)
    """

    name = "step_consistency"
    needs = ("texts", "gt_windows")

    def marks(
        self,
        pred: Tensor,
        gt: Tensor,
        texts: Sequence[str] = (),
        gt_windows: Sequence[Sequence[Span]] | None = None,
        **needed: Any,
    ) -> Tensor:
        """`texts`: the N completions. Without the lists of labelled windows, each row of `gt` is the only one."""
        gts = single_windows(gt) if gt_windows is None else gt_windows
        ious = span_iou(pred, gt)
        shares = [_consistency(*row) for row in zip(texts, gts, ious.tolist(), strict=True)]
        return ious * torch.tensor(shares, dtype=ious.dtype, device=ious.device)


def _consistency(text: str, labelled: Sequence[Span], answer_iou: float) -> float:
    """The share of the steps to the answer that end no worse than they start; 0 without any."""
    worths = [max((temporal_iou(anchor, window) for window in labelled), default=0.0) for anchor in anchors_of(text)]
    steps = list(pairwise([*worths, answer_iou]))
    return sum(after >= before - ROUNDING for before, after in steps) / max(1, len(steps))


def anchors_of(text: str) -> list[Span]:
    """The windows that the thinking of a completion names, in written order, in seconds.

    >>> anchors_of("<think>First <timestamp>2 to 9</timestamp>, then <timestamp>3 to 8</timestamp>.</think>3 to 7")
    [Span(start=2.0, end=9.0), Span(start=3.0, end=8.0)]
    """
    thought = thought_of(text) or ""
    return [span for part in _ANCHOR.findall(thought) or [thought] for span in parse_spans(part) or []]


def thought_of(text: str) -> str | None:
    """The thinking of a text: what stands before its last `</think>`, from `<think>` on; None without any.

    The opening tag may be missing, as with models whose prompt ends in it.
    """
    ends = [tag.start() for tag in _THINK_END.finditer(text)]
    if not ends:
        return None
    thought = text[: ends[-1]]
    start = _THINK_START.search(thought)
    return thought[start.end() :] if start else thought
