"""The terms of a run put together: which of them are there at once, and which moment needs most.

Pure arithmetic. `trainers.memory_plan` reads a `Job` from model, configuration and data, and shows the result.
"""

from __future__ import annotations

from dataclasses import dataclass

from trainers import memory
from trainers import memory_activations as activations
from trainers.memory import ModelShape, Parameters, Precision, Sharding, Trains
from trainers.memory_activations import Answering, Sequence

GB = 1e9
"""As cards are sold; 1 GiB is 1.07 of these."""


@dataclass(frozen=True)
class Clip:
    """The longest sample of a run."""

    visual: int
    """Visual tokens."""
    tokens: int
    """Of the whole prompt."""
    answer: int = 32
    """Of the answer that SFT learns."""

    @property
    def patches(self) -> int:
        """Of 16 x 16 pixels in two frames."""
        return activations.MERGE * self.visual


@dataclass(frozen=True)
class Update:
    """One forward and backward pass on a GPU."""

    sequence: Sequence
    clips: int
    """That pass through the vision tower together."""
    scored: int
    """Positions that reach the output head."""
    features_held: int = 0
    """Clips of which what the frozen vision tower makes is kept: those of a generation batch of GRPO with a shared
    prompt. Each passed through the tower alone."""
    accumulates: bool = True
    """Whether gradients of earlier passes are there already."""
    fused: bool = False
    """Whether the head is TRL's fused one."""


@dataclass(frozen=True)
class Job:
    """All that the estimate depends on."""

    shape: ModelShape
    parameters: Parameters
    precision: Precision
    trains: Trains
    clip: Clip
    update: Update
    sharding: Sharding = Sharding()
    optimizer: str = "adamw_torch_fused"
    checkpointing: bool = True
    tied: bool = True
    """Whether head and embeddings are one tensor."""
    rollout: Answering | None = None
    validation: Answering | None = None
    gathers_for_rollout: bool = False
    """Whether ZeRO-3 puts the whole model together on each GPU for sampling."""
    allowances: memory.Allowances = memory.ALLOWANCES


MOMENTS = {
    "layer": "in a layer's backward pass",
    "head": "at the loss",
    "vision": "in the vision tower's pass",
    "rollout": "while sampling",
    "validation": "in validation",
}
"""The moments of which one is the peak."""
_GROUPS = {"layer": {"update", "kept"}, "head": {"update", "kept"}, "vision": {"update"}}


@dataclass(frozen=True)
class Term:
    """Something that takes memory."""

    name: str
    num_bytes: float
    note: str = ""
    moment: str = ""
    """When it is there: always (""), throughout an update ("update"), while its graph lives ("kept"), or at one of
    `MOMENTS`."""


@dataclass(frozen=True)
class Estimate:
    """Bytes on each GPU, by term and moment."""

    terms: tuple[Term, ...]
    allowances: memory.Allowances
    num_gpus: int
    host: float = 0.0
    """Bytes of the host's memory that each process fills by offloading."""

    def present(self, moment: str) -> list[Term]:
        """The terms that are there at one of `MOMENTS`."""
        groups = {"", moment} | _GROUPS.get(moment, set())
        return [term for term in self.terms if term.moment in groups]

    def tensors(self, moment: str) -> float:
        """Bytes of tensors at one of `MOMENTS`."""
        return sum(term.num_bytes for term in self.present(moment))

    def allowance(self, moment: str) -> float:
        """What is added for context, NCCL, and fragmentation of what comes and goes."""
        moving = sum(term.num_bytes for term in self.present(moment) if term.moment)
        nccl = self.allowances.nccl if self.num_gpus > 1 else 0
        return self.allowances.context + nccl + self.allowances.fragmentation * moving

    @property
    def peak(self) -> str:
        """The moment at which most is needed."""
        found = [moment for moment in MOMENTS if any(term.moment == moment for term in self.terms)]
        return max(found, key=lambda moment: self.tensors(moment) + self.allowance(moment))

    @property
    def total(self) -> float:
        """Bytes at the peak, allowances included."""
        return self.tensors(self.peak) + self.allowance(self.peak)

    @property
    def largest(self) -> Term:
        """The largest term at the peak."""
        return max(self.present(self.peak), key=lambda term: term.num_bytes)

    def bytes_of(self, name: str) -> float:
        """Bytes of the term called `name`, 0 where there is none."""
        return sum(term.num_bytes for term in self.terms if term.name == name)


def estimate(job: Job) -> Estimate:
    """What `job` takes on each GPU."""
    terms = [*_constant_terms(job), *_update_terms(job), *_answer_terms(job)]
    host = memory.host_bytes(job.parameters, job.sharding, job.optimizer)
    return Estimate(tuple(term for term in terms if term.num_bytes), job.allowances, job.sharding.num_gpus, host)


