"""What GRPO sampled: a group of completions as text, and drawn beside its video.

    python scripts/show_rollouts.py outputs/rl [--step 40] [--row 17] [--output outputs/rl/rollouts]

Reads `rollouts.jsonl` of the run's folder. By default the last step, and of its groups the one with the widest spread
of rewards. The picture is skipped, and says why, when the video cannot be found as the run's `config.yaml` has it; the
exit status is then 1.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Run as a file, Python put this folder first on the path; the root belongs there (see utils/attach.py).
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from utils.attach import attach
from utils.common import UserError, run_command, settle_accelerator

attach()
settle_accelerator()

from datasets.video_dataset import VideoTemporalDataset  # noqa: E402
from inference.visualize import visualize_temporal_grounding  # noqa: E402
from rewards import zero_spread_share  # noqa: E402
from trainers.rollout_log import ROLLOUTS_FILE, read_records  # noqa: E402
from utils.config import RLConfig, load_config  # noqa: E402
from utils.logging_utils import get_logger, setup_logging  # noqa: E402
from utils.rows import Row, resolve_video, to_file_clock  # noqa: E402
from utils.spans import Span  # noqa: E402

CONFIG_FILE = "config.yaml"
Group = Mapping[str, Any]
"""A record of `trainers.rollout_log`."""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help=f"a GRPO run's folder, or its {ROLLOUTS_FILE}")
    parser.add_argument("--step", type=int, help="by default the last one")
    parser.add_argument("--row", type=int, help="number of the prompt; by default the one with the widest spread")
    parser.add_argument("--output", type=Path, metavar="DIR", help="for the picture; by default rollouts/ of the run")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Print, draw; returns the exit status."""
    args = parse_args(argv)
    setup_logging()
    path = args.run / ROLLOUTS_FILE if args.run.is_dir() else args.run
    records = read_records(path)
    group = choose(records, path, args.step, args.row)
    print(describe_step([record for record in records if record["step"] == group["step"]]))
    print(describe_group(group))
    picture = (args.output or path.parent / "rollouts") / f"step-{group['step']}-row-{group['row']}.png"
    try:
        draw(group, path.parent / CONFIG_FILE, picture)
    except UserError as error:
        get_logger().error("no picture: %s", error)
        return 1
    print(f"timeline: {picture}")
    return 0


# ---------------------------------------------------------------------------------------------- which group
def choose(records: Sequence[Group], path: Path, step: int | None, row: int | None) -> Group:
    """The group asked for: of several steps the last, of several groups the one with the widest spread of rewards.

    Raises UserError when there is none, naming those nearest.
    """
    if not records:
        raise UserError(f"{path} holds no rollout yet; wait for the first step of the run")
    at_step = [record for record in records if step in (None, record["step"])]
    if not at_step:
        raise UserError(f"--step {step}: {path} has steps {numbers(record['step'] for record in records)}")
    of_row = [record for record in at_step if row in (None, record["row"])]
    if not of_row:
        where = path if step is None else f"step {step}"
        raise UserError(f"--row {row}: {where} has rows {numbers(record['row'] for record in at_step)}")
    last = max(record["step"] for record in of_row)
    return max((record for record in of_row if record["step"] == last), key=spread)


def numbers(values: Any, shown: int = 12) -> str:
    """Distinct numbers in order, those in the middle left out when there are many."""
    ordered = sorted(set(values))
    if len(ordered) > shown:
        ordered = [*ordered[: shown - 1], "...", ordered[-1]]
    return ", ".join(map(str, ordered))


def rewards_of(group: Group) -> list[float]:
    """Total reward of each completion."""
    return [completion["reward"] for completion in group["completions"]]


def spread(group: Group) -> float:
    """Standard deviation of the group's rewards."""
    return statistics.pstdev(rewards_of(group))


