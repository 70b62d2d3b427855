"""How well the current model does on every row, so that GRPO can draw rows of middling difficulty (`data.select`).

    python scripts/score_difficulty.py --model_path outputs/sft/checkpoint-best \\
        --annotations data/annotations/train.jsonl --output data/annotations/train.scored.jsonl
    python scripts/score_difficulty.py --report data/annotations/train.scored.jsonl data.select.num_rows=800

Samples `--num_samples` answers a row and writes the rows with the mean and the standard deviation of their IoU in
`kwargs.model_iou_mean` and `kwargs.model_iou_std`, and the model's name in `kwargs.model_id`; all other keys stay as
they are. A row labelled absent scores 1 for a stated absence, else 0; a row without a label keeps null. The second
form shows the scores, and what `data.select` would draw of them.

Prompt, frame rate and pixel budget are the checkpoint's own; --data_config takes their place. Every IoU is appended to
OUTPUT.progress, and the same command goes on from there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Run as a file, Python put this folder first on the path; the root belongs there (see utils/attach.py).
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from utils.attach import attach
from utils.common import UserError, atomic_open, run_command, settle_accelerator

attach()
settle_accelerator()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from tqdm import tqdm  # noqa: E402

from datasets.video_dataset import VideoTemporalDataset  # noqa: E402
from inference.sampling import plain_sampling, sample_texts  # noqa: E402
from inference.video_infer import DEFAULT_NEW_TOKENS, THINKING_NEW_TOKENS  # noqa: E402
from trainers.callbacks import FaultCounter  # noqa: E402
from trainers.model import Policy, WeightSource, load_for_inference, load_processor, resolve_source  # noqa: E402
from trainers.rollout_batches import is_fault  # noqa: E402
from utils.config import AnnotationSource, DataFile, SelectConfig, load_config  # noqa: E402
from utils.logging_utils import get_logger, setup_logging  # noqa: E402
from utils.metrics import sample_scores  # noqa: E402
from utils.prompts import SAMPLING_KEYS, PromptContract  # noqa: E402
from utils.rows import Row, load_annotations, resolve_video, write_rows  # noqa: E402
from utils.selection import select_rows  # noqa: E402

MEAN, STD, MODEL_ID = "model_iou_mean", "model_iou_std", "model_id"
ZERO_STD = 1e-8
"""Below it all answers of a row scored the same, so that a GRPO group of them teaches nothing."""
NUM_BINS, BAR = 5, 40
CHUNK, NUM_CHUNKS = 65536, 64

Ious = dict[int, list[float]]
"""IoUs of the sampled answers by the line of the row."""


# ---------------------------------------------------------------------------------------------- command line
def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; a.b=c overrides a key of `data` or `prompt`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", help="base model, adapter or merged checkpoint")
    parser.add_argument("--annotations", type=Path, help="JSONL rows to score")
    parser.add_argument("--output", type=Path, help="JSONL with the same rows and their scores")
    parser.add_argument("--report", type=Path, metavar="SCORED", help="score nothing; show what a scored file holds")
    parser.add_argument("--data_config", type=Path, help="YAML with data and prompt, instead of the checkpoint's own")
    parser.add_argument("--num_samples", type=int, default=8, help="answers sampled per row")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--max_new_tokens", type=int)
    parser.add_argument("--batch_size", type=int, default=4, help="rows answered together, num_samples caches each")
    parser.add_argument("--num_workers", type=int, default=4, help="processes that decode videos")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    args = parser.parse_intermixed_args(argv)
    if not args.report and not (args.model_path and args.annotations and args.output):
        parser.error("give --model_path, --annotations and --output, or --report alone")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Score, or report."""
    args = parse_args(argv)
    setup_logging()
    if args.report:
        report(args)
        return
    check_settings(args)
    source = resolve_source(args.model_path, need_contract=args.data_config is None)
    asked = question_of(source, args)
    dataset = RowsToScore(asked.data, load_processor(source), asked.prompt, split="test", with_answer=False)
    check_rows(dataset, args.output)
    model_id = name_of(args.model_path)
    progress = Progress.open(Path(f"{args.output}.progress"), settings_of(args, asked, model_id))
    score_rows(load_for_inference(args.model_path, device=args.device, need_contract=False), dataset, progress, args)
    scored = [with_score(row, progress.ious.get(row.line), model_id) for row in dataset.rows]
    write_rows(args.output, scored)
    print(render_report(scored, asked.data.select))


