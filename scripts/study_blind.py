"""Does a prior give the answer away? Trains like the demo, but on zeroed pixels, and scores that on the test split.

    python scripts/study_blind.py --config configs/demo/sft_config.yaml --data_config configs/demo/video_config.yaml \\
        --output_dir outputs/study_blind --compare outputs/demo/sft/checkpoint-best

Such a model has the questions, the durations and the labels to learn from, and no picture. What it scores above the
best constant answer could be had without watching. Run again it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Run as a file, Python put this folder first on the path; the root belongs there (see utils/attach.py).
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from utils.attach import attach
from utils.common import run_command, settle_accelerator, write_json

attach()
settle_accelerator()

import torch  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from tqdm import tqdm  # noqa: E402

from datasets.collate_fns import Batch, VideoCollator  # noqa: E402
from datasets.encoding import Sample  # noqa: E402
from datasets.pixels import blinded  # noqa: E402
from datasets.video_dataset import VideoTemporalDataset, require_annotations  # noqa: E402
from scripts.demo_report import BATCH, answer, best_constant, render  # noqa: E402
from trainers.model import load_for_inference, load_policy, load_processor, resolve_source  # noqa: E402
from trainers.parts import LearningRates  # noqa: E402
from trainers.run_keeper import TrainingSetup  # noqa: E402
from trainers.sft_trainer import VideoSFTTrainer  # noqa: E402
from utils.checkpoints import BEST, FINAL, manifest_problems  # noqa: E402
from utils.config import SFTConfig, load_config  # noqa: E402
from utils.logging_utils import setup_logging  # noqa: E402
from utils.metrics import bootstrap_interval, evaluate, evaluate_intervals, sample_iou  # noqa: E402
from utils.prompts import PromptContract  # noqa: E402
from utils.run import Run, start_run  # noqa: E402

BLIND = "trained on zeroed pixels"
SEEING = "trained with pixels"

Interval = tuple[float, float]
Scored = list[dict[str, Any]]


@dataclass(frozen=True)
class BlindCollator:
    """`collator` with the pixels of its batches set to zero, and all else as it is: times, questions and answers."""

    collator: Callable[[Sequence[Sample]], Batch]

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """Collate, then blind."""
        return blinded(self.collator(samples))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; a.b=c overrides a configuration key."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="YAML with model, lora and training")
    parser.add_argument("--data_config", type=Path, required=True, help="YAML with data and prompt")
    parser.add_argument("--output_dir", type=Path, required=True, help="for the blind model and the table")
    parser.add_argument("--compare", type=Path, metavar="CHECKPOINT", help="a model trained with its pixels")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Train, score, print; returns the exit status."""
    args = parse_args(argv)
    setup_logging()
    config = blind_config(args)
    if args.compare:
        resolve_source(str(args.compare), need_contract=True)  # a wrong path is said before the training, not after
    folder = args.output_dir / "sft"
    if not train_blind(config, folder):
        return 130
    dataset, blind = score(config, folder / BEST, BLIND, blind=True)
    constant, window = best_constant(dataset, blind)
    samples = {f"best constant answer ({window})": constant, BLIND: blind}
    if args.compare:
        samples[SEEING] = score(config, args.compare, SEEING)[1]
    table = report(samples)
    print(render(table["rows"], len(dataset)))
    for name, (low, high) in table["mIoU_intervals"].items():
        print(f"{name}, mIoU: 95 % bootstrap interval {low:.1f} to {high:.1f}")
    low, high = table["blind_minus_constant"]
    print(f"{BLIND} minus best constant answer, row by row: {low:+.1f} to {high:+.1f}")
    print(table["verdict"])
    write_json(args.output_dir / "table.json", {"num_queries": len(dataset), **table})
    return 0


def blind_config(args: argparse.Namespace) -> SFTConfig:
    """The configuration with records of its own, so that the demo's are left alone, and without the blindness guard."""
    own = [f"training.metrics_dir={args.output_dir / 'metrics'}", f"training.logging_dir={args.output_dir / 'logs'}"]
    overrides = [*own, *args.overrides, "training.blindness_guard=false"]
    return load_config(SFTConfig, [args.config, args.data_config], overrides)


# ---------------------------------------------------------------------------------------------- training
def train_blind(config: SFTConfig, folder: Path) -> bool:
    """`train_sft.py` with zeroed pixels, in training and in validation; False when Ctrl-C ended it."""
    require_annotations(config.data)
    run = start_run(folder, config, "auto")
    if is_done(config, run):
        print(f"{folder} is trained already")
        return True
    trainer = blind_trainer(config, folder, run)
    trainer.train(resume_from_checkpoint=str(run.resume_from) if run.resume_from else None)
    if not trainer.exit_status:
        trainer.finish()
    return not trainer.exit_status


