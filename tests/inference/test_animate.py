"""The playing clip above its timeline: the cursor at the right place at the right time, and files of both kinds."""

from __future__ import annotations

import errno
import math
from contextlib import contextmanager

import av
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from inference.animate import GIF, MP4, animate_temporal_grounding, frame_times
from inference.timeline_page import TimeAxis
from utils.common import UserError
from utils.logging_utils import get_logger
from utils.palette import DARK, LIGHT
from utils.video import write_mp4

DURATION, RATE = 8.0, 2.0
LEFT, LENGTH = 1.45 / 8, (8 - 1.45 - 2.45) / 8
"""Where the time axis lies, as shares of the width of a narrow page (8 inches) without scores."""


def rgb(colour):
    return np.rint(np.array(to_rgb(colour)) * 255).astype(int)


def ramp(count, height=36, width=64):
    """Frames that brighten steadily."""
    levels = np.linspace(20, 230, count).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (count, height, width, 3)).copy()


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    write_mp4(path, ramp(16), fps=RATE)
    return path


def animate(video, path, **options):
    given = {"predictions": [(2.0, 6.0)], "ground_truths": [(3.0, 5.0)], "width": 320, "fps": RATE}
    return animate_temporal_grounding(video_path=video, output_path=path, **given | options)


def read_mp4(path):
    with av.open(str(path)) as container:
        assert [stream.type for stream in container.streams] == ["video"]  # no sound
        stream = container.streams.video[0]
        facts = stream.codec_context.name, stream.pix_fmt, stream.frames, float(stream.average_rate)
        pictures = [(frame.time, frame.to_ndarray(format="rgb24").astype(int)) for frame in container.decode(stream)]
    return facts, [time for time, _ in pictures], np.stack([picture for _, picture in pictures])


def read_gif(path):
    with Image.open(path) as image:
        pictures, times, now = [], [], 0.0
        for index in range(image.n_frames):
            image.seek(index)
            pictures.append(np.asarray(image.convert("RGB")).astype(int))
            times.append(now)
            now += image.info["duration"] / 1000
        return np.stack(pictures), times, now


def cursor_column(picture, colour, slack):
    """Middle of the columns with the longest run of the cursor's colour (the time above it is lower than a row)."""
    heights = (np.abs(picture - rgb(colour)).max(-1) <= slack).sum(0)
    assert heights.max() >= 14  # a row
    columns = np.flatnonzero(heights > 0.8 * heights.max())
    return (columns[0] + columns[-1] + 1) / 2


def test_mp4_plays_at_its_own_speed_in_a_format_that_plays_everywhere(video, tmp_path):
    written = animate(video, tmp_path / "new" / "a.mp4")
    facts, times, pictures = read_mp4(written)
    assert facts == ("h264", "yuv420p", 16, RATE)
    assert times == pytest.approx(np.arange(16) / RATE)
    assert pictures.shape[2] == 320 and pictures.shape[1] % 2 == 0
    assert [file.name for file in written.parent.iterdir()] == ["a.mp4"]


@pytest.mark.parametrize(("theme", "palette"), [("light", LIGHT), ("dark", DARK)])
def test_the_cursor_moves_along_the_time_axis(video, tmp_path, theme, palette):
    _, times, pictures = read_mp4(
        animate(video, tmp_path / "a.mp4", theme=theme, predictions=[None] * 3, ground_truths=None)
    )
    assert np.abs(pictures[5][2, 2] - rgb(palette.paper)).max() <= 6
    for time, picture in zip(times, pictures, strict=True):
        expected = (LEFT + LENGTH * time / DURATION) * 320
        assert cursor_column(picture, palette.cursor, 60) == pytest.approx(expected, abs=1.6), time


def test_each_frame_shows_the_clip_as_it_is_then(video, tmp_path):
    _, times, pictures = read_mp4(animate(video, tmp_path / "a.mp4", fps=4.0))
    levels = np.linspace(20, 230, 16)
    for time, picture in zip(times, pictures, strict=True):
        assert picture[80, 160].mean() == pytest.approx(levels[int(time * RATE + 1e-6)], abs=10), time
    assert len(times) == 32


