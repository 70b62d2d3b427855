"""`train_rl.py` as a user runs it: a whole small run and its resume, a dry run, and what bad input says."""

from __future__ import annotations

import json
import math
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import Qwen3VLForConditionalGeneration

from inference.video_infer import VideoTemporalInference
from trainers.rollout_log import ROLLOUTS_FILE, read_records
from utils.checkpoints import complete_checkpoints, manifest_problems
from utils.common import REPO_ROOT
from utils.logging_utils import read_metrics

DATA_CONFIG = REPO_ROOT / "configs/demo/video_config.yaml"
RL_CONFIG = REPO_ROOT / "configs/demo/rl_config.yaml"


class Result(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The last line on standard error, where a mistake of the user must be the only line about it."""
        assert "Traceback" not in self.err, self.err
        return self.err.strip().splitlines()[-1]


Run = Callable[..., Result]


@pytest.fixture
def arguments(answering_adapter: Path, demo_data: Path, tmp_path: Path) -> list[str]:
    """The flags of a run of four steps from an SFT adapter: 2 prompts x 4 completions a step, with a KL reference."""
    return [
        *("--config", str(RL_CONFIG), "--data_config", str(DATA_CONFIG)),
        *("--output_dir", str(tmp_path / "run"), "--model_path", str(answering_adapter)),
        *(f"data.{split}={demo_data / split}.jsonl" for split in ("train", "val", "test")),
        "data.cache_dir=null",
        "training.num_generations=4",
        "training.per_device_train_batch_size=4",
        "training.gradient_accumulation_steps=2",
        "training.per_device_eval_batch_size=4",
        "training.max_steps=4",
        "training.max_eval_samples=4",
        "training.eval_steps=2",
        "training.save_steps=2",
        "training.logging_steps=1",
        "training.kl_coef=0.05",
        "training.run_name=null",
        "training.dataloader_num_workers=0",
        f"training.metrics_dir={tmp_path / 'metrics'}",
        f"training.logging_dir={tmp_path / 'logs'}",
    ]


BARE = ("training.eval_strategy=no", "training.save_strategy=no", "training.max_steps=2")
"""Two steps that save and validate nothing on the way."""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run `train_rl.py` in this process, as `python train_rl.py ARGUMENTS` would."""

    def call(arguments: Sequence[str], *more: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["train_rl.py", *arguments, *more])
        monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "")
        monkeypatch.delenv("TENSORBOARD_LOGGING_DIR")
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(REPO_ROOT / "train_rl.py"), run_name="__main__")
        captured = capfd.readouterr()
        return Result(int(ended.value.code or 0), captured.out, captured.err)

    return call


def metrics(tmp_path: Path, key: str) -> dict[int, Any]:
    """A metric by step."""
    return {record["step"]: record[key] for record in read_metrics(tmp_path / "metrics/run.jsonl") if key in record}


def adapter_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def read_rows(demo_data: Path, split: str = "train") -> list[dict[str, Any]]:
    """The rows of a split with absolute video paths, to be changed and written elsewhere."""
    rows = [json.loads(line) for line in (demo_data / f"{split}.jsonl").read_text().splitlines()]
    return [row | {"video": str(demo_data / row["video"])} for row in rows]


# ---------------------------------------------------------------------------------------------- a run
def test_a_whole_run_and_its_resume(
    arguments: list[str], run: Run, answering_adapter: Path, demo_data: Path, tmp_path: Path
) -> None:
    first = run(arguments)
    assert first.status == 0, first.err
    folder = tmp_path / "run"
    for name in ("config.yaml", "environment.json", "log.txt", "prompt_contract.json"):
        assert (folder / name).stat().st_size > 0, name
    assert yaml.safe_load((folder / "config.yaml").read_text())["training"]["kl_coef"] == 0.05
    assert json.loads((folder / "environment.json").read_text())["versions"]["trl"]
    assert [path.name for path in complete_checkpoints(folder)] == ["checkpoint-2", "checkpoint-4"]
    assert not (folder / "merged_base").exists()  # the SFT adapter itself went on
    _check_records(folder, tmp_path)
    assert (tmp_path / "metrics/run.png").read_bytes()[:4] == b"\x89PNG"
    assert list((tmp_path / "logs/run").glob("events.out.tfevents.*"))
    _check_answers(folder, demo_data)
    start, end = adapter_weights(answering_adapter), adapter_weights(folder / "checkpoint-final")
    assert start.keys() == end.keys() and any(not torch.equal(start[name], end[name]) for name in start)

    again = run(arguments)
    assert again.status == 2 and "nothing was changed" in again.error
    assert "--resume_from_checkpoint auto" in again.error and "checkpoint-final" in again.error

    keys = ("train/loss", "train/kl", "reward/total", "eval/reward")
    before = {key: metrics(tmp_path, key) for key in keys}
    shutil.rmtree(folder / "checkpoint-4")
    resumed = run(arguments, "--resume_from_checkpoint", "auto")
    assert resumed.status == 0 and f"going on from {folder / 'checkpoint-2'}" in resumed.err
    assert {key: metrics(tmp_path, key) for key in keys} == before
    assert [record["step"] for record in read_records(folder / ROLLOUTS_FILE)] == [0, 0, 1, 1, 2, 2, 3, 3]