def is_done(config: SFTConfig, run: Run) -> bool:
    """Whether an earlier call trained to the end: Trainer would take one more step from there."""
    if run.resume_from is None or manifest_problems(run.output_dir / FINAL):
        return False
    state = json.loads((run.resume_from / "trainer_state.json").read_text(encoding="utf-8"))
    num_steps = config.training.max_steps
    return bool(state["global_step"] >= (num_steps if num_steps > 0 else state["max_steps"]))


def blind_trainer(config: SFTConfig, folder: Path, run: Run) -> VideoSFTTrainer:
    """The trainer that `train_sft.py` builds, with both its collators blinded."""
    device = {} if torch.accelerator.is_available() else {"use_cpu": True}
    training_args = config.training.to_training_arguments(folder, None, **device)
    processor = load_processor(resolve_source(config.model.name_or_path), config.model)
    train_set = VideoTemporalDataset(config.data, processor, config.prompt, seed=config.training.seed)
    num_val = config.training.max_eval_samples
    val_set = VideoTemporalDataset(
        config.data, processor, config.prompt, split="val", with_answer=False, max_samples=num_val
    )
    rates = LearningRates.from_training(config.training)
    policy = load_policy(config.model, config.lora, rates)
    contract = PromptContract.current(config.prompt, config.data, policy.vision_tower)
    setup = TrainingSetup.from_config(config, rates, contract, run)
    trainer = VideoSFTTrainer(policy, train_set, val_set, training_args, setup)
    trainer.data_collator = BlindCollator(trainer.data_collator)
    trainer.eval_collator = BlindCollator(trainer.eval_collator)  # type: ignore[assignment, arg-type]
    return trainer


# ---------------------------------------------------------------------------------------------- scoring
def score(
    config: SFTConfig, checkpoint: Path, name: str, *, blind: bool = False
) -> tuple[VideoTemporalDataset, Scored]:
    """The test split, and its rows with the greedy answers of `checkpoint`, asked as it was trained to be."""
    policy = load_for_inference(str(checkpoint))
    prompt = policy.contract.prompt if policy.contract else config.prompt
    dataset = VideoTemporalDataset(config.data, policy.processor, prompt, split="test", with_answer=False)
    collator: Any = VideoCollator(policy.processor.tokenizer.pad_token_id, dataset.blank(), side="left")
    loader = DataLoader(dataset, BATCH, collate_fn=BlindCollator(collator) if blind else collator)
    batches = list(tqdm(loader, desc="reading the test videos", leave=False))
    texts = answer(policy, batches, name, config)
    return dataset, [dataset.scored_sample(index, text) for index, text in sorted(texts.items())]


def report(samples: dict[str, Scored]) -> dict[str, Any]:
    """What table.json holds: metrics and mIoU intervals per row of the table (the constant answer's first), the
    interval of the row-by-row difference, and the verdict. In percent."""
    intervals = {name: evaluate_intervals(rows)["mIoU"] for name, rows in samples.items()}
    constant = next(iter(samples))
    pairs = zip(samples[BLIND], samples[constant], strict=True)
    differences = [100 * (sample_iou(ours) - sample_iou(theirs)) for ours, theirs in pairs if ours["gt"]]
    is_at_or_below, verdict = judge(intervals[BLIND], intervals[constant])
    table = {name: evaluate(rows) for name, rows in samples.items()}
    unread = table[BLIND]["parse_failure_rate"]
    if unread:  # a model that has not learnt to answer says nothing about priors
        verdict += f"; {unread:.0f} % of the blind model's answers could not be read"
    return {
        "rows": table,
        "mIoU_intervals": intervals,
        "blind_minus_constant": bootstrap_interval(differences),
        "blind_at_or_below_constant": is_at_or_below,
        "verdict": verdict,
    }


def judge(blind: Interval, constant: Interval) -> tuple[bool, str]:
    """Whether the blind model's interval ends at or below that of the best constant answer, and that in words."""
    where = f"mIoU {blind[0]:.1f} to {blind[1]:.1f}, best constant answer {constant[0]:.1f} to {constant[1]:.1f}"
    if blind[1] <= constant[1]:
        return True, f"verdict: without pixels no more is learnt than one constant answer gives ({where})"
    if blind[0] > constant[1]:
        return False, f"verdict: a prior gives answers away: the blind model beats every constant answer ({where})"
    return False, f"verdict: undecided: the blind model's interval reaches above the constant answer's ({where})"


if __name__ == "__main__":
    run_command(main)
