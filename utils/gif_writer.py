"""Writing animated GIFs: one table of 256 colours for all pictures, and only what changes from one to the next."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from PIL import Image

from utils.common import UserError, atomic_open

UNCHANGED = 255
"""Number of the transparent colour: the picture before shows through."""

SHORTEST_DELAY_S = 0.02
"""What players still keep to: below it most of them show a picture for a tenth of a second."""


def write_gif(
    path: str | os.PathLike[str], frames: Iterable[np.ndarray], times_s: Sequence[float], colours: np.ndarray
) -> None:
    """Write pictures as a GIF that repeats for ever, atomically.

    Args:
        frames: colour numbers, uint8, shape (H, W), values below 255; one for each of `times_s`.
        times_s: when each is shown and, last, when the last one ends: one more than pictures, at least 0.02 s apart.
            GIF keeps hundredths of a second; rounding never adds up.
        colours: uint8, shape (N, 3), N <= 255.

    Raises:
        UserError: more than 255 colours, or times too close.
    """
    if len(colours) > UNCHANGED:
        raise UserError(f"a GIF holds at most {UNCHANGED} colours beside the transparent one, got {len(colours)}")
    ticks = np.rint(np.asarray(times_s, dtype=np.float64) * 100).astype(np.int64)
    delays_ms = (10 * np.diff(ticks)).tolist()
    if min(delays_ms) < 1000 * SHORTEST_DELAY_S:
        raise UserError(f"pictures of a GIF must be {SHORTEST_DELAY_S} s apart, got {min(delays_ms) / 1000} s")
    table = [*colours.astype(int).flatten().tolist(), *[0] * (768 - colours.size)]
    first, *rest = [_as_image(frame, table) for frame in _changes(frames)]  # Pillow holds them all in any case
    look = {"loop": 0, "disposal": 1, "transparency": UNCHANGED, "optimize": False}
    with atomic_open(path, "wb") as handle:
        first.save(handle, format="GIF", save_all=True, append_images=rest, duration=delays_ms, **look)


def _changes(frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Each picture with the pixels that stay as they are made transparent, which packs to almost nothing."""
    before: np.ndarray | None = None
    for frame in frames:
        yield frame if before is None else np.where(frame == before, UNCHANGED, frame).astype(np.uint8)
        before = frame


def _as_image(numbers: np.ndarray, table: list[int]) -> Image.Image:
    image = Image.fromarray(numbers)  # mode L
    image.putpalette(table)  # now P, the numbers as they are
    return image


class ColourTable:
    """Up to 255 colours: those of drawn parts exactly, the rest chosen for the video's pictures."""

    def __init__(self, drawn: np.ndarray, pictures: np.ndarray, num_drawn: int = 64) -> None:
        """`drawn` and `pictures` are uint8 RGB arrays of any shape (..., 3)."""
        codes, counts = np.unique(_codes(drawn), return_counts=True)
        kept = codes[np.argsort(-counts, kind="stable")[:num_drawn]]
        exact = np.stack([kept >> 16, kept >> 8 & 255, kept & 255], axis=-1).astype(np.uint8)
        mosaic = Image.fromarray(np.ascontiguousarray(pictures.reshape(1, -1, 3)))
        quantised = mosaic.quantize(UNCHANGED - len(exact), method=Image.Quantize.MEDIANCUT)
        found = np.array(quantised.getpalette(), dtype=np.uint8).reshape(-1, 3)
        self.colours = np.concatenate([exact, found])[:UNCHANGED]
        self._image = Image.new("P", (1, 1))
        unused = np.repeat(self.colours[:1], 256 - len(self.colours), axis=0)
        self._image.putpalette(np.concatenate([self.colours, unused]).flatten().tolist())

    def dithered(self, picture: np.ndarray) -> np.ndarray:
        """Colour numbers of a video's picture, uint8 (H, W), with noise in place of steps."""
        image = Image.fromarray(np.ascontiguousarray(picture))
        numbers = np.asarray(image.quantize(palette=self._image, dither=Image.Dither.FLOYDSTEINBERG))
        return np.where(numbers < len(self.colours), numbers, 0).astype(np.uint8)

    def nearest(self, picture: np.ndarray) -> np.ndarray:
        """Colour numbers of something drawn, uint8 (H, W): the nearest colour, flat."""
        codes, where = np.unique(_codes(picture), return_inverse=True)
        wanted = np.stack([codes >> 16, codes >> 8 & 255, codes & 255], axis=-1)
        distances = ((wanted[:, None].astype(np.int64) - self.colours.astype(np.int64)) ** 2).sum(-1)
        return distances.argmin(-1).astype(np.uint8)[where].reshape(picture.shape[:2])


def _codes(picture: np.ndarray) -> np.ndarray:
    """Each colour as one number, int32."""
    parts = picture.reshape(-1, 3).astype(np.int32)
    return parts[:, 0] << 16 | parts[:, 1] << 8 | parts[:, 2]
