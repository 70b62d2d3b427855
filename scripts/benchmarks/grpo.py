"""What a GRPO step costs when a prompt with its video is computed once, against once for every completion.

Three ways of doing the same work, taken in turn within every repeat:

    shared     pack and sample_shared of trainers/shared_prefix.py
    unshared   rows and sample_rows of the same file, which training.share_prefix=false takes
    stock      TRL's own scoring method and stock `generate`; TRL takes no video, so it gets the same frames as images,
               one for each pair of frames: the same number of tokens, and the same numbers out

A whole step is rollout (prefill and decode), one pass without gradient (the reference) and one update (forward and
backward). Left out, since all three share it: decoding the video, rewards and the optimizer.

Without TRL the stock way is skipped, and log-probabilities come from the logits of the completions' positions.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from scripts.benchmarks.common import (
    Times,
    baseline,
    ceilings,
    ceilings_line,
    check_options,
    circumstances,
    compared,
    drain,
    gradient,
    heading,
    memory_row,
    peak_mib,
    peaks_in_fresh_processes,
    relative_error,
    seconds,
    table_head,
    take_turns,
    tell,
)
from scripts.benchmarks.grpo_ways import HAS_TRL, WAYS, Cell, Work, make_way

PHASES = ("prefill", "decode", "score", "update")
PASSES = ("rollout", "score", "update")
LEAST = {"prompt_tokens": 80, "generations": 2, "completion_tokens": 2, "prompts": 1, "repeats": 1}


def run(args: argparse.Namespace) -> None:
    """Measure one cell and say it."""
    options = {key: value for key, value in vars(args).items() if key not in ("command", "json")}
    record = run_cell(Cell(**options))
    tell(record, table(record), args.json)


# ---------------------------------------------------------------------------------------------- phases
def run_phase(way: Any, phase: str) -> Any:
    """Do the work of one of `PASSES` once."""
    work: Work = way.work
    if phase == "rollout":
        return way.rollout(work.generation(work.cell.completion_tokens))
    if phase == "update":
        return update(way)
    with torch.no_grad():
        return way.log_probs()


def update(way: Any) -> Tensor:
    """Forward and backward of GRPO's loss on fresh completions (ratio 1, nothing clipped); returns the log-probs."""
    way.model.train()
    way.model.zero_grad(set_to_none=True)
    log_probs = way.log_probs()
    ratio = (log_probs - log_probs.detach()).exp()
    (-(ratio * way.work.advantages).mean()).backward()
    way.model.eval()
    return log_probs.detach()


def measure_times(ways: Mapping[str, Any], cell: Cell) -> dict[str, Times]:
    """Median seconds of every way and phase. Warm the ways up first."""
    return take_turns(ways, PASSES, cell.repeats, _timed)


def _timed(way: Any, name: str) -> dict[str, float]:
    """Seconds of one pass by phase: a rollout is split at its first token."""
    call = partial(run_phase, way, name)
    if name != "rollout":
        return {name: seconds(way.work.cell.device, call)}
    with _first_token(way) as moments:
        start = time.perf_counter()
        whole = seconds(way.work.cell.device, call)
    prefill = moments[0] - start
    return {"prefill": prefill, "decode": whole - prefill}


@contextmanager
def _first_token(way: Any) -> Iterator[list[float]]:
    """Gives the moment when a rollout knows the logits of its first tokens, as the list's one element.

    Sharing takes a second pass for it, over the prompt's last token on all rows.
    """
    passes, moments = 0, []

    def mark(*_: Any) -> None:
        nonlocal passes
        passes += 1
        if passes == (2 if way.shares else 1):
            drain(way.work.cell.device)
            moments.append(time.perf_counter())

    handle = way.model.get_output_embeddings().register_forward_hook(mark)
    yield moments
    handle.remove()


def compare(ways: Mapping[str, Any]) -> dict[str, Any]:
    """Whether the ways agree: log-probabilities, gradients of what trains, greedy tokens. Also warms them up."""
    values, slopes, greedy = {}, {}, {}
    for name, way in ways.items():
        values[name] = update(way)
        slopes[name] = gradient(way.model)
        greedy[name] = way.rollout(way.work.generation(way.work.cell.completion_tokens, greedy=True))
    found: dict[str, Any] = {}
    for name, suffix in (("unshared", ""), ("stock", "_stock")):
        if name in ways:
            found[f"max_logprob_diff{suffix}"] = float((values["shared"] - values[name]).abs().max())
            found[f"grad_rel_err{suffix}"] = relative_error(slopes["shared"], slopes[name])
            found[f"greedy_equal{suffix}"] = bool(torch.equal(greedy["shared"], greedy[name]))
    return found


