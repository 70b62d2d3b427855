"""Which frame is on display when: constant and variable rate, lost frames."""

from __future__ import annotations

import numpy as np
import pytest

from utils.video_file import VideoFile, VideoReadError
from utils.video_stream import frames_on_display
from utils.video_writer import write_mp4, write_mp4_stream

GREYS = np.arange(0, 200, 25, dtype=np.uint8)
TIMES = [0.0, 0.1, 0.5, 0.6, 1.0, 2.0, 2.2, 3.0]


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """Eight grey frames at uneven times."""
    path = tmp_path_factory.mktemp("stream") / "uneven.mp4"
    write_mp4(path, np.broadcast_to(GREYS[:, None, None, None], (8, 32, 48, 3)).copy(), times_s=TIMES)
    return path


def greys(frames):
    """Which of the eight frames each one is."""
    return [round(float(frame.mean()) / 25) for frame in frames]


def test_the_last_frame_shown_at_or_before_a_time(video):
    with VideoFile(video) as file:
        at = np.array([0.0, 0.05, 0.1, 0.49, 0.5, 1.9, 1.99999, 2.1, 3.5])
        frames = list(frames_on_display(file, file.scan(), at, 16, 24))
    assert greys(frames) == [0, 0, 1, 1, 2, 4, 5, 5, 7]  # 1.99999 is 2.0 within the clock's slack
    assert frames[0].shape == (16, 24, 3) and frames[0].dtype == np.uint8


def test_a_stretch_that_begins_between_two_frames(video):
    with VideoFile(video) as file:
        stretch = file.scan(0.7, 2.1)
        assert greys(frames_on_display(file, stretch, np.array([0.7, 1.0, 2.05]), 16, 24)) == [4, 4, 5]


@pytest.mark.parametrize(("lost", "expected"), [({2}, [0, 1, 1, 3]), ({0, 1}, [2, 2, 2, 3]), ({3}, [0, 1, 2, 2])])
def test_lost_frames_are_shown_as_the_one_before(video, lost, expected, monkeypatch):
    decode_each = VideoFile.decode_each

    def losing(self, stretch, wanted, height, width):
        return (pair for pair in decode_each(self, stretch, wanted, height, width) if pair[0] not in lost)

    monkeypatch.setattr(VideoFile, "decode_each", losing)
    with VideoFile(video) as file:
        assert greys(frames_on_display(file, file.scan(), np.array(TIMES[:4]), 16, 24)) == expected


def test_a_file_of_which_nothing_decodes_is_refused(video, monkeypatch):
    monkeypatch.setattr(VideoFile, "decode_each", lambda *_: iter(()))
    with VideoFile(video) as file, pytest.raises(VideoReadError, match="none of its frames decodes"):
        list(frames_on_display(file, file.scan(), np.array([0.0]), 16, 24))


def test_a_stream_of_frames_gives_the_same_file(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (5, 32, 48, 3)).astype(np.uint8)
    write_mp4(tmp_path / "whole.mp4", frames, fps=5.0, crf=18)
    write_mp4_stream(tmp_path / "stream.mp4", iter(frames), size=(32, 48), num_frames=5, fps=5.0)
    assert (tmp_path / "whole.mp4").read_bytes() == (tmp_path / "stream.mp4").read_bytes()
