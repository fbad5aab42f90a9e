"""Write the generated pages: docs/reference/cli.md from the commands themselves, docs/flow.svg from docs/flow.dot (make docs)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click

from hpcutils.cli import COMMANDS, cli

DOCS = Path(__file__).parent


def command_page() -> str:
    """Return the reference of the command line: each command's own help."""
    parts = [
        "# Command line",
        "",
        "Made by `make docs` from the commands. Results go to stdout, progress and messages to stderr.",
        "",
    ]
    for name in COMMANDS:
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        parts += section(command, f"hpcutils {name}")
    return "\n".join(parts)


def section(command: click.Command, name: str) -> list[str]:
    """Return a command's part of the page, and those of the commands below it."""
    context = click.Context(command, info_name=name, max_content_width=100, terminal_width=100)
    parts = [f"## {name.removeprefix('hpcutils ')}", "", "```text", command.get_help(context), "```", ""]
    for below, each in command.commands.items() if isinstance(command, click.Group) else ():
        parts += section(each, f"{name} {below}")
    return parts


def main() -> None:
    (DOCS / "reference" / "cli.md").write_text(command_page())
    subprocess.run(["dot", "-Tsvg", str(DOCS / "flow.dot"), "-o", str(DOCS / "flow.svg")], check=True)


if __name__ == "__main__":
    sys.exit(main())