# ---------------------------------------------------------------------------------------------- memory
def peaks(way: Any) -> Times:
    """Peak MiB of every pass."""
    found = {}
    for name in PASSES:
        _forget(way)
        found[name] = peak_mib(way.work.cell.device, partial(run_phase, way, name))
    return found


def _forget(way: Any) -> None:
    """Drop what earlier phases left: gradients, and the rows that stock TRL keeps for all of them."""
    way.model.zero_grad(set_to_none=True)
    vars(way).pop("inputs", None)


def peaks_alone(cell: Cell, name: str) -> Times:
    """`peaks` in a process that has done nothing else."""
    way = make_way(name, Work(cell))
    run_phase(way, "score")  # what a first pass makes and keeps is no peak
    return peaks(way)


# ---------------------------------------------------------------------------------------------- one cell
def run_cell(cell: Cell) -> dict[str, Any]:
    """Measure one cell; the record that becomes the JSON line.

    Raises UserError for numbers out of their rule and for a device that is not there.
    """
    check_options(cell, LEAST)
    names = [name for name in WAYS if name != "stock" or HAS_TRL]
    if HAS_TRL:
        import trainers.rl_trainer  # noqa: F401  here, and not once in every process that measures memory
    limits = ceilings() if cell.device == "cuda" else None
    memory = peaks_in_fresh_processes(names, partial(peaks_alone, cell)) if cell.device == "cpu" else None
    work = Work(cell)
    ways = {name: make_way(name, work) for name in names}
    agreement = compare(ways)
    times = measure_times(ways, cell)
    if cell.device == "cuda":
        memory = {name: peaks(way) for name, way in ways.items()}
    record = asdict(cell) | {"prompt_tokens": work.length, "visual_tokens": work.num_visual}
    found = circumstances(work.own, cell.device, head="TRL fused" if HAS_TRL else "plain logits")
    return record | summary(work, times, memory) | agreement | {"ceilings": limits} | found


def summary(
    work: Work, times: Mapping[str, Mapping[str, float]], memory: Mapping[str, Mapping[str, float]] | None
) -> dict[str, Any]:
    """Ratios against the fair baseline, rates and peaks."""
    against = baseline(times, "stock", ("update", "step"))
    ratios = {f"{phase}_ratio": times[against][phase] / times["shared"][phase] for phase in (*PHASES, "step")}
    rates = {name: work.row_tokens() / taken["update"] for name, taken in times.items()}
    highest = memory and max(memory[against].values()) / max(memory["shared"].values())
    return {
        **ratios,
        "against": against,
        "peak_memory_ratio": highest,
        "seconds": times,
        "update_tokens_per_second": rates,
        "peak_mib": memory,
    }


# ---------------------------------------------------------------------------------------------- table
def table(record: Mapping[str, Any]) -> str:
    """The record for a reader."""
    names, others = list(record["seconds"]), [record["against"]]
    lines = [_heading(record), *table_head(names, others)]
    for phase in (*PHASES, "step"):
        times = {name: taken[phase] for name, taken in record["seconds"].items()}
        lines.append(compared(phase if phase != "step" else "whole step", times, others, ".3f", "s"))
    if record["peak_mib"]:
        lines += ["", "peak memory above what was in use before the phase:"]
        lines += [memory_row(record, phase, others) for phase in PASSES]
    return "\n".join([*lines, "", *_notes(record, names)])


def _heading(record: Mapping[str, Any]) -> str:
    return (
        f"{heading(record)}\n"
        f"{record['prompts']} prompt(s) of {record['prompt_tokens']} tokens ({record['visual_tokens']} visual), "
        f"{record['generations']} completions of {record['completion_tokens']} tokens; median of {record['repeats']}\n"
    )


def _notes(record: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    rates = ", ".join(f"{name} {record['update_tokens_per_second'][name]:,.0f}" for name in names)
    lines = [f"row tokens per second in the update (G x (P + C) over its time): {rates}"]
    if record["against"] == "stock":
        lines += ["ratios are against stock TRL: the unshared path is more than 10 % slower than it"]
    for name, suffix in (("unshared", ""), ("stock", "_stock")):
        if name in names:
            lines += [
                f"shared against {name}: log-probabilities differ by {record['max_logprob_diff' + suffix]:.1e}, the "
                f"gradient by {record['grad_rel_err' + suffix]:.1e} of its norm; greedy tokens "
                f"{'equal' if record['greedy_equal' + suffix] else 'DIFFER'}"
            ]
    if "stock" not in names:
        lines += ["stock TRL: left out" + ("" if HAS_TRL else ", trl is not installed")]
    if not HAS_TRL:
        lines += ["head: plain logits at the completions' positions and log-softmax in chunks, not TRL's fused head"]
    return lines + ceilings_line(record)
