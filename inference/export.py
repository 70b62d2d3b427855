"""A checkpoint as a folder that loads by itself anywhere, and on request a repository on the hub.

    scripts/export_to_hf.sh --checkpoint outputs/rl/checkpoint-best --output_dir exports/vtg-4b --merge_lora true
    scripts/export_to_hf.sh --checkpoint outputs/rl/checkpoint-best --output_dir exports/vtg-4b \\
        --push_to_hub true --repo_id me/vtg-4b --private

The folder holds the weights (an adapter merged into its base, or the adapter), processor with chat template, greedy
generation config, prompt contract and model card. Merging is `trainers.merging`, the card `inference.model_card`, the
upload `utils.hub_upload`. Everything happens on the CPU; memory peaks at about one copy of the model.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
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
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import GenerationConfig  # noqa: E402

from inference.lineage import Lineage, base_licence, is_hub_name, read_validation, trace  # noqa: E402
from inference.model_card import PROJECT, CardFacts, rename, write_card  # noqa: E402
from inference.video_infer import DEFAULT_NEW_TOKENS, THINKING_NEW_TOKENS  # noqa: E402
from trainers.generation import vision_token_ids  # noqa: E402
from trainers.merging import merged_weights, weights_digest  # noqa: E402
from trainers.model import ADAPTER_CONFIG, WeightSource, load_base, load_processor, resolve_source  # noqa: E402
from utils.checkpoints import complete_checkpoints, manifest_problems, replace_folder, saving, write_manifest  # noqa: E402
from utils.config import DataConfig, ModelConfig  # noqa: E402
from utils.hub_upload import push_folder, require_account  # noqa: E402
from utils.logging_utils import get_logger, human_bytes, setup_logging  # noqa: E402
from utils.prompts import CONTRACT_FILE, PromptContract  # noqa: E402

ADAPTER_WEIGHTS = "adapter_model.safetensors"
RECORD_FILE = "export.json"
"""What the folder was made from and how: a push that broke off finds it and does not export again."""
DTYPES = ("bfloat16", "float16", "float32")
DEFAULT_DTYPE = "bfloat16"
DEFAULT_SHARD = "4GB"
_AGAIN = "start the same command again"


@dataclass(frozen=True)
class Record:
    """`export.json`. Two exports with the same one hold the same weights."""

    source_sha256: str
    """Of the checkpoint's weights."""
    merge_lora: bool
    dtype: str | None
    """None: an adapter as it was stored."""
    max_shard_size: str
    base_model: str | None
    name: str
    """What the model card loads."""


@dataclass(frozen=True)
class Plan:
    """What to export, checked."""

    source: WeightSource
    contract: PromptContract
    checkpoint: Path
    output_dir: Path
    lineage: Lineage
    record: Record

    @property
    def ships_adapter(self) -> bool:
        """Whether the folder holds an adapter rather than full weights."""
        return self.source.adapter is not None and not self.record.merge_lora

    @property
    def adapter_base(self) -> str:
        """What a shipped adapter names as its base: the hub name where one is known."""
        return self.record.base_model or self.source.base


# ---------------------------------------------------------------------------------------------- what may be exported
def make_plan(args: argparse.Namespace) -> Plan:
    """Check the flags and the checkpoint. Raises UserError for the first thing that is wrong."""
    checkpoint: Path = args.checkpoint
    source, contract = open_checkpoint(checkpoint)
    if not args.merge_lora and source.adapter is None:
        raise UserError(f"--merge_lora false, but {checkpoint} holds full weights and no adapter; leave the flag out")
    if not args.merge_lora and args.max_shard_size is not None:
        raise UserError("--max_shard_size is for merged weights; leave it out with --merge_lora false")
    lineage = trace(checkpoint)
    base_model = args.base_model or (lineage.base if lineage.is_on_hub and source.base == lineage.base else None)
    if args.base_model:
        lineage = Lineage(lineage.runs, args.base_model, is_on_hub=True)
    record = Record(
        source_sha256=weights_digest(checkpoint),
        merge_lora=args.merge_lora,
        dtype=args.dtype or (DEFAULT_DTYPE if args.merge_lora else None),
        max_shard_size=args.max_shard_size or DEFAULT_SHARD,
        base_model=base_model,
        name=args.repo_id or args.output_dir.resolve().name,
    )
    return Plan(source, contract, checkpoint, args.output_dir.expanduser().resolve(), lineage, record)


