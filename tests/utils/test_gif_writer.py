"""GIFs: the pictures come back as they went in, at the right times, and drawn colours stay exact."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from utils.common import UserError
from utils.gif_writer import ColourTable, write_gif

COLOURS = np.array([[10, 20, 30], [250, 0, 0], [0, 200, 0], [255, 255, 255]], np.uint8)


def read(path):
    """Frames (T, H, W, 3) and how long each is shown, in milliseconds."""
    with Image.open(path) as image:
        frames, delays = [], []
        for index in range(getattr(image, "n_frames", 1)):
            image.seek(index)
            frames.append(np.asarray(image.convert("RGB")))
            delays.append(image.info["duration"])
        return np.stack(frames), delays, image.info


def test_pictures_come_back_as_they_went_in(tmp_path):
    numbers = np.random.default_rng(0).integers(0, 4, (6, 9, 7)).astype(np.uint8)
    numbers[3, :, 2:] = numbers[2, :, 2:]  # a part that does not change
    write_gif(tmp_path / "a.gif", iter(numbers), np.arange(7) / 8, COLOURS)
    frames, delays, info = read(tmp_path / "a.gif")
    assert (frames == COLOURS[numbers]).all()
    assert delays == [120, 130, 130, 120, 120, 130]  # hundredths, which add up to the true end
    assert info["loop"] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["a.gif"]


def test_pictures_that_stay_the_same_keep_their_time(tmp_path):
    numbers = np.zeros((4, 5, 5), np.uint8)
    numbers[3, 2, 2] = 1
    write_gif(tmp_path / "a.gif", iter(numbers), [0.0, 0.5, 1.0, 1.5, 2.0], COLOURS)
    frames, delays, _ = read(tmp_path / "a.gif")
    assert sum(delays) == 2000 and delays[-1] == 500
    assert (frames[0] == COLOURS[0]).all() and (frames[-1][2, 2] == COLOURS[1]).all()


def test_one_picture(tmp_path):
    write_gif(tmp_path / "a.gif", iter(np.ones((1, 4, 6), np.uint8)), [0.0, 0.04], COLOURS)
    frames, _, _ = read(tmp_path / "a.gif")
    assert frames.shape == (1, 4, 6, 3) and (frames == COLOURS[1]).all()


def test_what_a_gif_cannot_hold_is_refused(tmp_path):
    with pytest.raises(UserError, match="at most 255 colours"):
        write_gif(tmp_path / "a.gif", iter([]), [0.0, 1.0], np.zeros((256, 3), np.uint8))
    with pytest.raises(UserError, match=r"0\.02 s apart, got 0\.01 s"):
        write_gif(tmp_path / "a.gif", iter([]), [0.0, 0.01], COLOURS)
    assert not list(tmp_path.iterdir())


def test_drawn_colours_are_exact_and_pictures_near():
    drawn = COLOURS[np.random.default_rng(0).integers(0, 4, (20, 20))]
    ramp = np.stack(np.meshgrid(np.linspace(0, 255, 64), np.linspace(0, 255, 48)), -1)
    picture = np.concatenate([ramp, 255 - ramp[..., :1]], -1).astype(np.uint8)
    table = ColourTable(drawn, picture)
    assert len(table.colours) <= 255
    assert (table.colours[table.nearest(drawn)] == drawn).all()
    shown = table.colours[table.dithered(picture)].astype(float)
    assert shown.shape == picture.shape
    block_means = (shown - picture).reshape(6, 8, 8, 8, 3).mean((1, 3))
    assert np.abs(block_means).max() < 8  # noise that evens out


def test_black_is_never_taken_for_transparent():
    table = ColourTable(COLOURS[None], np.zeros((1, 8, 8, 3), np.uint8))
    numbers = table.dithered(np.zeros((8, 8, 3), np.uint8))
    assert numbers.max() < 255 and table.colours[numbers].max() <= 30
