"""How well does a checkpoint answer the queries of an annotation file?

    python inference/evaluate.py --model_path outputs/sft/checkpoint-best \\
        --annotations data/annotations/test.jsonl --output_dir outputs/eval/sft
    torchrun --nproc_per_node 4 inference/evaluate.py --model_path ... --annotations ... --output_dir ...
    python inference/evaluate.py --predictions predictions.jsonl --annotations data/annotations/test.jsonl

Answers are stored as they come: killed, it goes on where it stopped when the same command is given again, with any
number of processes. In the folder then stand predictions.jsonl (every answer) and metrics.json (averages with 95 %
intervals, counts, baselines, breakdowns, and the averages of every protocol). Prompt, frame rate and pixel budget are
the checkpoint's own; --data_config takes their place. Status 2 and one line for what is wrong with the input.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Run as a file, Python put this folder first on the path; the root belongs there (see utils/attach.py).
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from utils.attach import attach
from utils.common import UserError, run_command, settle_accelerator, write_json

attach()
settle_accelerator()

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from inference.eval_answers import answer  # noqa: E402
from inference.eval_queries import NUM_NAMED, Queries, Round, check_videos, load_queries, plan_rounds, qids_in  # noqa: E402
from inference.eval_report import check_keys, render, summarise  # noqa: E402
from inference.eval_store import (  # noqa: E402
    METRICS_FILE,
    Answer,
    AnswerLog,
    begin,
    claimed,
    read_answers,
    write_predictions,
)
from inference.processes import World, joined  # noqa: E402
from inference.video_infer import DEFAULT_NEW_TOKENS, THINKING_NEW_TOKENS, VideoTemporalInference  # noqa: E402
from trainers.callbacks import FaultCounter  # noqa: E402
from trainers.merging import weights_digest  # noqa: E402
from trainers.model import resolve_source  # noqa: E402
from utils.config import DataFile, load_config  # noqa: E402
from utils.logging_utils import get_logger, setup_logging  # noqa: E402
from utils.metrics import METRICS, evaluate  # noqa: E402
from utils.predictions import check_units, far_outside, read_predictions  # noqa: E402
from utils.prompts import SAMPLING_KEYS, PromptContract  # noqa: E402
from utils.protocols import PROTOCOLS, get_protocol  # noqa: E402
from utils.rows import TRIM_READINGS  # noqa: E402


# ---------------------------------------------------------------------------------------------- command line
def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    differs = "\n".join(f"  {name}: {protocol.differs}" for name, protocol in PROTOCOLS.items())
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=f"protocols:\n{differs}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model_path", help="base model, adapter or merged checkpoint")
    parser.add_argument("--predictions", type=Path, metavar="FILE", help="score these instead of a model")
    parser.add_argument("--annotations", type=Path, required=True, help="JSONL rows; those with a label are asked")
    parser.add_argument("--output_dir", type=Path, help="for the results; with --predictions it may be left out")
    parser.add_argument("--protocol", default="default", metavar="|".join(PROTOCOLS), help="how to score; see below")
    parser.add_argument("--by", action="append", default=[], metavar="KEY", help="a key of kwargs to break down by")
    parser.add_argument("--max_samples", type=int, help="only so many queries, evenly spread over the file")
    parser.add_argument("--batch_size", type=int, default=8, help="queries answered together")
    parser.add_argument("--num_workers", type=int, default=4, help="processes that decode videos")
    parser.add_argument("--max_new_tokens", type=int, help="longest answer")
    parser.add_argument("--device")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--data_config", type=Path, help="YAML with data and prompt, instead of the checkpoint's own")
    parser.add_argument("--videos_root", type=Path, help="as data.videos_root")
    parser.add_argument("--trim", choices=TRIM_READINGS, help="as data.trim")
    parser.add_argument("--max_bad_fraction", type=float, help="as data.max_bad_fraction")
    parser.add_argument("--trust_units", action="store_true", help="score --predictions whatever their unit looks like")
    parser.add_argument("--allow_pickle", action="store_true", help="read weights that are no safetensors: SECURITY.md")
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace) -> None:
    """Raise UserError for flags that cannot work."""
    if (args.model_path is None) == (args.predictions is None):
        raise UserError("give either --model_path or --predictions, not both and not neither")
    if args.model_path and args.output_dir is None:
        raise UserError("--output_dir is missing: the folder for the answers and the metrics, e.g. outputs/eval/sft")
    for name, least in (("batch_size", 1), ("num_workers", 0), ("max_samples", 1), ("max_new_tokens", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name} must be >= {least}, got {value}")
    if args.max_bad_fraction is not None and not 0 <= args.max_bad_fraction <= 1:
        raise UserError(f"--max_bad_fraction must lie between 0 and 1, got {args.max_bad_fraction}")
    get_protocol(args.protocol)


def main(argv: Sequence[str] | None = None) -> None:
    """Answer what is not answered yet, score, print."""
    args = parse_args(argv)
    setup_logging()
    with joined() as world, ExitStack() as stack:
        plan = world.first_on_rank_zero(lambda: prepare(args, world, stack))
        world.wait()  # all have read what is answered before any answers on
        if args.model_path:
            answer_queries(args, plan, world)
            world.wait()
        if world.rank == 0:
            finish(args, plan)


# ---------------------------------------------------------------------------------------------- before the model
@dataclass(frozen=True)
class Plan:
    """What to ask and how, checked."""

    contract: PromptContract
    queries: Queries
    rounds: list[Round]
    """Qids that have no answer yet."""
    predictions: dict[str, Any]
    """Of `--predictions`, by qid."""


def prepare(args: argparse.Namespace, world: World, stack: ExitStack) -> Plan:
    """Check all that can be checked without the model; on rank 0 also claim the folder until `stack` is left."""
    check_args(args)
    contract = contract_of(args)
    queries = load_queries(args.annotations, contract.data, contract.prompt, max_samples=args.max_samples)
    check_keys([queries.row(qid).kwargs for qid in queries.chosen], args.by)
    if world.rank == 0 and args.output_dir is not None:
        stack.enter_context(claimed(args.output_dir))
        begin(args.output_dir, made_of(args, contract))
        setup_logging(args.output_dir)
    if args.predictions:
        return Plan(contract, queries, [], predictions_of(args, queries))
    answers = read_answers(args.output_dir)
    done = {qid for qid, answer in answers.items() if answer.fault is None}
    rounds = plan_rounds(queries, args.batch_size, done)
    if world.rank == 0:
        check_videos(queries, qids_in(rounds))
    return Plan(contract, queries, rounds, {})


def contract_of(args: argparse.Namespace) -> PromptContract:
    """How the model is asked, and with `data` as the flags say."""
    recorded = None
    if args.model_path:
        recorded = resolve_source(args.model_path, need_contract=args.data_config is None).contract
    given = load_config(DataFile, [args.data_config]) if args.data_config else DataFile()
    contract = PromptContract.current(given.prompt, given.data) if args.data_config or not recorded else recorded
    flags = {name: getattr(args, name) for name in ("videos_root", "trim", "max_bad_fraction")}
    data = contract.data.model_copy(update={name: value for name, value in flags.items() if value is not None})
    return replace(contract, data=data)


def made_of(args: argparse.Namespace, contract: PromptContract) -> dict[str, Any]:
    """All that decides the answers, for `run.json`. Not the number of queries, processes or queries in a batch."""
    decides: dict[str, Any] = {"annotations": fingerprint(args.annotations), "data.trim": contract.data.trim}
    if args.predictions:
        return decides | {"predictions": fingerprint(args.predictions)}
    sampling = contract.data.model_dump(mode="json", include=set(SAMPLING_KEYS))
    decides |= {f"data.{key}": value for key, value in sampling.items()}
    decides |= {f"prompt.{key}": value for key, value in contract.prompt.model_dump(mode="json").items()}
    decides |= {"max_new_tokens": new_tokens(args, contract), "dtype": dtype_of(args)}
    return {"model": model_fingerprint(args.model_path), **decides}


def fingerprint(path: Path) -> dict[str, str]:
    """Name and hash of a file. Raises UserError when it cannot be read."""
    try:
        with open(path, "rb") as handle:
            return {"name": path.name, "sha256": hashlib.file_digest(handle, "sha256").hexdigest()}
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def model_fingerprint(model_path: str) -> dict[str, str]:
    """Name and hash of a checkpoint's weights; of a hub name, the name."""
    folder = Path(model_path).expanduser()
    if not folder.is_dir():
        return {"name": model_path, "sha256": model_path}
    name = "/".join(folder.resolve().parts[-2:])
    if any(folder.glob("*model*.safetensors")):
        return {"name": name, "sha256": weights_digest(folder)}
    parts = "".join(fingerprint(path)["sha256"] for path in sorted(folder.glob("*model*.bin")))
    return {"name": name, "sha256": hashlib.sha256(parts.encode()).hexdigest()}


