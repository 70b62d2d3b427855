"""The decoding benchmark, small: that it reads what it says, and sees memory grow where it grows."""

import json
import mmap
import subprocess
import sys

import pytest

from scripts.benchmarks import decoding
from scripts.benchmarks.decoding import growth_mib, make_clip, measure_backends, measure_memory, measure_overhead
from utils.common import REPO_ROOT
from utils.video import FrameBudget, probe_video

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")

BUDGET = FrameBudget(2, 1, 64, 1024, 4096, 2**20)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return make_clip(tmp_path_factory.mktemp("decoding") / "clip.mp4", "32p", 2)


def test_clips_are_as_asked_and_every_backend_reads_them(clip):
    info = probe_video(clip)
    assert (info.height, info.width, info.num_frames, info.duration_s) == (32, 32, 60, pytest.approx(2.0))
    found = measure_backends(clip, ("decord", "pyav"), 1, num_threads=1, budget=BUDGET)
    assert list(found) == ["decord", "pyav"] and min(found.values()) > 0
    assert set(measure_overhead(clip, 1, BUDGET)) == {"here", "apart"}


def test_memory_that_grows_is_seen(clip, monkeypatch):
    readings = measure_memory([clip], num_decodes=40, every=20, budget=BUDGET)
    assert [reading["decodes"] for reading in readings] == [1, 20, 40]
    assert all(20 < reading["child_mib"] < 400 for reading in readings)
    assert max(growth_mib(readings).values()) < 8
    kept = []
    real = decoding.checksum

    def leaky(clip):
        kept.append(mmap.mmap(-1, 2**20))  # pages of its own: NumPy's may come from what other tests gave back
        kept[-1].write(b"x" * 2**20)
        return real(clip)

    monkeypatch.setattr(decoding, "checksum", leaky)
    leaking = growth_mib(measure_memory([clip], num_decodes=40, every=20, budget=BUDGET, timeout_s=None))
    assert leaking.keys() == {"worker_mib"} and 15 < leaking["worker_mib"] < 28


def test_the_command_prints_a_table_and_json(tmp_path):
    command = [sys.executable, "scripts/bench.py", "decoding", "memory", "--decodes", "4", "--every", "2"]
    result = subprocess.run(
        [*command, "--folder", str(tmp_path)], cwd=REPO_ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    record = json.loads(result.stdout.splitlines()[-1])
    assert [reading["decodes"] for reading in record["apart"]["readings"]] == [1, 2, 4]
    assert set(record["here"]["growth_mib"]) == {"worker_mib"} and "child_mib" in result.stdout
