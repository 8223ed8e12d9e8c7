"""The command line: thin commands over the rooms below, each loaded when it is called."""

from __future__ import annotations

import importlib
from typing import Final

import click

from quantrecipe.cli.running import run

COMMANDS: Final = {
    "convert": "quantrecipe.cli.convert:convert",
    "pull": "quantrecipe.cli.pull:pull",
    "validate": "quantrecipe.cli.validate:validate",
    "inspect": "quantrecipe.cli.inspect:inspect",
    "verify": "quantrecipe.cli.verify:verify",
    "diff": "quantrecipe.cli.diff:diff",
    "calibrate": "quantrecipe.cli.calibrate:calibrate",
    "rank": "quantrecipe.cli.rank:rank",
    "evaluate": "quantrecipe.cli.evaluate:evaluate",
    "report": "quantrecipe.cli.report:report",
    "publish": "quantrecipe.cli.publish:publish",
    "tune": "quantrecipe.cli.tune:tune",
    "schema": "quantrecipe.cli.schema_command:schema",
    "migrate": "quantrecipe.cli.migrate:migrate",
    "recipes": "quantrecipe.cli.listings:recipes",
    "layouts": "quantrecipe.cli.listings:layouts",
    "formats": "quantrecipe.cli.listings:formats",
}


class _LazyGroup(click.Group):
    """Imports a command's module only when the command is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="quantrecipe")
def cli() -> None:
    """Quantize checkpoints by recipe, and check what comes out."""


def main() -> None:
    """The console script ``quantrecipe``."""
    run(cli)


__all__ = ["COMMANDS", "cli", "main"]
