"""Does GRPO teach more than the same time of something simpler? SFT, then GRPO, against two controls.

    python scripts/study_grpo.py --output_dir outputs/study_grpo

From one SFT checkpoint: (GRPO) reinforcement learning with the IoU as reward; (i) SFT continued for the same training
time on the same rows, at several learning rates of which the validation split chooses; (ii) no training: the SFT model
sampled at the temperature at which its entropy is that of the GRPO model, since sharpening alone raises the reward of
sampled answers. All are scored on one held-out split, paired by query. Every stage is skipped when its result is there
already, so the same command goes on after Ctrl-C; other settings want another folder. Hours on two cores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Run as a file, Python put this folder first on the path; the root belongs there (see utils/attach.py).
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from utils.attach import attach
from utils.common import REPO_ROOT, UserError, run_command, seed_everything, settle_accelerator, write_json

attach()
settle_accelerator()

import torch  # noqa: E402
import yaml  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from tqdm import tqdm  # noqa: E402

from datasets.collate_fns import VideoCollator  # noqa: E402
from datasets.video_dataset import VideoTemporalDataset  # noqa: E402
from inference.sampling import sample_answers  # noqa: E402
from scripts.make_demo_data import LEVELS, make_demo_data  # noqa: E402
from trainers.generation import answer_rows  # noqa: E402
from trainers.model import Policy, load_for_inference  # noqa: E402
from trainers.shared_prefix import enable_shared_prefix, make_prompt, pack  # noqa: E402
from utils.checkpoints import FINAL, MANIFEST_FILE  # noqa: E402
from utils.config import SFTConfig, load_config  # noqa: E402
from utils.logging_utils import read_metrics, setup_logging  # noqa: E402
from utils.metrics import bootstrap_interval, sample_iou  # noqa: E402

CONFIGS = REPO_ROOT / "configs/demo"
MAX_NEW_TOKENS = 24


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; a.b=c overrides a key of the GRPO run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--level", choices=LEVELS, default="imprecise", help="kind of data (default %(default)s)")
    parser.add_argument("--num_train", type=int, default=3000, help="training videos (default %(default)s)")
    parser.add_argument("--num_test", type=int, default=600, help="held-out videos (default %(default)s)")
    parser.add_argument("--sft_steps", type=int, default=1200, help="updates of SFT (default %(default)s)")
    parser.add_argument("--rl_steps", type=int, default=300, help="updates of GRPO (default %(default)s)")
    parser.add_argument(
        "--control_rates", type=float, nargs="+", default=[1e-3, 3e-4, 1e-4], help="learning rates of the longer SFT"
    )
    parser.add_argument("--num_samples", type=int, default=8, help="sampled answers a query (default %(default)s)")
    parser.add_argument("--sft_config", type=Path, default=CONFIGS / "sft_config.yaml")
    parser.add_argument("--rl_config", type=Path, default=CONFIGS / "rl_config.yaml")
    parser.add_argument("--data_config", type=Path, default=CONFIGS / "video_config.yaml")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="for the GRPO run")
    return parser.parse_intermixed_args(argv)


def main() -> None:
    """Train what is missing, score, print the table."""
    args = parse_args()
    setup_logging()
    keep_settings(args)
    data = make_demo_data(
        args.output_dir / "data", num_train=args.num_train, num_val=200, num_test=args.num_test, level=args.level,
        progress=True,
    )  # fmt: skip
    places = [f"data.{split}={path}" for split, path in data.annotations.items()]
    tiny = args.output_dir / "tiny_model"
    if not (tiny / "config.json").is_file():
        start("scripts/make_tiny_model.py", "--output_dir", tiny, "--annotations", data.annotations["train"],
              "--data_config", args.data_config)  # fmt: skip
    sft = train("train_sft.py", args, "sft", args.sft_config, tiny, [*places, f"training.max_steps={args.sft_steps}"])
    rl = train("train_rl.py", args, "grpo", args.rl_config, sft,
               [*places, f"training.max_steps={args.rl_steps}", *args.overrides])  # fmt: skip
    longer = [control(args, places, sft, rate) for rate in args.control_rates]
    chosen = max(longer, key=lambda folder: score(args, places, folder, "val")["mIoU"])
    results = {
        "SFT": score(args, places, sft, "test"),
        "SFT continued": score(args, places, chosen, "test"),
        "GRPO": score(args, places, rl, "test"),
    }
    matched = match_temperature(args, places, sft, results["GRPO"]["entropy"])
    results["SFT at GRPO's entropy"] = score(args, places, sft, "test", temperature=matched)
    spent = {"seconds": seconds_of(args, "grpo"), "seconds_continued": seconds_of(args, chosen.parent.name)}
    report(args.output_dir, results, matched, {"chosen": str(chosen), **spent})


def keep_settings(args: argparse.Namespace) -> None:
    """Note what the folder's results are made with. Raises UserError when they were made with something else: stages
    that are skipped would pass as the new settings' own. Further rates of the control may join."""
    left_out = ("output_dir", "control_rates")
    settings = {name: str(value) for name, value in vars(args).items() if name not in left_out}
    for name in ("sft_config", "rl_config", "data_config"):
        settings[name] += f"@{hashlib.sha256(getattr(args, name).read_bytes()).hexdigest()[:8]}"
    path = args.output_dir / "settings.json"
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else settings
    pairs = [(name, earlier.get(name), value) for name, value in settings.items()]
    if changed := [f"{name} {before} -> {now}" for name, before, now in pairs if before != now]:
        raise UserError(
            f"{args.output_dir} holds a study with other settings: {', '.join(changed)}. Give the same again to go on, "
            "or another --output_dir"
        )
    write_json(path, settings)


