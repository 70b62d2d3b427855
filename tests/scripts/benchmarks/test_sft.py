"""The SFT benchmark: its three ways learn the same from rows of different length, and its line can be read by a
program."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch

from datasets.encoding import IGNORE
from datasets.pixels import pixel_values
from scripts.benchmarks.common import check_options, take_turns
from scripts.benchmarks.models import make_trainable
from scripts.benchmarks.sft import LEAST, WAYS, Cell, Way, Work, compare, step, summary, table, timed
from trainers.vision_attention import FRAMEWISE
from utils.common import REPO_ROOT, UserError

SMALL = partial(Cell, 150, 3)


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The JSON line of a small cell, from the command line in another folder."""
    folder = tmp_path_factory.mktemp("bench")
    command = [sys.executable, str(REPO_ROOT / "scripts/bench.py"), "sft", "--prompt_tokens", "150", "--queries", "4"]
    command += ["--videos", "2", "--repeats", "1", "--json", str(folder / "out.json")]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    line = json.loads(result.stdout.splitlines()[-1])
    assert line == json.loads((folder / "out.json").read_text())
    assert table(line) in result.stdout
    return line


def test_the_three_ways_learn_the_same(record: dict[str, Any]) -> None:
    for suffix in ("", "_trainer"):
        assert record[f"grad_rel_err{suffix}"] < 1e-5
        assert record[f"loss_diff{suffix}"] < 1e-5 * record["loss"]["shared"]
    assert 5 < record["loss"]["shared"] < 8  # random weights: about the logarithm of the vocabulary


def test_the_line_holds_ratios_of_its_own_numbers(record: dict[str, Any]) -> None:
    taken = record["seconds"]
    assert list(taken) == ["shared", "unshared", "trainer"]
    for name, times in taken.items():
        assert times["step"] == pytest.approx(times["forward"] + times["backward"])
        assert record["samples_per_second"][name] == pytest.approx(8 / times["step"])
    assert record["shared_vs_unshared"] == pytest.approx(taken["unshared"]["step"] / taken["shared"]["step"])
    assert record["shared_vs_trainer"] == pytest.approx(taken["trainer"]["step"] / taken["shared"]["step"])
    assert (record["size"], record["device"], record["dtype"], record["vision"]) == (
        "tiny",
        "cpu",
        "float32",
        "trained",
    )
    assert (record["queries"], record["videos"], record["rows"], record["repeats"]) == (4, 2, 8, 1)
    assert record["versions"]["torch"] == torch.__version__.split("+")[0]


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
def test_four_rows_take_more_memory_than_one_video(record: dict[str, Any]) -> None:
    peaks = record["peak_mib"]
    assert record["peak_memory_ratio"] == pytest.approx(peaks[record["against"]]["step"] / peaks["shared"]["step"])
    assert record["peak_memory_ratio"] > 1.3


def test_rows_are_about_different_clips_and_differ_in_length() -> None:
    work = Work(SMALL(videos=2))
    samples = [work.queries[index] for index in range(6)]
    assert len({len(sample["input_ids"]) for sample in samples}) >= 3
    assert torch.equal(pixel_values([samples[0]["pixels"]]), pixel_values([samples[2]["pixels"]]))
    assert not torch.equal(pixel_values([samples[0]["pixels"]]), pixel_values([samples[3]["pixels"]]))
    texts = work.processor.tokenizer.batch_decode([sample["labels"][sample["labels"] != IGNORE] for sample in samples])
    assert all(text.startswith("From ") and text.endswith(" seconds.<|im_end|>") for text in texts)
    assert len(set(texts)) > 1


def test_sizes_are_those_of_the_batches() -> None:
    work = Work(SMALL(videos=2))
    samples = [work.queries[index] for index in range(6)]
    lengths = [len(sample["input_ids"]) for sample in samples]
    answers = [int((sample["labels"] != IGNORE).sum()) for sample in samples]
    visual = int(samples[0]["mm_token_type_ids"].count_nonzero())
    tails = sum(len(tail) for unit in work.units["units"] for tail in unit["tails"])
    prefixes = sum(len(unit["prefix"]["input_ids"]) for unit in work.units["units"])
    assert work.sizes() == {
        "prompt_tokens": round((sum(lengths) - sum(answers)) / 6),
        "visual_tokens": visual,
        "answer_tokens": sum(answers) / 6,
        "rows": 6,
        "tokens": {
            "shared": prefixes + tails + sum(answers) - 6,  # an answer's last token predicts nothing
            "unshared": 6 * max(lengths),
            "trainer": 6 * max(lengths),
        },
    }


@pytest.mark.parametrize("num", [2, 40])
def test_answers_of_a_wanted_length(num: int) -> None:
    work = Work(SMALL(answer_tokens=num))
    assert [len(answer) for answer in work.units["units"][0]["answers"]] == [num] * 3
    assert (work.rows["labels"] != IGNORE).sum(dim=1).tolist() == [num] * 3
    assert work.sizes()["answer_tokens"] == num


def test_each_way_computes_what_it_is_named_for() -> None:
    """The trainer's head is on every position and its vision tower is stock; the others' are the project's."""
    work = Work(SMALL())
    answers = int((work.rows["labels"] != IGNORE).sum())
    columns = len(work.rows["logits_to_keep"])
    positions = {"shared": (1, answers), "unshared": (3, columns), "trainer": work.rows["input_ids"].shape}
    assert columns < work.rows["input_ids"].shape[1] / 2
    for name in WAYS:
        way, seen = Way(name, work), []
        way.model.lm_head.register_forward_hook(lambda *_, seen=seen: seen.append(_[2].shape[:2]))
        step(way)
        assert seen == [positions[name]]
        framewise = way.model.config.vision_config._attn_implementation == FRAMEWISE
        assert framewise == (name != "trainer")


