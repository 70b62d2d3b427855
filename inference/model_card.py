"""The model card of an export: what the model is, how it was trained and asked, how it did, and how to run it.

Facts come from `inference.lineage` and the prompt contract; here they become Markdown with the hub's front matter.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import yaml

from inference.lineage import BASELINES, Lineage, TrainedRun, Validation
from utils.metrics import METRICS
from utils.prompts import PromptContract, build_messages, format_answer
from utils.spans import Span

PROJECT = "Qwen3-VL-GRPO-VTG"
_EXAMPLE = "the person opens the door"
_STAGES = {"SFT": "supervised fine-tuning", "GRPO": "reinforcement learning with temporal rewards (GRPO)"}
_METRIC_NAMES = {
    "set_IoU": "IoU of all windows",
    "absent_accuracy": "absence recognised",
    "parse_failure_rate": "unreadable answers",
}


@dataclass(frozen=True)
class CardFacts:
    """What a card is written from."""

    name: str
    """What a reader loads it by: `owner/name` on the hub, or the folder's name."""
    lineage: Lineage
    licence: str
    """Of the base model, as the hub spells it."""
    contract: PromptContract
    validation: Validation | None
    dtype: str
    """Of the stored weights."""
    adapter_base: str | None = None
    """For an adapter, what its base is loaded by; None for full weights."""


