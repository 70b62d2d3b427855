"""Turns a public benchmark, or another trainer's rows, into this project's JSONL; every quirk is counted and kept.

    python scripts/convert_dataset.py --dataset charades_sta --annotations charades_sta_test.txt \\
        --videos_dir data/videos/charades --output data/annotations/charades_test.jsonl

By default every row of the source becomes a row as it is, its quirks listed in `kwargs.quirks`: that is how published
numbers are computed, but for what the last line says of the benchmark. `--policy end_past_duration=clip` and its like
repair or drop, kind by kind; what the source said stays in `kwargs.repaired`. The other way, `--dataset rows --to
ms_swift` (or llama_factory) writes rows as conversations, from which `--dataset conversations` reads them back.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # Python had put scripts/ there; see utils/attach.py

from utils.attach import attach
from utils.common import UserError, run_command, write_json

attach()

from datasets.converters import CONVERTERS, find_converter  # noqa: E402
from datasets.converters.conversations import STYLES, write_conversations  # noqa: E402
from datasets.converters.conversion import (  # noqa: E402
    MAIN_KINDS,
    OWN_KINDS,
    Request,
    convert,
    read_policies,
    render,
    write_records,
)
from utils.data_validation import KINDS  # noqa: E402


def _parser() -> argparse.ArgumentParser:
    actions = {kind: ["keep", "drop", *KINDS[kind].repairs] if kind in KINDS else ["keep", "drop"] for kind in _kinds()}
    meanings = {kind: KINDS[kind].meaning for kind in KINDS} | OWN_KINDS
    kinds = "\n".join(f"  {kind:<18} {'|'.join(actions[kind]):<15} {meanings[kind]}" for kind in actions)
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"quirks and the policies they take (all are kept by default):\n{kinds}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--dataset", required=True, help=f"{', '.join(CONVERTERS)}, or your own as package.module:Name")
    add("--annotations", required=True, type=Path, help="the released file, or the folder that holds it")
    add("--videos_dir", required=True, type=Path, help="where the videos are; relative for relative paths in the rows")
    add("--output", required=True, type=Path, metavar="OUT.jsonl")
    add("--split", help="which part, where the file's name does not tell; goes to kwargs.split")
    add("--report", type=Path, metavar="OUT.json", help="write rows, videos and the count of every quirk")
    add("--policy", nargs="+", default=[], action="extend", metavar="KIND=ACTION", help="keep, clip, swap or drop")
    add("--to", choices=("rows", *STYLES), default="rows", help="what to write (%(default)s: this project's JSONL)")
    videos = parser.add_mutually_exclusive_group()
    videos.add_argument("--skip_videos", action="store_true", help="do not look for the videos")
    videos.add_argument("--probe_videos", action="store_true", help="open every video, to check lengths and stretches")
    return parser


def _kinds() -> list[str]:
    """Main ones first; not those that no converter can produce."""
    impossible = {"bad_json", "not_an_object", "duplicate_key", "missing_field", "extra_field", "trim_reading"}
    impossible |= {"outside_root", "shared_pair", "shared_video", "start_before_clip"}
    return [*MAIN_KINDS, *(kind for kind in (*OWN_KINDS, *KINDS) if kind not in {*MAIN_KINDS, *impossible})]


def _check_outputs(output: Path, report: Path | None, annotations: Path) -> None:
    """Before a long run of measuring, not after it."""
    for flag, path in (("--output", output), ("--report", report)):
        if path is None:
            continue
        if path.exists() and annotations.exists() and os.path.samefile(path, annotations):
            raise UserError(f"{flag} {path}: this is the input; give the output a name of its own")
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
            raise UserError(f"{flag} {path}: cannot be written; give the name of a file in a folder you may write to")
    if report is not None and report.absolute() == output.absolute():
        raise UserError(f"--output and --report are both {report}; give each a name of its own")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    args = _parser().parse_args(argv)
    _check_outputs(args.output, args.report, args.annotations)
    converter = find_converter(args.dataset)
    policies = read_policies(args.policy)
    request = Request(
        args.annotations, args.videos_dir, args.output, args.split, policies, args.skip_videos, args.probe_videos
    )
    conversion = convert(converter, request)
    _check_outputs(args.output, args.report, conversion.source)  # the one read from a folder of several
    if args.to == "rows":
        write_records(args.output, conversion.records)
    else:
        write_conversations(args.output, conversion.records, args.to)
    if args.report:
        write_json(args.report, conversion.as_json(converter.name))
    print(render(conversion, converter))
    if not args.skip_videos and not args.videos_dir.is_dir():
        print(f"note: --videos_dir {args.videos_dir} is no folder; --skip_videos is for videos on another machine")


if __name__ == "__main__":
    run_command(main)