@pytest.mark.parametrize("vision", ["frozen", "trained"])
def test_the_ways_agree_on_a_real_sizes_setting(vision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """LoRA and gradient checkpointing, on the tiny weights."""
    monkeypatch.setattr(
        "scripts.benchmarks.sft.make_trainable",
        lambda model, size, *, vision: make_trainable(model, "4b", vision=vision),
    )
    ways = {name: Way(name, work) for work in [Work(SMALL(videos=2, vision=vision))] for name in WAYS}
    found = compare(ways)
    for suffix in ("", "_trainer"):
        assert 0 < found[f"grad_rel_err{suffix}"] < 1e-5
        assert found[f"loss_diff{suffix}"] < 1e-5 * found["loss"]["shared"]
    reached = {name for name, parameter in ways["shared"].model.named_parameters() if parameter.grad is not None}
    assert any("lora_B" in name for name in reached) and any("visual" in name for name in reached) == (
        vision == "trained"
    )
    modules = ways["shared"].model.modules()
    assert any(module.gradient_checkpointing for module in modules if hasattr(module, "gradient_checkpointing"))


def test_the_tiny_models_vision_can_be_frozen() -> None:
    work = Work(SMALL(vision="frozen"))
    for name in WAYS:
        step(way := Way(name, work))
        reached = {name for name, parameter in way.model.named_parameters() if parameter.grad is not None}
        assert "lm_head.weight" in reached or "model.language_model.embed_tokens.weight" in reached
        assert not any("visual" in name for name in reached)


def test_another_answer_moves_the_gradient() -> None:
    """The agreement is no accident: it ends where one way learns another token."""
    work = Work(SMALL())
    ways = {name: Way(name, work) for name in WAYS}
    unit = work.units["units"][0]
    unit["answers"][0] = unit["answers"][0].flip(0)
    found = compare(ways)
    assert found["grad_rel_err"] > 1e-2 and found["grad_rel_err_trainer"] > 1e-2


def test_times_are_of_both_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.5, 2.0])
    monkeypatch.setattr("scripts.benchmarks.sft.seconds", lambda device, call: (call(), next(clock))[1])
    way = Way("shared", Work(SMALL()))
    assert take_turns({"shared": way}, ("step",), 1, timed) == {
        "shared": {"forward": 0.5, "backward": 2.0, "step": 2.5}
    }
    assert way.model.lm_head.weight.grad is not None


def times(shared: float, unshared: float, trainer: float) -> dict[str, dict[str, float]]:
    values = {"shared": shared, "unshared": unshared, "trainer": trainer}
    return {name: {"forward": 0.25 * value, "backward": 0.75 * value, "step": value} for name, value in values.items()}


def test_summary() -> None:
    peaks = {"shared": {"step": 100.0}, "unshared": {"step": 250.0}, "trainer": {"step": 400.0}}
    found = summary(8, times(2.0, 5.0, 6.0), peaks)
    assert found["samples_per_second"] == {"shared": 4.0, "unshared": 1.6, "trainer": pytest.approx(8 / 6)}
    assert (found["shared_vs_unshared"], found["shared_vs_trainer"]) == (pytest.approx(2.5), pytest.approx(3.0))
    assert (found["against"], found["peak_memory_ratio"]) == ("unshared", 2.5)
    slow = summary(8, times(2.0, 5.0, 4.0), peaks)
    assert (slow["against"], slow["peak_memory_ratio"]) == ("trainer", 4.0)
    assert summary(8, times(2.0, 5.0, 6.0), None)["peak_memory_ratio"] is None


def test_a_slow_unshared_path_is_said(record: dict[str, Any]) -> None:
    says = "the unshared path is more than 10 % slower than it"
    assert (says in table(record)) == (record["against"] == "trainer")
    assert says in table({**record, "against": "trainer"})
    assert says not in table({**record, "against": "unshared"})
    assert "without the optimizer" in table(record)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"prompt_tokens": 20}, "--prompt_tokens must be >= 80, got 20"),
        ({"queries": 1}, "--queries must be >= 2, got 1"),
        ({"videos": 0}, "--videos must be >= 1, got 0"),
        ({"answer_tokens": 1}, "--answer_tokens must be >= 2, got 1"),
        ({"repeats": 0}, "--repeats must be >= 1, got 0"),
    ],
)
def test_numbers_out_of_their_rule(change: dict[str, int], says: str) -> None:
    with pytest.raises(UserError, match=says):
        check_options(Cell(**{"prompt_tokens": 150, "queries": 2, **change}), LEAST)


@pytest.mark.gpu
def test_on_a_gpu_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A real size's setting on tiny weights: rounding alone keeps the ways apart."""
    monkeypatch.setattr(
        "scripts.benchmarks.sft.make_trainable",
        lambda model, size, *, vision: make_trainable(model, "4b", vision=vision),
    )
    work = Work(SMALL(videos=2, vision="frozen", device="cuda"))
    ways = {name: Way(name, work) for name in WAYS}
    assert {parameter.dtype for parameter in work.own.parameters()} == {torch.bfloat16}
    found = compare(ways)
    for suffix in ("", "_trainer"):
        assert found[f"loss_diff{suffix}"] < 0.02 * found["loss"]["shared"]
        assert found[f"grad_rel_err{suffix}"] < 0.1
    taken = take_turns(ways, ("step",), 1, timed)
    assert min(times["backward"] for times in taken.values()) > 0
