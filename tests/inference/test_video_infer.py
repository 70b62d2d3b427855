"""Prediction from any kind of checkpoint, and the command line."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from inference.video_infer import VideoTemporalInference, summary
from trainers.model import load_for_inference, load_policy
from trainers.parts import LearningRates
from utils.common import REPO_ROOT, UserError
from utils.config import DataConfig, LoraConfig, ModelConfig, PromptConfig
from utils.prompts import PromptContract

DATA = DataConfig(
    fps=1.0, min_frames=2, max_frames=8, min_pixels_per_frame=1024, max_pixels_per_frame=1024, total_pixels=16384
)
PROMPT = PromptConfig(question="When {sentence}?")


@pytest.fixture(scope="module")
def full_checkpoint(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a trained checkpoint: with its prompt contract."""
    folder = tmp_path_factory.mktemp("full") / "checkpoint-best"
    policy = load_for_inference(str(tiny_model), need_contract=False, dtype="float32", device="cpu")
    policy.model.save_pretrained(folder)
    policy.processor.save_pretrained(folder)
    PromptContract.current(PROMPT, DATA).save(folder)
    return folder


@pytest.fixture(scope="module")
def adapter_checkpoint(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter with weights that matter, saved as the trainer saves it."""
    folder = tmp_path_factory.mktemp("adapter") / "checkpoint-best"
    config = ModelConfig(name_or_path=str(tiny_model), torch_dtype="float32", attn_implementation="sdpa")
    policy = load_policy(config, LoraConfig(r=4, lora_alpha=8), LearningRates(1e-4, 1e-4, 0.0, 1e-4))
    torch.manual_seed(0)
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    policy.model.save_pretrained(folder)
    policy.processor.save_pretrained(folder)
    PromptContract.current(PROMPT, DATA).save(folder)
    return folder


@pytest.fixture
def video(demo_data: Path) -> Path:
    return sorted((demo_data / "videos" / "test").iterdir())[0]


def answering(engine: VideoTemporalInference, monkeypatch: pytest.MonkeyPatch, text: str) -> VideoTemporalInference:
    """`engine` with its generation replaced: what is tested is what becomes of an answer."""
    monkeypatch.setattr("inference.video_infer.generate_texts", lambda *_a, **_k: [text])
    return engine


def test_prediction_has_the_promised_keys(full_checkpoint: Path, video: Path) -> None:
    engine = VideoTemporalInference(model_path=str(full_checkpoint))
    found = engine.predict(video_path=str(video), query="the red square appears", max_new_tokens=4)
    assert {"start_time", "end_time", "segments", "raw_text", "parsed"} <= set(found)
    assert found["num_frames"] == 8 and found["clip"] == [0.0, pytest.approx(8.0, abs=0.5)]
    assert isinstance(found["raw_text"], str)


def test_answers_of_every_kind(full_checkpoint: Path, video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = VideoTemporalInference(model_path=full_checkpoint)

    def predict(text: str) -> dict[str, Any]:
        return answering(engine, monkeypatch, text).predict(video, "x")

    two = predict("From 1.0 to 2.0 seconds and from 5.0 to 6.5 seconds.")
    assert (two["start_time"], two["end_time"], two["segments"]) == (1.0, 2.0, [[1.0, 2.0], [5.0, 6.5]])
    absent = predict("The event does not happen in the video.")
    assert absent["parsed"] and absent["segments"] == [] and absent["start_time"] is None
    assert "not in the video" in summary(absent)
    assert summary(two) == "1.0 s to 2.0 s\n5.0 s to 6.5 s"
    empty = predict("From 6.0 to 6.0 seconds.")
    assert (empty["start_time"], empty["end_time"], empty["segments"], empty["parsed"]) == (
        6.0,
        6.0,
        [[6.0, 6.0]],
        True,
    )
    assert summary(empty) == "6.0 s (an empty window: start = end)"
    nonsense = predict("purple 7 monkeys")
    assert not nonsense["parsed"] and nonsense["segments"] == [] and nonsense["raw_text"] == "purple 7 monkeys"
    assert "no segment could be read" in summary(nonsense)


def test_times_are_on_the_files_clock(full_checkpoint: Path, video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = answering(VideoTemporalInference(full_checkpoint), monkeypatch, "From 1.0 to 2.5 seconds.")
    found = engine.predict(video, "x", video_start=3.0, video_end=7.0)
    assert found["segments"] == [[pytest.approx(4.0), pytest.approx(5.5)]]
    assert found["clip_segments"] == [[1.0, 2.5]]
    assert found["clip"] == [pytest.approx(3.0), pytest.approx(7.0)]


def test_frames_instead_of_a_file(full_checkpoint: Path) -> None:
    engine = VideoTemporalInference(full_checkpoint)
    frames = np.zeros((6, 40, 56, 3), np.uint8)
    found = engine.predict(frames=frames, fps=2.0, query="x", max_new_tokens=2)
    assert found["video"] is None and found["num_frames"] == 6
    with pytest.raises(UserError):
        engine.predict(frames=frames, query="x")
    with pytest.raises(UserError, match="either video_path or frames"):
        engine.predict(query="x")


def test_checkpoint_decides_prompt_and_sampling(full_checkpoint: Path, tiny_model: Path, video: Path) -> None:
    assert VideoTemporalInference(full_checkpoint).contract.prompt == PROMPT
    base = VideoTemporalInference(tiny_model)
    assert base.contract.prompt == PromptConfig() and base.contract.data == DataConfig()
    given = VideoTemporalInference(tiny_model, data_config=REPO_ROOT / "configs/demo/video_config.yaml")
    assert given.contract.data.max_frames == 16


def test_adapter_equals_the_merged_weights(
    adapter_checkpoint: Path, tiny_model: Path, video: Path, tmp_path: Path
) -> None:
    adapter = VideoTemporalInference(adapter_checkpoint)
    merged = adapter.model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    adapter.processor.save_pretrained(tmp_path / "merged")
    adapter.contract.save(tmp_path / "merged")
    query = "the red square appears"
    answers = [
        VideoTemporalInference(path).predict(video, query, max_new_tokens=8)["raw_text"]
        for path in (adapter_checkpoint, tmp_path / "merged")
    ]
    base = VideoTemporalInference(tiny_model, data_config=None)
    base.contract = adapter.contract
    assert answers[0] == answers[1] != base.predict(video, query, max_new_tokens=8)["raw_text"]


def test_bad_input_is_a_user_error(full_checkpoint: Path, tmp_path: Path) -> None:
    engine = VideoTemporalInference(full_checkpoint)
    with pytest.raises(UserError, match="query is empty"):
        engine.predict(tmp_path / "x.mp4", "  ")
    with pytest.raises(UserError, match="x.mp4"):
        engine.predict(tmp_path / "x.mp4", "a dog")


def test_command_line_prints_json_and_draws(
    full_checkpoint: Path,
    video: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    picture = tmp_path / "visualization.png"
    flags = ["--model_path", str(full_checkpoint), "--video", str(video), "--query", "the red square appears"]
    flags += ["--output", str(picture), "--json", "--max_new_tokens", "4", "--ground_truth", "1", "3"]
    flags += ["--mp4", str(tmp_path / "clip.mp4"), "--gif", str(tmp_path / "clip.gif"), "--theme", "dark"]
    flags += ["--video_start", "1", "--video_end", "3"]
    monkeypatch.setattr(sys, "argv", ["video_infer.py", *flags])
    monkeypatch.setattr(sys, "path", [str(REPO_ROOT / "inference"), *sys.path])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(REPO_ROOT / "inference/video_infer.py"), run_name="__main__")
    assert ended.value.code == 0
    found = json.loads(capfd.readouterr().out)
    assert found["query"] == "the red square appears"
    assert picture.read_bytes()[:4] == b"\x89PNG"
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert container.streams.video[0].frames == 30  # 2 s at 15 frames a second
    with Image.open(tmp_path / "clip.gif") as image:
        assert image.n_frames == 16 and image.convert("RGB").getpixel((1, 1)) == (13, 17, 23)


def test_command_line_says_what_lowers_memory(
    video: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr("trainers.model.load_for_inference", fail)
    monkeypatch.setattr(sys, "argv", ["video_infer.py", "--model_path", "m", "--video", str(video), "--query", "q"])
    monkeypatch.setattr(sys, "path", [str(REPO_ROOT / "inference"), *sys.path])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(REPO_ROOT / "inference/video_infer.py"), run_name="__main__")
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert ended.value.code == 2 and last.startswith("error: CUDA ran out of memory (CUDA out of memory. Tried to")
    for knob in ("--video_start", "data.total_pixels", "--device cpu"):
        assert knob in last


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"--model_path": "./none"}, "error: model path './none' does not exist"),
        ({"--query": " "}, "error: --query is empty"),
        ({"--video": "gone.mp4"}, "error: cannot read the video gone.mp4"),
        ({"--output": "picture.txt"}, "error: a picture is written as .png, .svg or .pdf"),
        ({"--mp4": "clip.avi"}, "error: an animation is written as .mp4 or .gif, got 'clip.avi'"),
        ({"--gif": "clip.mp4"}, "error: --gif writes a .gif file, got clip.mp4; change its suffix"),
    ],
)
def test_command_line_error_is_one_line(
    flags: dict[str, str],
    message: str,
    video: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The model path is a wrong one in every case: other mistakes are found before anything is loaded."""
    given = {"--model_path": "./none", "--video": str(video), "--query": "q", **flags}
    monkeypatch.setattr(sys, "argv", ["video_infer.py", *(part for pair in given.items() for part in pair)])
    monkeypatch.setattr(sys, "path", [str(REPO_ROOT / "inference"), *sys.path])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(REPO_ROOT / "inference/video_infer.py"), run_name="__main__")
    err = capfd.readouterr().err.strip()
    assert ended.value.code == 2
    assert err.splitlines()[-1].startswith(message)
    assert "Traceback" not in err
