"""The configuration: what every key means, which values it takes, and reading and writing it as YAML (contract 5).

The `training` sections are in `utils.config_training` (SFT) and `utils.config_rl` (GRPO). Errors name key, value, rule
and line, all of them at once (`utils.config_yaml` knows the lines, `utils.config_errors` the words).
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import (
    BeforeValidator,
    Field,
    RootModel,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from utils.common import atomic_open
from utils.config_base import Broken, ConfigError, Names, RuleError, StrictModel
from utils.config_errors import Finding, SectionModel, findings, in_order, read_section, spoilt, unknown_key
from utils.config_rl import RewardTerms, RLTrainingConfig, default_rewards
from utils.config_trainer import TrainerSection
from utils.config_training import SFTTrainingConfig
from utils.config_yaml import apply_overrides, merge, read_file, to_yaml

if TYPE_CHECKING:
    from utils.video import FrameBudget

__all__ = [
    "AnnotationSource",
    "Broken",
    "ConfigError",
    "DataConfig",
    "DataFile",
    "LoraConfig",
    "ModelConfig",
    "PromptConfig",
    "RLConfig",
    "RLTrainingConfig",
    "RuleError",
    "SFTConfig",
    "SFTTrainingConfig",
    "SelectConfig",
    "StrictModel",
    "TrainerSection",
    "load_config",
    "save_config",
]


class ModelConfig(StrictModel):
    """Which model, and how it is loaded."""

    name_or_path: str = Field("Qwen/Qwen3-VL-4B-Instruct", min_length=1)
    """A Qwen3-VL on the Hugging Face hub, or a folder with one."""
    torch_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Type of the weights in memory."""
    attn_implementation: Literal["flash_attention_2", "sdpa", "eager"] = "flash_attention_2"
    """Attention kernels. flash_attention_2 falls back to sdpa where the package is not installed."""
    vision_tower: str | None = None
    """`package.module:factory` of a vision encoder to use instead of the model's own; null keeps its own."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models whose code you have read."""
    allow_pickle: bool = False
    """Read weights that are there as pickle alone (pytorch_model.bin, adapter_model.bin). Only from whom you trust."""
    revision: str | None = None
    """Branch, tag or commit on the hub; null takes the newest."""

    @field_validator("vision_tower")
    @classmethod
    def _is_import_path(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", value):
            raise ValueError("must look like package.module:factory")
        return value


class LoraConfig(StrictModel):
    """Low-rank adapters on the language model, and modules trained in full beside them."""

    enabled: bool = True
    """false trains the weights themselves (full fine-tuning)."""
    r: int = Field(64, ge=1)
    """Rank of the adapters."""
    lora_alpha: int = Field(128, ge=1)
    """Adapters are scaled by lora_alpha / r."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the adapters' inputs zeroed in training."""
    target_modules: Names = ("q_proj", "k_proj", "v_proj", "o_proj", "lm_head")
    """Names of the linear layers that get adapters."""
    modules_to_save: Names = ("embed_tokens", "lm_head")
    """Modules trained in full, at training.head_lr. One that is also in target_modules gets no adapter."""

    def rules(self) -> Iterable[Broken]:
        """LoRA needs a layer to sit on."""
        if self.enabled and not self.target_modules:
            text = "lora.target_modules must name at least one layer while lora.enabled is true"
            keys = ("lora.target_modules", "lora.enabled")
            yield Broken(keys, text, "name layers such as q_proj, or set lora.enabled: false")


class AnnotationSource(StrictModel):
    """One JSONL file of annotation rows. In YAML the path alone will do."""

    path: Annotated[Path, Field(strict=False)]
    """Relative to the working directory."""
    weight: float = Field(1.0, gt=0)
    """How often the file's rows are drawn, relative to their number: 2 shows each twice an epoch, 0.5 half of them."""

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        if not isinstance(value, str | Path | dict):
            raise ValueError("must be a path, or a mapping of path and weight")
        return value if isinstance(value, dict) else {"path": value}

    @field_validator("path", mode="before")
    @classmethod
    def _not_empty(cls, value: Any) -> Any:
        if value == "":
            raise ValueError("must be the path of a JSONL file")
        return value


def _as_sources(value: Any) -> Any:
    """Null stands for no file, a single item for a list of one."""
    if value is None:
        return []
    return value if isinstance(value, list | tuple) else [value]


Sources = Annotated[tuple[AnnotationSource, ...], Field(strict=False), BeforeValidator(_as_sources)]


class SelectConfig(StrictModel):
    """Which training rows GRPO draws: those of middling difficulty, by a score that an earlier pass put into them."""

    by: str = Field("model_iou_mean", min_length=1)
    """Key in the rows' `kwargs` that holds the score."""
    mean: float = 0.5
    """The drawn scores follow a Gaussian around this one, however the scores of all rows are spread."""
    std: float = Field(0.2, gt=0)
    """Width of that Gaussian."""
    min_iou: float = Field(0.05, ge=0)
    """Rows with a lower score are left out: a model that never finds them has nothing to compare."""
    num_rows: int | None = Field(None, ge=1)
    """Rows to draw, each once at most; null keeps each row with a probability proportional to Gaussian / density of the
    scores, 1 at most, and so about as many rows as can still follow the Gaussian."""
    seed: int = Field(0, ge=0)
    """Seed of the drawing; the same rows and seed always give the same."""


class DataConfig(StrictModel):
    """Which rows, and how their videos are decoded."""

    train: Sources = ()
    """Annotation files to train on."""
    val: Sources = ()
    """Annotation files to validate on during training."""
    test: Sources = ()
    """Annotation files held out for evaluation; training never reads their answers."""
    videos_root: Annotated[Path, Field(strict=False)] | None = None
    """Folder that relative video paths start from, and that no row may leave by `..`, an absolute path or a symbolic
    link; null: the annotation file's folder, then the working directory, and any path is opened."""
    backend: Literal["auto", "decord", "pyav", "qwen_vl_utils"] = "auto"
    """Video decoder; auto takes the fastest."""
    cache_dir: Annotated[Path, Field(strict=False)] | None = None
    """Folder that keeps decoded frames, so that no clip is decoded twice; several runs and machines may share it. null
    keeps none. Relative to the working directory."""
    cache_max_gb: float = Field(200.0, gt=0)
    """Size of that folder at most, in GB of 1e9 bytes; what was not used for longest goes first."""
    fps: float = Field(2.0, gt=0)
    """Frames sampled per second of video."""
    min_frames: int = Field(4, ge=1)
    """Frames sampled at least, however short the clip."""
    max_frames: int = Field(768, ge=1)
    """Frames sampled at most; a longer clip is sampled more sparsely."""
    min_pixels_per_frame: int = Field(16384, ge=1)
    """Smaller frames are enlarged to this many pixels (width x height)."""
    max_pixels_per_frame: int = Field(262144, ge=1)
    """Larger frames are reduced to this many pixels (width x height)."""
    total_pixels: int = Field(16777216, ge=1)
    """Pixels over all frames of a clip; one visual token is 2 frames x 32 x 32 pixels."""
    max_prompt_tokens: int = Field(16384, ge=1)
    """Longest prompt, visual tokens and markers included."""
    on_overlong: Literal["drop_frames", "refuse"] = "drop_frames"
    """What to do with a longer prompt: sample fewer frames evenly and say so, or count the row as bad."""
    trim: Literal["relative", "absolute", "pre_cut"] = "relative"
    """What `timestamp` counts from in a row with video_start: that point, the file's start, or a file already cut."""
    decode_timeout_s: float | None = Field(300.0, gt=0)
    """Seconds after which the decoding of one clip is given up and its process killed; null decodes in the reading
    process itself, where nothing can end a hang, and a crash ends the run."""
    quarantine: Annotated[Path, Field(strict=False)] | None = None
    """JSONL list of the videos on which a decoder hung or crashed, shared by all processes: they are not tried again.
    null: each process remembers its own."""
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    """Share of bad rows and unreadable videos past which a run stops; each one is named and counted."""
    select: SelectConfig | None = None
    """A choice of the training rows, for GRPO; null takes all."""

    @field_validator("cache_dir", "quarantine", mode="before")
    @classmethod
    def _is_named(cls, value: Any, info: ValidationInfo) -> Any:
        if value == "":
            wanted = {
                "cache_dir": "a folder, or null to keep no frames",
                "quarantine": "the path of a list, or null to keep it in memory",
            }
            raise ValueError(f"must be {wanted[str(info.field_name)]}")
        return value

    def rules(self) -> Iterable[Broken]:
        """Minima are no more than maxima."""
        for low, high in (("min_frames", "max_frames"), ("min_pixels_per_frame", "max_pixels_per_frame")):
            least, most = getattr(self, low), getattr(self, high)
            if least > most:
                text = f"data.{low} must be <= data.{high}, got {least} and {most}"
                yield Broken((f"data.{low}", f"data.{high}"), text)

    @property
    def budget(self) -> FrameBudget:
        """The sampling keys, as the video readers take them."""
        from utils.video import FrameBudget  # decoders are only needed once videos are read

        return FrameBudget(
            fps=self.fps,
            min_frames=self.min_frames,
            max_frames=self.max_frames,
            min_pixels_per_frame=self.min_pixels_per_frame,
            max_pixels_per_frame=self.max_pixels_per_frame,
            total_pixels=self.total_pixels,
        )


def _placeholders(template: str) -> set[str]:
    """Names in braces. Raises ValueError when the braces do not match."""
    try:
        return {name for _, name, _, _ in Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise ValueError(f"must have matching braces ({error}; write {{{{ for a plain brace)") from error


class PromptConfig(StrictModel):
    """The words of question and answer. They are stored with every checkpoint."""

    system: str | None = None
    """System message; null for none."""
    question: str = (
        'When does the following event happen in the video? "{sentence}" Give its start and end time in seconds.'
    )
    """The question after the video; `{sentence}` is the row's sentence."""
    thinking: bool = False
    """Let the model think in <think> tags and answer in <answer> tags."""
    thinking_instruction: str = (
        "First think it through inside <think> </think>, then give the answer inside <answer> </answer>."
    )
    """Appended to the question when thinking is on."""
    answer: str = "From {start:.1f} to {end:.1f} seconds."
    """The answer for one window; `{start}` and `{end}` are seconds from the clip's start."""
    absent: str = "The event does not happen in the video."
    """The answer for an event that does not happen."""

    @field_validator("question")
    @classmethod
    def _asks(cls, value: str) -> str:
        if _placeholders(value) != {"sentence"}:
            raise ValueError("must contain {sentence} and no other braces")
        return value

    @field_validator("answer")
    @classmethod
    def _answers(cls, value: str) -> str:
        if _placeholders(value) != {"start", "end"}:
            raise ValueError("must contain {start} and {end} and no other braces")
        from utils.spans import parse_spans

        try:
            text = value.format(start=12.0, end=45.0)
        except ValueError as error:
            raise ValueError(f"must hold formats for numbers, as in {{start:.1f}} ({error})") from error
        if parse_spans(text) != [(12.0, 45.0)]:
            raise ValueError(f"must be read back as the numbers it was filled with, which {text!r} is not")
        return value

    @field_validator("absent")
    @classmethod
    def _says_absent(cls, value: str) -> str:
        from utils.spans import parse_spans

        if parse_spans(value) != []:
            raise ValueError("must be read back as an absent event, as in 'The event does not happen in the video.'")
        return value


class DataFile(StrictModel):
    """What a `--data_config` file holds: rows and sampling, and the prompt."""

    data: DataConfig = DataConfig()
    prompt: PromptConfig = Field(default_factory=PromptConfig)


class SFTConfig(StrictModel):
    """Everything of a supervised fine-tuning run but its folder and its launch, which are flags."""

    model: ModelConfig = ModelConfig()
    lora: LoraConfig = LoraConfig()
    data: DataConfig = DataConfig()
    prompt: PromptConfig = Field(default_factory=PromptConfig)
    training: SerializeAsAny[SFTTrainingConfig] = SFTTrainingConfig()

    def rules(self) -> Iterable[Broken]:
        """Rules between sections."""
        yield from _between_sections(self.lora, self.data, self.training)
        if self.data.select is not None:
            text = "data.select is for GRPO alone, and SFT takes every row of data.train"
            yield Broken(("data.select",), text, "leave it out, or set data.select=null")


class RLConfig(StrictModel):
    """Everything of a GRPO run but its folder and its launch, which are flags."""

    model: ModelConfig = ModelConfig()
    lora: LoraConfig = LoraConfig()
    data: DataConfig = DataConfig()
    prompt: PromptConfig = Field(default_factory=PromptConfig)
    rewards: dict[str, RewardTerms] = Field(default_factory=default_rewards, min_length=1)
    """What completions earn: each reward's name with its weight and its own keys, as `rewards.CompositeReward` takes
    them, which knows the names. Whoever names any replaces the default two."""
    training: SerializeAsAny[RLTrainingConfig] = RLTrainingConfig()

    @property
    def rewards_for_prompt(self) -> dict[str, RewardTerms]:
        """`rewards`, where the one for format asks for the form that the prompt asks for, unless it says `thinking`
        itself (null takes either)."""
        terms = dict(self.rewards)
        if "format" in terms:
            terms["format"] = {"thinking": self.prompt.thinking, **terms["format"]}
        return terms

    def rules(self) -> Iterable[Broken]:
        """Rules between sections."""
        yield from _between_sections(self.lora, self.data, self.training)


def _between_sections(
    lora: LoraConfig, data: DataConfig, training: SFTTrainingConfig | RLTrainingConfig
) -> Iterable[Broken]:
    """What SFT and GRPO ask of their sections alike: full copies train, and early stopping has rows to go by."""
    heads = [name for name in ("embed_tokens", "lm_head") if name in lora.modules_to_save]
    if lora.enabled and heads and not training.head_lr:
        yield Broken(
            ("training.head_lr", "lora.modules_to_save"),
            f"training.head_lr must be > 0 while lora.modules_to_save holds {' and '.join(heads)}, got 0",
            "raise training.head_lr, or take them out of lora.modules_to_save",
        )
    if training.early_stopping_patience and not data.val:
        text = "training.early_stopping_patience needs validations, and data.val is empty"
        keys = ("training.early_stopping_patience", "data.val")
        yield Broken(keys, text, "name a file in data.val, or set the patience to null")


ConfigT = TypeVar("ConfigT", bound=StrictModel)


def load_config(
    cls: type[ConfigT],
    paths: Sequence[str | os.PathLike[str]] = (),
    overrides: Sequence[str] = (),
    *,
    passed_over: Collection[str] = (),
) -> ConfigT:
    """The configuration in the YAML files `paths`, with the `section.key=value` words of `overrides` laid over them.

    A section stands in one of the files at most; one that stands nowhere keeps its defaults. The values of overrides
    are YAML, and of two for one key the later wins. The sections `passed_over` may stand there and are not read.
    Imports transformers (and trl for GRPO) when `cls` has a `training` section.
    Raises ConfigError with every mistake of all files and overrides.
    """
    document = merge([read_file(Path(path), list(cls.model_fields)) for path in paths])
    apply_overrides(document, overrides)
    found = [Finding((), problem) for problem in document.problems]
    unknown = [name for name in document.values if name not in cls.model_fields and name not in passed_over]
    found += [Finding((), unknown_key((name,), cls.model_fields, document)) for name in unknown]
    models = _section_models(cls)
    sections = {name: read_section(name, models, document, found) for name in models}
    sections = {name: section for name, section in sections.items() if section != {}}  # `rewards` without a reward
    try:
        config = cls(**sections)
    except ValidationError as error:
        late = findings(error, "", cls, document) if document.complete else []
        found += [finding for finding in late if spoilt(found).isdisjoint(finding.keys)]
    if found:
        raise ConfigError(in_order(found, paths))
    return config


def _section_models(cls: type[StrictModel]) -> dict[str, SectionModel]:
    """The model of each section: with the Trainer's keys where it has a Trainer, a RootModel where keys are free."""
    models: dict[str, Any] = {name: field.annotation for name, field in cls.model_fields.items()}
    for name, model in models.items():
        if not isinstance(model, type):  # dict[str, RewardTerms]
            models[name] = RootModel[model]  # type: ignore[valid-type]
        elif issubclass(model, TrainerSection):
            models[name] = model.complete()
    return models


def save_config(config: StrictModel, path: str | os.PathLike[str]) -> None:
    """Write `config` as YAML that `load_config` reads back to an equal one, atomically."""
    with atomic_open(path) as handle:
        handle.write(to_yaml(config.model_dump(mode="json")))
