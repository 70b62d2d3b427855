"""Loading, refusing and saving configurations, the shipped files, and the way to TrainingArguments."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Protocol

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from utils.common import REPO_ROOT, UserError
from utils.config import (
    AnnotationSource,
    ConfigError,
    DataConfig,
    DataFile,
    LoraConfig,
    ModelConfig,
    PromptConfig,
    SFTConfig,
    SFTTrainingConfig,
    load_config,
    save_config,
)
from utils.config_trainer import check_deepspeed
from utils.config_yaml import parse_yaml, to_yaml

SFT_YAML = REPO_ROOT / "configs/training/sft_config.yaml"
DATA_YAML = REPO_ROOT / "configs/data/video_config.yaml"
SOME = "it must hold some of the sections model, lora, data, prompt, training"
DEEPSPEED = {name: REPO_ROOT / f"configs/deepspeed/{name}.json" for name in ("ds_zero2", "ds_zero3_offload")}


class Writer(Protocol):
    """Writes a YAML file and gives its name."""

    def __call__(self, text: str, name: str = ...) -> str: ...


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Writer:
    """Write a YAML file into an empty working directory and give its relative name, as a user would."""
    monkeypatch.chdir(tmp_path)

    def write_text(text: str, name: str = "c.yaml") -> str:
        Path(name).write_text(text, encoding="utf-8")
        return name

    return write_text


def problems(*paths: str, overrides: tuple[str, ...] = ()) -> list[str]:
    """The lines of the error that loading raises."""
    with pytest.raises(ConfigError) as error:
        load_config(SFTConfig, paths, overrides)
    assert str(error.value) == "\n".join(error.value.problems)
    return list(error.value.problems)


def of(*overrides: str) -> list[str]:
    return problems(overrides=overrides)


# ---- shipped files


def test_shipped_files_hold_every_key_at_its_default() -> None:
    config = load_config(SFTConfig, [SFT_YAML, DATA_YAML])
    train, val, test = (
        (AnnotationSource(path=Path(f"data/annotations/{name}.jsonl")),) for name in ("train", "val", "test")
    )
    # What is on in the files and off in code: who makes a DataConfig asks for it by name.
    in_use = {"cache_dir": Path("data/cache"), "quarantine": Path("data/cache/quarantine.jsonl")}
    assert config == SFTConfig(data=DataConfig(train=train, val=val, test=test, **in_use))
    written = yaml.safe_load(SFT_YAML.read_text()) | yaml.safe_load(DATA_YAML.read_text())
    for section, model in SFTConfig.model_fields.items():
        assert model.annotation is not None and set(written[section]) == set(model.annotation.model_fields), section


@pytest.mark.parametrize(
    "path",
    [path for path in sorted((REPO_ROOT / "configs").rglob("*.yaml")) if not path.name.startswith("rl")],
    ids=lambda path: path.relative_to(REPO_ROOT / "configs").as_posix(),
)
def test_every_shipped_yaml_loads(path: Path) -> None:
    assert isinstance(load_config(SFTConfig, [path]), SFTConfig)


def test_documented_defaults() -> None:
    config = SFTConfig()
    assert (config.model.name_or_path, config.model.torch_dtype) == ("Qwen/Qwen3-VL-4B-Instruct", "bfloat16")
    assert config.model.attn_implementation == "flash_attention_2"
    assert (config.lora.enabled, config.lora.r, config.lora.lora_alpha) == (True, 64, 128)
    assert config.lora.target_modules == ("q_proj", "k_proj", "v_proj", "o_proj", "lm_head")
    assert config.lora.modules_to_save == ("embed_tokens", "lm_head")
    training = config.training
    rates = (training.learning_rate, training.mm_projector_lr, training.vision_tower_lr, training.head_lr)
    assert rates == (1e-4, 1e-5, 0.0, 1e-4)
    batch = (training.per_device_train_batch_size, training.gradient_accumulation_steps, training.num_train_epochs)
    assert batch == (2, 8, 3)


# ---- reading


def test_three_mistakes_in_two_files_at_once(write: Writer) -> None:
    data = write("data:\n  train: a.jsonl\n  # comment\n  fps: -2\n", "data.yaml")
    training = write("training:\n  seed: 1\n  learning_rat: 1e-4\nmodel:\n  torch_dtype: bfloat\n", "sft.yaml")
    assert problems(training, data, overrides=("lora.r=none",)) == [
        "training.learning_rat is not a key (sft.yaml:3); did you mean learning_rate?",
        "model.torch_dtype must be one of bfloat16, float16, float32, got 'bfloat' (sft.yaml:5); "
        "did you mean bfloat16?",
        "data.fps must be > 0, got -2 (data.yaml:4)",
        "lora.r must be a whole number, got 'none' (command line)",
    ]


def test_a_wrong_value_does_not_hide_a_broken_rule(write: Writer) -> None:
    path = write("data:\n  fps: fast\n  min_frames: 9\n  max_frames: 8\n  min_pixels_per_frame: 300000\n")
    assert problems(path) == [
        "data.fps must be a number, got 'fast' (c.yaml:2)",
        "data.min_frames must be <= data.max_frames, got 9 and 8 (c.yaml:3; c.yaml:4)",
        "data.min_pixels_per_frame must be <= data.max_pixels_per_frame, got 300000 and 262144 (c.yaml:5)",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", f"c.yaml is empty; {SOME}"),
        ("# only a comment\n", f"c.yaml is empty; {SOME}"),
        ("- a\n", f"c.yaml is not a mapping but ['a']; {SOME}"),
        ("data: 3\n", "data must be a mapping of keys, got 3 (c.yaml:1)"),
        ("dta:\n  fps: 1\n", "dta is not a section (c.yaml:1); did you mean data?"),
        ("training:\n  fps: 1\n", "training.fps is not a key (c.yaml:2); did you mean data.fps?"),
        ("data:\n  zzz: 1\n", "data.zzz is not a key (c.yaml:2)"),
        ("data:\n  fps: 1\n  fps: 2\n", "data.fps is written twice, first at c.yaml:2 (c.yaml:3); keep one of them"),
        ("data: {}\n\ndata: {}\n", "data is written twice, first at c.yaml:1 (c.yaml:3); keep one of them"),
        ("data:\n  fps: !x 1\n", "data.fps has the tag !x, which is not used here (c.yaml:2); remove the tag"),
        ("data: &a\n  train: *a\n", "data.train holds itself by an alias (c.yaml:2)"),
        ("data:\n  train: [{path: a, weigt: 2}]", "data.train[0].weigt is not a key (c.yaml:2); did you mean weight?"),
        ("data:\n  train: [a, {weight: 2}]\n", "data.train[1].path is missing (c.yaml:2)"),
        ("data:\n  train: {path: a, weight: 0}\n", "data.train.weight must be > 0, got 0 (c.yaml:2)"),
        ("data:\n  train: [3]\n", "data.train[0] must be a path, or a mapping of path and weight, got 3 (c.yaml:2)"),
        ("data:\n  val: ''\n", "data.val must be the path of a JSONL file, got '' (c.yaml:2)"),
        ("data:\n  cache_dir: ''\n", "data.cache_dir must be a folder, or null to keep no frames, got '' (c.yaml:2)"),
        ("data:\n  cache_max_gb: 0\n", "data.cache_max_gb must be > 0, got 0 (c.yaml:2)"),
        ("data:\n  fps: .nan\n", "data.fps must be a finite number, got nan (c.yaml:2)"),
        ("data:\n  fps: true\n", "data.fps must be a number, got true (c.yaml:2)"),
        ("data:\n  max_frames: 8.0\n", "data.max_frames must be a whole number, got 8.0 (c.yaml:2)"),
        ("data:\n  fps:\n", "data.fps must be a number, got null (c.yaml:2)"),
        ("model:\n  revision: 1e10\n", "model.revision must be text, got 10000000000.0 (c.yaml:2); put it in quotes"),
        ("model:\n  trust_remote_code: yes\n", "model.trust_remote_code must be true or false, got 'yes' (c.yaml:2)"),
        ("model: {vision_tower: a}", "model.vision_tower must look like package.module:factory, got 'a' (c.yaml:1)"),
        ("lora:\n  target_modules: [q, 3]", "lora.target_modules[1] must be text, got 3 (c.yaml:2); put it in quotes"),
        ("model: {name_or_path: ''}", "model.name_or_path must not be empty, got '' (c.yaml:1)"),
        ("lora:\n  lora_dropout: 1\n", "lora.lora_dropout must be < 1, got 1 (c.yaml:2)"),
        ("data:\n  max_bad_fraction: 2\n", "data.max_bad_fraction must be <= 1, got 2 (c.yaml:2)"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(write: Writer, text: str, expected: str) -> None:
    assert problems(write(text)) == [expected]


@pytest.mark.parametrize(
    ("text", "line"),
    [("data:\n  fps: 1\n  a: b: c\n", 3), ("data:\n\tfps: 1\n", 2), ("a: 1\n---\nb: 2\n", 2), ("\na: \x07", 2)],
)
def test_syntax_errors_have_a_line(write: Writer, text: str, line: int) -> None:
    (problem,) = problems(write(text))
    assert problem.startswith("not valid YAML: ") and f"(c.yaml:{line})" in problem


def test_unreadable_files(write: Writer, tmp_path: Path) -> None:
    Path("latin.yaml").write_bytes("# größer\ndata: {}".encode("latin-1"))
    missing, folder, latin, wrong = problems("no.yaml", str(tmp_path), "latin.yaml", write("data:\n  fps: 0\n"))
    assert missing.startswith("no.yaml does not exist; give the path of a YAML file")
    assert folder.startswith(f"{tmp_path} cannot be read (Is a directory)")
    assert latin == "latin.yaml is not UTF-8 text (byte 4); save it as UTF-8"
    assert wrong == "data.fps must be > 0, got 0 (c.yaml:2)"


def test_a_missing_file_is_not_blamed_on_the_other(write: Writer) -> None:
    path = write("training:\n  early_stopping_patience: 2\n")
    assert len(problems(path, "no.yaml")) == 1


def test_sections_of_another_command_are_passed_over(write: Writer) -> None:
    """Their values and overrides are not looked at, those of the others are."""
    path = write("training:\n  fps: 1\nmodel: 3\ndata:\n  fps: 1\n")
    others, overrides = ("model", "training"), ["training.steps=2", "data.fps=4", "data.cache_dir=null"]
    config = load_config(DataFile, [path], overrides, passed_over=others)
    assert (config.data.fps, config.data.cache_dir) == (4.0, None)
    with pytest.raises(ConfigError, match="lora is not a section"):
        load_config(DataFile, [write("lora: {}\n", "b.yaml")], passed_over=others)


def test_a_section_stands_in_one_file(write: Writer) -> None:
    first, second = write("model: {}\ndata:\n  fps: 1\n", "a.yaml"), write("data:\n  fps: 2\n", "b.yaml")
    assert problems(first, second) == ["data is in two files, a.yaml:2 and b.yaml:1; keep the section in one of them"]


def test_numbers_words_and_single_items(write: Writer) -> None:
    path = write(
        "training:\n  learning_rate: 2e-5\n  report_to: wandb\n  run_name: 2026-01-01\n  eval_strategy: no\n"
        "data:\n  train: [a.jsonl, {path: b/c.jsonl, weight: 2}]\n  val: v.jsonl\n  test: {path: t.jsonl}\n  fps: 1\n"
        "lora:\n"
    )
    config = load_config(SFTConfig, [path])
    assert (config.training.learning_rate, config.training.report_to) == (2e-5, ("wandb",))
    assert (config.training.run_name, config.training.eval_strategy) == ("2026-01-01", "no")
    assert [(str(source.path), source.weight) for source in config.data.train] == [("a.jsonl", 1.0), ("b/c.jsonl", 2.0)]
    assert (config.data.val[0].path, config.data.test[0].path) == (Path("v.jsonl"), Path("t.jsonl"))
    assert isinstance(config.data.fps, float) and config.lora == LoraConfig()


# ---- overrides


def test_overrides(write: Writer) -> None:
    path = write(
        "training:\n  learning_rate: 1e-4\n  lr_scheduler_kwargs: {a: 1}\ndata:\n  train: a\n  max_frames: 5\n"
    )
    config = load_config(
        SFTConfig,
        [path],
        [
            "training.learning_rate=2e-5",
            "training.max_eval_samples=null",
            "training.lr_scheduler_kwargs.min_lr=1e-7",
            "data.train=[x.jsonl, {path: y.jsonl, weight: 3}]",
            "lora.modules_to_save=[]",
            'prompt.question="Query: {sentence}"',
            "training.seed=1",
            "training.seed=2",
        ],
    )
    assert (config.training.learning_rate, config.training.max_eval_samples, config.training.seed) == (2e-5, None, 2)
    assert config.training.values()["lr_scheduler_kwargs"] == {"a": 1, "min_lr": 1e-7}
    assert [source.weight for source in config.data.train] == [1.0, 3.0]
    assert (config.lora.modules_to_save, config.prompt.question, config.data.max_frames) == ((), "Query: {sentence}", 5)


def test_wrong_overrides() -> None:
    assert of("data.fps", "fps=1", "data.fps=", "data..fps=1", "data.fps={", "trainig.seed=1", "data.fbs=1") == [
        "'data.fps' is not an override (command line); write section.key=value, as in training.seed=1",
        "'fps=1' is not an override (command line); write section.key=value, as in training.seed=1",
        "data.fps has no value (command line); write data.fps=null for none",
        "'data..fps=1' is not an override (command line); write section.key=value, as in training.seed=1",
        "data.fps={ is not valid YAML (command line); put text with special characters in quotes of its own",
        "trainig is not a section (command line); did you mean training?",
        "data.fbs is not a key (command line); did you mean fps?",
    ]


def test_an_override_is_cited_instead_of_the_file(write: Writer) -> None:
    path = write("data:\n  train: a\n  min_frames: 5\n  max_frames: 9\n")
    assert problems(path, overrides=("data.max_frames=2", "data.train.weight=2")) == [
        "data.min_frames must be <= data.max_frames, got 5 and 2 (c.yaml:3; command line)",
        "data.train.weight cannot be set alone (command line): what holds it is not a mapping; "
        "give the whole value, data.train=...",
    ]


# ---- rules between keys


def test_rules_between_sections(write: Writer) -> None:
    path = write("training:\n  head_lr: 0\n  early_stopping_patience: 3\n")
    assert problems(path) == [
        "training.head_lr must be > 0 while lora.modules_to_save holds embed_tokens and lm_head, got 0 (c.yaml:2); "
        "raise training.head_lr, or take them out of lora.modules_to_save",
        "training.early_stopping_patience needs validations, and data.val is empty (c.yaml:3); "
        "name a file in data.val, or set the patience to null",
    ]
    assert load_config(SFTConfig, [], ["training.head_lr=0", "lora.modules_to_save=[]"]).training.head_lr == 0
    assert load_config(SFTConfig, [], ["training.head_lr=0", "lora.enabled=false"]).training.head_lr == 0


def test_sft_takes_every_row() -> None:
    assert of("data.select.num_rows=9") == [
        "data.select is for GRPO alone, and SFT takes every row of data.train (command line); "
        "leave it out, or set data.select=null"
    ]
    assert load_config(SFTConfig, [], ["data.select=null"]).data.select is None


def test_rules_of_training_and_lora() -> None:
    zero = ("training.learning_rate=0", "training.mm_projector_lr=0", "training.head_lr=0", "lora.enabled=false")
    assert of(*zero) == [
        "training.learning_rate, training.mm_projector_lr, training.vision_tower_lr, training.head_lr are all 0, "
        "so nothing would train (command line); raise one of them"
    ]
    (patience,) = of("training.early_stopping_patience=1", "training.eval_strategy=no", "data.val=v.jsonl")
    assert patience.startswith("training.early_stopping_patience needs validations, and training.eval_strategy is no")
    assert of("training.eval_steps=2.5", "training.save_steps=0") == [
        "training.eval_steps must be a whole number of updates, or a share of the run below 1, got 2.5 (command line)",
        "training.save_steps must be > 0, got 0 (command line)",
    ]
    (empty,) = of("lora.target_modules=[]")
    assert empty.startswith(
        "lora.target_modules must name at least one layer while lora.enabled is true (command line)"
    )


@pytest.mark.parametrize("answer", ["{start} to {end}", '{{"start": {start:.2f}, "end": {end:.2f}}}'])
def test_answers_that_can_be_read_back(answer: str) -> None:
    pytest.importorskip("utils.spans")
    assert PromptConfig(answer=answer).answer == answer


def test_prompt_rules() -> None:
    pytest.importorskip("utils.spans")
    default = PromptConfig()
    assert PromptConfig(**default.model_dump()) == default  # defaults are not validated by themselves
    found = of(
        "prompt.question=When?",
        "prompt.answer=From {start} on",
        "prompt.absent=From 1.0 to 2.0 seconds.",
    )
    assert found == [
        "prompt.question must contain {sentence} and no other braces, got 'When?' (command line)",
        "prompt.answer must contain {start} and {end} and no other braces, got 'From {start} on' (command line)",
        "prompt.absent must be read back as an absent event, as in 'The event does not happen in the video.', "
        "got 'From 1.0 to 2.0 seconds.' (command line)",
    ]
    (swapped,) = of('prompt.answer="From {end:.1f} to {start:.1f} seconds."')
    assert "must be read back as the numbers it was filled with, which 'From 45.0 to 12.0 seconds.' is not" in swapped
    (whole,) = of('prompt.answer="From {start:d} to {end:d} seconds."')
    assert "must hold formats for numbers, as in {start:.1f}" in whole
    (open_brace,) = of('prompt.question="{sentence} {"')
    assert "must have matching braces" in open_brace


# ---- models made in code


def test_models_are_frozen_and_strict() -> None:
    with pytest.raises(ValidationError):
        DataConfig(fps=-1)
    with pytest.raises(ValidationError, match="must be <="):
        DataConfig(min_frames=9, max_frames=2)
    with pytest.raises(ValidationError):
        ModelConfig(nme="x")  # type: ignore[call-arg]
    with pytest.raises(ValidationError, match="frozen"):
        SFTConfig().model.revision = "x"  # type: ignore[misc]
    assert issubclass(ConfigError, UserError)


def test_budget_carries_the_sampling_keys() -> None:
    pytest.importorskip("utils.video")
    budget = DataConfig(fps=1.5, max_frames=7).budget
    assert (budget.fps, budget.min_frames, budget.max_frames) == (1.5, 4, 7)
    assert (budget.min_pixels_per_frame, budget.max_pixels_per_frame, budget.total_pixels) == (16384, 262144, 16777216)


# ---- saving


def test_saved_config_loads_equal(tmp_path: Path) -> None:
    config = load_config(
        SFTConfig,
        [SFT_YAML, DATA_YAML],
        [
            "training.adam_beta2=0.95",
            "training.run_name='1e-4'",
            "prompt.system=\"no: '1:30'\\n{é}\"",
            "data.videos_root=v",
        ],
    )
    save_config(config, tmp_path / "run" / "config.yaml")
    loaded = load_config(SFTConfig, [tmp_path / "run" / "config.yaml"])
    assert loaded == config and loaded.training.run_name == "1e-4" and loaded.prompt.system == "no: '1:30'\n{é}"
    assert loaded != load_config(SFTConfig, [tmp_path / "run" / "config.yaml"], ["training.adam_beta2=0.9"])
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert written["training"]["adam_beta2"] == 0.95
    assert set(written["training"]) == {*SFTTrainingConfig.model_fields, "adam_beta2"}  # nothing nobody set


def test_default_config_saves_and_loads_equal(tmp_path: Path) -> None:
    save_config(SFTConfig(), tmp_path / "c.yaml")
    assert load_config(SFTConfig, [tmp_path / "c.yaml"]) == SFTConfig()


def test_config_pickles_and_copies() -> None:
    config = load_config(SFTConfig, [], ["training.adam_beta2=0.95", "data.train=a"])
    for twin in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
        assert twin == config and twin.training.values()["adam_beta2"] == 0.95
        assert twin.training.model_fields_set == {"adam_beta2"}


TRICKY = ["1e-4", "no", "1:30", "0x1", ".nan", "~", "- a", "{", "a: b", "2001-01-01", "\x85", " "]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.sampled_from(TRICKY)


@settings(deadline=None)
@given(st.dictionaries(st.text(max_size=3), SCALARS | st.lists(SCALARS, max_size=2), max_size=4))
def test_what_is_written_is_read_back(value: dict) -> None:
    read, document = parse_yaml(to_yaml(value), "c.yaml")
    assert (read, document.problems) == (value, [])


# ---- TrainingArguments


def test_every_trainer_key_is_reachable_or_refused() -> None:
    import dataclasses

    from transformers import TrainingArguments

    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    reachable = set(SFTTrainingConfig.complete().model_fields)
    assert names - reachable - set(SFTTrainingConfig.REFUSED) == set()
    assert reachable.isdisjoint(SFTTrainingConfig.REFUSED)
    assert {"optim", "adam_beta2", "torch_compile", "fsdp", "fp16", "use_cpu", "data_seed"} <= reachable


def test_refused_misspelt_and_wrong_trainer_keys() -> None:
    found = of(
        "training.output_dir=x",
        "training.remove_unused_columns=true",
        "training.adam_bta2=0.9",
        "training.adam_beta2=high",
        "training.optim=adamw",
        "training.lr_scheduler_type=cosin",
        "training.report_to=[tensorbord]",
        "training.optim_target_modules=[3]",
        "training.ddp_timeout=1.5",
    )
    assert found[:4] == [
        "training.output_dir cannot be set here (command line); "
        "give the folder on the command line: --output_dir FOLDER",
        "training.remove_unused_columns cannot be set here (command line); "
        "it would drop the video tensors, so it is always false",
        "training.adam_bta2 is not a key (command line); did you mean adam_beta2?",
        found[3],
    ]
    text = "\n".join(found)
    assert "training.adam_beta2 must be a number, got 'high' (command line)" in text
    assert "training.optim must be one of adamw_torch, " in text
    assert "got 'cosin' (command line); did you mean cosine?" in text
    assert "got 'tensorbord' (command line); did you mean tensorboard?" in text
    assert "training.optim_target_modules[0] must be text, got 3 (command line)" in text
    assert "training.ddp_timeout must be a whole number, got 1.5 (command line)" in text
    assert len(found) == 9


def test_to_training_arguments_passes_what_was_set(tmp_path: Path) -> None:
    import dataclasses

    from transformers import TrainingArguments

    overrides = ["training.use_cpu=true", "training.adam_beta2=0.95", "training.lr_scheduler_kwargs={}"]
    config = load_config(SFTConfig, [], overrides)
    arguments = config.training.to_training_arguments(output_dir=tmp_path, logging_first_step=True)
    plain = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    changed = {
        field.name
        for field in dataclasses.fields(TrainingArguments)
        if getattr(arguments, field.name) != getattr(plain, field.name)
    }
    assert {"adam_beta2", "logging_first_step", "learning_rate", "remove_unused_columns"} <= changed
    assert changed.isdisjoint({"optim", "adam_epsilon", "fp16", "logging_strategy"})
    assert (arguments.learning_rate, arguments.adam_beta2, arguments.logging_first_step) == (1e-4, 0.95, True)
    assert (arguments.warmup_steps, arguments.get_warmup_steps(1000)) == (0.03, 30)
    assert (arguments.gradient_checkpointing, arguments.bf16, arguments.remove_unused_columns) == (True, True, False)
    assert (arguments.eval_steps, arguments.save_steps, arguments.report_to) == (200, 200, ["tensorboard"])
    assert (arguments.train_sampling_strategy, arguments.label_names) == ("group_by_length", ["labels"])
    assert arguments.output_dir == str(tmp_path)


def test_training_section_made_in_code_reaches_the_trainer(tmp_path: Path) -> None:
    section = SFTTrainingConfig(warmup_steps=7, group_by_length=False, bf16=False, gradient_checkpointing=False)
    arguments = section.to_training_arguments(tmp_path, use_cpu=True, eval_strategy="no")
    assert (arguments.get_warmup_steps(1000), arguments.train_sampling_strategy) == (7, "random")
    assert (arguments.bf16, arguments.gradient_checkpointing, arguments.eval_strategy.value) == (False, False, "no")
    with pytest.raises(TypeError, match="nonsense"):
        section.to_training_arguments(tmp_path, nonsense=1)


def test_what_the_trainer_refuses_is_named(tmp_path: Path) -> None:
    config = load_config(SFTConfig, [], ["training.fp16=true", "training.use_cpu=true"])
    with pytest.raises(ConfigError, match=r"training\.bf16, training\.fp16: .*At most one of fp16 and bf16"):
        config.training.to_training_arguments(tmp_path)
    config = load_config(SFTConfig, [], ["training.debug=wrong_word", "training.use_cpu=true"])
    with pytest.raises(ConfigError, match=r"training\.debug: .*wrong_word"):
        config.training.to_training_arguments(tmp_path)


def test_a_tracker_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before models and videos are loaded; the Trainer would raise a RuntimeError after that."""
    monkeypatch.setattr("transformers.integrations.get_available_reporting_integrations", lambda: ["tensorboard"])
    section = SFTTrainingConfig(report_to=("tensorboard", "wandb"))
    with pytest.raises(ConfigError, match=r"training\.report_to: no package for wandb is installed here; pip install"):
        section.to_training_arguments(tmp_path, use_cpu=True)
    for names in (("none",), (), ("tensorboard",)):
        SFTTrainingConfig(report_to=names).to_training_arguments(tmp_path, use_cpu=True)


