"""The memory estimate of trainers/memory.py beside a measured run, or for a configuration without any weights.

    python scripts/bench_memory.py measure
    python scripts/bench_memory.py measure --size 4b --device cuda --prompt_tokens 8192 --batch 2
    python scripts/bench_memory.py plan --config configs/training/sft_16gb.yaml --size 4b
    python scripts/bench_memory.py plan --config configs/training/rl_config.yaml --stage grpo --size 4b --num_gpus 4 \\
        --deepspeed configs/deepspeed/ds_zero2.json training.kl_coef=0

`measure` trains a model of random weights on a synthetic clip, an update of one forward pass and one of two, each cell
in a process of its own, and compares the peak with the estimate's tensors; its allowances are left out. CUDA: torch's
own count. Linux: resident memory, as the kernel counts its peak, above what the process held after a first small
update; freed memory is handed back at once, for what the allocator keeps would hide a peak. The last line of the output
is one line of JSON.

`plan` builds a configuration's model on the meta device, in seconds and without weights or data, and shows what
`--dry_run` would for the longest clip that the data configuration allows.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import multiprocessing
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # Python had put scripts/ there; see utils/attach.py

from utils.attach import attach
from utils.common import REPO_ROOT, UserError, run_command, settle_accelerator, write_json

attach()
settle_accelerator()

import torch  # noqa: E402
from transformers import Qwen3VLForConditionalGeneration  # noqa: E402

from datasets.collate_fns import Batch, VideoCollator  # noqa: E402
from datasets.encoding import Sample, append_answer  # noqa: E402
from scripts.benchmarks.common import bytes_in_use, hand_freed_memory_back, peak_bytes, restart_peak  # noqa: E402
from scripts.benchmarks.models import SIZES, make_sample, model_config  # noqa: E402
from scripts.make_demo_data import all_sentences  # noqa: E402
from scripts.make_tiny_model import build_config, build_processor, build_tokenizer, prompt_texts  # noqa: E402
from trainers import memory_activations as activations  # noqa: E402
from trainers.generation import autocast_for, model_inputs  # noqa: E402
from trainers.memory import ModelShape  # noqa: E402
from trainers.memory_estimate import Clip, Job, Update, estimate  # noqa: E402
from trainers.memory_plan import (  # noqa: E402
    count_parameters,
    describe_estimate,
    largest_clip,
    read_job,
    read_precision,
    what_trains,
)
from trainers.model import add_lora  # noqa: E402
from trainers.parts import LearningRates, freeze_by_rate  # noqa: E402
from trainers.sft_trainer import answer_loss  # noqa: E402
from trainers.shared_prefix import enable_shared_prefix, make_prompt, pack  # noqa: E402
from trainers.vision_attention import batch_vision_frames  # noqa: E402
from utils.config import LoraConfig, ModelConfig, PromptConfig, RLConfig, SFTConfig, load_config  # noqa: E402
from utils.config_trainer import check_deepspeed  # noqa: E402

FAMILY: dict[str, dict[str, int]] = {
    "tiny": {"hidden": 128, "layers": 4, "vision_hidden": 64, "vision_layers": 2},
    "small": {"hidden": 256, "layers": 8, "vision_hidden": 128, "vision_layers": 4},
}
"""Sizes for a CPU, in fp32."""
WHATS = {"full": LearningRates(1e-4, 1e-4, 1e-4, 1e-4), "lora": LearningRates(1e-4, 0.0, 0.0, 0.0),
         "default": LearningRates(1e-4, 1e-5, 0.0, 1e-4)}  # fmt: skip
"""What trains: all weights, LoRA alone, or as sft_config.yaml has it."""
PASSES = (1, 2)
"""Forward passes of each update: gradients meet earlier ones, and the optimizer has its state, in the last."""
ANSWER = "From 1.0 to 2.0 seconds."


# ---------------------------------------------------------------------------------------------- models
def build_on(
    device: str,
    size: str,
    tokenizer: Any,
    model: ModelConfig,
    lora: LoraConfig,
    rates: LearningRates,
    *,
    half: bool = False,
    fused: bool = False,
) -> Any:
    """A model of random weights on `device` ("meta" takes no memory), with the adapter and the frozen parts that
    `trainers.model.load_policy` would give it.

    `half`: as under DeepSpeed, without fp32 copies. `fused`: with TRL's head, as GRPOTrainer adds it.
    """
    dtype = getattr(torch, model.torch_dtype) if lora.enabled or half else torch.float32
    config = build_config(tokenizer, **FAMILY[size], tie=True) if size in FAMILY else model_config(size, tokenizer)
    torch.manual_seed(0)
    with torch.device(device):
        base: Any = Qwen3VLForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation="sdpa")
        batch_vision_frames(base)
        if fused:
            from trl.trainer.utils import add_fused_lm_head

            add_fused_lm_head(base, outputs=("log_probs", "entropy"))
        wrapped = add_lora(base, lora, rates, fp32_copies=not half) if lora.enabled else base
    freeze_by_rate(wrapped, rates)
    return wrapped


def any_tokenizer() -> Any:
    """A small one: a real size takes its vocabulary from `scripts.benchmarks.models.model_config`."""
    return build_tokenizer(prompt_texts(all_sentences(), PromptConfig()))


# ---------------------------------------------------------------------------------------------- measuring
@dataclass(frozen=True)
class Cell:
    """What is measured."""

    stage: str
    """sft: `batch` clips in a forward pass; grpo: `batch` prompts with `generations` completions each, packed."""
    size: str
    device: str
    what: str
    """One of `WHATS`."""
    checkpointing: bool
    batch: int
    prompt_tokens: int
    generations: int = 8
    new_tokens: int = 32


class Work:
    """Model, optimizer and inputs of a cell, and its forward and backward pass."""

    def __init__(self, cell: Cell) -> None:
        self.cell, self.device = cell, torch.device(cell.device)
        self.processor = build_processor(any_tokenizer())
        self.args = SimpleNamespace(bf16=cell.device == "cuda", fp16=False)
        self.model = self._model()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
        sample = make_sample(self.processor, cell.prompt_tokens)
        self.length, self.visual = len(sample["input_ids"]), int(sample["mm_token_type_ids"].count_nonzero())
        self.batch = self._collate(sample) if cell.stage == "sft" else {}
        self.prompts = [make_prompt(self.model, copy.deepcopy(sample)) for _ in range(cell.batch * (not self.batch))]
        waiting = [*self.batch.get("pixels", ()), *(prompt.pixels for prompt in self.prompts)]
        sources = {pixels.source.data_ptr(): pixels.source.nbytes for pixels in waiting}
        self.host_bytes = sum(sources.values()) if cell.device == "cpu" else 0
        """Of frames that wait for their pass in the host's memory, which on a CPU is the one that is measured."""

    def _model(self) -> Any:
        cell = self.cell
        to_save = ("embed_tokens", "lm_head") if cell.what == "default" else ()
        targets = ("q_proj", "k_proj", "v_proj", "o_proj")
        lora = LoraConfig(enabled=cell.what != "full", target_modules=targets, modules_to_save=to_save)
        dtype: Any = "bfloat16" if cell.device == "cuda" else "float32"
        config = ModelConfig(torch_dtype=dtype)
        grpo = cell.stage == "grpo"
        model = build_on(cell.device, cell.size, self.processor.tokenizer, config, lora, WHATS[cell.what], fused=grpo)
        if grpo:
            enable_shared_prefix(model)
        if cell.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model.train()

    def train(self) -> None:
        """Updates as the trainers make them: gradients of several passes, one step."""
        for passes in PASSES:
            for _ in range(passes):
                self.sft_pass() if self.cell.stage == "sft" else self.grpo_pass()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def sft_pass(self) -> None:
        """The batch goes to the device, forward, `answer_loss`, backward."""
        inputs = model_inputs(self.batch, self.device)
        columns, labels = (self.batch[key].to(self.device) for key in ("logits_to_keep", "labels"))
        with autocast_for(self.model, self.device, bf16=self.args.bf16):
            outputs = self.model(**inputs, logits_to_keep=columns, use_cache=False)
        answer_loss(outputs, labels).backward()

    def _collate(self, sample: Sample) -> Batch:
        """`cell.batch` rows of the clip, of unequal lengths, so that there is padding as in a real batch."""
        samples = [append_answer(self.processor, sample, ANSWER + " Yes." * row) for row in range(self.cell.batch)]
        return VideoCollator(self.processor.tokenizer.pad_token_id, samples[0])([{**s, "index": 0} for s in samples])

    def grpo_pass(self) -> None:
        """Prompts with their completions packed, log-probabilities from TRL's fused head, backward."""
        shape = (self.cell.generations, self.cell.new_tokens)
        completions = [list(torch.full(shape, 5, device=self.device)) for _ in self.prompts]
        packed = pack(self.prompts, completions)
        with autocast_for(self.model, self.device, bf16=self.args.bf16):
            output = self.model(
                **packed.inputs, gather_columns=packed.columns, shift_labels=packed.targets, fused_lm_head=True
            )
        output.log_probs.mean().backward()

    def job(self) -> Job:
        """The same work, described."""
        cell, model = self.cell, self.model
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        shape = ModelShape.from_config(base.config)
        if cell.stage == "sft":
            rows, tokens = self.batch["input_ids"].shape
            kind = "masked" if rows > 1 else "plain"
            sequence = activations.Sequence(rows * tokens, kind, rows * tokens**2 if rows > 1 else 0)
            scored = rows * len(self.batch["logits_to_keep"])
        else:
            suffix = cell.generations * (cell.new_tokens - 1)
            sequence = activations.Sequence(cell.batch * (self.length + suffix), "packed")
            scored = cell.batch * cell.generations * cell.new_tokens
        return Job(
            shape=shape,
            parameters=count_parameters(model),
            precision=read_precision(model, self.args, deepspeed=False),
            trains=what_trains(model),
            clip=Clip(self.visual, self.length),
            update=Update(sequence, cell.batch, scored, fused=cell.stage == "grpo"),
            checkpointing=cell.checkpointing,
        )


