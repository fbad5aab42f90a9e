"""The command line. `hpcutils --help` imports click and nothing else: a command's module is loaded when it is called."""

from __future__ import annotations

import importlib
import sys
from typing import Any, NoReturn

import click

# name: (module, what `--help` says)
COMMANDS = {
    "submit": ("hpcutils.cli.submit", "Submit a training job to Slurm."),
    "run": ("hpcutils.cli.run", "Train here: in this process, or over local MPI ranks."),
    "status": ("hpcutils.cli.status", "Say where a run stands."),
    "logs": ("hpcutils.cli.logs", "Print the log of a rank."),
    "cancel": ("hpcutils.cli.cancel", "Cancel a run."),
    "stage": ("hpcutils.cli.stage", "List a dataset's files; say what staging it would do."),
    "cache": ("hpcutils.cli.cache", "Look after the cache on this node's disk."),
    "build": ("hpcutils.cli.build", "Build a container image from a recipe."),
    "image": ("hpcutils.cli.image", "List, test, verify, compare, lock and publish images."),
    "summary": ("hpcutils.cli.summary", "Print the layers of a model."),
    "plot": ("hpcutils.cli.plot", "Draw a model."),
}


class LazyGroup(click.Group):
    """A group that knows its commands by name, and loads one when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of a newcomer's day."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return one command."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(COMMANDS[cmd_name][0])
        command: click.Command = getattr(module, cmd_name)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; Ctrl-C ends it with a code of its own, as everything else does."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as exc:
            from hpcutils.errors import InterruptError

            raise InterruptError("interrupted") from exc

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list from the table, without importing a command for its one line."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="hpcutils")
def cli() -> None:
    """Train Keras models on Slurm clusters, in containers, from one train.yaml."""


def main() -> NoReturn:
    """Run the command line; every known error ends with its own exit code."""
    from hpcutils.errors import HpcutilsError

    try:
        cli.main(prog_name="hpcutils", standalone_mode=True)
    except HpcutilsError as exc:
        click.echo(f"error: {exc.message}", err=True)
        if exc.hint:
            click.echo(f"hint: {exc.hint}", err=True)
        sys.exit(exc.exit_code)
    sys.exit(0)


if __name__ == "__main__":
    main()
