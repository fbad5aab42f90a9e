"""The command line: parse, call one function, print."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from . import commands, config, lifecycle
from .errors import SandboxError
from .hosts import Host

CHECKOUT = Path(__file__).resolve().parents[2]


def main(arguments: list[str]) -> int:
    """Run one command; the exit code is 0, 1 on an error, 2 on wrong usage, or that of the command it ran."""
    os.umask(0o022)
    own, command = _split(arguments)
    options = _parser().parse_args(own)
    try:
        _check_usage(options, command)
        return options.run(options, command)
    except SandboxError as error:
        print(f"sandbox: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 1)
    except (OSError, subprocess.SubprocessError) as error:  # the machine's failures: a full disk, a command that hangs
        hint = f"the logs are in {config.ROOT / options.name / 'log'}; `up` repairs, `down` starts over"
        print(f"sandbox: {SandboxError(str(error), type(error).__name__, hint)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("sandbox: interrupted; run `up` again, or `down`", file=sys.stderr)
        return 130


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Ours before the first `--`, the command to run after it."""
    if "--" not in arguments:
        return arguments, []
    position = arguments.index("--")
    return arguments[:position], arguments[position + 1 :]


def _check_usage(options: argparse.Namespace, command: list[str]) -> None:
    if os.geteuid() != 0:
        raise SandboxError("this needs root, to make namespaces", f"user id {os.geteuid()}", "run it as root (sudo)")
    if not config.NAME_PATTERN.fullmatch(options.name):
        raise SandboxError("not a sandbox name", repr(options.name), "up to 24 of a-z, 0-9 and -, a letter or digit first")
    takes_command = options.run in (_exec, _user)
    if takes_command != bool(command):
        hint = "slurm/sandbox exec|user [options] -- COMMAND [ARGUMENT…]"
        raise SandboxError("a command is missing" if takes_command else "this takes no command", " ".join(sys.argv), hint)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="slurm/sandbox", description="A Slurm cluster on this machine.")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: object, text: str) -> argparse.ArgumentParser:
        sub = subparsers.add_parser(name, help=text, description=text)
        sub.add_argument("--name", default=os.environ.get("HPCUTILS_SANDBOX_NAME") or config.DEFAULT_NAME)
        sub.set_defaults(run=run)
        return sub

    sub = add("up", _up, "start a cluster, or repair it")
    sub.add_argument("--nodes", type=_number(1, config.MAX_NODES), default=2, help="how many nodes (default: 2)")
    sub.add_argument("--gpus", type=_number(0, config.MAX_GPUS), default=4, help="fake GPUs a node (default: 4)")
    partition_help = "NAME[:Key=Value…], the first is the default one; may be repeated (default: main, debug)"
    sub.add_argument("--partition", action="append", type=_partition, metavar="NAME", help=partition_help)
    sub.add_argument("--replace", action="store_true", help="take a cluster of another shape down first")
    add("down", _down, "end a cluster and remove all traces")
    sub = add("status", _status, "say what runs; exit code 0 only if all is well")
    sub.add_argument("--json", action="store_true")
    sub = add("exec", _exec, "run a command as the ordinary user on the login host or on a node")
    sub.add_argument("--node", default=config.LOGIN, metavar="nodeK")
    sub.add_argument("--cwd", metavar="DIR", help="where to run (default: the home folder)")
    sub.add_argument("--root", action="store_true", help="as root of that host")
    sub = add("user", _user, "run a command as the ordinary user on this machine, outside the cluster")
    sub.add_argument("--cwd", metavar="DIR", help="where to run (default: the home folder)")
    return parser


def _number(low: int, high: int):
    def parse(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from {low} to {high}")
        return int(text)

    return parse


def _partition(text: str) -> str:
    if not config.PARTITION_PATTERN.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME[:Key=Value…]")
    return text


def _up(options: argparse.Namespace, _: list[str]) -> int:
    shape = config.Shape(
        nodes=options.nodes,
        gpus=options.gpus,
        partitions=tuple(options.partition or config.DEFAULT_PARTITIONS),
        checkout=str(CHECKOUT),
    )
    began = time.monotonic()
    changed = lifecycle.up(config.Layout(options.name), shape, options.replace)
    outcome = f"up in {time.monotonic() - began:.1f} s" if changed else "already up, nothing to do"
    print(f"sandbox {options.name}: {outcome}: {shape.describe()}")
    return 0


def _down(options: argparse.Namespace, _: list[str]) -> int:
    ended = lifecycle.down(config.Layout(options.name))
    print(f"sandbox {options.name}: {'down' if ended else 'was not up'}")
    return 0


def _status(options: argparse.Namespace, _: list[str]) -> int:
    status = lifecycle.status(config.Layout(options.name))
    if options.json:
        print(json.dumps(status.to_json(), indent=2))
    else:
        print(f"sandbox {status.name}: {status.shape.describe() if status.shape else 'not up'}")
        for name, pid in {**status.hosts, **status.daemons}.items():
            print(f"  {name:18} {'not running' if pid is None else f'process {pid}'}")
        for name, state in status.nodes.items():
            print(f"  {name:18} {state}")
        print("  " + ("healthy" if not status.problems else "problems: " + "; ".join(status.problems)))
    return 1 if status.problems else 0


def _exec(options: argparse.Namespace, command: list[str]) -> int:
    layout = config.Layout(options.name)
    shape = lifecycle.read_shape(layout)
    if shape is None:
        raise SandboxError(f"sandbox {layout.name} is not up", str(layout.root), "run `slurm/sandbox up`")
    if shape.checkout != str(CHECKOUT):
        hint = "give yours another --name (or HPCUTILS_SANDBOX_NAME), or take that one down"
        raise SandboxError(f"sandbox {layout.name} belongs to another checkout", shape.checkout, hint)
    if options.node not in shape.host_names:
        raise SandboxError(f"no host {options.node!r}", f"sandbox {layout.name}", f"one of {', '.join(shape.host_names)}")
    commands.on_host(Host(layout, options.node), CHECKOUT, command, options.cwd, options.root)


def _user(options: argparse.Namespace, command: list[str]) -> int:
    commands.on_machine(CHECKOUT, command, options.cwd)
