"""The picture on display at each of many times, one at a time: a long video is never held in memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from utils.logging_utils import get_logger
from utils.video_file import CLOCK_SLACK_S, Stretch, VideoFile, VideoReadError


def frames_on_display(
    file: VideoFile, stretch: Stretch, times_s: np.ndarray, height: int, width: int
) -> Iterator[np.ndarray]:
    """For each time the last frame that is shown at or before it, as a player would; the first one before that.

    A frame that does not decode is replaced by the one before it, as players do, and counted in the log.

    Args:
        file: the opened file.
        stretch: the part to read, from `file.scan`.
        times_s: shape (T,), ascending, seconds on the file's clock.
        height: of the frames that come out, with `width`; uint8 RGB (height, width, 3).
        width: see above.

    Raises:
        VideoReadError: none of the frames decodes.
    """
    shown = np.maximum(np.searchsorted(stretch.times_s, times_s + CLOCK_SLACK_S, side="right") - 1, 0)
    wanted, first = np.unique(shown, return_index=True)
    starts = [*first.tolist(), len(shown)]
    done, num_found = 0, 0
    last: np.ndarray | None = None
    for index, frame in file.decode_each(stretch, stretch.ticks[wanted], height, width):
        for _ in range(done, starts[index]):  # frames lost before this one
            yield frame if last is None else last
        for _ in range(starts[index], starts[index + 1]):
            yield frame
        done, last, num_found = starts[index + 1], frame, num_found + 1
    if last is None:
        raise VideoReadError(file.path, "none of its frames decodes (damaged)")
    for _ in range(done, len(shown)):
        yield last
    if num_found < len(wanted):
        lost = len(wanted) - num_found
        get_logger().warning("%s: %d of %d frames do not decode; shown as the one before", file.path, lost, len(wanted))
