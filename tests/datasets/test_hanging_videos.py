"""A video that hangs its decoder costs an epoch one row: in forked and in spawned workers, and only once."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader

from datasets.collate_fns import VideoCollator
from datasets.video_dataset import VideoTemporalDataset
from trainers.callbacks import FaultCounter
from trainers.model import load_processor, resolve_source
from utils import decode_process
from utils.common import UserError
from utils.config import AnnotationSource, DataConfig
from utils.video import write_mp4

TIMEOUT_S = 1.0

HANGS = """
import ctypes, os
from utils import decode_child

real = decode_child.read_clip

def read(path, *args, **kwargs):
    if os.path.basename(path) == "hanging.mp4":
        ctypes.PyDLL(None).sleep(600)
    return real(path, *args, **kwargs)

decode_child.read_clip = read
decode_child.serve()
"""


def hang_by_name(_: int) -> None:
    decode_process.close_child()
    decode_process.CHILD_CODE = HANGS


@pytest.fixture
def dataset(tiny_model: Path, tmp_path: Path) -> VideoTemporalDataset:
    """Eight rows, two of them on the video that hangs."""
    names = ["a.mp4", "hanging.mp4", "b.mp4", "c.mp4", "hanging.mp4", "d.mp4", "e.mp4", "f.mp4"]
    for number, name in enumerate(names):
        write_mp4(tmp_path / name, np.full((8, 32, 64, 3), 20 * number, np.uint8), fps=4)
    row = {"duration": 2.0, "timestamp": [0.5, 1.0], "sentence": "it shows"}
    lines = (json.dumps({"video": name, **row}) for name in names)
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    data = DataConfig(
        train=(AnnotationSource(path=tmp_path / "rows.jsonl"),), decode_timeout_s=TIMEOUT_S,
        quarantine=tmp_path / "cache/list.jsonl", min_pixels_per_frame=1024, max_pixels_per_frame=2048,
    )  # fmt: skip
    return VideoTemporalDataset(data, load_processor(resolve_source(str(tiny_model))))


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_an_epoch_with_a_hanging_video_ends(dataset: VideoTemporalDataset, tmp_path: Path, context: str) -> None:
    collator = VideoCollator(dataset.processor.tokenizer.pad_token_id, dataset.blank())
    loader: Any = DataLoader(
        dataset, batch_size=2, collate_fn=collator, num_workers=1, multiprocessing_context=context,
        worker_init_fn=hang_by_name,
    )  # fmt: skip
    for epoch in (1, 2):
        started = time.monotonic()
        batches = list(loader)
        taken = time.monotonic() - started
        faults = [fault for batch in batches for fault in batch["faults"]]
        assert [index for index, _ in faults] == [1, 4]
        reasons = [reason for _, reason in faults]
        assert all(f"cannot read the video {tmp_path / 'hanging.mp4'}: " in reason for reason in reasons)
        limit = f"did not decode within data.decode_timeout_s={TIMEOUT_S:g}"
        assert all(limit in reason for reason in reasons)
        assert ["in quarantine since" in reason for reason in reasons] == [epoch == 2, True]
        assert taken > TIMEOUT_S or epoch == 2
    assert len((tmp_path / "cache/list.jsonl").read_text().splitlines()) == 1
    FaultCounter(8, max_fraction=0.25).add(faults)
    with pytest.raises(UserError, match="2 of 8 rows could not be used, more than data.max_bad_fraction=0.2"):
        FaultCounter(8, max_fraction=0.2).add(faults)
