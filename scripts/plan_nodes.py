"""Who is who among several machines: the size of the cluster, this machine's rank in it, and where node 0 listens.

Called by scripts/launch.sh when one of its node flags is given:

    python scripts/plan_nodes.py --hostfile=hosts.txt
    python scripts/plan_nodes.py --num_nodes=2 --node_rank=1 --master_addr=node1 --master_port=29500

Prints `name=value` lines for the shell; what a hostfile led to goes to standard error. Nothing is started here.
"""

from __future__ import annotations

import argparse
import re
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    # Run as a file, Python put this folder first on the path; the root belongs there (see utils/attach.py).
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from utils.common import UserError, run_command

DEFAULT_PORT = 29500
"""torchrun's own."""
_LINE = re.compile(r"(?P<name>\S+)(\s+slots\s*=\s*(?P<slots>[1-9]\d*))?(\s+max[_-]?slots\s*=\s*\d+)?")


class Host(NamedTuple):
    """One line of a hostfile. `slots` is the number of processes to start there, None where the line names none."""

    name: str
    slots: int | None
    line: int


class Plan(NamedTuple):
    """What torchrun is told on this node. `num_gpus` is None where neither flag nor hostfile says it."""

    num_nodes: int
    node_rank: int
    master_addr: str
    master_port: int
    num_gpus: str | None


# ---- hostfile


