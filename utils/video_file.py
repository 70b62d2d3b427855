"""One video file, opened by PyAV: the index of its frames and their true times, and their pixels.

The index is read from the packets, without decoding, and only over the stretch asked for. `utils.video_backends` builds
on it; sampling and sizes are chosen in `utils.video`.

File clock: time 0 is the moment the first video frame is shown. A stream that starts late or early (`start_time` not
0: MPEG-TS, files cut by edit lists) is moved there, as decord does it and as a player's counter shows it. Frames that
an edit list hides do not exist.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from utils.common import UserError

if TYPE_CHECKING:
    from av import Packet, VideoFrame

CLOCK_SLACK_S = 1e-4
"""Times closer than this count as equal: spans are written with few decimals."""

END_SLACK_S = 0.5
"""How far past the end of the video a stretch may reach, and a file fall short of its own header. Annotated ends are
rounded and often taken from the sound track; anything beyond is a wrong row or a file cut short."""

MAX_THREADS = 4
"""Threads of one decoder at most. The process that decodes for a DataLoader worker (`utils.decode_child`) sets it to 1:
it is a worker in all but name."""

KEPT_PACKET_BYTES = 64 * 2**20
"""Compressed packets held from the index pass for decoding; past this, the stretch is read from the disk twice."""


class VideoReadError(UserError):
    """A video that cannot be read, or not in the stretch asked for. Holds `path` and the plain `reason`."""

    def __init__(self, path: str | os.PathLike[str], reason: str = "") -> None:
        super().__init__(f"cannot read the video {os.fspath(path)}: {reason}" if reason else os.fspath(path))
        self.path = os.fspath(path)
        self.reason = reason

    def __reduce__(self) -> tuple[type[VideoReadError], tuple[str, str]]:
        return type(self), (self.path, self.reason)  # exceptions cross from DataLoader workers by pickle


@dataclass
class PacketLog:
    """What one pass over a stretch's packets saw, in decoding order; it starts with a key frame."""

    ticks: list[int] = field(default_factory=list)
    is_key: list[bool] = field(default_factory=list)
    is_shown: list[bool] = field(default_factory=list)
    durations: list[int] = field(default_factory=list)
    packets: list[Packet] | None = field(default_factory=list)
    """The packets themselves; None once they are more than `KEPT_PACKET_BYTES`."""
    num_bytes: int = 0

    def add(self, packet: Packet) -> None:
        self.ticks.append(packet.pts or 0)
        self.is_key.append(packet.is_keyframe)
        self.is_shown.append(not packet.is_discard)
        self.durations.append(packet.duration or 0)
        self.num_bytes += packet.size
        if self.packets is not None and self.num_bytes <= KEPT_PACKET_BYTES:
            self.packets.append(packet)
        else:
            self.packets = None

    def shown_ticks(self) -> np.ndarray:
        """Ticks of the frames that are shown, ascending, int64."""
        return np.unique(np.array(self.ticks, dtype=np.int64)[np.array(self.is_shown, dtype=bool)])

    def groups(self) -> list[tuple[int, int, bool]]:
        """Groups of pictures as (first packet, one past the last, open).

        An open group has frames that are shown before its key frame and refer back to the group before.
        """
        ticks = np.array(self.ticks, dtype=np.int64)
        bounds = [*np.flatnonzero(self.is_key).tolist(), len(ticks)]
        return [
            (first, last, bool(ticks[first:last].min() < ticks[first])) for first, last in itertools.pairwise(bounds)
        ]

    def needed(self, wanted: np.ndarray) -> np.ndarray:
        """Which packets must be decoded to show the frames at the ticks `wanted`: bool, one per packet.

        A group of pictures is decoded up to its last wanted frame, and one without a wanted frame is skipped, unless
        the group after it is needed and open.
        """
        is_wanted = np.isin(np.array(self.ticks, dtype=np.int64), wanted)
        needed = np.zeros(len(self.ticks), dtype=bool)
        next_refers_back = False
        for first, last, is_open in reversed(self.groups()):
            if next_refers_back:
                needed[first:last] = True
            elif is_wanted[first:last].any():
                needed[first : first + int(np.flatnonzero(is_wanted[first:last])[-1]) + 1] = True
            next_refers_back = is_open and bool(needed[first])
        return needed