def _check_records(folder: Path, tmp_path: Path) -> None:
    rollouts = read_records(folder / ROLLOUTS_FILE)
    assert [record["step"] for record in rollouts] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [len(record["completions"]) for record in rollouts] == [4] * 8
    earned = [c["reward"] for record in rollouts if record["step"] == 1 for c in record["completions"]]
    assert metrics(tmp_path, "reward/total")[2] == pytest.approx(sum(earned) / 8, abs=1e-6)
    assert metrics(tmp_path, "reward/temporal_iou") == metrics(tmp_path, "reward/total")
    for key in ("reward/temporal_iou_std", "reward/total_std", "train/loss", "train/completions/mean_length"):
        assert list(metrics(tmp_path, key)) == [1, 2, 3, 4], key
    for key in ("reward/temporal_iou_zero_spread", "reward/zero_spread"):
        assert set(metrics(tmp_path, key).values()) <= {0.0, 0.5, 1.0}, key
    assert metrics(tmp_path, "train/kl")[1] == 0.0 < metrics(tmp_path, "train/kl")[4]
    validated = metrics(tmp_path, "eval/reward")
    assert list(validated) == [2, 4] and validated == metrics(tmp_path, "eval/reward/temporal_iou")
    assert {step: 100 * value for step, value in validated.items()} == pytest.approx(metrics(tmp_path, "eval/mIoU"))


def _check_answers(folder: Path, demo_data: Path) -> None:
    """Both checkpoints load in inference; the final one answers what it answered in the last validation."""
    answers = [json.loads(line) for line in (folder / "validation/step-4.jsonl").read_text().splitlines()]
    assert len(answers) == 4
    for name in ("checkpoint-best", "checkpoint-final"):
        assert manifest_problems(folder / name) == []
        engine = VideoTemporalInference(folder / name)
        for answer in answers[:2] if name == "checkpoint-best" else answers:
            found = engine.predict(demo_data / answer["video"], answer["sentence"], max_new_tokens=24)
            assert found["parsed"]
            assert name == "checkpoint-best" or found["raw_text"] == answer["answer"]


