"""Do rows chosen by difficulty give GRPO more to learn from? Scores the rows twice, chooses by the first pass, and
looks at the second.

    python scripts/study_difficulty.py --model_path outputs/demo/sft/checkpoint-best \\
        --annotations outputs/demo/data/train.jsonl --temperature 0.7 data.select.mean=0.5

A group whose completions all earn the same (zero spread) teaches nothing. Rows chosen for the spread they had would
look good on the very samples they were chosen by, so the share is counted on answers sampled afresh. Writes the two
scored files beside the annotations; run again it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    # Run as a file, Python put this folder first on the path; the root belongs there (see utils/attach.py).
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from utils.attach import attach
from utils.common import REPO_ROOT, UserError, run_command, settle_accelerator

attach()
settle_accelerator()

import numpy as np  # noqa: E402

from scripts.score_difficulty import MEAN, STD, ZERO_STD  # noqa: E402
from utils.config import DataFile, load_config  # noqa: E402
from utils.logging_utils import setup_logging  # noqa: E402
from utils.metrics import bootstrap_interval  # noqa: E402
from utils.rows import Row, read_rows  # noqa: E402
from utils.selection import select_rows  # noqa: E402


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; data.select... is how rows are chosen, all else goes to both scoring passes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", required=True, help="the model that GRPO would start from")
    parser.add_argument("--annotations", type=Path, required=True, help="JSONL rows to choose from")
    parser.add_argument("--num_samples", type=int, default=8, help="answers sampled per row, GRPO's G")
    parser.add_argument("--temperature", type=float, default=1.0, help="GRPO's temperature")
    parser.add_argument("--batch_size", type=int, default=16, help="rows answered together")
    parser.add_argument("--num_workers", type=int, default=1, help="processes that decode videos")
    parser.add_argument("overrides", nargs="*", metavar="data.select.key=value")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Score twice, choose, print the table."""
    args = parse_args(argv)
    setup_logging()
    select = load_config(DataFile, [], args.overrides or ["data.select.mean=0.5"]).data.select
    if select is None:
        raise UserError("data.select is null: give how rows are chosen, e.g. data.select.mean=0.5")
    first, second = (scored(args, seed) for seed in (0, 1))
    fresh = {row.line: row for row in second}
    chosen = select_rows(first, select)
    rng = np.random.default_rng(0)
    random_rows = [first[place] for place in rng.choice(len(first), len(chosen), replace=False)]
    groups = {"all rows": first, "as many at random": random_rows, "chosen": chosen}
    print(table({name: [fresh[row.line] for row in rows] for name, rows in groups.items()}))


def scored(args: argparse.Namespace, seed: int) -> list[Row]:
    """The rows with the scores of one pass, made unless they are there."""
    output = args.annotations.with_name(f"{args.annotations.stem}.difficulty-{args.temperature:g}-{seed}.jsonl")
    if not output.is_file():
        command = [sys.executable, str(REPO_ROOT / "scripts/score_difficulty.py"), "--output", str(output)]
        for name in ("model_path", "annotations", "num_samples", "temperature", "batch_size", "num_workers"):
            command += [f"--{name}", str(getattr(args, name))]
        if subprocess.run([*command, "--seed", str(seed)], stdout=subprocess.DEVNULL).returncode:
            raise UserError(f"scoring with seed {seed} failed; the same command goes on from there")
    rows, _ = read_rows(output)
    return [row for row in rows if row.kwargs.get(MEAN) is not None]


def table(groups: dict[str, list[Row]]) -> str:
    """Rows, mean IoU, mean spread and share of groups without spread with its 95 % interval, on the second pass."""
    head = f"{'on fresh answers':<20}{'rows':>7}{'mean IoU':>10}{'spread':>8}{'zero spread':>13}"
    lines, record = [head, "-" * len(head)], {}
    for name, rows in groups.items():
        means, stds = (np.array([row.kwargs[key] for row in rows]) for key in (MEAN, STD))
        flat = 100.0 * (stds <= ZERO_STD)
        low, high = bootstrap_interval(flat.tolist())
        lines.append(f"{name:<20}{len(rows):>7}{means.mean():>10.3f}{stds.mean():>8.3f}{flat.mean():>11.1f} % "
                     f"({low:.1f} to {high:.1f})")  # fmt: skip
        record[name] = {"rows": len(rows), "mean_iou": means.mean(), "spread": stds.mean(), "zero_spread": flat.mean()}
    return "\n".join([*lines, json.dumps(record)])


if __name__ == "__main__":
    run_command(main)