# ---------------------------------------------------------------------------------------------- training
def start(script: str, *arguments: Any) -> None:
    """Run a script of this project to its end. Raises UserError when it fails."""
    ended = subprocess.run([sys.executable, str(REPO_ROOT / script), *map(str, arguments)], cwd=Path.cwd())
    if ended.returncode:
        raise UserError(f"{script} ended with status {ended.returncode}; the same command goes on from there")


def train(
    script: str, args: argparse.Namespace, name: str, config: Path, model: Path, overrides: Iterable[str]
) -> Path:
    """A run called `name`, unless it is done already. Returns its last checkpoint."""
    folder = args.output_dir / name
    if not (folder / FINAL / MANIFEST_FILE).is_file():
        start(script, "--config", config, "--data_config", args.data_config, "--output_dir", folder,
              "--model_path", model, "--resume_from_checkpoint", "auto", f"training.run_name={name}",
              f"training.metrics_dir={args.output_dir / 'metrics'}", f"training.logging_dir={args.output_dir / 'logs'}",
              *overrides)  # fmt: skip
    return folder / FINAL


def control(args: argparse.Namespace, places: list[str], sft: Path, rate: float) -> Path:
    """SFT continued for as long as GRPO trained, at one learning rate."""
    steps = round(seconds_of(args, "grpo") / seconds_per_step(args, "sft"))
    rates = [f"training.{part}={rate}" for part in ("learning_rate", "mm_projector_lr", "vision_tower_lr", "head_lr")]
    settings = [*places, *rates, f"training.max_steps={steps}", "training.eval_strategy=no"]
    return train("train_sft.py", args, f"continued-{rate:g}", args.sft_config, sft, settings)


def seconds_of(args: argparse.Namespace, name: str) -> float:
    """Training time of a run, validation and saving left out: the median time of an update, times their number."""
    return seconds_per_step(args, name) * max(record["step"] for record in steps_of(args, name))