# ---- DeepSpeed


@pytest.mark.parametrize("name", DEEPSPEED)
def test_deepspeed_files_leave_optimizer_and_rates_to_the_config(name: str, tmp_path: Path) -> None:
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig, unset_hf_deepspeed_config

    blocks = json.loads(DEEPSPEED[name].read_text())
    assert not {"optimizer", "scheduler"} & set(blocks)
    assert check_deepspeed(DEEPSPEED[name]) == str(DEEPSPEED[name])
    arguments = SFTTrainingConfig().to_training_arguments(tmp_path, use_cpu=True)
    try:
        filled = HfTrainerDeepSpeedConfig(str(DEEPSPEED[name]))
        filled.trainer_config_process(arguments)
        model = SimpleNamespace(config=SimpleNamespace(text_config=SimpleNamespace(hidden_size=2560)))
        filled.trainer_config_finalize(arguments, model, num_training_steps=100)
    finally:
        unset_hf_deepspeed_config()
    assert "auto" not in json.dumps(filled.config)
    assert (filled.config["train_micro_batch_size_per_gpu"], filled.config["gradient_accumulation_steps"]) == (2, 8)
    assert (filled.config["bf16"]["enabled"], filled.config["gradient_clipping"]) == (True, 1.0)
    assert filled.config["zero_optimization"]["reduce_bucket_size"] == 2560 * 2560


def test_deepspeed_stages() -> None:
    zero2, zero3 = (json.loads(path.read_text())["zero_optimization"] for path in DEEPSPEED.values())
    assert (zero2["stage"], zero2["overlap_comm"], zero2["contiguous_gradients"]) == (2, True, True)
    assert zero3["stage"] == 3 and zero3["stage3_gather_16bit_weights_on_model_save"] is True
    assert [zero3[part]["device"] for part in ("offload_param", "offload_optimizer")] == ["cpu", "cpu"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"optimizer": {}}', "must not hold the block optimizer"),
        ('{"a": 1', "is not valid JSON"),
        ("[]", "must hold a mapping, got list"),
        ('{"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}', 'zero_force_ds_cpu_optimizer": false'),
        (
            '{"torch_autocast": {"enabled": true, "lower_precision_safe_modules": ["a.b.C"]}}',
            "must not hold torch_autocast.lower_precision_safe_modules: DeepSpeed imports what it names",
        ),
        (None, "cannot be read"),
    ],
)
def test_unusable_deepspeed_files(text: str | None, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=expected):
        check_deepspeed(path)
