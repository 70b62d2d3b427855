"""What it saves to compute a video once: times, peak memory, and whether the results are the same.

    python scripts/bench.py grpo --prompt_tokens 1200 --generations 8 --completion_tokens 32
    python scripts/bench.py grpo --size 4b --device cuda --prompt_tokens 8192 --generations 8 --completion_tokens 64
    python scripts/bench.py grpo_curve
    python scripts/bench.py sft --prompt_tokens 1200 --queries 4
    python scripts/bench.py sft --size 4b --device cuda --prompt_tokens 8192 --queries 4
    python scripts/bench.py inference --prompt_tokens 1200 --queries 8
    python scripts/bench.py data
    python scripts/bench.py decoding speed
    python scripts/bench.py decoding memory --decodes 2000

Random weights, synthetic clips, one process. Several ways of doing the same work take turns within every repeat, and
medians are given. The last line of the output is one line of JSON. What the ways are, and what is left out, stands at
the top of scripts/benchmarks/<command>.py.

What is needed beside torch, transformers and peft is `datasets`, `pydantic`, and matplotlib for the curve. Without TRL
its way of doing `grpo` is skipped.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # Python had put scripts/ there; see utils/attach.py

from utils.common import run_command  # noqa: E402

SIZES = ("tiny", "2b", "4b", "8b")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_grpo(commands.add_parser("grpo", help="a GRPO step with its rollouts: table and JSON line"))
    _add_curve(commands.add_parser("grpo_curve", help="the figure of docs/benchmarks.md, its numbers beside it as CSV"))
    _add_sft(commands.add_parser("sft", help="a training step on queries that share videos: table and JSON line"))
    _add_inference(commands.add_parser("inference", help="queries on one video, answered: table and JSON line"))
    _add_data(commands.add_parser("data", help="decoders, the frame cache and the data loader: table and JSON line"))
    _add_decoding(commands.add_parser("decoding", help="decoders against each other, or memory over many decodes"))
    return parser.parse_args(argv)


def _add_grpo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt_tokens", type=int, required=True, help="P; the clip is chosen to come near it")
    parser.add_argument("--generations", type=int, required=True, help="G, completions of a prompt")
    parser.add_argument("--completion_tokens", type=int, required=True, help="C, tokens of a completion")
    parser.add_argument("--prompts", type=int, default=1, help="prompts in a step (%(default)s)")
    _add_common(parser)


def _add_curve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("docs/images/grpo_sharing.png"), help="png, svg or pdf")
    parser.add_argument("--sweep", choices=("G", "P", "both"), default="both", help="measure one panel, keep the other")
    parser.add_argument("--repeats", type=int, default=2, help="timed repeats after a warm-up (%(default)s)")


def _add_sft(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt_tokens", type=int, required=True, help="of a row; clips are chosen to come near it")
    parser.add_argument("--queries", type=int, required=True, help="rows that share a video")
    parser.add_argument("--videos", type=int, default=1, help="videos in a step (%(default)s)")
    parser.add_argument("--answer_tokens", type=int, help="of an answer, its end included (the project's own answers)")
    parser.add_argument("--vision", choices=("trained", "frozen"), help="(trained with tiny, else frozen)")
    _add_common(parser)


def _add_inference(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt_tokens", type=int, required=True, help="of a query; the clip is chosen to come near")
    parser.add_argument("--queries", type=int, required=True, help="asked about the video")
    parser.add_argument("--answer_tokens", type=int, default=16, help="of every answer (%(default)s)")
    _add_common(parser)


def _add_decoding(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("speed", "memory"))
    parser.add_argument("--folder", type=Path, help="where the clips are kept (a temporary folder)")
    parser.add_argument("--repeats", type=int, default=5, help="timed reads of each clip after a warm-up (%(default)s)")
    parser.add_argument("--decodes", type=int, default=2000, help="reads in one worker (%(default)s)")
    parser.add_argument("--every", type=int, default=200, help="reads between two looks at its memory (%(default)s)")
    parser.add_argument("--json", type=Path, help="also write the record here, indented")


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--heights", type=int, nargs="+", choices=(32, 360, 720), default=[360, 720], help="of clips")
    parser.add_argument("--seconds", type=int, nargs="+", default=[30, 150], help="lengths of clips (%(default)s)")
    parser.add_argument("--fps", type=float, default=2.0, help="frames taken of a second (%(default)s)")
    parser.add_argument("--workers", type=int, nargs="+", choices=range(9), default=[0, 1, 2], help="of the loader")
    parser.add_argument("--rows", type=int, default=8, help="samples in a pass of the data loader (%(default)s)")
    parser.add_argument("--folder", type=Path, help="where the clips are kept (a temporary folder)")
    parser.add_argument("--memory", action="store_true", help="also memory over --decodes decodes in one worker")
    parser.add_argument("--decodes", type=int, default=2000, help="(%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed repeats after a warm-up (%(default)s)")
    parser.add_argument("--json", type=Path, help="also write the record here, indented")
    parser.set_defaults(device="cpu")


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=3, help="timed repeats after a warm-up (%(default)s)")
    parser.add_argument("--json", type=Path, help="also write the record here, indented")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and say it. What measures is imported late: it takes seconds."""
    args = parse_args(argv)
    importlib.import_module(f"scripts.benchmarks.{args.command}").run(args)


if __name__ == "__main__":
    run_command(main)
