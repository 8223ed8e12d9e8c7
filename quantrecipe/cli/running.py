"""Running a command: what goes to which stream, and with which exit code it ends."""

from __future__ import annotations

import json
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import click

from quantrecipe.schema.problems import InvalidInput, QuantrecipeError

FAILURE, INTERRUPTED = 3, 130
SHOWN = 20


def run(command: click.Command) -> NoReturn:
    """Run a command and leave the process.

    0 fine; 1 a recipe, checkpoint or bound does not hold; 2 usage; 3 I/O or internal failure; 130
    interrupted.
    """
    stdout = sys.stdout
    # A scheduler that ends a job, or a closed terminal: the same way out as for Ctrl-C, so that
    # what was done is kept and nothing is left half done.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code = command.main(standalone_mode=False)
    except click.exceptions.Exit as leaving:
        code = leaving.exit_code
    except click.ClickException as error:
        error.show()
        code = error.exit_code if isinstance(error, click.UsageError) else FAILURE
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        code = INTERRUPTED
    except QuantrecipeError as error:
        report(error)
        code = error.exit_code
    except SystemExit as leaving:
        # When whoever read the output has seen enough, click puts another stdout in place and
        # answers with 1, which says more than that.
        code = leaving.code if sys.stdout is stdout else FAILURE
    except OSError as error:
        click.echo(f"error: {error}", err=True)
        code = FAILURE
    except Exception:  # noqa: BLE001 - the last resort, and it says all
        traceback.print_exc()
        click.echo("internal error: please report the lines above", err=True)
        code = FAILURE
    sys.exit(code if isinstance(code, int) else 0)


@contextmanager
def reporting(as_json: bool) -> Iterator[None]:
    """Within it, with ``--json``, an error goes to stdout as JSON and ends the command."""
    try:
        yield
    except QuantrecipeError as error:
        if not as_json:
            raise
        report(error, as_json=True)
        sys.exit(error.exit_code)


def report(error: QuantrecipeError, *, as_json: bool = False) -> None:
    """Say what is wrong: for people on stderr, for machines on stdout."""
    if as_json:
        problems = (
            [problem.as_dict() for problem in error.problems]
            if isinstance(error, InvalidInput)
            else [{"kind": error.kind, "message": str(error)}]
        )
        click.echo(json.dumps({"problems": problems}, indent=2))
        return
    if not isinstance(error, InvalidInput):
        click.echo(f"error: {error}", err=True)
        return
    for problem in error.problems[:SHOWN]:
        click.echo(f"error: {problem}", err=True)
    if len(error.problems) > SHOWN:
        click.echo(f"... and {len(error.problems) - SHOWN} more (--json shows all)", err=True)