def report(args: argparse.Namespace) -> None:
    """Show what a scored file holds."""
    data = load_config(DataFile, [args.data_config] if args.data_config else [], args.overrides).data
    rows = load_annotations([AnnotationSource(path=args.report)], max_bad_fraction=data.max_bad_fraction)
    print(render_report(rows, data.select))


def check_settings(args: argparse.Namespace) -> None:
    """Raise UserError for settings that cannot work, before the model loads."""
    rules = (("num_samples", 2, "one answer has no spread"), ("batch_size", 1, ""), ("num_workers", 0, ""))
    for name, least, why in rules:
        if getattr(args, name) < least:
            because = f" ({why})" if why else ""
            raise UserError(f"--{name} must be >= {least}{because}, got {getattr(args, name)}")
    if not args.temperature > 0:
        raise UserError(f"--temperature must be > 0, got {args.temperature}: greedy answers would all be the same")
    if args.output.absolute() == args.annotations.absolute():
        raise UserError(f"--output is the annotation file itself ({args.output}); give the scored rows another name")


def question_of(source: WeightSource, args: argparse.Namespace) -> DataFile:
    """What to ask and which rows: the checkpoint's record or `--data_config`, and the overrides laid over it."""
    if not args.data_config and not source.contract:
        get_logger().info("%s records no prompt: asking it with the default prompt and pixel budget", args.model_path)
    recorded = contract_as_overrides(source.contract) if source.contract and not args.data_config else []
    asked = load_config(DataFile, [args.data_config] if args.data_config else [], [*recorded, *args.overrides])
    PromptContract.current(asked.prompt, asked.data).warn_if_other(source.contract)
    rows = (AnnotationSource(path=args.annotations),)
    return asked.model_copy(update={"data": asked.data.model_copy(update={"test": rows})})


def contract_as_overrides(contract: PromptContract) -> list[str]:
    """The record as `section.key=value` words, so that the command line's can be laid over them."""
    values = {f"data.{key}": value for key, value in contract.data.model_dump(include=set(SAMPLING_KEYS)).items()}
    values |= {f"prompt.{key}": value for key, value in contract.prompt.model_dump().items()}
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]


class RowsToScore(VideoTemporalDataset):
    """All good rows of the file, those without a label too: they are written again with the others."""

    def is_usable(self, row: Row) -> bool:
        """Every row is."""
        return True


def check_rows(dataset: VideoTemporalDataset, output: Path) -> None:
    """Raise UserError when no row is labelled, or when rows in `output` would no longer find their videos."""
    first, root = dataset.rows[0], dataset.data.videos_root
    if all(row.timestamp is None for row in dataset.rows):
        raise UserError(f"{first.file}: no row is labelled (timestamp is null), so there is nothing to score against")
    for row in dataset.rows:
        here, there = resolve_video(row, root), resolve_video(replace(row, file=str(output)), root)
        if here.exists() and here.resolve() != there.resolve():
            raise UserError(
                f"--output {output}: its rows would not find {row.video}, which is looked up beside the annotation "
                f"file. Write to {Path(row.file).with_name(output.name)}, or give data.videos_root="
                f"{Path(row.file).parent} here and in training"
            )


# ---------------------------------------------------------------------------------------------- who answers
def name_of(model_path: str) -> str:
    """What `kwargs.model_id` says: a hub name as it is, of a folder its last two names and a hash of its weights."""
    folder = Path(model_path).expanduser()
    if not folder.is_dir():
        return model_path
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*model*.bin")):
        digest.update(f"{path.name} {path.stat().st_size} ".encode())
        for chunk in chunks_of(path):
            digest.update(chunk)
    return f"{'/'.join(folder.resolve().parts[-2:])}@{digest.hexdigest()[:8]}"