def write_card(facts: CardFacts) -> str:
    """The whole README.md."""
    parts = [
        _front_matter(facts),
        f"# {facts.name.rpartition('/')[2]}",
        _introduction(facts),
        _usage(facts),
        _asked(facts.contract),
        _training(facts),
        _validated(facts),
        _licence(facts),
        _limits(facts),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def rename(card: str, old: str, new: str) -> str:
    """The card with its snippets loading `new` in the place of `old`; all else, edits by hand included, stays."""
    for line in ("model_id = {}", "model_path={}"):
        card = card.replace(line.format(json.dumps(old)), line.format(json.dumps(new)))
    return card


def _front_matter(facts: CardFacts) -> str:
    stages = {run.stage.lower() for run in facts.lineage.runs}
    metadata: dict[str, Any] = {}
    if facts.lineage.is_on_hub:
        metadata["base_model"] = facts.lineage.base
        metadata["base_model_relation"] = "adapter" if facts.adapter_base else "finetune"
    metadata |= {
        "license": facts.licence,
        "pipeline_tag": "video-text-to-text",
        "library_name": "peft" if facts.adapter_base else "transformers",
        "tags": ["qwen3_vl", "video-temporal-grounding", "video-moment-retrieval", *sorted(stages)],
    }
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---"


def _introduction(facts: CardFacts) -> str:
    what = "a LoRA adapter (PEFT)" if facts.adapter_base else f"full weights in {facts.dtype}"
    how = " and ".join(_STAGES[run.stage] for run in facts.lineage.runs) or "training"
    return (
        f'Answers "when in this video does this happen?" with start and end times in seconds. It is {_base(facts)} '
        f"after {how}, done with {PROJECT}; this repository holds {what}."
    )


def _base(facts: CardFacts) -> str:
    name = facts.lineage.base_name
    return f"[{name}](https://huggingface.co/{name})" if facts.lineage.is_on_hub else f"`{name}`"


# ---------------------------------------------------------------------------------------------- snippets
def _usage(facts: CardFacts) -> str:
    packages = "transformers torch torchvision accelerate av" + (" peft" if facts.adapter_base else "")
    parts = ["## Use"]
    if facts.contract.vision_tower is None:
        parts += [f"With transformers alone (`pip install {packages}`):", _fenced(transformers_snippet(facts))]
        more = "it also parses the answer, decodes a stretch of a file, and reads variable frame rates truly"
    else:
        more = f"its vision tower is `{facts.contract.vision_tower}`, which transformers does not have"
    parts += [f"With the code it was trained with ({more}):", _fenced(project_snippet(facts))]
    parts.append(
        "Decoding is greedy by default here (`generation_config.json`), other than in the base model, which samples. "
        "vLLM ignores that: pass `temperature=0`."
    )
    return "\n\n".join(parts)


def _fenced(code: str) -> str:
    return f"```python\n{code}\n```"


def transformers_snippet(facts: CardFacts) -> str:
    """Python that answers one query without this project; it expects `video.mp4` in the working directory."""
    messages = build_messages(facts.contract.prompt, "{sentence}")
    template = messages[-1]["content"][-1]["text"]
    messages[-1]["content"][-1]["text"] = "@question@"
    listed = json.dumps(messages, ensure_ascii=False).replace('"@question@"', "question")
    return f"""\
{_imports(facts)}

model_id = {json.dumps(facts.name)}
processor = AutoProcessor.from_pretrained(model_id)
{_loading(facts)}

query = {json.dumps(_EXAMPLE)}
question = {json.dumps(template, ensure_ascii=False)}.replace("{{sentence}}", query)
messages = {listed}
# The processor carries the frame rate and the pixel budget of the training.
frames, metadata = load_video("video.mp4", backend="pyav", sample_indices_fn=processor.video_processor.sample_frames)
text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
inputs = processor(
    text=[text], videos=[frames], video_metadata=[metadata], do_sample_frames=False, return_tensors="pt"
).to(model.device)
output = model.generate(**inputs, generation_config=GenerationConfig.from_pretrained(model_id))
print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""


def _imports(facts: CardFacts) -> str:
    lines = [
        "from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig",
        "from transformers.video_utils import load_video",
    ]
    return "\n".join(["from peft import PeftModel", *lines] if facts.adapter_base else lines)


def _loading(facts: CardFacts) -> str:
    load = 'AutoModelForImageTextToText.from_pretrained({}, dtype="auto", device_map="auto")'
    if not facts.adapter_base:
        return f"model = {load.format('model_id')}"
    base = load.format(json.dumps(facts.adapter_base))
    return f"base = {base}\nmodel = PeftModel.from_pretrained(base, model_id)"


def project_snippet(facts: CardFacts) -> str:
    """Python that answers one query with `VideoTemporalInference`; it expects `video.mp4`."""
    return f"""\
from inference.video_infer import VideoTemporalInference

model = VideoTemporalInference(model_path={json.dumps(facts.name)})
found = model.predict(video_path="video.mp4", query={json.dumps(_EXAMPLE)})
print(found["raw_text"])  # found["segments"]: [[start, end], ...] in seconds on the file's clock"""


# ---------------------------------------------------------------------------------------------- what was done
def _asked(contract: PromptContract) -> str:
    prompt, data = contract.prompt, contract.data
    thought = "..." if prompt.thinking else None
    lines = [f"system: {prompt.system}"] if prompt.system else []
    lines += [
        f"user: <video> {build_messages(prompt, _EXAMPLE)[-1]['content'][-1]['text']}",
        f"assistant: {format_answer(prompt, [Span(3.2, 7.9)], thought)}",
        f"several windows: {format_answer(prompt, [Span(3.2, 7.9), Span(12.0, 15.4)], thought)}",
        f"the event is absent: {format_answer(prompt, [], thought)}",
    ]
    conversation = "\n".join(f"    {line}" for text in lines for line in text.splitlines())
    table = _table(
        ("", ""),
        [
            ("frames per second", f"{data.fps:g}, {_range(data.min_frames, data.max_frames)} frames a clip"),
            ("pixels per frame", _range(data.min_pixels_per_frame, data.max_pixels_per_frame)),
            ("pixels per clip", f"{data.total_pixels:,} at most, over all frames"),
            ("tokens per prompt", f"{data.max_prompt_tokens:,} at most"),
            ("transformers", contract.transformers_version),
        ],
    )
    return (
        "## Prompt, frame rate, pixel budget\n\n"
        f"Video before question:\n\n{conversation}\n\n{table}\n\n"
        "`prompt_contract.json` holds the same for programs. Releases of transformers have differed in how a video is "
        "written into the prompt: serve with the one named here."
    )


def _range(low: int, high: int) -> str:
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _training(facts: CardFacts) -> str:
    if not facts.lineage.runs:
        return "## Training data\n\nNot on record: the checkpoint was exported without its run's folder."
    head = ("stage", "trained on", "validated on", "what trained", "learning rate", "length")
    return f"## Training data\n\n{_table(head, [_run_row(run) for run in facts.lineage.runs])}"


def _run_row(run: TrainedRun) -> tuple[str, ...]:
    lora, data, training = run.config.lora, run.config.data, run.config.training
    in_full = f"; in full: {', '.join(lora.modules_to_save)}" if lora.modules_to_save else ""
    names = [name for name in lora.target_modules if name not in lora.modules_to_save]
    settings: Any = training
    steps, epochs = settings.max_steps, settings.num_train_epochs
    return (
        run.stage,
        ", ".join(f"`{source.path.name}`" for source in data.train) or "-",
        ", ".join(f"`{source.path.name}`" for source in data.val) or "-",
        f"LoRA r={lora.r} on {', '.join(names)}{in_full}" if lora.enabled else "all weights",
        f"{settings.learning_rate:g}",
        f"{steps} steps" if steps > 0 else f"{epochs:g} epochs",
    )


def _validated(facts: CardFacts) -> str:
    found = facts.validation
    if found is None:
        return "## Metrics\n\nNone on record: the checkpoint was not validated."
    rows = [_metric_row(name, found) for name in METRICS if not math.isnan(found.scores[name])]
    how = " with 95 % bootstrap intervals" if found.intervals else " (without intervals: the answers are not on record)"
    baselines = ", beside constant answers that need no video" if found.baselines else ""
    head = ("metric, in %", "value", "95 % interval", *(BASELINES[kind] for kind in found.baselines))
    return (
        f"## Metrics\n\nGreedy answers to the {found.scores['num_samples']:.0f} validation queries at step "
        f"{found.step}{how}{baselines}. Unreadable answers count as 0.\n\n{_table(head, rows)}"
    )


def _metric_row(name: str, found: Validation) -> tuple[str, ...]:
    interval = "{:.1f} to {:.1f}".format(*found.intervals[name]) if found.intervals else "-"
    others = [f"{scores[name]:.1f}" for scores in found.baselines.values()]
    return (_METRIC_NAMES.get(name, name), f"{found.scores[name]:.1f}", interval, *others)


def _licence(facts: CardFacts) -> str:
    if facts.licence == "other":
        note = f"These weights are derived from {_base(facts)}: its licence applies, and was not on record here."
    else:
        note = f"These weights are derived from {_base(facts)}, whose licence, `{facts.licence}`, applies to them."
    return f"## Licence\n\n{note} The data it was trained on has terms of its own."


def _limits(facts: CardFacts) -> str:
    return (
        "## Limits\n\nTimes are only as fine as the sampled frames. The metrics are of one validation set: videos of "
        "another kind or length may do worse. The snippet with transformers alone takes the file's average frame "
        "rate for its clock, so its times drift on files of variable rate."
    )


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
