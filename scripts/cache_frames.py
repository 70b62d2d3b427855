"""Decodes every clip of a configuration into its frame cache, before a run or beside it.

    python scripts/cache_frames.py --config configs/training/sft_config.yaml \\
        --data_config configs/data/video_config.yaml
    python scripts/cache_frames.py --data_config configs/data/video_config.yaml --splits test data.cache_dir=/my/frames

Run again it goes on where it stopped, after Ctrl-C and `kill -9` too. It may run several times at once, on machines
that share the folder: each goes through the clips in an order of its own and leaves out what is there. --verify reads
every byte of the clips that are there and decodes the damaged ones anew.

Exit status: 0; 1 when more clips cannot be read than data.max_bad_fraction allows; 2 with one line for what is wrong
with the configuration, or when the clips do not fit on the disk or into data.cache_max_gb; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    # Run as a file, Python put this folder first on the path; the root belongs there (see utils/attach.py).
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from utils.attach import attach
from utils.common import UserError, run_command

attach()

from torch.utils.data import DataLoader, Dataset  # noqa: E402
from tqdm import tqdm  # noqa: E402

from utils.clip_reader import ClipReader, Reads  # noqa: E402
from utils.config import DataConfig, DataFile, load_config  # noqa: E402
from utils.frame_cache import FrameCache  # noqa: E402
from utils.logging_utils import setup_logging  # noqa: E402
from utils.rows import Row, clip_bounds, load_annotations, look_up_video  # noqa: E402
from utils.selection import select_rows  # noqa: E402
from utils.video import VideoReadError  # noqa: E402

SPLITS = ("train", "val", "test")
OTHER_SECTIONS = ("model", "lora", "training", "rewards")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; a.b=c overrides a key of `data`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="YAML of a run, or its record; only its `data` section is read")
    parser.add_argument("--data_config", type=Path, help="YAML with data and prompt, where --config has none")
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=["train", "val"], help="(default: train val)")
    parser.add_argument("--num_workers", type=int, help="processes that decode (default: one for each core)")
    parser.add_argument("--verify", action="store_true", help="check every byte of what is there")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    args = parser.parse_intermixed_args(argv)
    if not (args.config or args.data_config):
        parser.error("give --config, --data_config or both")
    if args.num_workers is None:
        args.num_workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return args


@dataclass(frozen=True)
class Clip:
    """One stretch of one video, and the first row that asks about it."""

    path: Path
    bounds: tuple[float, float] | None
    row: str
    fault: str | None
    """Why it must not be opened."""


@dataclass(frozen=True)
class Outcome:
    """What became of a clip."""

    reads: Reads
    fault: str | None = None


class ClipsToFill(Dataset[Outcome]):
    """`clips[i]` sees that the cache has clip i."""

    def __init__(self, clips: Sequence[Clip], reader: ClipReader, *, verify: bool) -> None:
        self.clips, self.reader, self.verify = clips, reader, verify

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> Outcome:
        clip = self.clips[index]
        if clip.fault is not None:
            return Outcome(Reads(), f"{clip.row}: {clip.fault}")
        try:
            self.reader.fill(clip.path, *(clip.bounds or (None, None)), verify=self.verify)
        except VideoReadError as error:
            return Outcome(self.reader.take(), f"{clip.row}: {error}")
        return Outcome(self.reader.take())


def clips_of(data: DataConfig, splits: Sequence[str]) -> list[Clip]:
    """Every clip that the rows of `splits` name, once. Raises UserError when there is none."""
    clips: dict[tuple[Path, tuple[float, float] | None], Clip] = {}
    for split in splits:
        for row in rows_of(data, split):
            path, fault = look_up_video(row, data.videos_root)
            bounds = clip_bounds(row, data.trim)
            clips.setdefault((path, bounds), Clip(path, bounds, f"{row.file}:{row.line}", fault))
    if not clips:
        raise UserError(f"{' and '.join(f'data.{split}' for split in splits)}: no row to read a video for")
    return list(clips.values())


def rows_of(data: DataConfig, split: str) -> list[Row]:
    """The rows of a split that a run may draw, whatever the weights of their files and its seed."""
    sources = [source.model_copy(update={"weight": 1.0}) for source in getattr(data, split)]
    if not sources:
        return []
    rows = load_annotations(
        sources, max_bad_fraction=data.max_bad_fraction, trim=data.trim, videos_root=data.videos_root
    )
    labelled = [row for row in rows if row.timestamp is not None]
    return select_rows(labelled, data.select) if split == "train" and data.select is not None else labelled


class Summary:
    """What has been done, for the closing lines."""

    def __init__(self, num_clips: int) -> None:
        self.num_clips, self.num_done = num_clips, 0
        self.reads = Reads()
        self.faults: list[str] = []

    def add(self, outcome: Outcome) -> None:
        """Count one clip. Raises UserError when it could not be kept."""
        self.num_done += 1
        self.reads.add(outcome.reads)
        if outcome.fault is not None:
            self.faults.append(outcome.fault)
        for problem in self.reads.problems.values():
            raise UserError(f"{problem}. {self.num_done} of {self.num_clips} clips were gone through")

    def render(self, cache: FrameCache) -> str:
        """As text."""
        entries, reads = cache.entries(), self.reads
        num_decoded = self.num_done - reads.cache_hits - len(self.faults)  # `reads.decoded` has what was tried in vain
        lines = [
            f"clips:      {self.num_done} of {self.num_clips}: {reads.cache_hits} found, "
            f"{num_decoded} decoded ({reads.cache_rebuilt} of them anew), "
            f"{len(self.faults)} unreadable",
            f"cache:      {cache.folder}: {len(entries)} clips, {sum(entry.size for entry in entries) / 1e9:.3f} GB of "
            f"data.cache_max_gb={cache.max_bytes / 1e9:g}",
            *(f"unreadable: {fault}" for fault in self.faults),
        ]
        return "\n".join(lines)


def fill(clips: ClipsToFill, summary: Summary, num_workers: int) -> None:
    """Go through all clips, in an order of this process's own. Raises UserError when they cannot be kept."""
    order = random.SystemRandom().sample(range(len(clips)), len(clips))
    loader: DataLoader[Outcome] = DataLoader(
        clips, batch_size=None, sampler=order, num_workers=num_workers, in_order=False
    )
    with tqdm(total=len(clips), desc="caching", unit="clip") as bar:
        try:
            for outcome in loader:
                summary.add(outcome)
                bar.set_postfix(decoded=summary.reads.decoded, found=summary.reads.cache_hits, refresh=False)
                bar.update()
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            reason = str(error).splitlines()[0]
            raise UserError(
                f"a process that decodes has died ({reason}), perhaps for lack of memory: lower --num_workers. The "
                "same command goes on"
            ) from error


def main(argv: Sequence[str] | None = None) -> int:
    """Fill, and return the exit status."""
    args = parse_args(argv)
    setup_logging()
    paths = [path for path in (args.config, args.data_config) if path]
    data = load_config(DataFile, paths, args.overrides, passed_over=OTHER_SECTIONS).data
    if args.num_workers < 0:
        raise UserError(f"--num_workers must be >= 0, got {args.num_workers}")
    reader = ClipReader(data)
    if reader.cache is None:
        raise UserError("data.cache_dir is null, so there is nothing to fill; give data.cache_dir=FOLDER")
    clips = ClipsToFill(clips_of(data, args.splits), reader, verify=args.verify)
    summary = Summary(len(clips))
    try:
        fill(clips, summary, args.num_workers)
    finally:
        print(summary.render(reader.cache))
    return int(len(summary.faults) > data.max_bad_fraction * len(clips))


if __name__ == "__main__":
    run_command(main)