def chunks_of(path: Path) -> Iterator[bytes]:
    """A small file whole, of a large one pieces from everywhere: training moves them all, and reading takes seconds."""
    size = path.stat().st_size
    step = max(CHUNK, size // NUM_CHUNKS)
    with open(path, "rb") as handle:
        for start in range(0, size, step):
            handle.seek(start)
            yield handle.read(CHUNK)


# ---------------------------------------------------------------------------------------------- progress
@dataclass(frozen=True)
class Progress:
    """IoUs on disk: a first line with the settings, then one line per row."""

    path: Path
    ious: Ious

    @classmethod
    def open(cls, path: Path, settings: Mapping[str, Any]) -> Progress:
        """Begin a file, or go on with one. Raises UserError for one that was written with other settings."""
        if not path.exists():
            with atomic_open(path) as handle:
                handle.write(json.dumps(settings) + "\n")
            return cls(path, {})
        lines = whole_lines(path)
        try:
            earlier, *records = map(json.loads, lines)
            ious = {record["line"]: [float(iou) for iou in record["ious"]] for record in records}
            changed = [f"{key} {earlier[key]} -> {settings[key]}" for key in settings if earlier[key] != settings[key]]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is no progress file of this script ({error}); move it out of the way") from error
        if changed:
            raise UserError(
                f"{path} was begun with other settings: {', '.join(changed)}. Give the same again to go on, choose "
                "another --output, or delete the file to begin anew"
            )
        if ious:
            get_logger().info("%s: going on after %d rows", path, len(ious))
        return cls(path, ious)

    def add(self, ious: Ious) -> None:
        """Note the rows of a batch and append them."""
        self.ious.update(ious)
        with open(self.path, "a", encoding="utf-8") as handle:
            handle.writelines(json.dumps({"line": line, "ious": values}) + "\n" for line, values in ious.items())


def whole_lines(path: Path) -> list[str]:
    """The lines of `path`; a last one without its end, cut off by a kill, is removed from the file."""
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with open(path, "r+b") as handle:
            handle.truncate(len(whole))
    return whole.decode("utf-8").splitlines()


def settings_of(args: argparse.Namespace, asked: DataFile, model_id: str) -> dict[str, Any]:
    """All that decides the scores; a progress file goes on only with the same. `question` is a hash."""
    question = [
        asked.prompt.model_dump(mode="json"),
        asked.data.model_dump(mode="json", include={*SAMPLING_KEYS, "trim"}),
    ]
    return {
        "model_id": model_id,
        "annotations": digest_of(args.annotations.read_bytes()),
        "question": digest_of(json.dumps(question).encode()),
        "num_samples": args.num_samples,
        "temperature": args.temperature,
        "max_new_tokens": args.max_new_tokens,
        "seed": args.seed,
    }


def digest_of(data: bytes) -> str:
    """Eight hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()[:8]


# ---------------------------------------------------------------------------------------------- scoring
def score_rows(policy: Policy, dataset: VideoTemporalDataset, progress: Progress, args: argparse.Namespace) -> None:
    """Sample answers to every labelled row that `progress` lacks, and add their IoUs to it.

    Raises UserError once more videos cannot be read than `data.max_bad_fraction` allows.
    """
    batches = batches_to_score(dataset.rows, progress.ious, args.batch_size)
    num_labelled, num_left = sum(row.timestamp is not None for row in dataset.rows), sum(map(len, batches))
    faults = FaultCounter(len(dataset.rows), dataset.data.max_bad_fraction)
    default = THINKING_NEW_TOKENS if dataset.prompt.thinking else DEFAULT_NEW_TOKENS
    sampling = plain_sampling(policy, temperature=args.temperature, max_new_tokens=args.max_new_tokens or default)
    loader: Any = DataLoader(dataset, batch_sampler=batches, collate_fn=list, num_workers=args.num_workers)
    with tqdm(total=num_labelled, initial=num_labelled - num_left, desc="scoring", unit="row") as bar:
        for samples in loader:
            faults.add([(sample["index"], sample["fault"]) for sample in samples if is_fault(sample)])
            good = [sample for sample in samples if not is_fault(sample)]
            if good:
                torch.manual_seed(args.seed * 1_000_003 + good[0]["index"])  # of the batch, not of the whole run
            texts = sample_texts(policy, good, args.num_samples, sampling)
            progress.add(
                {
                    dataset.rows[sample["index"]].line: [answer_score(dataset, sample["index"], t) for t in answers]
                    for sample, answers in zip(good, texts, strict=True)
                }
            )
            bar.update(len(samples))
    if faults.rows:
        get_logger().warning("%d of %d rows could not be read and have no score", len(faults.rows), len(dataset.rows))


def batches_to_score(rows: Sequence[Row], done: Ious, size: int) -> list[list[int]]:
    """Places of the labelled rows, `size` together, without those that are done. The batches of a run that goes on are
    those of an uninterrupted one, and so are its random numbers."""
    labelled = [index for index, row in enumerate(rows) if row.timestamp is not None]
    batches = [labelled[start : start + size] for start in range(0, len(labelled), size)]
    left = [[index for index in batch if rows[index].line not in done] for batch in batches]
    return [batch for batch in left if batch]


def answer_score(dataset: VideoTemporalDataset, index: int, text: str) -> float:
    """IoU of an answer's first window with the labelled one it fits best; for a row labelled absent 1 or 0."""
    scores = sample_scores(dataset.scored_sample(index, text))
    return scores["absent_accuracy"] if "absent_accuracy" in scores else scores["mIoU"]


def with_score(row: Row, ious: Sequence[float] | None, model_id: str) -> Row:
    """The row with our three keys; null where it has no score, so that none of an earlier model stays."""
    scores: dict[str, Any] = {MEAN: None, STD: None, MODEL_ID: None}
    if ious:
        mean, std = statistics.fmean(ious), statistics.pstdev(ious)
        scores = {MEAN: round(mean, 6), STD: round(std, 6), MODEL_ID: model_id}
    return replace(row, kwargs=row.kwargs | scores)


# ---------------------------------------------------------------------------------------------- report
def render_report(rows: Sequence[Row], select: SelectConfig | None = None) -> str:
    """Scores of `rows` as text, and with `select` what it draws of them. Raises UserError when none has a score."""
    scored = [row for row in rows if row.kwargs.get(MEAN) is not None]
    if not scored:
        raise UserError(f"{rows[0].file or 'the file'}: no row has a score in kwargs.{MEAN}")
    models = ", ".join(sorted({str(row.kwargs.get(MODEL_ID)) for row in scored}))
    lines = [f"{len(scored)} of {len(rows)} rows scored by {models}", *histogram(scored)]
    if select is not None:
        drawn = select_rows(scored, select)
        lines += ["", f"data.select draws {len(drawn)} of them", *histogram(drawn)]
    return "\n".join(lines)


def histogram(rows: Sequence[Row]) -> list[str]:
    """Mean, share without spread, and how many rows have which mean IoU."""
    means = np.array([row.kwargs[MEAN] for row in rows])
    counts, edges = np.histogram(np.clip(means, 0, 1), NUM_BINS, (0, 1))
    bars = [
        f"  {low:.1f} to {high:.1f} {count:>7}  {'#' * round(BAR * count / counts.max())}"
        for low, high, count in zip(edges, edges[1:], counts, strict=False)
    ]
    return [
        f"mean IoU {means.mean():.3f} (std over rows {means.std():.3f}); "
        f"all answers alike (zero spread): {100 * flat_share(rows):.1f} % of rows",
        *bars,
    ]


def flat_share(rows: Iterable[Row]) -> float:
    """Share, in [0, 1], of scored rows whose sampled answers all scored the same: in GRPO they would teach nothing.
    NaN when no row has a standard deviation."""
    stds = [row.kwargs[STD] for row in rows if row.kwargs.get(STD) is not None]
    return sum(std <= ZERO_STD for std in stds) / len(stds) if stds else math.nan


if __name__ == "__main__":
    run_command(main)