@dataclass(frozen=True)
class Stretch:
    """The frames of one stretch of a file, in the order they are shown, and the packets that hold them."""

    ticks: np.ndarray
    """Presentation times of the frames, int64 ticks of the stream's clock, shape (N,), N >= 1."""
    times_s: np.ndarray
    """The same in seconds on the file's clock, float64, shape (N,)."""
    start_s: float
    end_s: float
    """Bounds in seconds on the file's clock; `end_s` is cut at the end of the video."""
    log: PacketLog

    def only(self, is_kept: np.ndarray) -> Stretch:
        """The same stretch with some of its frames left out."""
        return Stretch(self.ticks[is_kept], self.times_s[is_kept], self.start_s, self.end_s, self.log)


class VideoFile:
    """One video stream opened by PyAV. Use as a context manager; every failure is a `VideoReadError`.

    `height` and `width` are those of the picture as shown (after rotation by multiples of 90 degrees; pixels are taken
    as square and mirroring is ignored, as decord does); `origin` is the tick of time 0; `num_decoded` counts the frames
    that went through the decoder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self.num_decoded = 0
        check_is_file(self.path)
        with plain_errors(self.path):
            self._open()
            picture = self._first_picture()
        self.origin: int = picture.pts or 0
        self.rotation = picture.rotation if picture.rotation % 90 == 0 else 0  # counter-clockwise degrees
        self.height, self.width = picture.height, picture.width
        if self.rotation % 180:
            self.height, self.width = self.width, self.height

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._container.close()

    def _open(self) -> None:
        import av

        # An absolute name is never taken for a protocol ("a:b.mp4"), and odd bytes in tags are nobody's concern here.
        self._container = av.open(os.path.abspath(self.path), metadata_errors="ignore")
        stream = self._container.streams.best("video")
        if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
            kinds = ", ".join(sorted({other.type for other in self._container.streams})) or "none"
            raise VideoReadError(self.path, f"it has no video stream (streams: {kinds})")
        self._stream: Any = stream
        self.time_base = Fraction(stream.time_base or 0)
        context: Any = stream.codec_context
        context.thread_count = decoder_threads(context.width * context.height)
        context.thread_type = "AUTO" if context.thread_count > 1 else "NONE"
        self._rest = self._demux()
        self._head: list[Packet] | None = self._read_head()

    def _demux(self) -> Iterator[Packet]:
        for packet in self._container.demux(self._stream):
            if packet.size == 0:
                continue  # PyAV's end-of-file marker
            if packet.pts is None:
                remedy = "put them into a container with times: ffmpeg -i IN -c copy OUT.mp4"
                raise VideoReadError(self.path, f"its frames carry no times; {remedy}")
            yield packet

    def _read_head(self) -> list[Packet]:
        """Packets from the first key frame until none shown earlier can follow.

        No packet is shown before its decoding time, so a decoding time past the earliest shown one ends the search.
        """
        head: list[Packet] = []
        shown: list[int] = []
        for packet in itertools.dropwhile(lambda packet: not packet.is_keyframe, self._rest):
            head.append(packet)
            if not packet.is_discard and packet.pts is not None:
                shown.append(packet.pts)
            if shown and packet.dts is not None and packet.dts >= min(shown):
                break
        if not shown:
            raise VideoReadError(self.path, "it holds no frame that can be shown (empty or cut short)")
        return head

    def _first_picture(self) -> VideoFrame:
        """The first frame that is shown. Only decoding tells it: frames that refer back past the start never show."""
        pictures = list(self._decode_packets(self._head or []))
        if not pictures or pictures[0].pts is None:
            raise VideoReadError(self.path, "its first frames do not decode (damaged or cut short)")
        return pictures[0]

    @property
    def header_end_s(self) -> float | None:
        """End of the video on the file's clock as the container states it, None where it says nothing of the video."""
        if self._stream.duration:
            start = self.origin if self._stream.start_time is None else self._stream.start_time
            return float((start + self._stream.duration - self.origin) * self.time_base)
        if self._container.duration and len(self._container.streams) == 1:
            # Matroska counts from its own 0, not from the first frame.
            return self._container.duration / 1e6 - float(self.origin * self.time_base)
        return None

    @property
    def header_num_frames(self) -> int:
        """Number of frames as the container states it, 0 where it does not."""
        return self._stream.frames

    @property
    def seeks_exactly(self) -> bool:
        """Whether the container lists its key frames (mp4, mov, mkv, webm, avi); MPEG-TS and the like only guess."""
        return bool({"mp4", "matroska", "avi"} & set(self._container.format.name.split(",")))

    @property
    def average_rate(self) -> float:
        """Frames per second as the container states it, 0 where it does not."""
        return float(self._stream.average_rate or 0)

    def seconds(self, ticks: np.ndarray) -> np.ndarray:
        """Ticks as seconds on the file's clock, float64."""
        return (ticks - self.origin) * float(self.time_base)

    def tick(self, seconds: float) -> int:
        """The first tick that counts as at or after `seconds` on the file's clock."""
        return self.origin + math.ceil((seconds - CLOCK_SLACK_S) / float(self.time_base))

    def scan(self, start_s: float | None = None, end_s: float | None = None) -> Stretch:
        """Index the frames shown in [start_s, end_s), seconds on the file's clock; None means the file's own bound.

        Reads only the packets from the key frame before `start_s` to `end_s`. When no frame begins inside, the one on
        display at `start_s` stands for the stretch. `end_s` may pass the end of the video by `END_SLACK_S`, or by one
        frame where that is longer, and is then cut there.

        Raises:
            VideoReadError: bounds outside the video, or a file that ends before its header says.
        """
        start = 0.0 if start_s is None else float(start_s)
        if not start >= 0 or not math.isfinite(start) or (end_s is not None and not end_s > start):
            raise VideoReadError(self.path, f"a stretch must satisfy 0 <= start < end, got {start_s} to {end_s} s")
        log = PacketLog()
        end_tick = math.inf if end_s is None or math.isinf(end_s) else self.tick(end_s)
        with plain_errors(self.path):
            for packet in self._packets_from(self.tick(start)):
                if packet.dts is not None and packet.dts >= end_tick:
                    end = float(end_s or 0)  # the video goes on past the stretch
                    break
                log.add(packet)
            else:
                end = self._checked_end(log, start, end_s)
        ticks = log.shown_ticks()
        ticks = ticks[ticks >= self.origin]
        inside = ticks[(ticks >= self.tick(start)) & (ticks < self.tick(end))]
        if len(inside) == 0:
            inside = ticks[ticks < self.tick(end)][-1:]
        return Stretch(inside, self.seconds(inside), start, end, log)

    def _checked_end(self, log: PacketLog, start: float, end_s: float | None) -> float:
        """End of the stretch when its packets ran to the end of the file, whose true end is then known."""
        last = max((i for i, is_shown in enumerate(log.is_shown) if is_shown), key=log.ticks.__getitem__)
        last_s, frame_s = ((log.ticks[last] - self.origin) * self.time_base, log.durations[last] * self.time_base)
        slack = max(END_SLACK_S, float(frame_s))
        header_end = self.header_end_s
        if header_end is None or header_end <= last_s:
            video_end = float(last_s + frame_s)
        elif header_end <= last_s + slack + 2 * self._longest_gap_s(log):
            video_end = header_end
        else:
            found = f"its header promises {header_end:.2f} s but the data ends at {float(last_s):.2f} s"
            raise VideoReadError(self.path, f"{found} (cut short?)")
        if start >= video_end - CLOCK_SLACK_S:
            raise VideoReadError(self.path, f"the stretch starts at {start} s but the video ends at {video_end:.3f} s")
        if end_s is not None and end_s > video_end + slack:
            raise VideoReadError(self.path, f"the stretch ends at {end_s} s but the video ends at {video_end:.3f} s")
        return video_end if end_s is None else min(float(end_s), video_end)

    def _longest_gap_s(self, log: PacketLog) -> float:
        """Longest time from one frame to the next: how long a variable-rate file may go on after its last frame."""
        return float(np.diff(log.shown_ticks()).max(initial=0) * self.time_base)

    def _packets_from(self, tick: int) -> Iterator[Packet]:
        """Packets in decoding order from a key frame shown at or before `tick`."""
        if tick > self.origin:
            for back_s in (0, 2, 10, 60):  # some containers (MPEG-TS) seek past the key frame asked for
                target = tick - math.ceil(back_s / self.time_base)
                if target <= self.origin:
                    break
                self._container.seek(target, stream=self._stream)
                self._head, self._rest = None, self._demux()
                first = next((packet for packet in self._rest if packet.is_keyframe), None)
                if first is not None and first.pts is not None and first.pts <= tick:
                    return itertools.chain([first], self._rest)
        if self._head is None:  # the stream has moved on; seeking to the very start is not reliable either
            self._container.close()
            self._open()
        head, self._head = self._head or [], None
        return itertools.chain(head, self._rest)

    def decode(self, stretch: Stretch, wanted: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Decode the frames of `stretch` at the ticks `wanted`, resized to (height, width) as shown.

        Returns:
            frames: uint8 RGB, shape (len(wanted), height, width, 3).
            found: bool, shape (len(wanted),); False where the file promises a frame that does not decode.
        """
        frames = np.empty((len(wanted), height, width, 3), dtype=np.uint8)
        found = np.zeros(len(wanted), dtype=bool)
        # A decoder that guesses the order of frames may drop one where it passed over others: then once more in full.
        for is_quick in (True, False) if self._passes_over else (False,):
            missing = np.flatnonzero(~found)
            if len(missing):
                for i, frame in self.decode_each(stretch, wanted[missing], height, width, is_quick=is_quick):
                    frames[missing[i]], found[missing[i]] = frame, True
        return frames, found

    def decode_each(
        self, stretch: Stretch, wanted: np.ndarray, height: int, width: int, *, is_quick: bool = False
    ) -> Iterator[tuple[int, np.ndarray]]:
        """The same one by one, in the order they are shown: (index in `wanted`, frame); lost frames are left out.

        With `is_quick` the decoder passes over frames that nobody wants and no other frame refers to. It changes no
        pixel of the others.
        """
        import av

        position = {tick: i for i, tick in enumerate(wanted.tolist())}
        turns = self.rotation // 90
        coded = {"width": height, "height": width} if turns % 2 else {"width": width, "height": height}
        resize = av.video.reformatter.VideoReformatter()
        whole = set(position) if is_quick else None
        for picture in self._pictures(stretch, stretch.log.needed(wanted), whole):
            i = position.pop(picture.pts, None)
            if i is not None:
                # One thread: for small pictures swscale's own threads cost 20 times the work.
                rgb = resize.reformat(picture, **coded, format="rgb24", interpolation="BICUBIC", threads=1)
                yield i, np.rot90(rgb.to_ndarray(), turns) if turns else rgb.to_ndarray()
                if not position:
                    break

    def decodable(self, stretch: Stretch) -> np.ndarray:
        """Which of the stretch's frames come out of the decoder: bool, one per frame. Decodes all of them."""
        everything = np.ones(len(stretch.log.ticks), dtype=bool)
        return np.isin(stretch.ticks, [picture.pts for picture in self._pictures(stretch, everything)])

    @property
    def _passes_over(self) -> bool:
        """Whether the decoder can be told to pass over frames by their packets: in H.264 frames say whether others
        refer to them, and these containers hold one in each packet."""
        return self.seeks_exactly and self._stream.codec_context.name == "h264"

    def _pictures(self, stretch: Stretch, needed: np.ndarray, whole: set[int] | None = None) -> Iterator[Any]:
        """Pictures as shown, of the `needed` packets; all but those at the ticks `whole` may be passed over."""
        packets: Iterable[Packet] | None = stretch.log.packets
        with plain_errors(self.path):
            if packets is None:
                packets = self._packets_from(self.tick(stretch.start_s))
            # Run by run, with the decoder emptied between: H.264 tells neighbouring key frames apart by a number that
            # may be the same on both sides of skipped packets, and the second would be taken for a part of the first.
            pairs = zip(packets, needed.tolist(), strict=False)
            for is_needed, run in itertools.groupby(pairs, key=lambda pair: pair[1]):
                if is_needed:
                    yield from self._decode_packets((packet for packet, _ in run), whole)

    def _decode_packets(self, packets: Iterable[Packet], whole: set[int] | None = None) -> Iterator[Any]:
        """Pictures as shown; a packet that gives none (damaged, or refers to lost ones) is skipped."""
        import av

        context = self._stream.codec_context
        context.flush_buffers()
        was_wanted = False
        try:
            for packet in itertools.chain(packets, [None]):
                is_wanted = whole is None or packet is None or packet.pts in whole
                # The packet after a wanted one is decoded too: it might hold the second field of the same picture.
                context.skip_frame = "DEFAULT" if is_wanted or was_wanted else "NONREF"
                was_wanted = is_wanted
                try:
                    pictures = context.decode(packet)
                except av.error.InvalidDataError:
                    continue
                self.num_decoded += len(pictures)
                yield from pictures
        finally:
            context.skip_frame = "DEFAULT"
        context.flush_buffers()


def in_worker() -> bool:
    """Whether this is a worker process of multiprocessing, as those of a DataLoader are."""
    return multiprocessing.parent_process() is not None


def decoder_threads(num_pixels: int) -> int:
    """Threads for one decoder: one in a worker process or for small pictures, else up to `MAX_THREADS`.

    DataLoader workers already use every core, one video each; threads inside them only fight. Below about 320 x 240
    starting a thread costs more than decoding the picture.
    """
    if in_worker() or num_pixels <= 320 * 240:
        return 1
    return min(MAX_THREADS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def check_is_file(path: str) -> None:
    """Raise a `VideoReadError` in plain words unless `path` is a regular, readable file with something in it."""
    try:
        # Not blocking: opening a pipe would wait for its other end. Looked at when it is open, and so the file itself.
        number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        try:
            status = os.fstat(number)
        finally:
            os.close(number)
    except FileNotFoundError:
        raise VideoReadError(path, "no such file") from None
    except OSError as error:
        raise VideoReadError(path, (error.strerror or str(error)).lower()) from None
    if stat.S_ISDIR(status.st_mode):
        raise VideoReadError(path, "it is a directory")
    if not stat.S_ISREG(status.st_mode):
        raise VideoReadError(path, "it is not a regular file")
    if status.st_size == 0:
        raise VideoReadError(path, "the file is empty (0 bytes)")


@contextmanager
def plain_errors(path: str) -> Iterator[None]:
    """Turn FFmpeg's errors into a `VideoReadError` about `path`."""
    import av

    try:
        yield
    except (MemoryError, BlockingIOError) as error:  # FFmpeg's own among them; the second: no more threads to be had
        raise VideoReadError(path, f"there is not enough memory to decode it ({error})") from error
    except (av.error.FFmpegError, EOFError) as error:
        what = getattr(error, "strerror", None) or str(error)
        raise VideoReadError(path, f"not a video, damaged or cut short ({what})") from error
