"""What decoding once saves: clips per second by each decoder and from the frame cache, and samples out of the loader.

Clips of noise that moves, 30 frames a second, H.264; every way reads the same frames at the same size and sums every
byte of them (`data_ways`). The ways take turns within every repeat. Four states:

    warm         the file, or the cache's entry, has been read by this process
    first_read   the entry is in memory, but new to the process, which checks its frames against their digest: what the
                 workers of a later epoch see, which are new unless `training.dataloader_persistent_workers` is set
    first_touch  pages were dropped from memory before (`posix_fadvise`), so the file comes from the disk, or the entry,
                 which is checked
    cold         nothing is cached: the cache's reader decodes and keeps the clip; the others decode, as in "warm"

Samples are counted as they come out of a `torch.utils.data.DataLoader` with one row in a batch, its workers already
started, on the first clip (the smallest and shortest, unless asked for otherwise): where decoding weighs least. "own"
reads a warm cache, "qwen_vl_utils" decodes each time.

Ratios of the JSON line are of the time for all clips, each once; those of the worst clip stand beside them.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from datasets.collate_fns import Batch, VideoCollator
from datasets.encoding import encode_prompt
from datasets.pixels import pixel_values
from datasets.video_dataset import VideoTemporalDataset
from scripts.benchmarks.common import check_options, surroundings, tell
from scripts.benchmarks.data_ways import (
    PEERS,
    READERS,
    PeerSamples,
    Reader,
    Work,
    checksum,
    encode_stock,
    entries,
    forget_pages,
    make_dataset,
    make_work,
)
from scripts.benchmarks.decoding import FPS, growth_mib, make_clip, measure_memory
from scripts.benchmarks.models import demo_processor
from scripts.make_demo_data import all_sentences
from utils.clip_reader import ClipReader
from utils.common import UserError
from utils.config import DataConfig, PromptConfig
from utils.frame_cache import forget_checked
from utils.prompts import build_messages

LEAST = {"repeats": 1, "rows": 2, "decodes": 2}
STATES = {"warm": READERS, "first_read": ("cache",), "first_touch": READERS, "cold": ("cache",)}
"""What is measured in each state. Where only the cache is, the other readers do what they do in "warm"."""
LOADERS = ("own", "qwen_vl_utils")
PACKAGES = ("torch", "transformers", "decord", "av", "qwen_vl_utils")

Taken = dict[str, dict[str, float]]
"""Median seconds by state and way."""


def run(args: argparse.Namespace) -> None:
    """Measure everything and say it."""
    check_options(args, LEAST)
    if any(seconds < 2 for seconds in args.seconds) or not args.fps > 0:
        raise UserError(f"--seconds must be >= 2 and --fps > 0, got {args.seconds} and {args.fps}")
    with tempfile.TemporaryDirectory() as temporary:
        record = measure(args, Path(args.folder or temporary), Path(temporary))
    tell(record, table(record), args.json)


def measure(args: argparse.Namespace, clips: Path, temporary: Path) -> dict[str, Any]:
    """The record that becomes the JSON line. Clips are kept in `clips`, the cache is in `temporary`."""
    clips.mkdir(parents=True, exist_ok=True)
    data = DataConfig(fps=args.fps, cache_dir=temporary / "cache")
    works = [
        make_work(f"{size} {length} s", make_clip(clips / f"{size}-{length}.mp4", size, length), FPS, data)
        for size in (f"{height}p" for height in args.heights)
        for length in args.seconds
    ]
    # Loaders first: their workers must be forked before this process has used decord, which does not survive a fork.
    samples = measure_loading(works[0], args.rows, args.workers, args.repeats, temporary)
    seconds = {work.name: measure_reading(work, args.repeats) for work in tqdm(works, "clips")}
    found = {
        "seconds": seconds,
        "frames": {work.name: len(work.numbers) for work in works},
        "sizes": {work.name: list(work.size) for work in works},
        "samples_per_second": samples,
        "parts": {work.name: measure_parts(work, args.repeats) for work in works},
        "repeats": args.repeats,
        "rows": args.rows,
    }
    if args.memory:
        found["memory"] = measure_growth(clips, args.decodes)
    return found | summary(found) | surroundings("cpu", PACKAGES)


# ---------------------------------------------------------------------------------------------- reading
def measure_reading(work: Work, repeats: int) -> Taken:
    """Median seconds of one read with the sum of its bytes, in every state. Fills the cache."""
    readers = {name: Reader(name) for name in READERS}
    assert checksum(readers["cache"](work)) == checksum(readers["cache"](work)) == work.sum, "the cache differs"
    taken: dict[str, dict[str, list[float]]] = {state: defaultdict(list) for state in STATES}
    for _ in range(repeats):
        readers["cache"](work)  # the last repeat wrote the entry anew; "warm" is one that was read
        for state, names in STATES.items():
            for name in names:
                if _prepare(state, work):
                    taken[state][name].append(elapsed(partial(_read, readers[name], work)))
    return {
        state: {name: statistics.median(found) for name, found in names.items()}
        for state, names in taken.items()
        if names
    }


def _read(reader: Reader, work: Work) -> int:
    return checksum(reader(work))


def _prepare(state: str, work: Work) -> bool:
    """Bring the clip into a state; False where that is not possible."""
    if state == "warm":
        return True
    forget_checked()
    if state == "first_read":
        return True
    if state == "cold":
        for entry in entries(work.data):
            entry.unlink()
        return True
    return forget_pages([work.path, *entries(work.data)])


def elapsed(call: Callable[[], Any]) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


# ---------------------------------------------------------------------------------------------- samples
def measure_loading(
    work: Work, num_rows: int, workers: Sequence[int], repeats: int, folder: Path
) -> dict[str, dict[str, float]]:
    """Samples per second by way and number of workers: median of passes over `num_rows` rows about the clip, after a
    pass to warm up that also fills the cache."""
    queries = make_dataset(folder, work, num_rows, demo_processor())
    loaders = {
        (name, number): make_loader(queries if name == "own" else PeerSamples(queries), queries, number)
        for number in sorted(workers, reverse=True)  # those with workers first: see `measure`
        for name in LOADERS
    }
    sizes = {key: read_through(loader) for key, loader in loaders.items()}
    assert len(set(sizes.values())) == 1, f"the ways give different amounts: {sizes}"
    taken: dict[tuple[str, int], list[float]] = defaultdict(list)
    for _ in tqdm(range(repeats), "passes of the loaders"):
        for key, loader in loaders.items():
            taken[key].append(elapsed(partial(read_through, loader)))
    rates = {key: num_rows / statistics.median(found) for key, found in taken.items()}
    return {name: {str(number): rates[name, number] for number in workers} for name in LOADERS}


def make_loader(dataset: Any, queries: VideoTemporalDataset, num_workers: int) -> DataLoader[Batch]:
    """One row in a batch, in order, by the project's collator."""
    collator = VideoCollator(queries.processor.tokenizer.pad_token_id, queries.blank())
    return DataLoader(
        dataset, batch_size=1, collate_fn=collator, num_workers=num_workers, persistent_workers=num_workers > 0,
    )  # fmt: skip