def new_tokens(args: argparse.Namespace, contract: PromptContract) -> int:
    """Tokens an answer may have."""
    return args.max_new_tokens or (THINKING_NEW_TOKENS if contract.prompt.thinking else DEFAULT_NEW_TOKENS)


def dtype_of(args: argparse.Namespace) -> str:
    """The precision of the weights, as `trainers.model.load_for_inference` chooses it."""
    on_cuda = (args.device or ("cuda" if torch.cuda.is_available() else "cpu")).startswith("cuda")
    return args.dtype or ("bfloat16" if on_cuda else "float32")


def predictions_of(args: argparse.Namespace, queries: Queries) -> dict[str, Any]:
    """The predictions of the file, by qid. Raises UserError for a wrong unit, and when too many queries have none."""
    found = read_predictions(args.predictions, queries.durations, ignored=queries.unlabelled)
    samples = queries.predicted(found)
    if not args.trust_units:
        check_units(samples, str(args.predictions))
    absent = [qid for qid in queries.chosen if qid not in found]
    if len(absent) > queries.dataset.data.max_bad_fraction * len(queries.chosen):
        raise UserError(
            f"{args.predictions}: {len(absent)} of {len(queries.chosen)} queries have no prediction, more than "
            f"max_bad_fraction={queries.dataset.data.max_bad_fraction:g} allows; the first: {absent[0]!r}. Write a "
            "line for each (pred null for an answer that could not be read), or raise --max_bad_fraction to count them "
            "as failures"
        )
    if absent:
        get_logger().warning("%d queries have no prediction and count as failures: %s", len(absent), absent[:5])
    return found