def test_gif_has_the_exact_colours(video, tmp_path):
    pictures, times, end = read_gif(animate(video, tmp_path / "a.gif", theme="dark"))
    assert pictures.shape[2] == 320 and (len(pictures), end) == (16, DURATION)
    assert times == pytest.approx(np.arange(16) / RATE)
    for time, picture in zip(times, pictures, strict=True):
        colours = {tuple(colour) for colour in picture.reshape(-1, 3)}
        assert {tuple(rgb(c)) for c in (DARK.truth, DARK.prediction, DARK.cursor, DARK.paper)} <= colours
        expected = (LEFT + LENGTH * time / DURATION) * 320
        assert cursor_column(picture, DARK.cursor, 0) == pytest.approx(expected, abs=1.1), time
    levels = [picture[40:80, 140:180].mean() for picture in pictures]
    assert levels == pytest.approx(np.linspace(20, 230, 16).tolist(), abs=6)


def test_bars_lie_at_their_times(video, tmp_path):
    [picture, *_], _, _ = read_gif(animate(video, tmp_path / "a.gif"))
    for colour, (start, end) in ((LIGHT.truth, (3.0, 5.0)), (LIGHT.prediction, (2.0, 6.0))):
        is_bar = (picture == rgb(colour)).all(-1)
        row = int(is_bar.sum(1).argmax())
        inside = np.flatnonzero(is_bar[row])
        inside = inside[(inside > LEFT * 320) & (inside < (LEFT + LENGTH) * 320)]
        assert inside[0] == pytest.approx((LEFT + LENGTH * start / DURATION) * 320, abs=1.5)
        assert inside[-1] + 1 == pytest.approx((LEFT + LENGTH * end / DURATION) * 320, abs=1.5)


def test_a_stretch_fills_the_time_axis(video, tmp_path):
    path = animate(video, tmp_path / "a.gif", video_start=4.0, video_end=6.0, predictions=[], ground_truths=None)
    pictures, times, end = read_gif(path)
    assert (len(pictures), end) == (4, 2.0)
    for time, picture in zip(times, pictures, strict=True):
        assert cursor_column(picture, LIGHT.cursor, 0) == pytest.approx((LEFT + LENGTH * time / 2) * 320, abs=1.1)
        assert picture[40:80, 140:180].mean() == pytest.approx(np.linspace(20, 230, 16)[8 + int(time * RATE)], abs=6)


@pytest.mark.parametrize(
    ("shape", "count"), [((96, 40), 4), ((2, 2), 3), ((36, 64), 1), ((16, 320), 2)], ids=["tall", "tiny", "one", "wide"]
)
@pytest.mark.parametrize("suffix", ["mp4", "gif"])
def test_clips_of_every_shape(shape, count, suffix, tmp_path):
    write_mp4(tmp_path / "v.mp4", ramp(count, *shape), fps=RATE)
    path = animate(tmp_path / "v.mp4", tmp_path / f"a.{suffix}", predictions=[None], width=241)
    if suffix == "mp4":
        (codec, _, num_frames, _), _, pictures = read_mp4(path)
        assert (codec, num_frames) == ("h264", count)
    else:
        pictures = read_gif(path)[0]
        assert len(pictures) == count
    height, width = pictures.shape[1:3]
    assert width == 240 and height % 2 == 0
    most = (MP4 if suffix == "mp4" else GIF).picture_share * width
    middle = pictures[0][: int(most) + 6, 120]  # a page without a title begins with its border
    shown = np.abs(middle - 20).max(-1) <= 14  # the first frame is dark, the paper is not
    expected = min((240 - 2 * 4) * shape[0] / shape[1], most)
    assert shown.sum() == pytest.approx(expected, abs=2)


def test_several_queries_scores_and_saliency_are_played_too(video, tmp_path):
    predictions = [{"query": "a", "segments": [[1, 2]]}, {"query": "b", "segments": [[3, 4]], "scores": [0.5]}]
    path = animate(video, tmp_path / "a.gif", predictions=predictions, ground_truths={"a": [(1, 2)]}, saliency=[0, 1])
    with Image.open(path) as image:
        both = image.size
    assert both[0] == 320 and both[1] > Image.open(animate(video, tmp_path / "b.gif")).size[1]