def measure(cell: Cell) -> dict[str, Any]:
    """Peak bytes of a cell beside its estimate. Run it in a process that has computed nothing yet."""
    if cell.device == "cpu":
        hand_freed_memory_back()
    Work(replace(cell, size="tiny", batch=1, prompt_tokens=100)).train()  # what a first update makes and keeps
    gc.collect()
    if cell.device == "cuda":
        torch.cuda.empty_cache()
    before = bytes_in_use(cell.device)
    work = Work(cell)
    restart_peak(cell.device)  # without what building took for a moment
    work.train()
    measured = peak_bytes(cell.device) - before - work.host_bytes
    found = estimate(work.job())
    return asdict(cell) | {
        "prompt_tokens": work.length,
        "measured": measured,
        "estimate": found.tensors(found.peak),
        "peak": found.peak,
        "total": found.total,
        "reserved": torch.cuda.max_memory_reserved() if cell.device == "cuda" else None,
        "terms": {term.name: round(term.num_bytes) for term in found.terms},
    }


def measure_apart(cell: Cell) -> dict[str, Any]:
    """`measure` in a process of its own."""
    kind = "spawn" if cell.device == "cuda" else "fork"
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(kind)) as pool:
        return pool.submit(measure, cell).result()


def default_cells() -> list[Cell]:
    """The rows of docs/benchmarks.md: lengths, batches, what trains, with and without checkpointing."""
    tiny = partial(Cell, "sft", "tiny", "cpu")
    return [
        *(tiny("full", True, batch, length) for batch, length in ((1, 600), (1, 2500), (2, 1200), (4, 1200))),
        *(tiny("full", False, batch, 1200) for batch in (1, 2)),
        *(tiny(what, checkpointing, 2, 1200) for what in ("lora", "default") for checkpointing in (True, False)),
        Cell("sft", "small", "cpu", "lora", True, 1, 1200),
        *(Cell("grpo", "tiny", "cpu", "lora", checkpointing, 1, 1200) for checkpointing in (True, False)),
    ]