# ---------------------------------------------------------------------------------------------- answering
def answer_queries(args: argparse.Namespace, plan: Plan, world: World) -> None:
    """Answer this process's share of what is left, and store every batch when it is done.

    Raises UserError once more videos cannot be read than `data.max_bad_fraction` allows.
    """
    queries, rounds = plan.queries, plan.rounds[world.rank :: world.size]
    num_left = len(qids_in(plan.rounds))
    get_logger().info("%d of %d queries are answered", len(queries.chosen) - num_left, len(queries.chosen))
    if not rounds:
        return
    engine = VideoTemporalInference(
        args.model_path,
        device=world.device(args.device),
        dtype=args.dtype,
        data_config=args.data_config,
        allow_pickle=args.allow_pickle,
    )
    queries.dataset.processor = engine.processor
    log, qids = AnswerLog(args.output_dir, world.rank), {place: qid for qid, place in queries.places.items()}
    faults = FaultCounter(len(queries.chosen), plan.contract.data.max_bad_fraction)
    places = [[[queries.places[qid] for qid in batch] for batch in batches] for batches in rounds]
    tokens = new_tokens(args, plan.contract)
    with tqdm(total=len(qids_in(rounds)), desc="answering", unit="query", disable=world.rank > 0) as bar:
        for texts, unread in answer(engine, queries.dataset, places, tokens, args.num_workers):
            reasons = dict(unread)
            log.add(Answer(qids[place], text, reasons.get(place)) for place, text in texts.items())
            faults.add(unread)
            bar.update(len(texts))


# ---------------------------------------------------------------------------------------------- scoring
def finish(args: argparse.Namespace, plan: Plan) -> None:
    """Score all answers, write the results and print the table. Raises UserError for too many unreadable videos."""
    queries = plan.queries
    answers = read_answers(args.output_dir) if args.model_path else {}
    unread = [
        (queries.places[qid], str(answers[qid].fault))
        for qid in queries.chosen
        if qid in answers and answers[qid].fault
    ]
    if len(unread) > plan.contract.data.max_bad_fraction * len(queries.chosen):  # of all processes together
        FaultCounter(len(queries.chosen), plan.contract.data.max_bad_fraction).add(unread)
    samples = queries.answered(answers) if args.model_path else queries.predicted(plan.predictions)
    if far := far_outside(samples):
        get_logger().warning(
            "%d predicted windows begin after the end of their video or end past ten times it: are they in seconds? "
            "They count as they are; qids: %s", len(far), ", ".join(list(dict.fromkeys(far))[:NUM_NAMED]),
        )  # fmt: skip
    found = summarise(samples, args.protocol, args.by)
    found["counts"] |= queries.counts | {
        "num_unreadable": len(unread),
        "num_unanswered": 0 if args.model_path else sum(qid not in plan.predictions for qid in queries.chosen),
        "num_far_outside": len(far),
    }
    found["protocols"] = {name: averages_of(samples, name) for name in PROTOCOLS}
    if args.output_dir is not None:
        everything = queries.answered(answers, list(answers)) if args.model_path else samples
        write_predictions(
            args.output_dir, (queries.record(sample, answers.get(sample["qid"])) for sample in everything)
        )
        write_json(args.output_dir / METRICS_FILE, found)
    print(render(found))  # noqa: T201
    if args.output_dir is not None:
        get_logger().info("results: %s", args.output_dir / METRICS_FILE)


def averages_of(samples: Sequence[Any], protocol: str) -> dict[str, float]:
    """The averages of one protocol."""
    scores = evaluate(samples, protocol)
    return {name: scores[name] for name in METRICS}


if __name__ == "__main__":
    run_command(main)
