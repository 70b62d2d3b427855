"""scripts/sft.sh, rl.sh and scripts/slurm/*.sbatch: what they start where, and what they say to wrong flags.

The Python they are given is a stand-in that writes down what it is to run, unless that is scripts/plan_nodes.py;
`srun`, `scontrol`, `squeue` and `nvidia-smi` are stand-ins as well. Runs that train are in tests/test_multiprocess.py.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.plan_nodes import Host, addresses, leads_here, own_names, rank_here, read_hostfile
from utils.common import REPO_ROOT, UserError

SHELL_FILES = [
    *(REPO_ROOT / "scripts" / name for name in ("launch.sh", "sft.sh", "rl.sh")),
    *sorted((REPO_ROOT / "scripts/slurm").iterdir()),
]

FAKE_PYTHON = """#!{python}
import json, os, pathlib, signal, sys, time

if sys.argv[1].endswith("plan_nodes.py"):
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
folder = pathlib.Path(os.environ["CALLS"])
names = ("OMP_NUM_THREADS", "DS_ACCELERATOR", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT")
call = {{"arguments": sys.argv[1:], "environment": {{name: os.environ.get(name) for name in names}}}}
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(time.monotonic()))
place = folder / ("node" + os.environ.get("SLURM_NODEID", "") + ".json")
place.with_suffix(".new").write_text(json.dumps(call))
place.with_suffix(".new").rename(place)
if os.environ.get("TRAINS"):
    until = time.monotonic() + 60
    while not told and time.monotonic() < until:
        time.sleep(0.02)
    time.sleep(0.5)  # a checkpoint is saved, and a second SIGTERM would be counted
    place.with_suffix(".saved").write_text(str(len(told)))
    sys.exit(1)  # as torchrun when its processes were stopped