# ---------------------------------------------------------------------------------------------- a configuration
def plan(
    kind: type[SFTConfig] | type[RLConfig],
    paths: Sequence[Path],
    size: str,
    overrides: Sequence[str] = (),
    *,
    deepspeed: Path | None = None,
    num_gpus: int = 1,
) -> Job:
    """The job of a configuration on `num_gpus` GPUs with a model of `size`; neither weights nor data are needed."""
    config: Any = load_config(kind, paths, overrides)
    args = config.training.to_training_arguments("unused", None, use_cpu=True)
    if half := deepspeed is not None:
        check_deepspeed(deepspeed)
    rates = LearningRates.from_training(config.training)
    model = build_on("meta", size, any_tokenizer(), config.model, config.lora, rates, half=half)
    return read_job(model, config, args, largest_clip(config.data), deepspeed=deepspeed, num_gpus=num_gpus)


# ---------------------------------------------------------------------------------------------- command line
HEAD = f"{'':<52}{'measured':>12}{'estimate':>12}{'ratio':>8}"


def table_row(record: Mapping[str, Any]) -> str:
    """A record for a reader, under `HEAD`."""
    how = "checkpointing" if record["checkpointing"] else "all kept"
    name = f"{record['stage']} {record['size']} {record['what']}, {how}, {record['batch']} x {record['prompt_tokens']}"
    sizes = "".join(f"{record[key] / 2**20:>8.0f} MiB" for key in ("measured", "estimate"))
    return f"{name:<52}{sizes}{record['estimate'] / record['measured']:>8.2f}"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("measure", help="estimate beside a measured run")
    run.add_argument("--size", choices=(*FAMILY, *SIZES), help="one cell of this size; else the table of the docs")
    run.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    run.add_argument("--stage", choices=("sft", "grpo"), default="sft")
    run.add_argument("--what", choices=tuple(WHATS), default="default", help="what trains (%(default)s)")
    run.add_argument("--no_checkpointing", action="store_true", help="keep all activations")
    run.add_argument("--batch", type=int, default=1, help="clips, or for grpo prompts, in a pass (%(default)s)")
    run.add_argument("--prompt_tokens", type=int, default=1200, help="(%(default)s)")
    run.add_argument("--generations", type=int, default=8, help="grpo: completions of a prompt (%(default)s)")
    run.add_argument("--new_tokens", type=int, default=32, help="grpo: tokens of a completion (%(default)s)")
    run.add_argument("--json", type=Path, help="also write the records here, indented")
    config = commands.add_parser("plan", help="the estimate for a configuration")
    config.add_argument("--config", type=Path, required=True, help="the stage's own")
    config.add_argument("--stage", choices=("sft", "grpo"), default="sft")
    config.add_argument("--data_config", type=Path, default=REPO_ROOT / "configs/data/video_config.yaml")
    config.add_argument(
        "--size", choices=(*FAMILY, *SIZES), required=True, help="the model, as model.name_or_path has it"
    )
    config.add_argument("--num_gpus", type=int, default=1)
    config.add_argument("--deepspeed", type=Path)
    config.add_argument("overrides", nargs="*", metavar="a.b=c")
    return parser.parse_args(argv)