def read_hostfile(path: Path) -> list[Host]:
    """The hosts of a file with one `host slots=N` a line, in its order; `#` begins a comment.

    Raises UserError for a file that cannot be read or names no host, a line of another form and a host named twice.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"--hostfile {path} cannot be read: {reason}") from error
    hosts: list[Host] = []
    for number, text in enumerate((line.split("#")[0].strip() for line in lines), start=1):
        if not text:
            continue
        host = _parse(path, number, text)
        if twin := next((other for other in hosts if other.name == host.name), None):
            raise UserError(f"--hostfile {path}:{number}: {host.name} stands on line {twin.line} already; keep one")
        hosts.append(host)
    if not hosts:
        raise UserError(f"--hostfile {path} names no host; write one `host slots=N` a line")
    return hosts


def _parse(path: Path, number: int, text: str) -> Host:
    found = _LINE.fullmatch(text)
    if not found:
        rule = "a line must read `host slots=N`, N >= 1 being the processes to start there"
        raise UserError(f"--hostfile {path}:{number}: {rule}, got {text!r}")
    slots = found["slots"]
    return Host(found["name"], int(slots) if slots else None, number)


def rank_here(hosts: Sequence[Host], path: Path) -> int:
    """The place of this machine in `hosts`: by its name, else by a name or address that leads to it.

    Raises UserError when no line or more than one is this machine.
    """
    own = own_names()
    found = [rank for rank, host in enumerate(hosts) if host.name.lower() in own]
    found = found or [rank for rank, host in enumerate(hosts) if leads_here(host.name)]
    if len(found) == 1:
        return found[0]
    if not found:
        listed = ", ".join(host.name for host in hosts)
        raise UserError(
            f"--hostfile {path}: this machine ({socket.gethostname()}) is none of its hosts ({listed}); add it, write "
            "an address of it, or give --node_rank"
        )
    lines = " and ".join(str(hosts[rank].line) for rank in found)
    raise UserError(f"--hostfile {path}: lines {lines} are all this machine; keep one, or give --node_rank")


def own_names() -> set[str]:
    """What this machine calls itself, with and without its domain."""
    names = {socket.gethostname().lower(), socket.getfqdn().lower()}
    return names | {name.split(".")[0] for name in names}


def leads_here(name: str) -> bool:
    """Whether a host name or IP address belongs to this machine: only its own addresses can be bound to."""
    for family, kind, protocol, _, address in addresses(name):
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.bind((address[0], 0, *address[2:]))
            except OSError:
                continue
            return True
    return False


def addresses(name: str) -> list[tuple]:
    """The addresses of a host as `socket.getaddrinfo` gives them; [] for a name that nobody knows."""
    try:
        return socket.getaddrinfo(name, 0, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []


# ---- flags


def whole(flag: str, text: str, low: int, high: int | None = None) -> int:
    """`text` as a whole number in [low, high]. Raises UserError that names the flag."""
    rule = f">= {low}" if high is None else f"from {low} to {high}"
    if not re.fullmatch(r"\d{1,9}", text) or int(text) < low or (high is not None and int(text) > high):
        raise UserError(f"{flag} must be a whole number {rule}, got {text}")
    return int(text)


def make_plan(args: argparse.Namespace) -> Plan:
    """The plan that the flags and the hostfile lead to; a flag wins over the hostfile. Raises UserError."""
    hosts = read_hostfile(args.hostfile) if args.hostfile else []
    num_nodes = whole("--num_nodes", args.num_nodes, 1) if args.num_nodes else max(len(hosts), 1)
    if hosts and num_nodes != len(hosts):
        raise UserError(f"--num_nodes {num_nodes}, but --hostfile {args.hostfile} lists {len(hosts)} host(s)")
    node_rank = _node_rank(args, hosts, num_nodes)
    port = whole("--master_port", args.master_port, 1, 65535) if args.master_port else DEFAULT_PORT
    if node_rank == 0:
        require_free(port)
    num_gpus = args.num_gpus
    if num_gpus is None and hosts and hosts[node_rank].slots:
        num_gpus = str(hosts[node_rank].slots)
    return Plan(num_nodes, node_rank, _master(args, hosts, num_nodes), port, num_gpus)


def _node_rank(args: argparse.Namespace, hosts: Sequence[Host], num_nodes: int) -> int:
    if args.node_rank:
        return whole(f"with {num_nodes} node(s) --node_rank", args.node_rank, 0, num_nodes - 1)
    if hosts:
        return rank_here(hosts, args.hostfile)
    if num_nodes == 1:
        return 0
    raise UserError(
        f"--node_rank is missing: with --num_nodes {num_nodes} every machine gets its own, from 0 to {num_nodes - 1} "
        "(or give --hostfile)"
    )


def _master(args: argparse.Namespace, hosts: Sequence[Host], num_nodes: int) -> str:
    if args.master_addr:
        address, origin = args.master_addr, "--master_addr"
    elif hosts:
        address, origin = hosts[0].name, f"--hostfile {args.hostfile}:{hosts[0].line}:"
    elif num_nodes == 1:
        return "127.0.0.1"
    else:
        raise UserError(
            f"--master_addr is missing: with --num_nodes {num_nodes} give the host name or address of the machine with "
            "--node_rank 0 (or give --hostfile)"
        )
    if not addresses(address):
        raise UserError(
            f"{origin} {address} cannot be resolved on this machine; give a name or IP address that it knows"
        )
    return str(address)


def require_free(port: int) -> None:
    """Raise UserError when `port` cannot be listened on here."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch does: a port just left is free
        try:
            probe.bind(("", port))
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise UserError(
                f"--master_port {port} cannot be used on this machine ({reason}); give a free port above 1023, the "
                "same on every node"
            ) from error


# ---- command line


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; numbers stay text, so that a wrong one is one clear line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_nodes", help="machines")
    parser.add_argument("--node_rank", help="which of them this is, from 0")
    parser.add_argument("--master_addr", help="host name or address of node 0")
    parser.add_argument("--master_port", help=f"a free port on node 0 (default: {DEFAULT_PORT})")
    parser.add_argument("--hostfile", type=Path, help="lines `host slots=N`")
    parser.add_argument("--num_gpus", help="processes on this machine, instead of the hostfile's slots")
    return parser.parse_args(argv)


def main() -> int:
    """Print the plan for the shell, and for people what it rests on."""
    args = parse_args()
    plan = make_plan(args)
    if args.hostfile:
        processes = f"{plan.num_gpus or 'as many as GPUs'} process(es)"
        print(
            f"{args.hostfile}: this is node {plan.node_rank} of {plan.num_nodes} with {processes}; node 0 is "
            f"{plan.master_addr}, port {plan.master_port}",
            file=sys.stderr,
        )
    for name, value in plan._asdict().items():
        if value is not None:
            print(f"{name}={value}")
    return 0


if __name__ == "__main__":
    run_command(main)
