"""Makes a page of an evaluation: where does the model fail, and does it do better than another?

    python inference/report.py --run outputs/eval/sft
    python inference/report.py --run outputs/eval/rl --vs outputs/eval/sft

Reads the folder that inference/evaluate.py wrote and needs no model. The report is one folder with index.html: open it
in a browser, also from a disk without a network. Videos stay where they are and are linked; --copy_videos makes a
folder that can be moved. It appears whole or not at all. Status 2 and one line for what is wrong with the input.
"""

from __future__ import annotations

import argparse
import errno
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    # Run as a file, Python put this folder first on the path; the root belongs there (see utils/attach.py).
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from inference.report_compare import Comparison, compare
from inference.report_data import Evaluation, read_evaluation
from inference.report_figures import pictures
from inference.report_page import GENERATOR, render_page
from inference.report_rows import Videos, group_keys, page_rows
from utils.checkpoints import replace_folder, unfinished_of
from utils.common import UserError, run_command
from utils.curves import save_figure
from utils.logging_utils import get_logger, setup_logging
from utils.palette import THEMES

PAGE = "index.html"
FIGURES_FOLDER = "figures"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="the --output_dir of inference/evaluate.py")
    parser.add_argument("--vs", type=Path, help="another one, of the same annotations, to compare with")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: RUN/report, or RUN/report-vs-NAME")
    parser.add_argument("--videos_root", type=Path, help="where the videos are now, if not where they were evaluated")
    parser.add_argument("--copy_videos", action="store_true", help="put the videos into the report")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Read, compare, draw, write."""
    args = parse_args(argv)
    setup_logging()
    output = output_of(args)
    require_replaceable(output)
    ours = read_evaluation(args.run, "--run")
    comparison = compare(ours, read_evaluation(args.vs, "--vs", ours.protocol)) if args.vs else None
    write_report(ours, comparison, Videos(output, args.videos_root, args.copy_videos))
    print(output / PAGE)  # noqa: T201


def output_of(args: argparse.Namespace) -> Path:
    """The report's folder, absolute: links to videos start from it."""
    name = f"report-vs-{args.vs.resolve().name}" if args.vs else "report"
    return (args.output or args.run / name).absolute()


def require_replaceable(folder: Path) -> None:
    """Raise UserError for a folder that holds anything but an earlier report, and for one that cannot be made."""
    if folder.is_dir() and any(folder.iterdir()):
        page = folder / PAGE
        is_ours = page.is_file() and GENERATOR.encode() in page.read_bytes()[:2000]
        if not is_ours:
            raise UserError(f"--output {folder} is not empty and holds no report; choose another folder")
    elif folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder} is a file; choose a folder")


def write_report(ours: Evaluation, comparison: Comparison | None, videos: Videos) -> None:
    """Write the folder `videos.report`; an earlier report goes once the new one is whole."""
    keys = group_keys(list(ours.rows.values()))
    rows = page_rows(ours, comparison, videos, list(keys))
    figures = pictures(ours, comparison.theirs if comparison else None)
    page = render_page(ours, comparison, figures, rows, videos.listed, keys)
    unfinished = unfinished_of(videos.report)
    shutil.rmtree(unfinished, ignore_errors=True)  # of a report that was killed
    try:
        (unfinished / FIGURES_FOLDER).mkdir(parents=True)
        for picture in figures:
            for theme, palette in THEMES.items():
                path = unfinished / FIGURES_FOLDER / f"{picture.name}-{theme}.svg"
                save_figure(picture.figure(palette), path)
        videos.copy_into(unfinished)
        (unfinished / PAGE).write_text(page, encoding="utf-8")
        replace_folder(unfinished, videos.report)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise  # `run_command` has a sentence for a full disk
        raise UserError(f"--output {videos.report} cannot be written: {error}; choose another folder") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    absent = sum(video["src"] is None for video in videos.listed)
    if absent:
        first = next(video["note"] for video in videos.listed if video["src"] is None)
        get_logger().warning("%d of %d videos cannot be shown (%s)", absent, len(videos.listed), first)


if __name__ == "__main__":
    run_command(main)