def _constant_terms(job: Job) -> list[Term]:
    parameters, sharding, update = job.parameters, job.sharding, job.update
    frozen, trained = parameters.frozen_bytes / GB, parameters.trained_bytes / GB
    gathered = f", up to {sharding.max_live / 1e9:g} B elements gathered" if sharding.stage == 3 else ""
    return [
        Term(
            "weights",
            memory.weight_bytes(parameters, sharding),
            f"{frozen:.2f} frozen, {trained:.2f} trained{gathered}",
        ),
        Term("reference", sharding.share(parameters.reference_bytes, 3), "frozen copy for the KL term"),
        Term("optimizer", memory.optimizer_bytes(parameters, sharding, job.optimizer), job.optimizer),
        Term("exchange", memory.exchange_bytes(parameters, sharding), "buckets of gradients between GPUs"),
        Term("features", _feature_bytes(job, update.features_held), _of_clips(job, update.features_held)),
    ]


def _of_clips(job: Job, number: int) -> str:
    return f"of {number} clip(s), {job.clip.visual} visual tokens each"


def _pixel_bytes(job: Job) -> int:
    return job.clip.patches * job.shape.vision.patch_values * activations.PIXEL_BYTES


def _feature_bytes(job: Job, clips: int) -> float:
    return activations.vision_output(job.shape, job.precision, clips * job.clip.visual)


def _update_terms(job: Job) -> list[Term]:
    text, vision, precision, trains = job.shape.text, job.shape.vision, job.precision, job.trains
    update, checkpointing = job.update, job.checkpointing
    clips = 1 if update.features_held else update.clips
    patches = clips * job.clip.patches
    tower = activations.vision_kept(vision, precision, trains, patches, checkpointing=checkpointing)
    kept = tower + activations.language_kept(text, precision, trains, update.sequence, checkpointing=checkpointing)
    work = activations.layer_at_work(text, precision, trains, update.sequence, checkpointing=checkpointing)
    head = activations.head_work(text, precision, trains, update.scored, fused=update.fused) + _at_the_end(job)
    gradients = memory.gradient_bytes(job.parameters, job.sharding) + _waiting_gradient(job)
    what = "inputs of the layers" if checkpointing else "of all layers"
    seen = "vision" if update.features_held else "update"
    return [
        Term("pixels", clips * _pixel_bytes(job), _of_clips(job, clips), seen),
        Term("gradients", gradients, "", "update"),
        Term("activations", kept, f"{what}, {update.sequence.tokens} tokens", "kept"),
        Term("one layer", work, "computed again, with its gradients" if checkpointing else "its gradients", "layer"),
        Term("logits", head, f"of {update.scored} positions, the head's gradient, the last norm", "head"),
        Term(
            "vision", tower + activations.vision_work(vision, precision, trains, patches), f"{clips} clip(s)", "vision"
        ),
    ]


def _waiting_gradient(job: Job) -> float:
    """Where head and embeddings are one trained tensor, the head's gradient waits until the embeddings' is there."""
    waits = job.tied and job.trains.head and job.update.accumulates and (job.sharding.stage or 0) < 2
    return job.shape.text.vocab * job.shape.text.hidden * job.precision.adapters * waits


def _at_the_end(job: Job) -> float:
    """Alive at the end of the forward pass only: last norm, hidden states, visual features, autocast's weights."""
    text, precision, update = job.shape.text, job.precision, job.update
    last = update.sequence.tokens * (4 + precision.stream) * text.hidden
    features = 0 if update.features_held else _feature_bytes(job, update.clips)
    casts = text.layers * activations.cast_bytes(text, precision, job.trains) if job.checkpointing else 0
    return last + features + casts


def _answer_terms(job: Job) -> list[Term]:
    terms: list[Term] = []
    for moment, answering in (("rollout", job.rollout), ("validation", job.validation)):
        if answering is None:
            continue
        prefill = activations.prefill_work(job.shape.text, job.precision, answering)
        if moment == "validation" or not job.update.features_held:
            prefill += answering.prompts * _pixel_bytes(job) + _feature_bytes(job, answering.prompts)
        rows = f"{answering.prompts} prompt(s), {answering.answers} answers of {answering.new_tokens} tokens"
        cache = activations.cache_bytes(job.shape.text, job.precision, answering)
        terms.append(Term(f"{moment} cache", cache, f"keys and values of {rows}", moment))
        terms.append(Term(f"{moment} prefill", prefill, "", moment))
        if moment == "rollout" and job.gathers_for_rollout:
            whole = job.parameters.frozen_bytes + job.parameters.trained_bytes
            terms.append(Term("gathered weights", whole, "the whole model, for sampling under ZeRO-3", moment))
    return terms