def cell_of(args: argparse.Namespace) -> Cell:
    """The one cell that the command line asks for. Raises UserError for what cannot run."""
    for name in ("batch", "generations", "new_tokens"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} must be >= 1, got {getattr(args, name)}")
    if args.prompt_tokens < 80:
        raise UserError(f"--prompt_tokens must be >= 80, got {args.prompt_tokens}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device here; use --device cpu, or install torch for CUDA")
    if args.device == "cpu" and sys.platform != "linux":
        raise UserError("measuring on a CPU reads /proc, which this system has not; use --device cuda")
    return Cell(
        args.stage, args.size, args.device, args.what, not args.no_checkpointing, args.batch, args.prompt_tokens,
        args.generations, args.new_tokens,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Measure or plan, and say it."""
    args = parse_args(argv)
    if args.command == "plan":
        kind = SFTConfig if args.stage == "sft" else RLConfig
        paths, options = [args.config, args.data_config], {"deepspeed": args.deepspeed, "num_gpus": args.num_gpus}
        print(describe_estimate(estimate(plan(kind, paths, args.size, args.overrides, **options))))
        return
    records = []
    print(HEAD)
    for cell in [cell_of(args)] if args.size else default_cells():
        records.append(measure_apart(cell))
        print(table_row(records[-1]), flush=True)
        if args.json:
            write_json(args.json, records)
    print(json.dumps(records))


if __name__ == "__main__":
    run_command(main)