# ---------------------------------------------------------------------------------------------- text
def describe_step(groups: Sequence[Group]) -> str:
    """One paragraph on all groups of a step."""
    completions = [completion for group in groups for completion in group["completions"]]
    size = len(groups[0]["completions"])
    unread = sum(completion["spans"] is None for completion in completions) / len(completions)
    rewards = [completion["reward"] for completion in completions]
    mean, within = statistics.fmean(rewards), statistics.fmean(map(spread, groups))
    return (
        f"step {groups[0]['step']}: {len(groups)} groups of {size} completions\n"
        f"  mean reward {mean:.3f}, spread within a group {within:.3f}, flat groups (all earn the same) "
        f"{100 * zero_spread_share(rewards, size):.1f} %, unread answers {100 * unread:.1f} %"
    )


def describe_group(group: Group) -> str:
    """The prompt, the label and every completion in full. Times are seconds on the clip's clock."""
    label = in_words([Span(*window) for window in group["timestamp"]])
    head = [
        f"\nrow {group['row']}: {group['video']} ({group['duration']:g} s)",
        f"  {group['sentence']!r}",
        f"  label: {label}",
        f"  mean reward {statistics.fmean(rewards_of(group)):.3f}, spread {spread(group):.3f}",
    ]
    return "\n".join([*head, *map(describe_completion, range(1, len(rewards_of(group)) + 1), group["completions"])])


def describe_completion(number: int, completion: Mapping[str, Any]) -> str:
    """What it earned for what, and from the second line on its text."""
    spans = completion["spans"]
    windows = "unread" if spans is None else in_words([Span(*window) for window in spans])
    parts = "  ".join(f"{name} {value:.3f}" for name, value in completion["rewards"].items())
    text = completion["text"].replace("\n", "\n       ")
    return (
        f"  #{number:<3} reward {completion['reward']:.3f}  advantage {completion['advantage']:+.2f}  {windows}  "
        f"({parts}; {completion['num_tokens']} tokens)\n       {text}"
    )


def in_words(windows: Sequence[Span]) -> str:
    """`3.0 - 7.9 s, 12.0 - 14.5 s`; absent for no window."""
    return ", ".join(f"{start:.1f} - {end:.1f} s" for start, end in windows) or "absent"


# ---------------------------------------------------------------------------------------------- picture
def draw(group: Group, config_path: Path, picture: Path) -> None:
    """Every completion's windows under the video, on the file's clock.

    Raises UserError when the run's configuration, its annotation row or the video is not where it was.
    """
    config = load_config(RLConfig, [config_path])
    row = row_of(group, config)
    path = resolve_video(row, config.data.videos_root)
    if not path.exists():
        raise UserError(f"{path} does not exist; it is the video of {row.file}:{row.line} as {config_path} finds it")

    def on_file(windows: Sequence[Sequence[float]]) -> list[Span]:
        return [to_file_clock(Span(*window), row, config.data.trim) for window in windows]

    predictions = [
        {
            "segments": on_file(completion["spans"] or ()),
            "parsed": completion["spans"] is not None,
            "raw_text": completion["text"],
        }
        for completion in group["completions"]
    ]
    visualize_temporal_grounding(
        video_path=path,
        predictions=predictions,
        ground_truths=on_file(group["timestamp"]),
        output_path=picture,
        query=group["sentence"],
        labels=[label_of(*pair) for pair in enumerate(group["completions"], start=1)],
        backend=config.data.backend,
    )


def row_of(group: Group, config: RLConfig) -> Row:
    """The annotation row of a group, read as the run read it. Raises UserError when the files have changed since."""
    # for its rows alone, which need no processor
    dataset = VideoTemporalDataset(config.data, None, config.prompt, with_answer=False, seed=config.training.seed)
    rows = dataset.rows[group["row"] : group["row"] + 1]
    if not rows or (rows[0].video, rows[0].sentence) != (group["video"], group["sentence"]):
        files = ", ".join(str(source.path) for source in config.data.train)
        raise UserError(
            f"row {group['row']} of data.train is no longer {group['video']} with {group['sentence']!r}: {files} has "
            "changed since the run"
        )
    return rows[0]


def label_of(number: int, completion: Mapping[str, Any]) -> str:
    """`#1 reward 0.61 adv +1.2`."""
    return f"#{number} reward {completion['reward']:.2f} adv {completion['advantage']:+.1f}".replace("-", "−")


if __name__ == "__main__":
    run_command(main)