def read_through(loader: DataLoader[Batch]) -> tuple[int, int]:
    """Sum every byte of the tokens, labels and pixels of every batch; how many bytes there were, and rows."""
    num_bytes = num_rows = 0
    for batch in loader:
        assert not batch["faults"], batch["faults"]
        for tensor in (batch["input_ids"], batch["labels"], pixel_values(batch["pixels"])):
            checksum(tensor.numpy())
            num_bytes += tensor.nbytes
        num_rows += len(batch["input_ids"])
    return num_bytes, num_rows


def measure_parts(work: Work, repeats: int) -> dict[str, float]:
    """Median seconds of the parts of a sample in this process: reading it from the warm cache; the processor's work,
    tokens ("encode") and what the model reads of the frames ("patches"); all of that work as the others do it (float32
    pixels, as `fetch_video` gives them)."""
    processor, messages = demo_processor(), build_messages(PromptConfig(), all_sentences()[0])
    reader = ClipReader(work.data)
    clip = reader.read(work.path)
    pixels = encode_prompt(processor, messages, clip)["pixels"]
    video = torch.from_numpy(clip.frames).permute(0, 3, 1, 2).float().contiguous()
    parts = {
        "read": lambda: checksum(reader.read(work.path).frames),
        "encode": lambda: encode_prompt(processor, messages, clip),
        "patches": lambda: pixel_values([pixels]),
        "encode_stock": lambda: encode_stock(processor, messages, video, clip.metadata()),
    }
    taken = defaultdict(list)
    for turn in range(repeats + 1):
        for name, part in parts.items():
            seconds = elapsed(part)
            if turn:  # the first is to warm up
                taken[name].append(seconds)
    return {name: statistics.median(found) for name, found in taken.items()}