def open_checkpoint(folder: Path) -> tuple[WeightSource, PromptContract]:
    """The weights in `folder` and their prompt contract.

    Raises UserError when the folder is missing, incomplete, without a prompt contract or without safetensors, and when
    the base of an adapter does not exist.
    """
    if not folder.is_dir():
        raise UserError(f"--checkpoint {folder} is no folder; name one that holds weights, e.g. RUN/checkpoint-best")
    source = resolve_source(str(folder))
    if problems := manifest_problems(folder):
        others = ", ".join(path.name for path in complete_checkpoints(folder.parent))
        hint = f"; complete ones beside it: {others}" if others else ""
        raise UserError(f"--checkpoint {folder} is not a complete checkpoint: {'; '.join(problems[:3])}{hint}")
    if source.contract is None:
        raise UserError(
            f"--checkpoint {folder} has no {CONTRACT_FILE}: nobody could say with which prompt, frame rate and pixel "
            "budget the model is to be asked. Copy the file from the run folder that trained it"
        )
    if not any(folder.glob("*model*.safetensors")):
        raise UserError(f"--checkpoint {folder} holds no safetensors; weights in other formats are not exported")
    return source, source.contract


def require_empty(folder: Path) -> None:
    """Raise UserError when something would have to be deleted, or `folder` cannot be made."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        inside = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    except OSError as error:
        raise UserError(f"--output_dir {folder} cannot be made a folder: {error.strerror}. Choose another") from error
    if inside:
        raise UserError(
            f"--output_dir {folder} is not empty ({', '.join(inside[:3])}{', ...' if len(inside) > 3 else ''}); choose "
            "another name. Nothing was changed"
        )


def is_exported(plan: Plan) -> bool:
    """Whether the output folder holds this very export, whole; its name in the card may be another."""
    path = plan.output_dir / RECORD_FILE
    if not path.is_file() or manifest_problems(plan.output_dir):
        return False
    try:
        stored = Record(**json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, TypeError, UnicodeDecodeError):
        return False
    return replace(stored, name=plan.record.name) == plan.record


# ---------------------------------------------------------------------------------------------- the folder
def export(plan: Plan) -> None:
    """Write the folder; it appears whole or not at all. Raises UserError for what cannot be loaded, and a full disk."""
    require_empty(plan.output_dir)
    unfinished = plan.output_dir.with_name(f".{plan.output_dir.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of an export that was killed
    try:
        if plan.ships_adapter:
            write_adapter(plan, unfinished)
        else:
            write_full_weights(plan, unfinished)
        with saving(plan.output_dir, 0, _AGAIN):
            write_companions(plan, unfinished)
            write_manifest(unfinished)
            # After the manifest, which then stays true when the card is edited by hand.
            (unfinished / "README.md").write_text(write_card(card_facts(plan)), encoding="utf-8")
            write_json(unfinished / RECORD_FILE, asdict(plan.record))
        replace_folder(unfinished, plan.output_dir)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_full_weights(plan: Plan, folder: Path) -> None:
    """Base + adapter as one model, or full weights as they are, in the wanted dtype."""
    model = full_model(plan)
    num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    get_logger().info("writing %s of weights", human_bytes(num_bytes))
    with saving(plan.output_dir, num_bytes, _AGAIN):
        model.save_pretrained(folder, max_shard_size=plan.record.max_shard_size)


def full_model(plan: Plan) -> Any:
    """The model to write. Raises UserError when it cannot be loaded, or holds values that are not finite."""
    source, dtype = plan.source, getattr(torch, str(plan.record.dtype))
    runs = plan.lineage.runs
    config = ModelConfig(
        name_or_path=source.base,
        torch_dtype=plan.record.dtype,  # type: ignore[arg-type]
        attn_implementation="sdpa",
        revision=runs[0].config.model.revision if runs and not Path(source.base).is_dir() else None,
    )
    if source.adapter is not None:
        get_logger().info("merging %s into %s", plan.checkpoint, source.base)
        try:
            model = merged_weights(source, config, dtype, progress=True)
        except UserError as error:
            where = source.adapter / ADAPTER_CONFIG
            raise UserError(f"{error} (named by base_model_name_or_path in {where})") from error
    else:
        tower = plan.contract.vision_tower
        model = load_base(source.base, config, dtype=dtype, vision_tower=tower, tower_is_stored=tower is not None)
    _require_finite(model, str(plan.record.dtype))
    return model


def _require_finite(model: torch.nn.Module, dtype: str) -> None:
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            remedy = (
                "it may not fit float16: try --dtype bfloat16" if dtype == "float16" else "choose another checkpoint"
            )
            raise UserError(f"{name} holds values that are not finite in {dtype}; {remedy}")


def write_adapter(plan: Plan, folder: Path) -> None:
    """The adapter as plain PEFT loads it, in another dtype if one was asked for."""
    assert plan.source.adapter is not None
    weights = plan.source.adapter / ADAPTER_WEIGHTS
    settings = json.loads((plan.source.adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    with saving(plan.output_dir, weights.stat().st_size, _AGAIN):
        folder.mkdir()
        write_json(folder / ADAPTER_CONFIG, {**settings, "base_model_name_or_path": plan.adapter_base})
        if plan.record.dtype is None:
            shutil.copyfile(weights, folder / ADAPTER_WEIGHTS)
        else:
            dtype = getattr(torch, plan.record.dtype)
            tensors = {name: value.to(dtype) for name, value in load_file(weights).items()}
            save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def write_companions(plan: Plan, folder: Path) -> None:
    """Processor and chat template, generation config, prompt contract."""
    processor = load_processor(plan.source)
    carry_sampling(processor.video_processor, plan.contract.data)
    processor.save_pretrained(folder)
    greedy_defaults(processor, thinking=plan.contract.prompt.thinking).save_pretrained(folder)
    plan.contract.save(folder)


def carry_sampling(video_processor: Any, data: DataConfig) -> None:
    """Give the processor the frame rate and pixel budget of the training, for those who load it without this project.

    Here they change nothing: `datasets.encoding` hands it frames that are sampled and sized already.
    """
    video_processor.fps = data.fps
    video_processor.min_frames, video_processor.max_frames = data.min_frames, data.max_frames
    video_processor.size = {"shortest_edge": data.min_pixels_per_frame, "longest_edge": data.total_pixels}
    video_processor.cap_pixels_per_frame = True
    pixels_per_token = (video_processor.patch_size * video_processor.merge_size) ** 2
    video_processor.max_video_tokens = max(1, data.max_pixels_per_frame // pixels_per_token)


def greedy_defaults(processor: Any, *, thinking: bool) -> GenerationConfig:
    """Lets plain `generate` do what `VideoTemporalInference` does; the base model's own config samples."""
    tokenizer = processor.tokenizer
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=THINKING_NEW_TOKENS if thinking else DEFAULT_NEW_TOKENS,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=vision_token_ids(processor),
    )


