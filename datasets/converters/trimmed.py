"""What the two Time-R1 files share: rows about a stretch of a file, and the doubt whether that file is already cut.

Their times count from the start of the stretch (`data.trim: relative`). Some files are the stretch alone, though, and
then `start` and `end` must not be applied once more. Without the file three things tell: a name that carries the
stretch, a stretch that starts at 0, and a file of which several stretches are used.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from datasets.converters.base import SourceRow
from utils.rows import TRIM_TOLERANCE_S

_CLOCK = r"(\d+):(\d\d):(\d\d)[:.](\d+)"
_STRETCH = re.compile(rf"_{_CLOCK}_{_CLOCK}\.\w+$")
"""As in `abcdefghijk_00:00:39:000_00:01:24:700.mp4`."""


def with_doubts(rows: Sequence[SourceRow]) -> list[SourceRow]:
    """The rows with `stretch` set: "named", "doubtful" or "certain"."""
    starts: dict[str, set[float | None]] = defaultdict(set)
    shortest: dict[str, float] = {}
    for row in rows:
        starts[row.videos[0]].add(row.video_start)
        if row.video_start is None and row.duration is not None:  # this row says how long the whole file is
            shortest[row.videos[0]] = min(row.duration, shortest.get(row.videos[0], row.duration))
    return [_judged(row, starts[row.videos[0]], shortest.get(row.videos[0])) for row in rows]


def _judged(row: SourceRow, starts: set[float | None], file_s: float | None) -> SourceRow:
    if row.video_start is None or row.video_end is None:
        return row
    if _names_stretch(row.videos[0], row.video_start, row.video_end):
        return replace(row, stretch="named")
    if file_s is not None and row.video_end > file_s + TRIM_TOLERANCE_S:
        return replace(row, stretch="doubtful")
    from_zero = row.video_start == 0  # the same frames, be the file cut or not
    return row if from_zero or len(starts) > 1 else replace(row, stretch="doubtful")


def _names_stretch(video: str, start_s: float, end_s: float) -> bool:
    found = _STRETCH.search(video)
    if found is None:
        return False
    groups = found.groups()
    named = [_seconds(*groups[:4]), _seconds(*groups[4:])]
    return abs(named[0] - start_s) <= TRIM_TOLERANCE_S and abs(named[1] - end_s) <= TRIM_TOLERANCE_S


def _seconds(hours: str, minutes: str, seconds: str, fraction: str) -> float:
    return 3600 * int(hours) + 60 * int(minutes) + int(seconds) + int(fraction) / 10 ** len(fraction)
