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
        parts += _help(name, command)
        if isinstance(command, click.Group):
            parts += [line for word, inner in command.commands.items() for line in _help(f"{name} {word}", inner)]
    return "\n".join(parts)


def _help(name: str, command: click.Command) -> list[str]:
    context = click.Context(command, info_name=f"hpcutils {name}", max_content_width=100, terminal_width=100)
    return [f"## {name}", "", "```text", command.get_help(context), "```", ""]


def main() -> None:
    (DOCS / "reference" / "cli.md").write_text(command_page())
    subprocess.run(["dot", "-Tsvg", str(DOCS / "flow.dot"), "-o", str(DOCS / "flow.svg")], check=True)


if __name__ == "__main__":
    sys.exit(main())