def card_facts(plan: Plan) -> CardFacts:
    """What the model card says."""
    return CardFacts(
        name=plan.record.name,
        lineage=plan.lineage,
        licence=base_licence(plan.lineage),
        contract=plan.contract,
        validation=read_validation(plan.checkpoint),
        dtype=plan.record.dtype or "its stored dtype",
        adapter_base=plan.adapter_base if plan.ships_adapter else None,
    )


def adopt_name(plan: Plan) -> None:
    """Let the card of a finished export load the name of this one, as when it is pushed after a first look."""
    path = plan.output_dir / RECORD_FILE
    earlier = json.loads(path.read_text(encoding="utf-8"))["name"]
    card = plan.output_dir / "README.md"
    if earlier != plan.record.name and card.is_file():
        card.write_text(rename(card.read_text(encoding="utf-8"), earlier, plan.record.name), encoding="utf-8")
    write_json(path, asdict(plan.record))


# ---------------------------------------------------------------------------------------------- command line
def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="export_to_hf.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    switch: dict[str, Any] = {"type": _switch, "nargs": "?", "const": True, "metavar": "true|false"}
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder with an adapter or full weights")
    parser.add_argument("--output_dir", type=Path, required=True, help="a new or empty folder")
    parser.add_argument("--merge_lora", default=True, **switch, help="merge an adapter (default), or ship it as it is")
    parser.add_argument(
        "--dtype", help=f"of the weights: {', '.join(DTYPES)} (default: {DEFAULT_DTYPE}; adapter: as is)"
    )
    parser.add_argument(
        "--max_shard_size", type=_size, help=f"largest weight file, e.g. 4GB (default: {DEFAULT_SHARD})"
    )
    parser.add_argument("--base_model", help="hub name of the base, where the checkpoint only knows a folder")
    parser.add_argument("--push_to_hub", default=False, **switch, help="upload the folder (default: false)")
    parser.add_argument("--repo_id", help="repository, owner/name; the model card loads this name")
    parser.add_argument("--private", default=None, **switch, help="make a new repository private (default: account's)")
    args = parser.parse_args(argv)
    _check_flags(args)
    return args


