"""Every frame of the test files carries its own number in the brightness of eight bars, so each test checks which
frame was really decoded, and compares it with the time the clip claims."""

import itertools
import multiprocessing
import os
import pickle
import shutil
import struct
import sys
import tempfile
import threading
import time
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils import video_backends, video_file
from utils.common import UserError
from utils.video import (
    FrameBudget,
    VideoClip,
    VideoReadError,
    clip_from_frames,
    plan_num_frames,
    plan_size,
    probe_video,
    read_clip,
    resize_clip,
    write_mp4,
)
from utils.video_file import VideoFile
from utils.video_writer import write_mp4_stream

FPS = 25
GOP = 20
BACKENDS = ("pyav", "decord")


def budget(fps=FPS, min_frames=1, max_frames=768, least=1024, most=262144, total=16777216):
    return FrameBudget(fps, min_frames, max_frames, least, most, total)


def numbered(count, height=64, width=96):
    """uint8 (count, height, width, 3); frame i shows the bits of i as dark and bright bars."""
    bits = (np.arange(count)[:, None] >> np.arange(8)) & 1
    rows = np.repeat(np.where(bits, 220, 30).astype(np.uint8), -(-width // 8), axis=1)[:, :width]
    return np.ascontiguousarray(np.broadcast_to(rows[:, None, :, None], (count, height, width, 3)))


def numbers(frames):
    """The number each frame shows."""
    columns = frames.mean(axis=(1, 3))
    edges = np.linspace(0, columns.shape[1], 9)
    bars = [columns[:, int(a + (b - a) / 4) : int(b - (b - a) / 4)].mean(axis=1) for a, b in itertools.pairwise(edges)]
    return sum((bar > 125).astype(int) << bit for bit, bar in enumerate(bars)).tolist()


def encode(path, frames, codec="libx264", fps=FPS, pix_fmt="yuv420p", b_frames=None, gop=None, **options):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pix_fmt
        if b_frames is not None:
            stream.codec_context.max_b_frames = b_frames
        if gop is not None:
            stream.codec_context.gop_size = gop
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def remux(source, target, shift_s=0.0, replace=None, skip=0, **options):
    """Copy packets from number `skip` on; earlier by `shift_s` (mp4 then hides what falls before 0), some replaced."""
    with av.open(str(source)) as old, av.open(str(target), "w", options=options) as new:
        stream = old.streams.video[0]
        copy = new.add_stream_from_template(stream)
        for number, packet in enumerate(packet for packet in old.demux(stream) if packet.size):
            if number < skip:
                continue
            shift = round(shift_s / stream.time_base)
            data = (replace or {}).get(number, bytes(packet))
            out = av.Packet(data)
            out.pts, out.dts, out.time_base = packet.pts - shift, packet.dts - shift, packet.time_base
            out.duration, out.is_keyframe, out.stream = packet.duration, packet.is_keyframe, copy
            new.mux(out)
    return target


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("videos")


@pytest.fixture(scope="module")
def constant(folder):
    """8 s at 25 frames a second, a key frame every 20."""
    write_mp4(folder / "constant.mp4", numbered(200), fps=FPS, gop_size=GOP)
    return folder / "constant.mp4"


@pytest.fixture(scope="module")
def variable_times():
    gaps = np.random.default_rng(0).uniform(0.02, 0.5, 59)
    return 0.3 + np.concatenate([[0.0], np.cumsum(gaps)])


@pytest.fixture(scope="module")
def variable(folder, variable_times):
    """Irregular times, the first frame shown 0.3 s into the stream."""
    write_mp4(folder / "variable.mp4", numbered(60), times_s=variable_times, gop_size=GOP)
    return folder / "variable.mp4"


# -- which frames, when ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_constant_rate_gives_qwens_frames_at_their_times(constant, backend):
    clip = read_clip(constant, budget(fps=2), backend=backend)
    expected = np.linspace(0, 199, 16).round().astype(int).tolist()
    assert numbers(clip.frames) == expected
    np.testing.assert_allclose(clip.times_s, np.array(expected) / FPS, atol=1e-9)
    assert (clip.start_s, clip.duration_s) == (0.0, pytest.approx(8.0))
    assert clip.frames.shape == (16, 64, 96, 3) and clip.frames.dtype == np.uint8 and clip.times_s.dtype == np.float64


@pytest.mark.parametrize("backend", BACKENDS)
def test_variable_rate_takes_the_nearest_frames_at_their_true_times(variable, variable_times, backend):
    clip = read_clip(variable, budget(fps=1), backend=backend)
    shown = variable_times - variable_times[0]
    np.testing.assert_allclose(clip.times_s, shown[numbers(clip.frames)], atol=2e-5)
    targets = np.linspace(0, shown[-1], len(clip.frames))
    nearest = np.abs(shown[None] - targets[:, None]).min(axis=1)
    assert len(clip.frames) == 16
    np.testing.assert_allclose(np.abs(clip.times_s - targets), nearest, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_frames_of_a_variable_rate_file(variable, variable_times, backend):
    clip = read_clip(variable, budget(fps=100), backend=backend)
    assert numbers(clip.frames) == list(range(60))
    np.testing.assert_allclose(clip.times_s, variable_times - 0.3, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("start, end", [(0.0, 0.8), (2.0, 3.0), (3.13, 5.57), (7.2, 8.0), (0.0, None), (6.5, None)])
def test_a_stretch_holds_its_own_frames_on_its_own_clock(constant, backend, start, end):
    clip = read_clip(constant, budget(), start_s=start, end_s=end, backend=backend)
    stop = 8.0 if end is None else end
    expected = [i for i in range(200) if start <= i / FPS < stop - 1e-6]
    found = numbers(clip.frames)
    assert found == expected
    np.testing.assert_allclose(clip.times_s, np.array(found) / FPS - start, atol=1e-6)
    assert (clip.start_s, clip.duration_s) == (start, pytest.approx(stop - start))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stretch_of_a_variable_rate_file(variable, variable_times, backend):
    clip = read_clip(variable, budget(fps=4), start_s=4.0, end_s=9.5, backend=backend)
    shown = variable_times - variable_times[0]
    found = numbers(clip.frames)
    assert found[0] == int(np.searchsorted(shown, 4.0)) and found[-1] == int(np.searchsorted(shown, 9.5)) - 1
    np.testing.assert_allclose(clip.times_s + 4.0, shown[found], atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_between_two_frames_the_one_on_display_stands_for_the_stretch(folder, backend):
    write_mp4(folder / "slides.mp4", numbered(3), times_s=[0.0, 4.0, 9.0])
    clip = read_clip(folder / "slides.mp4", budget(), start_s=5.0, end_s=7.5, backend=backend)
    assert numbers(clip.frames) == [1] and clip.times_s.tolist() == [0.0] and clip.duration_s == 2.5


@pytest.mark.parametrize("start, end", [(None, None), (3.3, 5.1)])
def test_a_stretch_too_large_to_hold_is_read_twice_alike(constant, monkeypatch, start, end):
    held = read_clip(constant, budget(fps=5), start_s=start, end_s=end, backend="pyav")
    monkeypatch.setattr(video_file, "KEPT_PACKET_BYTES", 100)
    again = read_clip(constant, budget(fps=5), start_s=start, end_s=end, backend="pyav")
    np.testing.assert_array_equal(again.frames, held.frames)
    np.testing.assert_array_equal(again.times_s, held.times_s)


def test_frames_far_outside_the_stretch_are_not_decoded(constant):
    with VideoFile(constant) as file:
        opened = file.num_decoded
        stretch = file.scan(4.1, 4.6)  # frames 103 to 114, in the group that begins at 100
        file.decode(stretch, stretch.ticks, 64, 96)
        assert opened <= 4
        assert len(stretch.ticks) == 12
        assert file.num_decoded - opened <= 20
        assert len(stretch.log.ticks) <= 24  # nor are their packets read


def test_groups_are_decoded_only_up_to_their_last_wanted_frame(constant):
    with VideoFile(constant) as file:
        stretch = file.scan()
        before = file.num_decoded
        file.decode(stretch, stretch.ticks[[0, 41, 199]], 64, 96)
        assert file.num_decoded - before <= 1 + 6 + 20  # frame 0; 40 to 41 and what x264 stores before; the last group


@pytest.mark.parametrize("threads", [1, 3])
def test_passing_over_frames_changes_no_pixel(folder, monkeypatch, threads):
    """B-frames that nobody wants are not decoded; the others come out as from a decoder that decodes all."""
    monkeypatch.setattr(video_file, "decoder_threads", lambda num_pixels: threads)
    path = folder / "unreferred.mp4"
    if not path.exists():
        texture = np.random.default_rng(0).integers(0, 255, (8, 12, 3)).astype(np.uint8).repeat(8, 0).repeat(8, 1)
        write_mp4(path, np.stack([np.roll(texture, i, axis=1) for i in range(120)]), fps=FPS, crf=23)
    with VideoFile(path) as file:
        stretch = file.scan()
        wanted = stretch.ticks[[0, 1, 2, 30, 47, 64, 65, 119]]
        opened = file.num_decoded
        whole = np.stack([frame for _, frame in file.decode_each(stretch, wanted, 64, 96)])
        num_whole = file.num_decoded - opened
        frames, found = file.decode(stretch, wanted, 64, 96)
        num_quick = file.num_decoded - opened - num_whole
        assert found.all() and np.array_equal(frames, whole)
        assert num_quick < 0.8 * num_whole
        everything, found = file.decode(stretch, stretch.ticks, 64, 96)
        assert found.all() and np.array_equal(everything[[0, 1, 2, 30, 47, 64, 65, 119]], whole)
        assert file.decodable(stretch).all()  # the decoder is told nothing of it any more


def test_a_frame_that_passing_over_lost_is_decoded_in_full(constant, monkeypatch):
    asked, decode_each = [], VideoFile.decode_each

    def losing(self, stretch, wanted, height, width, *, is_quick):
        asked.append((len(wanted), is_quick))
        pairs = decode_each(self, stretch, wanted, height, width, is_quick=is_quick)
        return (pair for pair in pairs if not (is_quick and pair[0] in (1, 3)))

    monkeypatch.setattr(VideoFile, "decode_each", losing)
    with VideoFile(constant) as file:
        stretch = file.scan()
        frames, found = file.decode(stretch, stretch.ticks[[3, 40, 77, 120, 199]], 64, 96)
    assert found.all() and numbers(frames) == [3, 40, 77, 120, 199]
    assert asked == [(5, True), (2, False)]


# -- odd files ---------------------------------------------------------------------------------------------------------


def turned(source, target, degrees):
    """Write a display matrix (clockwise) into the track header, as telephones do."""
    data = bytearray(Path(source).read_bytes())
    a, b, c, d = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[degrees]
    at = data.index(b"tkhd") + 4 + 40
    data[at : at + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    Path(target).write_bytes(data)
    return target


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation_is_honoured(folder, backend, degrees):
    picture = np.zeros((64, 96, 3), np.uint8)
    picture[:32, :48], picture[:32, 48:], picture[32:, :48] = 250, 90, 160
    write_mp4(folder / "upright.mp4", np.stack([picture] * 4), fps=4)
    path = turned(folder / "upright.mp4", folder / f"turned{degrees}.mp4", degrees)
    expected = np.rot90(picture, -degrees // 90)
    frame = read_clip(path, budget(), backend=backend).frames[0]
    assert frame.shape == expected.shape
    inner = (slice(8, None, 16), slice(8, None, 16))
    np.testing.assert_allclose(frame[inner].astype(int), expected[inner].astype(int), atol=4)
    info = probe_video(path)
    assert (info.height, info.width) == expected.shape[:2]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("codec, pix_fmt", [("mpeg4", "yuv420p"), ("libx264", "yuv444p")])
def test_odd_sizes(folder, backend, codec, pix_fmt):
    path = encode(folder / f"odd-{codec}.mp4", numbered(20, 49, 81), codec, pix_fmt=pix_fmt)
    clip = read_clip(path, budget(), backend=backend)
    assert clip.frames.shape == (20, 64, 96, 3)  # 49 x 81 to the nearest multiples of 32
    assert numbers(clip.frames) == list(range(20))
    assert (probe_video(path).height, probe_video(path).width) == (49, 81)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_frame(folder, backend):
    write_mp4(folder / "one.mp4", numbered(2)[1:], fps=8)
    clip = read_clip(folder / "one.mp4", budget(min_frames=4), backend=backend)
    assert numbers(clip.frames) == [1] and clip.times_s.tolist() == [0.0] and clip.duration_s == 0.125


@pytest.mark.parametrize("backend", BACKENDS)
def test_frames_hidden_before_an_edit_list_do_not_exist(folder, constant, backend):
    path = remux(constant, folder / "headless.mp4", shift_s=1.56)
    clip = read_clip(path, budget(), backend=backend)
    assert numbers(clip.frames) == list(range(39, 200))
    np.testing.assert_allclose(clip.times_s, np.arange(161) / FPS, atol=1e-4)
    assert probe_video(path).num_frames == 161


@pytest.mark.parametrize("backend", BACKENDS)
def test_frames_hidden_after_an_edit_list_neither_hang_nor_exist(folder, backend):
    """decord counts 300 frames here, 90 are shown, and its get_batch never returns."""
    write_mp4(folder / "long.mp4", numbered(250), fps=FPS)
    data = bytearray((folder / "long.mp4").read_bytes())
    at = data.index(b"elst") + 12
    data[at : at + 4] = struct.pack(">I", 3000)  # the segment's length in milliseconds
    path = folder / "tailless.mp4"
    path.write_bytes(data)
    started = time.monotonic()
    clip = read_clip(path, budget(fps=5), backend=backend)
    assert time.monotonic() - started < 10
    found = numbers(clip.frames)
    assert found[0] == 0 and found[-1] == 74 and clip.duration_s == pytest.approx(3.0)
    np.testing.assert_allclose(clip.times_s, np.array(found) / FPS, atol=1e-6)


OPEN = {"x264-params": "open-gop=1:keyint=24:min-keyint=12:bframes=4:b-adapt=0:scenecut=0"}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "name, codec, options",
    [
        ("open.mp4", "libx264", OPEN),
        ("open.mkv", "libx264", OPEN),
        ("b.avi", "mpeg4", {"b_frames": 2, "gop": 12, "qmax": "3"}),
        ("b.mp4", "mpeg4", {"b_frames": 2, "gop": 12, "qmax": "3"}),
        ("b.ts", "mpeg2video", {"b_frames": 2, "gop": 12, "qmax": "3"}),
        ("vp9.webm", "libvpx-vp9", {"gop": 20, "deadline": "realtime", "cpu-used": "8"}),
    ],
)
def test_containers_and_open_groups_of_pictures(folder, backend, name, codec, options):
    """In the first five decord alone gives shifted frames without an error, or repeats some."""
    path = folder / name
    if not path.exists():
        encode(path, numbered(100), codec, **options)
    for start, end in ((None, None), (0.4, 1.3), (1.51, 3.33)):
        clip = read_clip(path, budget(fps=9), start_s=start, end_s=end, backend=backend)
        expected = np.array(numbers(clip.frames)) / FPS
        np.testing.assert_allclose(clip.times_s + clip.start_s, expected, atol=1e-3)  # mkv counts milliseconds


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_frame_that_does_not_decode_is_not_sampled(folder, backend):
    encode(folder / "whole.mp4", numbered(40), "mpeg4", gop=12, qmax="3")
    not_coded = b"\0\0\1\xb6\x50\x4f"  # an MPEG-4 picture that says "nothing new", which decoders drop
    path = remux(folder / "whole.mp4", folder / "lost.mp4", replace={35: not_coded})  # last of its group
    clip = read_clip(path, budget(), backend=backend)
    found = numbers(clip.frames)
    assert found == [i for i in range(40) if i != 35]
    np.testing.assert_allclose(clip.times_s, np.array(found) / FPS, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_time_0_is_the_first_frame_that_shows(folder, backend):
    """A file that begins inside a group, then with frames that refer back past its start."""
    encode(folder / "open-source.mp4", numbered(100), **OPEN)
    with av.open(str(folder / "open-source.mp4")) as container:
        keys = [i for i, packet in enumerate(container.demux(video=0)) if packet.size and packet.is_keyframe]
    path = remux(folder / "open-source.mp4", folder / "begins-inside.mkv", skip=keys[1] - 3)
    clip = read_clip(path, budget(), backend=backend)
    found = np.array(numbers(clip.frames))
    assert clip.times_s[0] == 0.0 and found[-1] == 99
    np.testing.assert_allclose(clip.times_s, (found - found[0]) / FPS, atol=1e-3)


# -- unreadable --------------------------------------------------------------------------------------------------------


def sound_only(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16000, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def cut_in_half(path):
    write_mp4(path, numbered(100), fps=FPS)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def fast_start(path):
    """The index first, so that a file cut short still opens."""
    source = path.with_name("slow-start.mp4")
    noise = np.random.default_rng(0).integers(0, 8, (200, 64, 96, 3), dtype=np.uint8)
    write_mp4(source, numbered(200) + noise, fps=FPS, gop_size=GOP)
    remux(source, path, movflags="faststart")


def cut_data(path):
    fast_start(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * 0.6)])


def raw_stream(path):
    encode(path.with_suffix(".h264"), numbered(10))
    path.with_suffix(".h264").rename(path)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "make, reason",
    [
        (sound_only, r"no video stream \(streams: audio\)"),
        (lambda path: path.write_bytes(b""), "empty"),
        (lambda path: path.write_text("not a video\n" * 50), "not a video"),
        (lambda path: path.mkdir(), "directory"),
        (os.mkfifo, "not a regular file"),
        (lambda path: None, "no such file"),
        (cut_in_half, "cut short"),
        (cut_data, r"promises 8.00 s but the data ends at \d.\d\d s"),
        (raw_stream, "no times; put them into a container"),
    ],
)
def test_unreadable_files_are_named_with_a_plain_reason(tmp_path, make, reason, backend):
    path = tmp_path / "broken.mp4"
    make(path)
    with pytest.raises(VideoReadError, match=reason) as caught:
        read_clip(path, budget(), backend=backend)
    assert str(path) in str(caught.value) and caught.value.path == str(path)
    with pytest.raises(VideoReadError):
        probe_video(path)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_forbidden_file(constant, backend):
    """Also where the tests run as root, who may read everything and turns into somebody else for it."""
    with tempfile.TemporaryDirectory() as folder:  # tmp_path lies in a folder that is root's alone
        os.chmod(folder, 0o755)
        paths = [Path(shutil.copy(constant, os.path.join(folder, name))) for name in ("open.mp4", "secret.mp4")]
        paths[0].chmod(0o644)
        paths[1].chmod(0)
        before = os.geteuid()
        read_clip(constant, budget(), end_s=0.4, backend=backend)  # imports what it needs
        try:
            os.seteuid(before or 65534)
            if not os.access(paths[0], os.R_OK, effective_ids=True):
                pytest.skip(f"nobody but root may look into {tempfile.gettempdir()}")
            assert numbers(read_clip(paths[0], budget(), end_s=0.4, backend=backend).frames) == list(range(10))
            for read in (probe_video, lambda path: read_clip(path, budget(), backend=backend)):
                with pytest.raises(VideoReadError, match="secret.mp4: permission denied"):
                    read(paths[1])
        finally:
            os.seteuid(before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_whole_part_of_a_file_cut_short_can_be_read(tmp_path, backend):
    cut_data(tmp_path / "cut.mp4")
    clip = read_clip(tmp_path / "cut.mp4", budget(), start_s=1.0, end_s=2.0, backend=backend)
    assert numbers(clip.frames) == list(range(25, 50))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "start, end, message",
    [
        (9.0, None, "starts at 9.0 s but the video ends at 8.000 s"),
        (8.0, 8.3, "starts at 8.0 s but the video ends at 8.000 s"),
        (1.0, 9.0, "ends at 9.0 s but the video ends at 8.000 s"),
        (3.0, 3.0, "0 <= start < end, got 3.0 to 3.0"),
        (-1.0, 3.0, "0 <= start < end, got -1.0 to 3.0"),
        (float("nan"), 3.0, "0 <= start < end"),
        (0.0, float("nan"), "0 <= start < end"),
    ],
)
def test_a_stretch_outside_the_file_is_refused_with_both_numbers(constant, backend, start, end, message):
    with pytest.raises(VideoReadError, match=message):
        read_clip(constant, budget(), start_s=start, end_s=end, backend=backend)


def test_a_small_overrun_of_the_end_is_cut(constant):
    clip = read_clip(constant, budget(), start_s=7.0, end_s=8.4, backend="pyav")
    assert numbers(clip.frames) == list(range(175, 200)) and clip.duration_s == pytest.approx(1.0)


def test_errors_survive_the_way_out_of_a_worker():
    error = pickle.loads(pickle.dumps(VideoReadError("a.mp4", "no such file")))
    assert str(error) == "cannot read the video a.mp4: no such file" and error.path == "a.mp4"


def test_backends_unknown_or_missing(constant, monkeypatch):
    with pytest.raises(UserError, match=r"data.backend must be one of .* did you mean 'pyav'"):
        read_clip(constant, budget(), backend="pyavv")
    monkeypatch.setitem(sys.modules, "decord", None)
    with pytest.raises(UserError, match="data.backend is 'decord'.*pip install decord.*pyav or qwen_vl_utils"):
        read_clip(constant, budget(), backend="decord")
    assert len(read_clip(constant, budget(), backend="pyav").frames) == 200


def test_a_decoder_that_hangs_is_left_behind(constant, monkeypatch):
    release = threading.Event()
    opened = []

    def hang(*_):
        opened.append(1)
        release.wait(30)

    monkeypatch.setattr(video_backends, "open_decord", hang)
    monkeypatch.setattr(video_backends, "DECORD_DEADLINE_S", 0.05)
    monkeypatch.setattr(video_backends, "DECORD_DEADLINE_PER_PACKET_S", 0.0)
    monkeypatch.setattr(video_backends, "_decord_hung", threading.Event())
    for _ in range(2):
        assert numbers(read_clip(constant, budget(), end_s=1.0, backend="decord").frames) == list(range(25))
    release.set()
    assert len(opened) == 1  # the second read did not try again


def _read_in_worker(path):
    return numbers(read_clip(path, budget(), end_s=0.4, backend="decord").frames)


def test_decord_reads_in_a_forked_worker_after_the_parent_has_read(constant):
    expected = _read_in_worker(constant)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.map_async(_read_in_worker, [constant]).get(timeout=30) == [expected] == [list(range(10))]

# -- hard to read, and unlike in pixels --------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_twenty_thousand_frames(folder, backend):
    """11 minutes; a file whose frames are told apart by their brightness, two to a shade."""
    path = folder / "twenty-thousand.mp4"
    if not path.exists():
        shades = (np.arange(20_000) % 200 + 20).astype(np.uint8)
        flat = (np.full((16, 16, 3), shade, np.uint8) for shade in shades)
        write_mp4_stream(path, flat, size=(16, 16), num_frames=20_000, fps=30)
    clip = read_clip(path, budget(fps=0.1, least=1), backend=backend)
    indices = np.linspace(0, 19_999, len(clip.frames)).round().astype(int)
    assert len(clip.frames) == 68  # 666.7 s at 0.1 fps, made even
    np.testing.assert_allclose(clip.times_s, indices / 30, atol=1e-6)
    np.testing.assert_allclose(clip.frames.mean(axis=(1, 2, 3)), indices % 200 + 20, atol=3)
    tail = read_clip(path, budget(fps=30, least=1), start_s=660.0, backend=backend)
    assert tail.frames.mean(axis=(1, 2, 3)).round().astype(int).tolist()[-1] == pytest.approx(19_999 % 200 + 20, abs=3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_eight_thousand_pixels_wide(folder, backend):
    path = folder / "wide.mp4"
    if not path.exists():
        write_mp4(path, numbered(4, 256, 8192), fps=4)
    clip = read_clip(path, budget(most=65536), backend=backend)
    assert clip.frames.shape == (4, 32, 1440, 3) and numbers(clip.frames) == [0, 1, 2, 3]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_header_that_counts_too_many_frames_is_not_believed(folder, backend):
    """An AVI's header says 400 frames and has 40: of the whole file that is an error, a stretch of it can be read."""
    path = folder / "over-reported.avi"
    if not path.exists():
        encode(path, numbered(40), "mpeg4", gop=12, qmax="3")
        data = bytearray(path.read_bytes())
        at = data.index(b"strh") + 8 + 32
        assert struct.unpack("<I", data[at : at + 4]) == (40,)
        data[at : at + 4] = struct.pack("<I", 400)
        path.write_bytes(data)
    started = time.monotonic()
    try:
        assert numbers(read_clip(path, budget(), backend=backend).frames) == list(range(40))
    except VideoReadError as error:
        assert "promises 16.00 s but the data ends at 1.56 s" in error.reason
    assert numbers(read_clip(path, budget(), start_s=0.4, end_s=1.2, backend=backend).frames) == list(range(10, 30))
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    "height, width, mean, most",
    [(352, 640, 0, 0), (360, 640, 2, 16), (720, 1280, 2, 16), (48, 64, 2, 16)],  # as they are; smaller; smaller; larger
)
def test_decord_and_pyav_give_the_same_pixels_but_for_their_scalers(folder, height, width, mean, most):
    """The decoded pictures are equal to the bit; decord resizes by another filter. See docs/benchmarks.md."""
    from PIL import Image

    path = folder / f"textured-{height}.mp4"
    coarse = np.random.default_rng(0).integers(30, 226, (height // 32 + 1, width // 32 + 1, 3), dtype=np.uint8)
    ground = np.asarray(Image.fromarray(coarse).resize((width + 24, height), Image.Resampling.BICUBIC))
    write_mp4(path, np.stack([ground[:, 8 * i : 8 * i + width] for i in range(4)]), fps=4)
    limits = budget(fps=4, most=352 * 640 if most == 0 else 65536 if height == 360 else 262144)
    one, other = (read_clip(path, limits, backend=name) for name in ("decord", "pyav"))
    np.testing.assert_array_equal(one.times_s, other.times_s)
    assert one.frames.shape == other.frames.shape and (one.frames.shape[1:3] == (height, width)) is (most == 0)
    difference = np.abs(one.frames.astype(int) - other.frames.astype(int))
    assert difference.mean() <= mean and difference.max() <= most


def test_auto_reads_by_pyav(constant, monkeypatch):
    """Measured, it is nowhere slower (docs/benchmarks.md); decord need not be installed."""
    monkeypatch.setitem(sys.modules, "decord", None)
    found, wanted = (read_clip(constant, budget(fps=2), backend=name) for name in ("auto", "pyav"))
    np.testing.assert_array_equal(found.frames, wanted.frames)
    np.testing.assert_array_equal(found.times_s, wanted.times_s)


# -- probing -----------------------------------------------------------------------------------------------------------


def test_probe(constant, variable, variable_times):
    info = probe_video(constant)
    assert (info.duration_s, info.width, info.height, info.num_frames) == (pytest.approx(8.0), 96, 64, 200)
    assert info.average_fps == pytest.approx(25.0)
    info = probe_video(variable)
    assert info.num_frames == 60
    last_gap = variable_times[-1] - variable_times[-2]
    assert info.duration_s == pytest.approx(variable_times[-1] - 0.3 + last_gap, abs=1e-4)


# -- plans -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "length_s, available, changes, expected",
    [
        (10.0, 300, {}, 20),
        (7.5, 300, {}, 16),  # 15 made even
        (0.2, 300, {}, 4),  # min_frames
        (1000.0, 30000, {}, 768),
        (10.0, 7, {}, 7),  # no more than there are
        (10.0, 1, {}, 1),
        (9.6, 300, {"max_frames": 19}, 18),
        (9.6, 300, {"min_frames": 19, "max_frames": 19}, 19),
        (100.0, 3000, {"total": 20 * 16384}, 20),  # total_pixels at the smallest frame
        (100.0, 3000, {"total": 21 * 16384 + 5}, 20),
        (10.0, 300, {"min_frames": 8, "total": 6 * 16384}, 6),  # the total wins over min_frames
    ],
)
def test_plan_num_frames(length_s, available, changes, expected):
    limits = {"fps": 2, "min_frames": 4, "least": 16384} | changes
    assert plan_num_frames(length_s, available, budget(**limits)) == expected


@pytest.mark.parametrize(
    "num_frames, height, width, changes, expected",
    [
        (16, 720, 1280, {}, (384, 672)),  # Qwen's smart_resize: down to 262144
        (16, 1080, 1920, {}, (384, 672)),
        (16, 240, 320, {}, (256, 320)),  # rounded only
        (16, 32, 32, {}, (128, 128)),  # up to 16384
        (16, 32, 32, {"least": 1024}, (32, 32)),
        (16, 1920, 1080, {"most": 65536}, (320, 192)),
        (768, 720, 1280, {}, (96, 192)),  # 16777216 / 768 = 21845
        (767, 720, 1280, {}, (96, 192)),  # an odd number counts as the next even one
        (2000, 720, 1280, {}, (96, 160)),  # never planned below the minimum per frame; frames are dropped instead
        (16, 720, 1280, {"least": 16384, "most": 16384}, (96, 160)),
        (2, 32, 6400, {}, (32, 6400)),
        (2, 10, 2000, {"most": 65536}, (32, 1984)),
        (2, 32, 6400, {"least": 1024, "most": 65536}, (32, 2048)),  # the maximum wins over the aspect
    ],
)
def test_plan_size(num_frames, height, width, changes, expected):
    limits = {"least": 16384} | changes
    assert plan_size(num_frames, height, width, budget(**limits)) == expected


@given(
    num_frames=st.integers(1, 1000),
    height=st.integers(16, 2160),
    width=st.integers(16, 2160),
    least=st.integers(1024, 100_000),
    most=st.integers(1024, 2_000_000),
    total=st.integers(2048, 30_000_000),
)
def test_plan_size_keeps_every_bound(num_frames, height, width, least, most, total):
    limits = budget(least=least, most=max(least, most), total=max(2 * least, total))
    frames = min(num_frames, limits.most_frames)
    planned = plan_size(frames, height, width, limits)
    pixels = planned[0] * planned[1]
    assert all(side % 32 == 0 and side >= 32 for side in planned)
    assert pixels <= limits.max_pixels_per_frame
    assert (frames + frames % 2) * pixels <= limits.total_pixels
    assert plan_size(frames, width, height, limits) == planned[::-1]


@pytest.mark.parametrize("height, width", [(10, 2001), (2001, 10), (0, 10)])
def test_long_shapes_are_refused(height, width):
    with pytest.raises(UserError, match="200 times"):
        plan_size(4, height, width, budget())


def test_a_long_shape_names_its_file(folder):
    path = folder / "long-shape.mp4"
    write_mp4(path, np.zeros((2, 2, 512, 3), np.uint8), fps=2)
    with pytest.raises(VideoReadError, match=r"long-shape.mp4.*512 x 2 pixels"):
        read_clip(path, budget())


def test_impossible_budgets_name_their_keys():
    with pytest.raises(UserError) as caught:
        FrameBudget(0.0, 8, 4, 2048, 1024, 1024)
    for key in ("fps", "min_frames", "max_pixels_per_frame", "total_pixels"):
        assert f"data.{key}" in str(caught.value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_total_binds_frames_and_sizes(constant, backend):
    clip = read_clip(constant, budget(least=1024, total=40 * 3072), backend=backend)
    assert clip.frames.shape == (120, 32, 32, 3)  # 200 frames wanted, 120 of 1024 pixels fit
    assert (np.diff(clip.times_s) > 0).all() and clip.times_s[-1] == pytest.approx(199 / FPS)
    assert read_clip(constant, budget(fps=5, total=40 * 3072), backend=backend).frames.shape == (40, 32, 64, 3)


# -- clips -------------------------------------------------------------------------------------------------------------


def test_markers_of_the_processor_are_the_true_times(variable, variable_times):
    from transformers.models.qwen3_vl import Qwen3VLProcessor

    clip = read_clip(variable, budget(fps=100, max_frames=59), start_s=0.9, backend="pyav")
    shown = variable_times[numbers(clip.frames)] - 0.3 - 0.9
    assert len(shown) % 2 == 1  # the processor repeats the last index, in place
    for _ in range(2):
        metadata = clip.metadata()
        markers = Qwen3VLProcessor._calculate_timestamps(None, metadata["frames_indices"], metadata["fps"], 2)
        expected = np.append(shown, shown[-1]).reshape(-1, 2).mean(axis=1)
        np.testing.assert_allclose(markers, expected, atol=2e-5)  # the file itself counts 1/90000 s
        printed = np.array([float(f"{marker:.1f}") for marker in markers])
        assert np.abs(printed - expected).max() <= 0.05 + 2e-5
    assert clip.metadata()["total_num_frames"] >= clip.metadata()["frames_indices"][-1] + 1
    assert clip.metadata()["duration"] == clip.duration_s


@given(st.lists(st.floats(0.001, 100.0), min_size=1, max_size=50))
def test_the_virtual_clock_is_exact_to_half_a_microsecond(gaps):
    times = np.cumsum(gaps)
    metadata = VideoClip(np.zeros((len(gaps), 2, 2, 3), np.uint8), times, 0.0, float(times[-1])).metadata()
    assert np.abs(np.array(metadata["frames_indices"]) / metadata["fps"] - times).max() <= 0.5001e-6
    assert len(set(metadata["frames_indices"])) == len(gaps)


def test_subsample_is_even_and_keeps_the_times():
    clip = clip_from_frames(numbered(21), fps=4)
    fewer = clip.subsample(5)
    assert numbers(fewer.frames) == [0, 5, 10, 15, 20] and fewer.times_s.tolist() == [0.0, 1.25, 2.5, 3.75, 5.0]
    assert fewer.duration_s == clip.duration_s == 5.25
    assert numbers(clip.subsample(1).frames) == [10]
    assert clip.subsample(21) is clip and clip.subsample(100) is clip
    with pytest.raises(UserError, match="at least one"):
        clip.subsample(0)


def test_clip_from_frames_keeps_pixels_and_times():
    from PIL import Image

    frames = numbered(3)
    for given_frames in (frames, list(frames), [Image.fromarray(frame) for frame in frames]):
        clip = clip_from_frames(given_frames, times_s=[0.5, 0.75, 2.0])
        np.testing.assert_array_equal(clip.frames, frames)
        assert clip.times_s.tolist() == [0.5, 0.75, 2.0] and clip.duration_s == 3.25 and clip.start_s == 0.0
    assert clip_from_frames(frames, fps=2).times_s.tolist() == [0.0, 0.5, 1.0]


@pytest.mark.parametrize(
    "frames, times, message",
    [
        (numbered(3), {}, "exactly one of times_s"),
        (numbered(3), {"times_s": [0, 1, 2], "fps": 1}, "exactly one of times_s"),
        (numbered(3), {"times_s": [0, 1]}, "one time for each of the 3 frames"),
        (numbered(3), {"times_s": [0, 1, 1]}, "strictly increasing"),
        (numbered(3), {"times_s": [0, 2, 1]}, "strictly increasing"),
        (numbered(3), {"times_s": [-1, 0, 1]}, ">= 0"),
        (numbered(3), {"times_s": [0, 1, float("nan")]}, "finite"),
        (numbered(3), {"times_s": []}, "one time for each"),
        (numbered(3), {"fps": 0}, "fps must be finite and > 0"),
        ([], {"fps": 1}, "empty"),
        ([np.zeros((4, 4, 3), np.uint8), np.zeros((4, 6, 3), np.uint8)], {"fps": 1}, r"frame 1 is \(4, 6, 3\)"),
        (numbered(3).astype(np.float32), {"fps": 1}, "uint8"),
        (numbered(3)[..., 0], {"fps": 1}, r"\(T, H, W, 3\)"),
    ],
)
def test_clip_from_frames_refuses(frames, times, message):
    with pytest.raises(UserError, match=message):
        clip_from_frames(frames, **times)


def test_resize_clip_fits_the_budget_and_keeps_the_times():
    clip = clip_from_frames(numbered(20, 128, 192), fps=4)
    fitted = resize_clip(clip, budget(total=10 * 6144, least=4096))
    assert fitted.frames.shape == (14, 32, 64, 3)  # 15 frames of 4096 pixels fit, taken even
    np.testing.assert_allclose(fitted.times_s, np.array(numbers(fitted.frames)) / 4)
    assert resize_clip(clip, budget()) is clip


# -- qwen-vl-utils -----------------------------------------------------------------------------------------------------


def test_qwen_backend_is_fetch_video_with_true_times(constant):
    fetch_video = pytest.importorskip("qwen_vl_utils").fetch_video
    limits = budget(fps=2, min_frames=4, least=8192)
    for start, end in ((None, None), (2.0, 6.0)):
        request = {"video": str(constant), "fps": 2, "min_frames": 4, "max_frames": 768}
        request |= {"min_pixels": 8192, "max_pixels": 262144}
        if start is not None:
            request |= {"video_start": start, "video_end": end}
        pixels, metadata = fetch_video(request, image_patch_size=16, return_video_metadata=True)
        clip = read_clip(constant, limits, start_s=start, end_s=end, backend="qwen_vl_utils")
        np.testing.assert_array_equal(clip.frames, pixels.permute(0, 2, 3, 1).numpy())
        assert numbers(clip.frames) == metadata["frames_indices"]
        np.testing.assert_allclose(clip.times_s + (start or 0.0), np.array(metadata["frames_indices"]) / FPS, atol=1e-6)
        assert clip.duration_s == pytest.approx(8.0 if start is None else 4.0)


def test_qwen_backend_refuses_what_it_would_get_wrong(folder, constant, variable):
    pytest.importorskip("qwen_vl_utils")
    write_mp4(folder / "single.mp4", numbered(1), fps=8)
    hidden = remux(constant, folder / "hidden.mp4", shift_s=1.56)
    for path, start, end, reason in (
        (folder / "single.mp4", None, None, "at least two frames"),
        (hidden, None, None, "hidden or missing frames"),
        (variable, 10.0, 12.0, "reads .* s; set data.backend"),  # it would cut by the average rate
    ):
        with pytest.raises(VideoReadError, match=reason):
            read_clip(path, budget(fps=2), start_s=start, end_s=end, backend="qwen_vl_utils")


def test_plan_size_equals_qwens_smart_resize():
    smart_resize = pytest.importorskip("qwen_vl_utils.vision_process").smart_resize
    rng = np.random.default_rng(0)
    equal = 0
    for height, width in rng.integers(32, 2160, (300, 2)).tolist():
        expected = smart_resize(height, width, factor=32, min_pixels=16384, max_pixels=262144)
        if expected[0] * expected[1] <= 262144 and min(expected) > 0:
            assert plan_size(8, height, width, budget(least=16384)) == expected
            equal += 1
    assert equal > 290


# -- writing -----------------------------------------------------------------------------------------------------------


def test_writing_is_repeatable_and_whole(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        write_mp4(tmp_path / name, numbered(16), fps=8)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["a.mp4", "b.mp4"]
    write_mp4(tmp_path / "ntsc.mp4", numbered(30), fps=30000 / 1001)
    clip = read_clip(tmp_path / "ntsc.mp4", budget(fps=30), backend="pyav")
    np.testing.assert_allclose(clip.times_s, np.arange(30) * 1001 / 30000, atol=1e-9)


@pytest.mark.parametrize(
    "frames, times, message",
    [
        (numbered(2), {}, "exactly one"),
        (numbered(2), {"fps": 0}, "at least 0.001"),
        (numbered(2), {"times_s": [0.0]}, "each of the 2 frames"),
        (numbered(2), {"times_s": [0.0, 0.000001]}, "increase strictly"),
        (numbered(2)[:, :63], {"fps": 2}, "even height and width"),
        (numbered(2)[:0], {"fps": 2}, "T >= 1"),
    ],
)
def test_writing_refuses(tmp_path, frames, times, message):
    with pytest.raises(UserError, match=message):
        write_mp4(tmp_path / "x.mp4", frames, **times)
    assert not (tmp_path / "x.mp4").exists()


def test_key_frames_around_skipped_ones_are_not_taken_for_one(tmp_path: Path) -> None:
    """H.264's picture numbers may repeat across skipped groups; the decoder must not join what it then sees."""
    frames = np.zeros((105, 48, 64, 3), np.uint8)
    for i in range(105):  # x264 makes most of these a key frame
        frames[i, :, (i * 3) % 56 : (i * 3) % 56 + 8] = (255, 200, 40)
    times = np.concatenate([np.arange(0, 4, 0.1), np.arange(4, 16, 0.8), np.arange(16, 18, 0.04)])
    write_mp4(tmp_path / "keys.mp4", frames, times_s=times)
    for fps in (0.9, 1.3, 1.7, 2.9):
        clip = read_clip(tmp_path / "keys.mp4", FrameBudget(fps, 1, 64, 1024, 4096, 10**7), backend="pyav")
        chosen = np.abs(times[:, None] - clip.times_s).argmin(axis=0)
        lit = clip.frames[:, 24].max(axis=2) > 100  # (T, W)
        centres = (lit * np.arange(lit.shape[1])).sum(axis=1) / lit.sum(axis=1) * 64 / lit.shape[1]
        assert np.abs(centres - (chosen * 3) % 56 - 4).max() < 1.5
