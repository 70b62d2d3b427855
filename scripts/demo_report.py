"""The end of the demo: scores the checkpoints on the test split, prints the table, draws a timeline.

    python scripts/demo_report.py --config configs/demo/sft_config.yaml --data_config configs/demo/video_config.yaml \\
        --checkpoint outputs/demo/sft/checkpoint-best --rl_checkpoint outputs/demo/rl/checkpoint-best \\
        --output_dir outputs/demo/report

Rows: the untrained model, the best answer that looks at no pixel, the SFT model on zeroed pixels, the SFT model, the
model after GRPO. Beside them what GRPO changed, query by query: greedy mIoU, and the mean reward of sampled answers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Run as a file, Python put this folder first on the path; the root belongs there (see utils/attach.py).
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from utils.attach import attach
from utils.common import run_command, seed_everything, settle_accelerator, write_json

attach()
settle_accelerator()

from torch.utils.data import DataLoader  # noqa: E402
from tqdm import tqdm  # noqa: E402

from datasets.collate_fns import Batch, VideoCollator  # noqa: E402
from datasets.video_dataset import VideoTemporalDataset  # noqa: E402
from inference.sampling import sample_answers  # noqa: E402
from inference.visualize import visualize_temporal_grounding  # noqa: E402
from scripts.make_demo_data import best_constant_iou  # noqa: E402
from trainers.generation import answer_rows  # noqa: E402
from trainers.model import Policy, load_for_inference  # noqa: E402
from utils.config import SFTConfig, load_config  # noqa: E402
from utils.logging_utils import get_logger, setup_logging  # noqa: E402
from utils.metrics import bootstrap_interval, evaluate, evaluate_intervals, sample_iou  # noqa: E402
from utils.rows import resolve_video, to_file_clock  # noqa: E402

COLUMNS = ("mIoU", "R1@0.3", "R1@0.5", "R1@0.7")
BATCH = 64
SFT, GRPO = "after SFT", "after GRPO"
NUM_SAMPLES = 8


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; a.b=c overrides a configuration key."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--data_config", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True, help="the model after SFT")
    parser.add_argument("--rl_checkpoint", type=Path, help="the model after GRPO")
    parser.add_argument("--output_dir", type=Path, required=True, help="for the table and the picture")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    return parser.parse_intermixed_args(argv)


def main() -> None:
    """Score, print, draw."""
    args = parse_args()
    setup_logging()
    config = load_config(SFTConfig, [args.config, args.data_config], args.overrides)
    untrained = load_for_inference(config.model.name_or_path, need_contract=False)
    trained = load_for_inference(str(args.checkpoint))
    prompt = trained.contract.prompt if trained.contract else config.prompt
    dataset = VideoTemporalDataset(config.data, trained.processor, prompt, split="test", with_answer=False)
    collator = VideoCollator(trained.processor.tokenizer.pad_token_id, dataset.blank(), side="left")
    batches = list(tqdm(DataLoader(dataset, BATCH, collate_fn=collator), desc="reading the test videos"))  # type: ignore[arg-type]
    runs = {
        "untrained": answer(untrained, batches, "untrained", config),
        "after SFT, pixels zeroed": answer(trained, batches, "zeroed pixels", config, blind=True),
        SFT: answer(trained, batches, SFT, config),
    }
    policies = {SFT: trained}
    if args.rl_checkpoint:
        policies[GRPO] = load_for_inference(str(args.rl_checkpoint))
        runs[GRPO] = answer(policies[GRPO], batches, GRPO, config)
    scored = {
        name: [dataset.scored_sample(i, text) for i, text in sorted(texts.items())] for name, texts in runs.items()
    }
    constant, window = best_constant(dataset, scored[SFT])
    scored = {"untrained": scored["untrained"], f"best constant answer ({window})": constant} | scored
    table = {name: evaluate(rows) for name, rows in scored.items()}
    print(render(table, len(dataset)))
    record: dict[str, Any] = {"num_queries": len(dataset), "rows": table}
    for name in policies:
        record[f"{name}, mIoU interval"] = interval = evaluate_intervals(scored[name])["mIoU"]
        print(f"{name}, mIoU: 95 % bootstrap interval {interval[0]:.1f} to {interval[1]:.1f}")
    if args.rl_checkpoint:
        record["after GRPO against after SFT"] = compare(dataset, policies, scored, config)
    write_json(args.output_dir / "table.json", record)
    best = GRPO if args.rl_checkpoint else SFT
    picture = draw(dataset, runs[best], args.output_dir / "timeline.png")
    print(f"timeline:   {picture}")


def compare(
    dataset: VideoTemporalDataset,
    policies: Mapping[str, Policy],
    scored: Mapping[str, Sequence[Any]],
    config: SFTConfig,
) -> dict[str, Any]:
    """What GRPO changed, paired by query, in percent: greedy IoU, and the mean IoU of answers sampled at T=1."""
    samples = [dataset[index] for index in range(len(dataset))]
    greedy = {name: [100 * sample_iou(sample) for sample in scored[name]] for name in policies}
    sampled = {name: sampled_ious(dataset, policy, samples, name, config) for name, policy in policies.items()}
    found = {}
    for what, values in (("mIoU", greedy), (f"mean sampled reward ({NUM_SAMPLES} answers a query, T=1)", sampled)):
        before, after = (sum(values[name]) / len(values[name]) for name in (SFT, GRPO))
        low, high = bootstrap_interval([b - a for a, b in zip(values[SFT], values[GRPO], strict=True)])
        found[what] = {"before": before, "after": after, "difference_interval": (low, high)}
        print(
            f"{what}: {before:.1f} after SFT, {after:.1f} after GRPO; difference {after - before:+.1f}, "
            f"95 % interval {low:+.1f} to {high:+.1f}"
        )
    return found


def sampled_ious(
    dataset: VideoTemporalDataset, policy: Policy, samples: Sequence[Any], name: str, config: SFTConfig
) -> list[float]:
    """Mean IoU of sampled answers per query, in percent."""
    seed_everything(0)
    answers = sample_answers(
        policy, tqdm(samples, desc=f"sampling: {name}", leave=False),
        num_samples=NUM_SAMPLES, max_new_tokens=config.training.max_new_tokens, prompts_per_batch=32,
    )  # fmt: skip
    return [
        100 * sum(sample_iou(dataset.scored_sample(index, text)) for text in texts) / len(texts)
        for index, texts in answers
    ]


def answer(
    policy: Policy, batches: Sequence[Batch], name: str, config: SFTConfig, *, blind: bool = False
) -> dict[int, str]:
    """Greedy answer per row number."""
    answers = answer_rows(
        policy.model,
        policy.processor,
        tqdm(batches, desc=f"answering: {name}", leave=False),
        blind=blind,
        max_new_tokens=config.training.max_new_tokens,
    )
    for _, reason in answers.faults:
        get_logger().warning("left out: %s", reason)
    return answers.texts


def best_constant(dataset: VideoTemporalDataset, samples: Sequence[Mapping[str, Any]]) -> tuple[list[Any], str]:
    """The constant answer that scores best, searched on the very rows it is scored on, which favours it.

    Returns the samples with it as their prediction, and the window in words (shares of the duration).
    """
    start, end = best_constant_iou(dataset.rows, steps=32).best_window
    scored = [{**s, "pred": [[start * s["duration"], end * s["duration"]]]} for s in samples]
    return scored, f"{100 * start:.0f}-{100 * end:.0f} %"


def render(table: Mapping[str, Mapping[str, float]], num_queries: int) -> str:
    """The table as text, in percent."""
    width = max(map(len, table))
    head = f"{f'{num_queries} held-out queries':<{width}}" + "".join(f"{column:>9}" for column in COLUMNS)
    lines = [f"{name:<{width}}" + "".join(f"{row[column]:>9.1f}" for column in COLUMNS) for name, row in table.items()]
    return "\n".join(["", head, "-" * len(head), *lines, ""])


def draw(dataset: VideoTemporalDataset, answers: Mapping[int, str], path: Path) -> Path:
    """Timeline of the first test video: every query asked about it, with prediction and truth."""
    video = dataset.rows[0].video
    indices = [i for i, row in enumerate(dataset.rows) if row.video == video][:1]
    row = dataset.rows[indices[0]]
    sample = dataset.scored_sample(indices[0], answers[indices[0]])
    spans = [to_file_clock(span, row, dataset.data.trim) for span in sample["pred"] or ()]
    return visualize_temporal_grounding(
        video_path=resolve_video(row, dataset.data.videos_root),
        predictions=[{"segments": spans, "parsed": sample["pred"] is not None, "raw_text": answers[indices[0]]}],
        ground_truths=[tuple(to_file_clock(s, row, dataset.data.trim)) for s in row.timestamp or ()],
        output_path=path,
        query=row.sentence,
    )


if __name__ == "__main__":
    run_command(main)