@pytest.mark.slow
def test_ctrl_c_leaves_a_resumable_run(arguments: list[str], tmp_path: Path) -> None:
    command = [sys.executable, str(REPO_ROOT / "train_rl.py"), *arguments]
    command += ["training.max_steps=400", "training.dataloader_num_workers=1", "training.eval_strategy=no"]
    command += ["training.save_steps=400"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    records = tmp_path / "metrics/run.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (records.exists() and records.read_text().count("train/loss") >= 3):
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the data workers too
    err = process.communicate(timeout=120)[1]
    assert process.returncode == 130, err
    assert "--resume_from_checkpoint auto" in err and "Traceback" not in err
    step = int(complete_checkpoints(tmp_path / "run")[-1].name.split("-")[1])
    assert step >= 3
    more = ["--resume_from_checkpoint", "auto", f"training.max_steps={step + 2}"]
    ended = subprocess.run([*command, *more], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert manifest_problems(tmp_path / "run/checkpoint-final") == []
    assert sorted(metrics(tmp_path, "reward/total")) == list(range(1, step + 3))


# ---------------------------------------------------------------------------------------------- the plan
@pytest.mark.parametrize(
    ("overrides", "per_epoch", "left_out"),
    [
        ([], 24, 0),  # 48 rows, 2 prompts an update
        (["training.num_iterations=2"], 48, 0),
        (["training.steps_per_generation=4"], 24, 0),  # 4 prompts a batch of completions, which feeds two updates
        (["training.gradient_accumulation_steps=5"], 9, 3),
        (["training.gradient_accumulation_steps=3", "training.steps_per_generation=2"], 16, 0),
    ],
)
def test_dry_run_shows_the_plan_and_trains_nothing(
    overrides: list[str], per_epoch: int, left_out: int, arguments: list[str], run: Run, demo_data: Path, tmp_path: Path
) -> None:
    assert len(read_rows(demo_data)) == 48
    result = run(arguments, "--dry_run", *overrides, "training.max_steps=-1", "training.num_train_epochs=2")
    assert result.status == 0, result.err
    assert "rows:        48 train, 4 validation" in result.out
    assert f"steps:       {2 * per_epoch} ({per_epoch} an epoch)" in result.out
    assert f"{left_out} rows do not fill one" in result.out
    assert "x 4 completions" in result.out and "reward:      1 x temporal_iou" in result.out
    assert "memory:      about 0." in result.out and "\n  rollout cache " in result.out
    assert "<0.2 seconds><|vision_start|><|video_pad|>*2<|vision_end|><1.2 seconds>" in result.out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("overrides", [[], ["training.num_iterations=2"], ["training.gradient_accumulation_steps=5"]])
def test_the_plan_is_what_training_does(
    overrides: list[str], arguments: list[str], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps that the plan announces for an epoch are those that Trainer sets itself."""
    from transformers import Trainer

    seen: list[tuple[Any, ...]] = []
    plain = Trainer.set_initial_training_values

    def spy(self: Any, args: Any, dataloader: Any) -> Any:
        seen.append(plain(self, args, dataloader))
        raise KeyboardInterrupt  # enough is known

    monkeypatch.setattr(Trainer, "set_initial_training_values", spy)
    options = [*overrides, "training.max_steps=-1", "training.num_train_epochs=3"]
    plan = run(arguments, "--dry_run", *options).out
    assert run(arguments, *options).status == 130
    per_epoch, max_steps = seen[0][1], seen[0][-1]
    assert f"steps:       {max_steps} ({per_epoch} an epoch)" in plan


def test_dry_run_of_an_adapter_that_would_be_merged(arguments: list[str], run: Run, tmp_path: Path) -> None:
    result = run(arguments, "--dry_run", "lora.enabled=false", "training.head_lr=1e-6")
    assert result.status == 0, result.err
    assert "would merge" in result.err and "lora.enabled is false" in result.err
    assert "head 49.2 k (lr 1e-06), language 787.8 k (lr 0.001)" in result.out  # the model's own, not an adapter's
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------- what cannot start
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model_path", "./no/such/folder"], "'./no/such/folder' does not exist"),
        (["--model_path", "outputs/sft/no-checkpoint"], "'outputs/sft/no-checkpoint' does not exist"),
        (["--model_path", str(REPO_ROOT / "configs")], "configs holds neither config.json nor adapter_config.json"),
        (["rewards.temporal_io.weight=1"], "did you mean temporal_iou?"),
        (["rewards.temporal_iou.scal=2"], "rewards.temporal_iou.scal is not a key; did you mean scale?"),
        (["training.num_generations=3"], "set the batch size to 3 or 6, or training.num_generations to 2 or 4"),
        (["training.gradient_accumulation_steps=49"], "fewer than the 49 prompts of one generation batch"),
        (["training.use_vllm=true"], "vLLM changes or drops the video tokens of Qwen3-VL"),
        (["training.beta=0.1"], "write training.kl_coef"),
        (["data.train=nowhere.jsonl"], "nowhere.jsonl"),
        (["--deepspeed", "no.json"], "no.json"),
        (["--resume_from_checkpoint", "no/checkpoint-1"], "no/checkpoint-1"),
    ],
)
def test_what_cannot_start_is_one_clear_error(
    flags: list[str], message: str, arguments: list[str], run: Run, tmp_path: Path
) -> None:
    result = run(arguments, *flags)
    assert result.status == 2, result.err
    assert result.error.startswith("error: ") and message in result.err
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_run_folder_is_no_checkpoint(arguments: list[str], run: Run, tmp_path: Path) -> None:
    """The folder of an SFT run instead of a checkpoint in it: the checkpoints are named."""
    (tmp_path / "sft/checkpoint-best").mkdir(parents=True)
    result = run(arguments, "--model_path", str(tmp_path / "sft"))
    assert result.status == 2 and "checkpoint-best: name one of them" in result.error


def test_three_mistakes_are_named_at_once(arguments: list[str], run: Run) -> None:
    result = run(arguments, "data.fps=-2", "training.learning_rat=1e-4", "training.num_generations=1")
    assert result.status == 2 and "Traceback" not in result.err
    assert "data.fps must be > 0, got -2" in result.err
    assert "did you mean learning_rate?" in result.err
    assert "training.num_generations must be >= 2, got 1" in result.err


# ---------------------------------------------------------------------------------------------- rewards of one's own
MY_REWARDS = """
import torch
from torch import nn


class GivesNone(nn.Module):
    def forward(self, pred, gt):
        return None


class GivesNaN(nn.Module):
    def forward(self, pred, gt):
        return (pred - gt).mean(1) * float("nan")


class GivesOne(nn.Module):
    def forward(self, pred, gt):
        return torch.ones(1)


class GivesWords(nn.Module):
    def forward(self, pred, gt):
        return ["good"] * len(pred)


class Close(nn.Module):
    def forward(self, pred, gt):
        return 1 / (1 + (pred - gt).abs().sum(1))
"""


@pytest.fixture
def config_with_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    """`config_with_reward("Close")`: flags that add a class of a user's module `my_rewards` beside temporal_iou."""
    (tmp_path / "my_rewards.py").write_text(MY_REWARDS)
    monkeypatch.syspath_prepend(tmp_path)

    def write(name: str) -> list[str]:
        config = yaml.safe_load(RL_CONFIG.read_text())
        config["rewards"] = {"temporal_iou": {"weight": 1.0}, f"my_rewards:{name}": {"weight": 0.5}}
        path = tmp_path / "rl.yaml"
        path.write_text(yaml.safe_dump(config))
        return ["--config", str(path)]

    return write


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("GivesNone", "reward `my_rewards:GivesNone` returned None"),
        ("GivesNaN", "reward `my_rewards:GivesNaN` returned nan"),
        ("GivesOne", "reward `my_rewards:GivesOne` returned values of shape (1,)"),
        ("GivesWords", "reward `my_rewards:GivesWords` returned ['good'"),
        ("Clos", "my_rewards has no Clos; did you mean my_rewards:Close?"),
    ],
)
def test_a_faulty_reward_is_named(
    name: str, message: str, arguments: list[str], run: Run, config_with_reward: Callable[[str], list[str]]
) -> None:
    result = run(arguments, *config_with_reward(name), *BARE)
    assert result.status == 2, result.err
    assert message in result.error


def test_a_reward_of_ones_own_is_logged_under_its_name(
    arguments: list[str], run: Run, config_with_reward: Callable[[str], list[str]], tmp_path: Path
) -> None:
    result = run(arguments, *config_with_reward("Close"), *BARE)
    assert result.status == 0, result.err
    iou, close = metrics(tmp_path, "reward/temporal_iou"), metrics(tmp_path, "reward/my_rewards:Close")
    total = metrics(tmp_path, "reward/total")
    assert list(total) == [1, 2]
    assert all(total[step] == pytest.approx(iou[step] + 0.5 * close[step], abs=1e-6) for step in total)
    assert all(0 < value < 1 for value in close.values())
    assert f"my_rewards:Close {close[2]:.3f}" in result.err


def test_a_reward_that_fails_late_loses_no_checkpoint(
    arguments: list[str], run: Run, config_with_reward: Callable[[str], list[str]], tmp_path: Path
) -> None:
    """It fails in step 4; what was saved after step 2 stays, and the mended reward goes on from there."""
    flags = config_with_reward("Close")
    path = tmp_path / "my_rewards.py"
    path.write_text(
        MY_REWARDS.replace("return 1 /", "Close.calls += 1\n        return None if Close.calls > 3 else 1 /")
        + "\n\nClose.calls = 0\n"
    )
    sys.modules.pop("my_rewards", None)
    options = [*flags, "training.eval_strategy=no", "training.check_sharing=false"]
    result = run(arguments, *options)
    assert result.status == 2 and "my_rewards:Close` returned None" in result.error
    saved = complete_checkpoints(tmp_path / "run")
    assert [folder.name for folder in saved] == ["checkpoint-2"]
    path.write_text(MY_REWARDS)
    sys.modules.pop("my_rewards", None)
    resumed = run(arguments, *options, "--resume_from_checkpoint", "auto")
    assert resumed.status == 0, resumed.err
    assert sorted(metrics(tmp_path, "reward/total")) == [1, 2, 3, 4]


# ---------------------------------------------------------------------------------------------- where the run starts
def test_full_fine_tuning_from_an_adapter_merges_it_first(
    arguments: list[str], run: Run, answering_adapter: Path, demo_data: Path, tmp_path: Path
) -> None:
    result = run(arguments, "lora.enabled=false", *BARE, "training.learning_rate=0", "training.head_lr=1e-4")
    assert result.status == 0, result.err
    assert "merging" in result.err and "lora.enabled is false" in result.err
    assert manifest_problems(tmp_path / "run/merged_base") == []
    assert metrics(tmp_path, "train/kl")[1] == 0.0
    row = read_rows(demo_data, "val")[0]
    before = VideoTemporalInference(answering_adapter).predict(row["video"], row["sentence"])
    merged = VideoTemporalInference(tmp_path / "run/merged_base").predict(row["video"], row["sentence"])
    assert merged["raw_text"] == before["raw_text"] and before["parsed"]
    final = tmp_path / "run/checkpoint-final"
    assert not (final / "adapter_config.json").exists()
    after = load_file(final / "model.safetensors")
    start = load_file(tmp_path / "run/merged_base/model.safetensors")
    moved = {name for name in start if not torch.equal(start[name].float(), after[name].float())}
    assert moved == {"model.language_model.embed_tokens.weight"}


def test_a_model_that_cannot_answer_yet_is_warned_of_and_trained(
    arguments: list[str], run: Run, tiny_model: Path, tmp_path: Path
) -> None:
    result = run(arguments, "--model_path", str(tiny_model), *BARE)
    assert result.status == 0, result.err
    assert result.err.count("no answer of the batch can be read as a time window, e.g. '") == 2
    assert "Fine-tune with train_sft.py first" in result.err
    assert metrics(tmp_path, "train/parse_failure_rate") == {1: 100.0, 2: 100.0}
    assert metrics(tmp_path, "reward/total") == {1: 0.0, 2: 0.0}
    assert metrics(tmp_path, "reward/zero_spread") == {1: 1.0, 2: 1.0}
    assert manifest_problems(tmp_path / "run/checkpoint-final") == []


# ---------------------------------------------------------------------------------------------- videos that break
@pytest.fixture
def rows_with_broken(demo_data: Path, tmp_path: Path) -> Callable[[int, Sequence[int]], Path]:
    """`rows_with_broken(4, [1])`: a file of the first 4 rows, of which row 1 names a video that cannot be read."""

    def write(num_rows: int, broken: Sequence[int]) -> Path:
        rows = read_rows(demo_data)[:num_rows]
        for number in broken:
            rows[number]["video"] = str(tmp_path / f"broken{number}.mp4")
            (tmp_path / f"broken{number}.mp4").write_bytes(b"no video")
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


def test_a_broken_video_is_left_out(
    arguments: list[str], run: Run, rows_with_broken: Callable[..., Path], tmp_path: Path
) -> None:
    """4 rows in 2 epochs: it is drawn twice, and named and counted once."""
    path = rows_with_broken(4, [1])
    options = ["data.max_bad_fraction=0.25", "training.eval_strategy=no", "training.save_strategy=no"]
    result = run(arguments, f"data.train={path}", *options)
    assert result.status == 0, result.err
    assert result.err.count("left out: ") == 1 and f"{path}:2" in result.err and "broken1.mp4" in result.err
    assert metrics(tmp_path, "train/unreadable_videos")[4] == 1
    drawn = [record["row"] for record in read_records(tmp_path / "run" / ROLLOUTS_FILE)]
    assert sorted(drawn) == [0, 0, 2, 2, 3, 3]
    assert all(math.isfinite(value) for value in metrics(tmp_path, "train/loss").values())


def test_a_batch_of_broken_videos_teaches_nothing(
    arguments: list[str], run: Run, rows_with_broken: Callable[..., Path], answering_adapter: Path, tmp_path: Path
) -> None:
    options = ["data.max_bad_fraction=0.5", "training.shuffle_dataset=false", "training.kl_coef=0"]
    result = run(arguments, f"data.train={rows_with_broken(4, [2, 3])}", *options, *BARE, "training.logging_steps=1")
    assert result.status == 0, result.err
    assert metrics(tmp_path, "train/loss")[2] == 0.0 == metrics(tmp_path, "train/grad_norm")[2]
    assert list(metrics(tmp_path, "train/parse_failure_rate")) == [1, 2]
    assert "incorrect" not in result.err  # TensorBoard is given no None
    weights = adapter_weights(tmp_path / "run/checkpoint-final")
    assert all(value.isfinite().all() for value in weights.values())


def test_too_many_broken_videos_stop_the_run(
    arguments: list[str], run: Run, rows_with_broken: Callable[..., Path], tmp_path: Path
) -> None:
    path = rows_with_broken(12, range(4, 12))
    options = ["training.max_steps=6", "training.eval_strategy=no", "training.shuffle_dataset=false"]
    result = run(arguments, f"data.train={path}", "data.max_bad_fraction=0.2", *options)
    assert result.status == 2, result.err
    assert "4 of 12 rows could not be used, more than data.max_bad_fraction=0.2" in result.error
    assert "--probe_videos" in result.error and "broken7.mp4" in result.error
    assert [folder.name for folder in complete_checkpoints(tmp_path / "run")] == ["checkpoint-2"]


# ---------------------------------------------------------------------------------------------- odd completions
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_completions_that_are_all_cut_off(
    masked: bool, loss_type: str, arguments: list[str], run: Run, answering_adapter: Path, tmp_path: Path
) -> None:
    """Left out of the loss they leave nothing to learn from: no NaN, and no weight moves."""
    options = [f"training.mask_truncated_completions={masked}".lower(), f"training.loss_type={loss_type}"]
    result = run(arguments, *options, *BARE, "training.max_completion_length=3")
    assert result.status == 0, result.err
    assert metrics(tmp_path, "train/completions/clipped_ratio") == {1: 1.0, 2: 1.0}
    assert metrics(tmp_path, "train/loss")[1] == pytest.approx(0.0, abs=1e-6)
    assert all(math.isfinite(value) for value in metrics(tmp_path, "train/loss").values())
    assert all(math.isfinite(value) for value in metrics(tmp_path, "train/grad_norm").values())
    assert "raise training.max_completion_length if answers are cut off" in result.err
    start, end = adapter_weights(answering_adapter), adapter_weights(tmp_path / "run/checkpoint-final")
    assert all(value.isfinite().all() for value in end.values())
    if masked:
        assert all(torch.equal(value, start[name]) for name, value in end.items())
        assert set(metrics(tmp_path, "train/kl").values()) == {0.0}


def test_some_completions_cut_off_and_masked(arguments: list[str], run: Run, tmp_path: Path) -> None:
    """The limit lies between the lengths of the answers: the cut ones are left out, the others are learnt from."""
    assert run(arguments, *BARE).status == 0
    records = read_records(tmp_path / "run" / ROLLOUTS_FILE)
    lengths = sorted({c["num_tokens"] for record in records[:2] for c in record["completions"]})
    assert len(lengths) > 1
    options = ["--output_dir", str(tmp_path / "masked"), f"training.max_completion_length={lengths[0]}"]
    result = run(arguments, *BARE, *options, "training.mask_truncated_completions=true")
    assert result.status == 0, result.err
    first = next(record for record in read_metrics(tmp_path / "metrics/masked.jsonl") if "train/loss" in record)
    assert 0 < first["train/completions/clipped_ratio"] < 1
    assert math.isfinite(first["train/loss"]) and first["train/grad_norm"] > 0


@pytest.fixture
def silent_model(answering_model: Path, tmp_path: Path) -> Path:
    """A checkpoint that ends its answer at once: the head's rows of the end token and of the first word are swapped."""
    folder = tmp_path / "silent"
    shutil.copytree(answering_model, folder)
    (folder / "manifest.json").unlink()
    model = Qwen3VLForConditionalGeneration.from_pretrained(answering_model, dtype=torch.float32)
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    end = model.generation_config.eos_token_id
    pair = [end[0] if isinstance(end, list) else end, vocabulary["From"]]
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    with torch.no_grad():
        model.lm_head.weight[pair] = model.lm_head.weight[pair[::-1]]
    model.save_pretrained(folder)
    return folder


def test_empty_completions(arguments: list[str], run: Run, silent_model: Path, tmp_path: Path) -> None:
    result = run(arguments, "--model_path", str(silent_model), *BARE, "training.temperature=0.1")
    assert result.status == 0, result.err
    texts = [c["text"] for r in read_records(tmp_path / "run" / ROLLOUTS_FILE) for c in r["completions"]]
    assert texts == [""] * 16
    assert metrics(tmp_path, "train/completions/mean_length") == {1: 1.0, 2: 1.0}
    assert all(math.isfinite(value) for value in metrics(tmp_path, "train/loss").values())
    assert "no answer of the batch can be read as a time window, e.g. ''" in result.err
    weights = adapter_weights(tmp_path / "run/checkpoint-final")
    assert all(value.isfinite().all() for value in weights.values())