def _switch(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"must be true or false, got {text!r}")
    return text.lower() == "true"


def _size(text: str) -> str:
    if not re.fullmatch(r"[1-9]\d*(KB|MB|GB)", text):
        raise argparse.ArgumentTypeError(f"must be a whole number with KB, MB or GB, as 4GB, got {text!r}")
    return text


def _check_flags(args: argparse.Namespace) -> None:
    if args.dtype is not None and args.dtype not in DTYPES:
        raise UserError(f"--dtype must be one of {', '.join(DTYPES)}, got {args.dtype!r}")
    if args.push_to_hub and not args.repo_id:
        raise UserError("--push_to_hub true needs --repo_id owner/name, the repository to write to")
    if args.base_model and not is_hub_name(args.base_model):
        raise UserError(f"--base_model must be a name on the hub (owner/name), got {args.base_model!r}")
    if args.private is not None and not args.push_to_hub:
        raise UserError("--private is for a repository that --push_to_hub true makes; leave it out without a push")


def main() -> None:
    """Check, export, push."""
    args = parse_args()
    setup_logging()
    plan = make_plan(args)
    _check_base(plan, pushed=args.push_to_hub)
    if args.push_to_hub:
        plan = replace(plan, record=replace(plan.record, name=require_account(args.repo_id)))
    if args.push_to_hub and is_exported(plan):
        get_logger().info("%s holds this export already: only the upload is left", plan.output_dir)
        adopt_name(plan)
    else:
        export(plan)
        print(f"exported: {args.output_dir}")  # noqa: T201
    if args.push_to_hub:
        message = f"Export with {PROJECT}"
        print(f"pushed: {push_folder(plan.output_dir, plan.record.name, private=args.private, message=message)}")  # noqa: T201


def _check_base(plan: Plan, *, pushed: bool) -> None:
    """An adapter whose base is a folder of this machine is of no use to others."""
    if plan.lineage.is_on_hub and (not plan.ships_adapter or plan.record.base_model):
        return
    base = plan.source.base if plan.ships_adapter else plan.lineage.base
    if plan.ships_adapter and pushed:
        raise UserError(
            f"the base of this adapter is a folder of this machine ({base}), which nobody else has. Give its name on "
            "the hub with --base_model, or push merged weights with --merge_lora true"
        )
    get_logger().warning(
        "the base is a folder (%s), so the model card cannot name it; --base_model owner/name does", base
    )


if __name__ == "__main__":
    run_command(main)