"""


def write_program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


class Machine:
    """A PATH with stand-ins in front, and what was started."""

    def __init__(self, folder: Path) -> None:
        self.bin, self.calls = folder / "bin", folder / "calls"
        self.bin.mkdir()
        self.calls.mkdir()
        write_program(self.bin / "python", FAKE_PYTHON.format(python=sys.executable))
        write_program(self.bin / "nvidia-smi", "#!/bin/sh\nexit 9\n")

    @property
    def environment(self) -> dict[str, str]:
        hidden = ("OMP_NUM_THREADS", "DS_ACCELERATOR", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT")
        kept = {key: value for key, value in os.environ.items() if key not in hidden and not key.startswith("SLURM")}
        path = f"{self.bin}{os.pathsep}{os.environ['PATH']}"
        return kept | {"PATH": path, "VTG_PYTHON": str(self.bin / "python"), "CALLS": str(self.calls)}

    def gpus(self, number: int) -> None:
        """Put GPUs into the machine."""
        write_program(self.bin / "nvidia-smi", f"#!/bin/sh\nfor i in $(seq {number}); do echo GPU $i; done\n")

    def start(self, *arguments: str, script: str = "sft.sh") -> subprocess.CompletedProcess[str]:
        command = [REPO_ROOT / "scripts" / script, *arguments]
        return subprocess.run(command, cwd=self.bin, env=self.environment, capture_output=True, text=True, timeout=60)

    def call(self, node: str = "") -> list[str]:
        """The arguments that Python was started with."""
        return json.loads((self.calls / f"node{node}.json").read_text())["arguments"]

    def call_environment(self) -> dict[str, str | None]:
        return json.loads((self.calls / "node.json").read_text())["environment"]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.fixture
def free_port() -> int:
    """A port that nobody listens on, as `scripts/slurm/job.sh` would choose it."""
    for port in range(20000 + os.getpid() % 5000, 30000):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise AssertionError("no free port")


SFT_REST = [
    str(REPO_ROOT / "train_sft.py"),
    *("--config", str(REPO_ROOT / "configs/training/sft_config.yaml")),
    *("--data_config", str(REPO_ROOT / "configs/data/video_config.yaml")),
    *("--output_dir", "outputs/sft"),
]
RL_REST = [
    str(REPO_ROOT / "train_rl.py"),
    *("--config", str(REPO_ROOT / "configs/training/rl_config.yaml")),
    *SFT_REST[3:5],
    *("--output_dir", "outputs/rl"),
]
TORCHRUN = [str(REPO_ROOT / "scripts/torchrun.py"), "--nproc_per_node"]


# ---- one machine


def test_one_process_needs_no_launcher(machine: Machine) -> None:
    assert machine.start("training.seed=1").returncode == 0
    assert machine.call() == [*SFT_REST, "training.seed=1"]
    assert machine.call_environment()["DS_ACCELERATOR"] == "cpu"


def test_a_configuration_with_its_own_data_gets_no_other(machine: Machine, tmp_path: Path) -> None:
    record = tmp_path / "config.yaml"
    record.write_text("model: {}\ndata:\n  train: [rows.jsonl]\n")
    assert machine.start("--config", str(record)).returncode == 0
    assert machine.call() == [SFT_REST[0], "--config", str(record), "--output_dir", "outputs/sft"]
    record.write_text("model: {}\n")
    assert machine.start("--config", str(record)).returncode == 0
    assert machine.call()[3:5] == SFT_REST[3:5]


def test_several_gpus_get_a_process_each(machine: Machine) -> None:
    machine.gpus(4)
    machine.start(script="rl.sh")
    assert machine.call() == [*TORCHRUN, "4", "--standalone", *RL_REST]
    machine.start("--num_gpus=2", "--sft_checkpoint", "a b/checkpoint-best", script="rl.sh")
    assert machine.call() == [*TORCHRUN, "2", "--standalone", *RL_REST, "--model_path", "a b/checkpoint-best"]
    environment = machine.call_environment()
    assert environment == {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": None,
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "110",
    }


def test_deepspeed_gets_a_launcher_for_one_process_too(machine: Machine) -> None:
    for flags in (["--deepspeed", "z.json"], ["--deepspeed=z.json"]):
        machine.start(*flags)
        assert machine.call() == [*TORCHRUN, "1", "--standalone", *SFT_REST, *flags]


def test_everything_else_is_passed_on_as_it_stands(machine: Machine) -> None:
    given = [
        "--dry_run",
        "--resume_from_checkpoint",
        "auto",
        "data.train=a b.jsonl",
        'prompt.question=Is "{sentence}"?',
    ]
    machine.start("--output_dir", "my run", *given)
    assert machine.call() == [*SFT_REST[:-1], "my run", *given]


def test_a_port_is_taken_on_one_machine_too(machine: Machine, free_port: int) -> None:
    machine.start("--master_port", str(free_port))
    nodes = ["--nnodes", "1", "--node_rank", "0", "--master_addr", "127.0.0.1", "--master_port", str(free_port)]
    assert machine.call() == [*TORCHRUN, "1", *nodes, *SFT_REST]


# ---- several machines


def test_two_nodes(machine: Machine, free_port: int) -> None:
    port = str(free_port)
    for rank in ("0", "1"):
        flags = ["--num_nodes", "2", "--node_rank", rank, "--master_addr", "127.0.0.1", "--master_port", port]
        assert machine.start(*flags, "--num_gpus", "3", "lora.r=8").returncode == 0
        nodes = ["--nnodes", "2", "--node_rank", rank, *flags[4:]]
        assert machine.call() == [*TORCHRUN, "3", *nodes, *SFT_REST, "lora.r=8"]


def test_nodes_of_one_gpu_still_meet(machine: Machine) -> None:
    machine.start("--num_nodes=2", "--node_rank=1", "--master_addr=localhost")
    nodes = ["--nnodes", "2", "--node_rank", "1", "--master_addr", "localhost", "--master_port", "29500"]
    assert machine.call() == [*TORCHRUN, "1", *nodes, *SFT_REST]


def test_the_hostfile_says_who_is_who(machine: Machine, tmp_path: Path) -> None:
    hosts = tmp_path / "hosts.txt"
    hosts.write_text(
        f"# two of them\n203.0.113.1 slots=8  # elsewhere\n\n{socket.gethostname()}\tslots = 2 max_slots=4\r\n"
    )
    result = machine.start("--hostfile", str(hosts))
    nodes = ["--nnodes", "2", "--node_rank", "1", "--master_addr", "203.0.113.1", "--master_port", "29500"]
    assert machine.call() == [*TORCHRUN, "2", *nodes, *SFT_REST]
    chosen = f"{hosts}: this is node 1 of 2 with 2 process(es); node 0 is 203.0.113.1, port 29500"
    assert result.stderr.strip() == chosen
    machine.start("--hostfile", str(hosts), "--num_gpus", "1", "--master_addr", "localhost", "--num_nodes", "2")
    assert machine.call() == [*TORCHRUN, "1", *nodes[:4], "--master_addr", "localhost", *nodes[6:], *SFT_REST]


def test_this_machine_is_known_by_its_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert leads_here("127.0.0.1") and leads_here("localhost")
    assert not leads_here("203.0.113.1") and not leads_here("no-such-host.invalid")
    assert addresses("no-such-host.invalid") == [] and socket.gethostname().lower() in own_names()
    hosts = [Host("203.0.113.1", 4, 1), Host("127.0.0.1", 4, 2)]
    assert rank_here(hosts, tmp_path) == 1
    monkeypatch.setattr(socket, "gethostname", lambda: "gpu7.cluster.example")
    monkeypatch.setattr(socket, "getfqdn", lambda: "gpu7.cluster.example")
    assert rank_here([Host("gpu07", 4, 1), Host("GPU7", 4, 2), Host("127.0.0.1", 4, 3)], tmp_path) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("node1 slots=0\n", r":1: a line must read `host slots=N`.*got 'node1 slots=0'"),
        ("node1 slots=4\nnode2 4\n", r":2: a line must read `host slots=N`.*got 'node2 4'"),
        ("node1 slots=four\n", r":1: a line must read"),
        ("node1 slots=4\nnode2 slots=4\n\nnode1 slots=2\n", r":4: node1 stands on line 1 already; keep one"),
        ("# nothing\n\n", r"names no host; write one `host slots=N` a line"),
    ],
)
def test_hostfile_that_cannot_be_read(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_hostfile(path)


# ---- wrong flags

NODES = ["--num_nodes", "2", "--master_addr", "127.0.0.1"]
RANK_RULE = "--node_rank must be a whole number from 0 to"
ALL_HERE = "lines 1 and 2 are all this machine; keep one, or give --node_rank"
NONE_HERE = "none of its hosts (203.0.113.1, 203.0.113.2); add it, write an address of it, or give --node_rank"
NO_RANK = "--node_rank is missing: with --num_nodes 2 every machine gets its own, from 0 to 1 (or give --hostfile)"
NO_MASTER = (
    "--master_addr is missing: with --num_nodes 2 give the host name or address of the machine with --node_rank 0 (or "
    "give --hostfile)"
)
UNKNOWN = "--master_addr no-host.invalid cannot be resolved on this machine; give a name or IP address that it knows"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_gpus", "0"], "--num_gpus must be a whole number >= 1, got 0"),
        (["--num_gpus", "two"], "--num_gpus must be a whole number >= 1, got two"),
        (["--num_gpus"], "--num_gpus needs a value"),
        (["--hostfile="], "--hostfile needs a value"),
        (["--num_nodes", "0"], "--num_nodes must be a whole number >= 1, got 0"),
        ([*NODES, "--node_rank", "2"], f"with 2 node(s) {RANK_RULE} 1, got 2"),
        ([*NODES, "--node_rank", "-1"], f"with 2 node(s) {RANK_RULE} 1, got -1"),
        (["--node_rank", "1"], f"with 1 node(s) {RANK_RULE} 0, got 1"),
        (NODES, NO_RANK),
        (["--num_nodes", "2", "--node_rank", "1"], NO_MASTER),
        (["--num_nodes", "2", "--node_rank", "1", "--master_addr", "no-host.invalid"], UNKNOWN),
        (["--master_port", "http"], "--master_port must be a whole number from 1 to 65535, got http"),
        (["--master_port", "65536"], "--master_port must be a whole number from 1 to 65535, got 65536"),
        (["--hostfile", "no/hosts"], "--hostfile no/hosts cannot be read: No such file or directory"),
        (["--hostfile", "FILE", "--num_nodes", "3"], "--num_nodes 3, but --hostfile FILE lists 2 host(s)"),
        (["--hostfile", "FILE"], f"--hostfile FILE: this machine ({socket.gethostname()}) is {NONE_HERE}"),
        (["--hostfile", "FILE", "--node_rank", "2"], f"with 2 node(s) {RANK_RULE} 1, got 2"),
        (["--hostfile", "TWICE"], f"--hostfile TWICE: {ALL_HERE}"),
    ],
)
def test_a_wrong_flag_is_one_line(flags: list[str], message: str, machine: Machine) -> None:
    hosts, twice = machine.bin / "hosts", machine.bin / "twice"
    hosts.write_text("203.0.113.1 slots=4\n203.0.113.2 slots=4\n")  # addresses that are nobody's
    twice.write_text("127.0.0.1 slots=1\n127.0.0.2 slots=1\n")
    places = {"FILE": str(hosts), "TWICE": str(twice)}
    result = machine.start(*(places.get(flag, flag) for flag in flags))
    for name, path in places.items():
        message = message.replace(name, path)
    assert (result.returncode, result.stdout, result.stderr) == (2, "", f"error: {message}\n")
    assert list(machine.calls.iterdir()) == []


def test_a_port_in_use_is_named_on_node_0_alone(machine: Machine) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        result = machine.start(*NODES, "--node_rank", "0", "--master_port", port)
        rule = "give a free port above 1023, the same on every node"
        expected = f"error: --master_port {port} cannot be used on this machine (address already in use); {rule}\n"
        assert (result.returncode, result.stderr) == (2, expected)
        assert machine.start(*NODES, "--node_rank", "1", "--master_port", port).returncode == 0


def test_more_processes_than_gpus(machine: Machine, tmp_path: Path) -> None:
    machine.gpus(2)
    result = machine.start("--num_gpus", "3")
    assert (result.returncode, result.stderr) == (2, "error: --num_gpus 3, but this machine has 2 GPU(s)\n")
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 slots=8\n")
    result = machine.start("--hostfile", str(hosts))
    assert result.returncode == 2
    last = result.stderr.splitlines()[-1]
    assert last == f"error: --num_gpus 8 (or slots in {hosts}), but this machine has 2 GPU(s)"


# ---- help


@pytest.mark.parametrize("script", ["sft.sh", "rl.sh"])
def test_help_lists_every_flag_and_asks_the_entry(script: str, machine: Machine) -> None:
    result = machine.start("--num_gpus", "2", "--help", script=script)
    assert result.returncode == 0
    name = script.removesuffix(".sh")
    for flag in (
        *("--num_gpus", "--num_nodes", "--node_rank", "--master_addr", "--master_port", "--hostfile", "--deepspeed"),
        *("--config", "--data_config", "--output_dir", *(["--sft_checkpoint"] if name == "rl" else [])),
    ):
        assert f"\n  {flag} " in result.stdout or f"\n{flag} " in result.stdout, flag
    for example in (f"scripts/{script} --", "--hostfile hosts.txt", f"sbatch scripts/slurm/{name}.sbatch", "by ssh"):
        assert example in result.stdout
    assert "set -e" not in result.stdout and "SCRIPT" not in result.stdout
    assert machine.call() == [str(REPO_ROOT / f"train_{name}.py"), "--help"]


# ---- the files


@pytest.mark.parametrize("path", SHELL_FILES, ids=lambda path: path.name)
def test_shell_syntax(path: Path) -> None:
    assert subprocess.run(["bash", "-n", path], capture_output=True, text=True).stderr == ""


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("path", SHELL_FILES, ids=lambda path: path.name)
def test_shellcheck(path: Path) -> None:
    places = f"--source-path={path.parent}:{REPO_ROOT}"
    command = ["shellcheck", "--shell=bash", "--severity=warning", "--external-sources", places, path]
    result = subprocess.run(command, cwd=REPO_ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


# ---- SLURM

SRUN = """#!/usr/bin/env bash
# Starts its command once a node, and does to it with signals what srun does.
echo "$@" >"$CALLS/srun"
while [[ $1 == --* ]]; do shift; done
tasks=()
for ((node = 0; node < SLURM_NNODES; node++)); do
    SLURM_NODEID=$node setsid "$@" &
    tasks+=($!)
