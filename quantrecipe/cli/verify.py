"""``verify``: a converted checkpoint held to its lock and to its source."""

from __future__ import annotations

import json
from pathlib import Path

import click

WORST = 10


@click.command()
@click.argument("path", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--against",
    metavar="SOURCE",
    type=click.Path(path_type=Path),
    help="Prove every module's error bound from the bytes of the source, too.",
)
@click.option("--quick", is_flag=True, help="Headers, sizes and small files only; hash no weights.")
@click.option(
    "--worst",
    type=click.IntRange(min=0),
    default=WORST,
    show_default=True,
    help="With --against: how many of the worst modules to list.",
)
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output; no progress.")
@click.pass_context
def verify(
    context: click.Context,
    path: Path,
    against: Path | None,
    quick: bool,
    worst: int,
    as_json: bool,
) -> None:
    """Check that a converted checkpoint is what its lock says, byte for byte.

    DIR is the folder that convert wrote. Every file is read once. With --against, every weight is
    compared with the SOURCE that it was converted from.

    Exits with 0 if all holds, 1 if something does not.
    """
    from quantrecipe.cli.progress import ProgressLine
    from quantrecipe.cli.verify_view import verification_json, verification_text
    from quantrecipe.evaluate import verify as run_verification
    from quantrecipe.evaluate import workload

    total = workload(path, against=against is not None, quick=quick)
    with ProgressLine(total, quiet=as_json or not total) as progress:
        found = run_verification(path, against=against, quick=quick, progress=progress.advance)
    if as_json:
        click.echo(json.dumps(verification_json(found, worst), indent=2))
    else:
        click.echo(verification_text(found, worst))
    context.exit(0 if found.whole else 1)
