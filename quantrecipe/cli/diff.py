"""``diff``: two checkpoints compared by what a reader gets of them."""

from __future__ import annotations

import json
from pathlib import Path

import click

from quantrecipe.evaluate import DEFAULT_FAILURES, FAILURES, Failure

ANY = "any"
WORST = 10
_BY_NAME: dict[str, Failure] = {name: name for name in FAILURES}


@click.command()
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option(
    "--part",
    "parts",
    multiple=True,
    metavar="A=B",
    help="A part of A and the part of B to compare it with; may be given again.",
)
@click.option("--layout-a", metavar="L", help="The layout that A is in; found out if left out.")
@click.option("--layout-b", metavar="L", help="The layout that B is in; found out if left out.")
@click.option(
    "--fail-on",
    multiple=True,
    type=click.Choice([*FAILURES, ANY]),
    help="A difference to exit with 1 for, in place of all but moved; may be given again.",
)
@click.option(
    "--allow",
    multiple=True,
    type=click.Choice(FAILURES),
    help="A difference not to exit with 1 for; may be given again.",
)
@click.option(
    "--min-sqnr",
    type=float,
    metavar="DB",
    help="Exit with 1 for allowed differences if any module's SQNR is below it.",
)
@click.option(
    "--worst",
    type=click.IntRange(min=0),
    default=WORST,
    show_default=True,
    help="How many of the modules with the least SQNR to list.",
)
@click.option("--all", "every", is_flag=True, help="Leave nothing out of long tables and lists.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output; no progress.")
@click.pass_context
def diff(
    context: click.Context,
    a: Path,
    b: Path,
    parts: tuple[str, ...],
    layout_a: str | None,
    layout_b: str | None,
    fail_on: tuple[str, ...],
    allow: tuple[str, ...],
    min_sqnr: float | None,
    worst: int,
    every: bool,
    as_json: bool,
) -> None:
    """Compare two checkpoints module by module, whatever layouts they are in.

    A and B are safetensors files, indexes, folders with either, or folders of such folders. What is
    compared is what a reader gets; names, files and shapes that mean the same are no difference.

    Exits with 0 if every module and tensor is the same or stored otherwise, 1 if one is not.
    """
    failures = _failures(fail_on, allow)
    if min_sqnr is not None and "requantized" in failures:
        raise click.UsageError(
            "--min-sqnr is for differences that are allowed: give --allow requantized with it."
        )
    given = _parse_parts(parts)

    from quantrecipe.cli.diff_view import diff_json, diff_text
    from quantrecipe.cli.progress import ProgressLine
    from quantrecipe.cli.running import reporting
    from quantrecipe.evaluate.comparison.running import open_comparison

    with (
        reporting(as_json),
        open_comparison(a, b, parts=given, layout_a=layout_a, layout_b=layout_b) as opened,
        ProgressLine(opened.nbytes, quiet=as_json) as progress,
    ):
        found = opened.compare(progress=progress.advance)
    if as_json:
        click.echo(json.dumps(diff_json(found, failures, min_sqnr), indent=2))
    else:
        click.echo(diff_text(found, failures, min_sqnr, worst=worst, every=every))
    failed = found.failed(failures, min_sqnr) or found.failed_settings(failures)
    context.exit(1 if failed else 0)


def _failures(fail_on: tuple[str, ...], allow: tuple[str, ...]) -> frozenset[Failure]:
    failures = set(DEFAULT_FAILURES)
    if fail_on:
        failures = {_BY_NAME[name] for name in (FAILURES if ANY in fail_on else fail_on)}
    return frozenset(failures - {_BY_NAME[name] for name in allow})


def _parse_parts(parts: tuple[str, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in parts:
        ours, _, theirs = text.partition("=")
        if not ours or not theirs:
            raise click.UsageError(f"--part {text!r}: give A=B, a part of A and one of B.")
        if ours in found:
            raise click.UsageError(f"--part names {ours!r} of A twice.")
        found[ours] = theirs
    return found
