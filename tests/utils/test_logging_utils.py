"""The logger's lines, the metrics file across kills and resumes, and the facts a run records."""

import io
import json
import logging
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from utils.common import REPO_ROOT, UserError
from utils.logging_utils import (
    MetricsWriter,
    environment_versions,
    get_logger,
    git_revision,
    human_bytes,
    human_count,
    is_rank_zero,
    peak_memory_bytes,
    process_rank,
    read_metrics,
    setup_logging,
)


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """Rank zero, and the logger as it was before the test."""
    for name in ("RANK", "LOCAL_RANK", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    logger = get_logger()
    before = (logger.handlers[:], logger.level, logger.propagate)
    logger.handlers[:] = []
    yield
    for handler in logger.handlers:
        if handler not in before[0]:
            handler.close()
    logger.handlers[:], logger.level, logger.propagate = before


class Captured:
    """What went to standard error since the test began."""

    def __init__(self, capsys):
        self.capsys, self.text = capsys, ""

    def getvalue(self):
        self.text += self.capsys.readouterr().err
        return self.text


@pytest.fixture
def stderr(capsys):
    return Captured(capsys)


class Terminal(io.StringIO):
    def isatty(self):
        return True


# ----------------------------------------------------------------------------------------------------------- the logger


def test_line_format_on_the_console_and_in_the_file(tmp_path, stderr):
    logger = setup_logging(tmp_path)
    logger.info("message %d", 1)
    logger.warning("careful")
    assert re.fullmatch(r"\d\d:\d\d:\d\d info  message 1\n\d\d:\d\d:\d\d warn  careful\n", stderr.getvalue())
    line = (tmp_path / "log.txt").read_text().splitlines()[0]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d info  message 1", line)


def test_calling_again_doubles_nothing_and_keeps_the_file(tmp_path, stderr):
    for folder in (tmp_path, tmp_path, None):
        setup_logging(folder)
    get_logger().info("once")
    assert stderr.getvalue().count("once") == 1
    assert (tmp_path / "log.txt").read_text().count("once") == 1


def test_the_file_is_appended_to(tmp_path, stderr):
    (tmp_path / "log.txt").write_text("from the run before\n")
    setup_logging(tmp_path).info("next")
    assert (tmp_path / "log.txt").read_text().splitlines()[0] == "from the run before"
    assert (tmp_path / "log.txt").read_text().endswith("next\n")


def test_another_folder_moves_the_file(tmp_path, stderr):
    setup_logging(tmp_path / "a").info("first")
    setup_logging(tmp_path / "b").info("second")
    assert "second" not in (tmp_path / "a" / "log.txt").read_text()
    assert "first" not in (tmp_path / "b" / "log.txt").read_text()


def test_levels(stderr):
    setup_logging(level="warning").info("quiet")
    setup_logging(level=logging.DEBUG).debug("loud")
    assert "quiet" not in stderr.getvalue() and "debug loud" in stderr.getvalue()
    with pytest.raises(UserError, match="did you mean 'warning'"):
        setup_logging(level="warnin")


def test_a_root_handler_does_not_double_lines(stderr):
    root_stream = io.StringIO()
    handler = logging.StreamHandler(root_stream)
    logging.getLogger().addHandler(handler)
    try:
        setup_logging().warning("once")
    finally:
        logging.getLogger().removeHandler(handler)
    assert root_stream.getvalue() == ""


def test_colour_only_on_a_terminal(monkeypatch, stderr):
    logger = setup_logging()
    logger.error("plain")
    assert "\033" not in stderr.getvalue()
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    logger.error("red")
    assert terminal.getvalue().startswith("\033[31m") and terminal.getvalue().endswith("\033[0m\n")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("NO_COLOR", "1")
    logger.error("plain")
    assert "\033" not in terminal.getvalue()


def test_other_ranks_show_errors_and_file_warnings(tmp_path, monkeypatch, stderr):
    monkeypatch.setenv("RANK", "3")
    logger = setup_logging(tmp_path)
    logger.info("hidden")
    assert not list(tmp_path.iterdir())  # no file before there is something to say
    logger.warning("to the file")
    logger.error("to both")
    assert re.fullmatch(r"\d\d:\d\d:\d\d error \[rank 3\] to both\n", stderr.getvalue())
    assert [line[20:] for line in (tmp_path / "log.rank3.txt").read_text().splitlines()] == [
        "warn  [rank 3] to the file",
        "error [rank 3] to both",
    ]


def test_rank_comes_from_the_launcher(monkeypatch):
    assert process_rank() == 0 and is_rank_zero()
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert process_rank() == 1
    monkeypatch.setenv("RANK", "9")
    assert process_rank() == 9 and not is_rank_zero()
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(UserError, match="RANK must be a whole number, got 'first'"):
        process_rank()


# ----------------------------------------------------------------------------------------------------- the metrics file


def test_records_are_flushed_and_carry_run_step_and_time(tmp_path):
    path = tmp_path / "deep" / "metrics.jsonl"
    writer = MetricsWriter(path, "run-a")
    writer.write(5, {"train/loss": np.float32(1.5), "train/lr": 1e-4, "note": "ok", "train/tokens": np.int64(7)})
    record = json.loads(path.read_text())  # before close
    assert record.pop("time") > 1.7e9
    assert record == {
        "run": "run-a", "step": 5, "train/loss": 1.5, "train/lr": 1e-4, "note": "ok", "train/tokens": 7,
    }  # fmt: skip


def test_non_finite_values_become_null(tmp_path):
    with MetricsWriter(tmp_path / "m.jsonl", "r") as writer:
        writer.write(1, {"a": float("nan"), "b": float("inf"), "c": np.float64("-inf")})
    text = (tmp_path / "m.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert [read_metrics(tmp_path / "m.jsonl")[0][name] for name in "abc"] == [None, None, None]


def test_reserved_names_are_refused(tmp_path):
    with MetricsWriter(tmp_path / "m.jsonl", "r") as writer, pytest.raises(ValueError, match="step"):
        writer.write(1, {"step": 2})


def losses(path, run=None):
    return {record["step"]: record["train/loss"] for record in read_metrics(path, run)}


def test_resume_supersedes_what_came_after_and_deletes_nothing(tmp_path):
    path = tmp_path / "m.jsonl"
    with MetricsWriter(path, "r") as writer:
        for step in range(1, 8):
            writer.write(step, {"train/loss": float(step)})
    before = path.read_text()
    with MetricsWriter(path, "r") as writer:
        writer.resume(4)
        writer.write(5, {"train/loss": 50.0})
    assert losses(path) == {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0, 5: 50.0}  # 6 and 7 do not stand
    assert path.read_text().startswith(before)


def test_records_of_one_step_are_merged_and_the_later_value_wins(tmp_path):
    path = tmp_path / "m.jsonl"
    with MetricsWriter(path, "r") as writer:
        writer.write(10, {"train/loss": 2.0, "train/grad_norm": 1.0})
        writer.write(10, {"eval/mIoU": 30.0, "train/loss": 3.0})
    [record] = read_metrics(path)
    assert (record["train/loss"], record["train/grad_norm"], record["eval/mIoU"]) == (3.0, 1.0, 30.0)


def test_the_last_run_is_read_unless_another_is_named(tmp_path):
    path = tmp_path / "m.jsonl"
    for run, value in (("old", 1.0), ("new", 2.0)):
        with MetricsWriter(path, run) as writer:
            writer.write(1, {"train/loss": value})
    assert losses(path) == {1: 2.0}
    assert losses(path, "old") == {1: 1.0}


def test_half_a_line_is_survived_and_named(tmp_path, stderr):
    path = tmp_path / "m.jsonl"
    with MetricsWriter(path, "r") as writer:
        writer.write(1, {"train/loss": 1.0})
    with open(path, "ab") as handle:
        handle.write('{"run": "r", "step": 2, "tra\u00e9'.encode()[:-1])  # killed, in the middle of a character
    with MetricsWriter(path, "r") as writer:
        writer.write(2, {"train/loss": 2.0})
    setup_logging()
    assert losses(path) == {1: 1.0, 2: 2.0}
    assert "m.jsonl:2 is not a metrics record" in stderr.getvalue()


def test_other_ranks_write_no_metrics(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with MetricsWriter(tmp_path / "m.jsonl", "r") as writer:
        writer.resume(0)
        writer.write(1, {"train/loss": 1.0})
    assert not (tmp_path / "m.jsonl").exists()


def test_a_missing_metrics_file_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere.jsonl does not exist"):
        read_metrics(tmp_path / "nowhere.jsonl")


# ----------------------------------------------------------------------------------------------------- facts of the run


def test_environment_versions():
    versions = environment_versions()
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert versions["numpy"] == np.__version__
    assert versions["torch"] and versions["transformers"]
    assert set(versions) >= {"platform", "trl", "peft", "accelerate", "datasets", "deepspeed", "decord", "av"}
    json.dumps(versions)


def git(folder, *arguments):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.com", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.strip()


def test_git_revision(tmp_path, monkeypatch):
    root = tmp_path / "repo"
    root.mkdir()
    assert git_revision(root) is None  # not a checkout
    git(root, "init", "-q")
    assert git_revision(root) is None  # no commit yet
    (root / "file").write_text("one")
    git(root, "add", "file")
    git(root, "commit", "-q", "-m", "first")
    head = git(root, "rev-parse", "HEAD")
    assert git_revision(root) == {"revision": head, "dirty": False}
    (root / "untracked").write_text("does not count")
    assert git_revision(root) == {"revision": head, "dirty": False}
    (root / "file").write_text("two")
    assert git_revision(root) == {"revision": head, "dirty": True}
    (root / "inner").mkdir()
    assert git_revision(root / "inner") is None  # the revision would be that of something else
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))  # as inside a git hook
    assert git_revision(root) == {"revision": head, "dirty": True}


def test_git_revision_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_revision(REPO_ROOT) is None


def test_peak_memory_grows_with_use():
    code = (
        "from utils.logging_utils import peak_memory_bytes as peak; before = peak(); block = bytearray(b'x') * 2**27;"
        "print(before, peak())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO_ROOT, capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert 0.9 * 2**27 < after - before < 1.5 * 2**27  # bytes, not kibibytes
    assert peak_memory_bytes() > 2**20


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536, "1.5 KiB"), (2**20 - 1, "1.0 MiB"), (2**42, "4.0 TiB")],
)
def test_human_bytes(value, text):
    assert human_bytes(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (999, "999"), (1000, "1.0 k"), (999_999, "1.0 M"), (4_437_815_808, "4.4 B")]
)
def test_human_count(value, text):
    assert human_count(value) == text


def test_import_needs_no_torch():
    code = "import sys, utils.logging_utils; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO_ROOT).returncode == 0