@pytest.mark.parametrize(
    ("limits", "length", "fps", "expected"),
    [
        (MP4, 60.0, None, (900, 15.0)),
        (MP4, 3600.0, None, (5400, 1.5)),
        (MP4, 60.0, 30.0, (1800, 30.0)),
        (GIF, 10.0, None, (80, 8.0)),
        (GIF, 180.0, None, (195, 195 / 180)),  # 20 million pixels of 426 x 240
        (GIF, 180.0, 0.5, (90, 0.5)),
        (GIF, 0.04, None, (1, 8.0)),
    ],
)
def test_long_clips_are_thinned(limits, length, fps, expected):
    times, rate = frame_times(
        TimeAxis(7 + length, 7.0, 7 + length, 7.0, 7 + length), limits, fps, (240, 426), (540, 640)
    )
    assert (len(times), rate) == (expected[0], pytest.approx(expected[1]))
    assert times == pytest.approx(7 + np.arange(len(times)) / rate)
    assert times[-1] < 7 + length <= times[-1] + 1 / rate + 1e-6


def test_a_page_with_very_many_rows_is_thinned_too():
    axis = TimeAxis(180.0, 0.0, 180.0, 0.0, 180.0)
    assert len(frame_times(axis, GIF, None, (240, 426), (4000, 640))[0]) == math.floor(200e6 / (4000 * 640))


def test_thinning_is_said(video, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(get_logger(), "propagate", False)  # caplog also listens at the root
    monkeypatch.setattr(get_logger(), "handlers", [*get_logger().handlers, caplog.handler])
    monkeypatch.setattr(get_logger(), "level", 20)
    monkeypatch.setitem(animate_temporal_grounding.__globals__["_KINDS"], ".mp4", MP4.__class__(
        fps=15, max_fps=60, width=960, picture_share=0.5, max_frames=4, max_pixels=math.inf, max_page_pixels=math.inf
    ))  # fmt: skip
    facts, _, _ = read_mp4(animate(video, tmp_path / "a.mp4"))
    assert facts[2:] == (4, 0.5)
    assert "thinned to 0.50 of 2 frames a second" in caplog.text and "video_start" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output_path": "a.avi"}, r"written as \.mp4 or \.gif, got 'a\.avi'"),
        ({"output_path": "a.gif", "fps": 30.0}, "fps must be above 0 and at most 25 for this kind of file, got 30"),
        ({"fps": 0.0}, "fps must be above 0"),
        ({"fps": math.nan}, "fps must be above 0"),
        ({"width": 100}, "width must be 240 to 1920 pixels, got 100"),
        ({"theme": "black"}, "theme must be one of light, dark"),
        ({"predictions": [(1, 2, math.inf)]}, "score must be a finite number"),
        ({"video_path": "missing.mp4"}, "missing.mp4: no such file"),
        ({"video_start": 9.0}, "the video ends at 8"),
        ({"video_start": 5.0, "video_end": 4.0}, "0 <= start < end"),
    ],
)
def test_bad_input_is_refused_and_leaves_nothing(video, change, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"video_path": video, "predictions": [], "output_path": "a.mp4", "width": 240}
    with pytest.raises(UserError, match=message):
        animate_temporal_grounding(**given | change)
    assert not list(tmp_path.iterdir())


def test_a_file_without_video_is_named(tmp_path):
    with av.open(str(tmp_path / "sound.m4a"), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    with pytest.raises(UserError, match=r"sound\.m4a: it has no video stream \(streams: audio\)"):
        animate(tmp_path / "sound.m4a", tmp_path / "a.mp4")
    assert not (tmp_path / "a.mp4").exists()


@pytest.mark.parametrize("suffix", ["mp4", "gif"])
def test_a_full_disk_is_said_plainly(video, tmp_path, monkeypatch, suffix):
    @contextmanager
    def full(path, mode):
        with open("/dev/full", mode) as handle:
            yield handle

    monkeypatch.setattr(f"utils.{'video' if suffix == 'mp4' else 'gif'}_writer.atomic_open", full)
    with pytest.raises(UserError, match=rf"no space left on the disk that holds .*a\.{suffix}; free some space"):
        animate(video, tmp_path / f"a.{suffix}")


@pytest.mark.parametrize("suffix", ["mp4", "gif"])
def test_what_cannot_be_finished_leaves_the_old_file(video, tmp_path, monkeypatch, suffix):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / f"a.{suffix}").write_text("old")
    monkeypatch.setattr("utils.common.os.fsync", fail)
    with pytest.raises(UserError, match="no space left"):
        animate(video, tmp_path / f"a.{suffix}")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(f"a.{suffix}", "old")]


def test_a_folder_in_the_way_is_named(video, tmp_path):
    (tmp_path / "a.gif").mkdir()
    with pytest.raises(UserError, match=r"a\.gif cannot be written"):
        animate(video, tmp_path / "a.gif")
    assert [path.name for path in tmp_path.iterdir()] == ["a.gif"]