def measure_growth(clips: Path, num_decodes: int) -> dict[str, Any]:
    """Resident memory of a worker and of its decoding process over so many decodes of small and 360p clips."""
    paths = [make_clip(clips / "32p-8.mp4", "32p", 8), make_clip(clips / "360p-4.mp4", "360p", 4)]
    readings = measure_memory(paths, num_decodes=num_decodes, every=max(1, num_decodes // 10))
    return {"decodes": num_decodes, "readings": readings, "growth_mib": growth_mib(readings)}


# ---------------------------------------------------------------------------------------------- summary
def summary(found: Mapping[str, Any]) -> dict[str, Any]:
    """The ratios of the JSON line, from the medians."""
    times, rates, parts = found["seconds"], found["samples_per_second"], found["parts"]
    decord = {name: taken["warm"]["decord"] / taken["warm"]["cache"] for name, taken in times.items()}
    cold = {name: min(taken["warm"][peer] for peer in PEERS) / taken["cold"]["cache"] for name, taken in times.items()}
    loader = {number: rates["own"][number] / rates["qwen_vl_utils"][number] for number in rates["own"]}
    return {
        "cache_vs_decord": total(times, "warm", "decord") / total(times, "warm", "cache"),
        "cache_vs_decord_worst_clip": min(decord.values()),
        "loader_vs_qwen_vl_utils": min(loader.values()),
        "loader_vs_qwen_vl_utils_by_workers": loader,
        "cold_vs_best_peer": min(total(times, "warm", peer) for peer in PEERS) / total(times, "cold", "cache"),
        "cold_vs_best_peer_worst_clip": min(cold.values()),
        "processor_share": {name: processing(part) / (part["read"] + processing(part)) for name, part in parts.items()},
        "encode_vs_stock": {name: part["encode_stock"] / processing(part) for name, part in parts.items()},
    }


def processing(parts: Mapping[str, float]) -> float:
    """Seconds of the processor's own work on a sample."""
    return parts["encode"] + parts["patches"]


def total(times: Mapping[str, Taken], state: str, way: str) -> float:
    """Seconds for all clips, each once."""
    return sum(taken[state][way] for taken in times.values())


# ---------------------------------------------------------------------------------------------- table
def table(record: Mapping[str, Any]) -> str:
    """The record for a reader."""
    lines = [f"{record['machine']}, {record['threads']} thread(s); median of {record['repeats']}", ""]
    for state in STATES:
        lines += [*_reading_rows(record, state), ""]
    lines += [*_loading_rows(record), "", *_part_rows(record), ""]
    if "memory" in record:
        grown = ", ".join(f"{name} {mib:+.1f}" for name, mib in record["memory"]["growth_mib"].items())
        lines += [f"resident memory over {record['memory']['decodes']:,} decodes in one worker, MiB: {grown}"]
    return "\n".join([*lines, *_verdicts(record)])


def _reading_rows(record: Mapping[str, Any], state: str) -> list[str]:
    """Seconds of a clip, and clips and frames per second over all of them."""
    names = STATES[state]
    if any(state not in taken for taken in record["seconds"].values()):
        return [f"{state}: this system does not drop pages when asked"]
    rows = [_line(f"{state}, s", names)]
    for clip, taken in record["seconds"].items():
        label = f"{clip}: {record['frames'][clip]} x {'x'.join(map(str, record['sizes'][clip]))}"
        rows.append(_line(label, [f"{taken[state][name]:.4f}" for name in names]))
    sums = {name: total(record["seconds"], state, name) for name in names}
    num_clips, num_frames = len(record["seconds"]), sum(record["frames"].values())
    rows.append(_line("videos/s", [f"{num_clips / seconds:.2f}" for seconds in sums.values()]))
    return [*rows, _line("frames/s", [f"{num_frames / seconds:,.0f}" for seconds in sums.values()])]


def _loading_rows(record: Mapping[str, Any]) -> list[str]:
    rows = [_line(f"samples/s, {next(iter(record['frames']))}", [*LOADERS, "ratio"])]
    for workers, ratio in record["loader_vs_qwen_vl_utils_by_workers"].items():
        rates = [f"{record['samples_per_second'][name][workers]:.2f}" for name in LOADERS]
        rows.append(_line(f"{workers} worker(s)", [*rates, f"{ratio:.1f}x"]))
    return rows


def _part_rows(record: Mapping[str, Any]) -> list[str]:
    rows = [_line("parts of a sample, s", ["read", "encode", "patches", "encode_stock", "share"])]
    for clip, parts in record["parts"].items():
        cells = [f"{seconds:.4f}" for seconds in parts.values()]
        rows.append(_line(clip, [*cells, f"{100 * record['processor_share'][clip]:.0f} %"]))
    return rows


def _verdicts(record: Mapping[str, Any]) -> list[str]:
    return [
        f"warm cache against decord: {record['cache_vs_decord']:.0f}x (worst clip "
        f"{record['cache_vs_decord_worst_clip']:.0f}x)",
        f"cold cache, writing included, against the best other way: {record['cold_vs_best_peer']:.2f}x (worst clip "
        f"{record['cold_vs_best_peer_worst_clip']:.2f}x)",
        f"warm loader against qwen-vl-utils: {record['loader_vs_qwen_vl_utils']:.1f}x, the least over the numbers of "
        "workers",
    ]


def _line(label: str, cells: Sequence[str]) -> str:
    return f"{label:<30}" + "".join(f"{cell:>15}" for cell in cells)