def seconds_per_step(args: argparse.Namespace, name: str) -> float:
    """Median seconds of an update, from the recorded speed and the samples of an update by the run's own record. The
    first interval warms up and does not count."""
    training = yaml.safe_load((args.output_dir / name / "config.yaml").read_text(encoding="utf-8"))["training"]
    samples = training["per_device_train_batch_size"] * training["gradient_accumulation_steps"]
    records = steps_of(args, name)
    values = sorted(samples / record["train/samples_per_second"] for record in records[1:] or records)
    return values[len(values) // 2]


def steps_of(args: argparse.Namespace, name: str) -> list[dict[str, Any]]:
    """The training records of a run."""
    return [record for record in read_metrics(args.output_dir / "metrics" / f"{name}.jsonl") if "train/loss" in record]


# ---------------------------------------------------------------------------------------------- scoring
def held_out(args: argparse.Namespace, places: list[str], policy: Policy, split: str) -> VideoTemporalDataset:
    """The rows of a split under the checkpoint's own prompt."""
    assert policy.contract is not None
    config = load_config(SFTConfig, [args.sft_config, args.data_config], places)
    return VideoTemporalDataset(config.data, policy.processor, policy.contract.prompt, split=split, with_answer=False)


def score(
    args: argparse.Namespace, places: list[str], checkpoint: Path, split: str, temperature: float = 1.0
) -> dict[str, Any]:
    """Greedy IoU, mean IoU of sampled answers and entropy a token, per query in percent; kept beside the checkpoint."""
    path = args.output_dir / "scores" / f"{checkpoint.parent.name}-{split}-T{temperature:.3f}.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    policy = load_for_inference(str(checkpoint))
    dataset = held_out(args, places, policy, split)
    samples = [dataset[index] for index in tqdm(range(len(dataset)), desc="reading", leave=False)]
    collator = VideoCollator(policy.processor.tokenizer.pad_token_id, dataset.blank(), side="left")
    loader: Any = DataLoader(samples, 64, collate_fn=collator)  # type: ignore[arg-type]
    texts = answer_rows(
        policy.model, policy.processor, tqdm(loader, desc="greedy", leave=False), max_new_tokens=MAX_NEW_TOKENS
    ).texts
    greedy = [100 * sample_iou(dataset.scored_sample(index, texts[index])) for index in range(len(dataset))]
    seed_everything(0)
    answers = dict(draw(args, policy, samples, temperature))
    sampled = [
        sum(100 * sample_iou(dataset.scored_sample(index, text)) for text in answers[index]) / args.num_samples
        for index in range(len(dataset))
    ]
    result = {
        "mIoU": sum(greedy) / len(greedy),
        "sampled": sum(sampled) / len(sampled),
        "entropy": entropy(policy, samples, answers, temperature),
        "temperature": temperature,
        "greedy_per_query": greedy,
        "sampled_per_query": sampled,
    }
    write_json(path, result)
    return result


def draw(args: argparse.Namespace, policy: Policy, samples: Sequence[Any], temperature: float) -> Any:
    """Sampled answers of every query."""
    return sample_answers(
        policy, tqdm(samples, desc=f"sampling at {temperature:.2f}", leave=False), num_samples=args.num_samples,
        temperature=temperature, max_new_tokens=MAX_NEW_TOKENS, prompts_per_batch=32,
    )  # fmt: skip


@torch.no_grad()
def entropy(policy: Policy, samples: Sequence[Any], answers: dict[int, list[str]], temperature: float) -> float:
    """Mean entropy (nats) of the next-token distribution at `temperature` over the tokens of sampled answers."""
    enable_shared_prefix(policy.model)
    tokenizer, total, count = policy.processor.tokenizer, 0.0, 0
    for sample in tqdm(samples[:256], desc="entropy", leave=False):
        texts = answers[sample["index"]]
        ids = [torch.tensor([*tokenizer(text)["input_ids"], tokenizer.eos_token_id]) for text in texts]
        packed = pack([make_prompt(policy.model, sample)], [ids])
        logits = policy.model(**packed.inputs, logits_to_keep=packed.columns).logits[0].float() / temperature
        log_probs = torch.log_softmax(logits, -1)
        total -= float((log_probs.exp() * log_probs).sum())
        count += len(log_probs)
    return total / count


def match_temperature(args: argparse.Namespace, places: list[str], sft: Path, target: float) -> float:
    """The temperature at which the SFT model's entropy on its own samples is `target`, to 5 %: bisection of its
    logarithm, since answers that are nearly tied stay open down to very low ones."""
    path = args.output_dir / "scores" / "matched_temperature.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))["temperature"]
    policy = load_for_inference(str(sft))
    dataset = held_out(args, places, policy, "val")
    samples = [dataset[index] for index in range(min(128, len(dataset)))]
    low, high = 0.001, 2.0
    while high / low > 1.05:
        middle = (low * high) ** 0.5
        seed_everything(0)
        found = entropy(policy, samples, dict(draw(args, policy, samples, middle)), middle)
        low, high = (middle, high) if found < target else (low, middle)
    matched = (low * high) ** 0.5
    write_json(path, {"temperature": matched, "entropy": target})
    return matched


# ---------------------------------------------------------------------------------------------- report
def report(folder: Path, results: dict[str, dict[str, Any]], matched: float, about: dict[str, Any]) -> None:
    """Print the table with paired 95 % intervals of GRPO against the others, and write it to `study.json`."""
    grpo, lines, rows = results["GRPO"], [], {}
    num_queries = len(grpo["greedy_per_query"])
    for name, result in results.items():
        row = {key: result[key] for key in ("mIoU", "sampled", "entropy", "temperature")}
        line = f"{name:<24}{row['mIoU']:>8.1f}{row['sampled']:>10.1f}{row['entropy']:>10.3f}"
        if name != "GRPO":
            for key in ("greedy", "sampled"):
                pairs = zip(result[f"{key}_per_query"], grpo[f"{key}_per_query"], strict=True)
                low, high = bootstrap_interval([after - before for before, after in pairs])
                row[f"grpo_minus_this_{key}"] = [low, high]
                line += f"   {low:+.1f} to {high:+.1f}"
        lines.append(line)
        rows[name] = row
    head = f"{f'{num_queries} held-out queries':<24}{'mIoU':>8}{'sampled':>10}{'entropy':>10}"
    print("\n".join(["", head + "   GRPO minus it: greedy, sampled (95 %)", *lines]))
    print(f"SFT's temperature at GRPO's entropy: {matched:.3f}; SFT was continued as {about['chosen']}, for "
          f"{about['seconds_continued']:.0f} s against GRPO's {about['seconds']:.0f} s")  # fmt: skip
    write_json(
        folder / "study.json", {"num_queries": num_queries, "matched_temperature": matched, **about, "rows": rows}
    )


if __name__ == "__main__":
    run_command(main)
