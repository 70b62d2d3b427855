"""What a resumed checkpoint holds beside weights: pickles, which transformers reads as tensors alone (SECURITY.md)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trainers.sft_trainer import VideoSFTTrainer
from utils.checkpoints import write_manifest
from utils.common import UserError
from utils.config import SFTConfig

pytestmark = pytest.mark.slow


class Attack:
    """Makes `marker` when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def test_states_of_a_resumed_run_are_read_as_tensors_alone(
    config_with: Callable[..., SFTConfig], trainer_for: Callable[..., VideoSFTTrainer], tmp_path: Path
) -> None:
    first = config_with("training.max_steps=1", "training.save_strategy=steps", "training.save_steps=1")
    trainer_for(first, tmp_path / "run").train()
    checkpoint, marker = tmp_path / "run" / "checkpoint-1", tmp_path / "executed"
    pickles = [path for path in sorted(checkpoint.iterdir()) if path.suffix in (".pt", ".pth", ".bin")]
    names = ["optimizer.pt", "rng_state.pth", "scheduler.pt", "training_args.bin"]
    assert [path.name for path in pickles] == names
    longer = config_with("training.max_steps=2", "training.save_strategy=no")
    for path in pickles:
        honest = path.read_bytes()
        torch.save({"state": Attack(marker)}, path)
        torch.load(path, weights_only=False)
        assert marker.exists()  # the attack works on a reader without a guard
        marker.unlink()
        write_manifest(checkpoint)
        trainer = trainer_for(longer, tmp_path / "run", "auto")
        if path.name == "training_args.bin":
            trainer.train(resume_from_checkpoint=str(checkpoint))  # it is not read
            assert trainer.state.global_step == 2
        else:
            with pytest.raises(UserError, match="--resume_from_checkpoint: .*other objects than tensors"):
                trainer.train(resume_from_checkpoint=str(checkpoint))
        assert not marker.exists()
        path.write_bytes(honest)