done
to_all() { for task in "${tasks[@]}"; do kill "-$1" -- "-$task" 2>/dev/null; done; }
trap 'to_all USR1' USR1
trap 'to_all KILL' TERM
status=0
for task in "${tasks[@]}"; do
    while :; do
        wait "$task"
        code=$?
        kill -0 "$task" 2>/dev/null || break
    done
    [ "$code" -le "$status" ] || status=$code
done
exit "$status"
"""
SCONTROL = """#!/bin/sh
case "$*" in
    "show hostnames node[1-2]") printf 'localhost\\n127.0.0.1\\n' ;;
    *) echo "$@" >>"$CALLS/scontrol" ;;
esac
"""


class Cluster:
    """A job of two nodes, run by the batch script as slurmd would run it."""

    def __init__(self, machine: Machine, job: int) -> None:
        self.machine = machine
        write_program(machine.bin / "srun", SRUN)
        write_program(machine.bin / "scontrol", SCONTROL)
        write_program(machine.bin / "squeue", '#!/bin/sh\necho "${JOB_STATE:-RUNNING}"\n')
        self.environment = machine.environment | {
            "SLURM_JOB_ID": str(job),
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_NNODES": "2",
            "SLURM_GPUS_ON_NODE": "4",
            "SLURM_SUBMIT_DIR": str(REPO_ROOT),
        }
        self.processes: list[subprocess.Popen[str]] = []

    def submit(self, script: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        spooled = self.machine.bin / "slurm_script"  # SLURM runs a copy
        shutil.copy(REPO_ROOT / "scripts/slurm" / script, spooled)
        process = subprocess.Popen(
            ["bash", spooled, *arguments],
            cwd=self.machine.bin,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.processes.append(process)
        return process

    def wait_for_nodes(self) -> None:
        until = time.monotonic() + 30
        while len(list(self.machine.calls.glob("node?.json"))) < 2:
            assert time.monotonic() < until, "the nodes did not start"
            time.sleep(0.05)

    def requeued(self) -> list[str]:
        path = self.machine.calls / "scontrol"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def cluster(machine: Machine, free_port: int) -> Iterator[Cluster]:
    cluster = Cluster(machine, 7_000_000 + free_port - 20000)  # the job's number decides on the port
    yield cluster
    for process in cluster.processes:
        if process.poll() is None:
            process.kill()


@pytest.mark.parametrize(("script", "rest"), [("sft.sbatch", SFT_REST), ("rl.sbatch", RL_REST)])
def test_slurm_starts_one_launcher_a_node(script: str, rest: list[str], cluster: Cluster, free_port: int) -> None:
    job = cluster.submit(script, "--output_dir", "outputs/x", "training.seed=3", SLURM_CPUS_PER_TASK="32")
    output = job.communicate(timeout=60)[0]
    assert job.returncode == 0, output
    assert f"node 0 is localhost, port {free_port}" in output
    for node in ("0", "1"):
        place = ["--nnodes", "2", "--node_rank", node, "--master_addr", "localhost", "--master_port", str(free_port)]
        expected = [
            *TORCHRUN,
            "4",
            *place,
            *rest[:-1],
            "outputs/x",
            "--resume_from_checkpoint",
            "auto",
            "training.seed=3",
        ]
        assert cluster.machine.call(node) == expected
    assert (cluster.machine.calls / "srun").read_text().startswith("--ntasks-per-node=1 ")
    assert cluster.requeued() == []


@pytest.mark.parametrize(
    ("state", "requeued"), [("RUNNING", True), ("CANCELLED", False)], ids=["time is up", "scancel"]
)
def test_slurm_sigterm_saves_and_goes_back_into_the_queue(state: str, requeued: bool, cluster: Cluster) -> None:
    job = cluster.submit("sft.sbatch", TRAINS="yes", JOB_STATE=state)
    cluster.wait_for_nodes()
    os.kill(job.pid, signal.SIGTERM)  # as --signal=B:TERM@120: the batch script alone
    output = job.communicate(timeout=60)[0]
    assert job.returncode == 1, output
    saved = {path.name: path.read_text() for path in cluster.machine.calls.glob("*.saved")}
    assert saved == {"node0.saved": "1", "node1.saved": "1"}  # each was told once, and lived to save
    assert cluster.requeued() == ([f"requeue {cluster.environment['SLURM_JOB_ID']}"] if requeued else [])


def test_slurm_settings_of_the_example() -> None:
    for name in ("sft", "rl"):
        lines = (REPO_ROOT / f"scripts/slurm/{name}.sbatch").read_text().splitlines()
        settings = {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")}
        assert settings >= {"--nodes=2", "--gpus-per-node=4", "--ntasks-per-node=1", "--requeue", "--signal=B:TERM@120"}
        place = next(item for item in settings if item.startswith("--output=")).removeprefix("--output=")
        assert (REPO_ROOT / place).parent.is_dir()  # SLURM makes no folder: a job without its log folder fails unseen
        commands = [line for line in lines if line and not line.startswith("#")]
        assert commands[0] == "set -euo pipefail"  # after the last setting: SLURM reads none behind a command


def test_slurm_outside_the_root(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit("sft.sbatch", SLURM_SUBMIT_DIR=str(tmp_path))
    output = job.communicate(timeout=60)[0]
    assert (job.returncode, output) == (2, f"error: submit from the repository's root, not from {tmp_path}\n")
