"""``rank``: which modules are fragile under a recipe, and which to protect."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final, get_args

import click

from quantrecipe.cli.functions import find_function
from quantrecipe.cli.running import reporting
from quantrecipe.schema.dtypes import PlainDType
from quantrecipe.schema.placement import parse_size
from quantrecipe.schema.problems import OutputError

if TYPE_CHECKING:
    from quantrecipe.converter import OpenRecipe
    from quantrecipe.converter.ranking import Order, Ranking
    from quantrecipe.schema.plan import Plan
    from quantrecipe.schema.recipe import Recipe

_AGAINST: Final = ("random", "reverse")


def _size(_: click.Context, __: click.Parameter, text: str | None) -> int | None:
    try:
        return None if text is None else parse_size(text)
    except ValueError as error:
        raise click.BadParameter(f"{error}.") from None


def _rungs(_: click.Context, __: click.Parameter, text: str | None) -> list[int] | None:
    """Whole numbers with commas between them."""
    pieces = [] if text is None else [each.strip() for each in text.split(",")]
    if not all(each.isdecimal() and len(each) < 9 for each in pieces):
        raise click.BadParameter(f"{text!r}: give whole numbers with commas between: 0,1,2,4.")
    return None if text is None else [int(each) for each in pieces]


def _against(_: click.Context, __: click.Parameter, text: str | None) -> list[Order]:
    found: list[Order] = []
    for each in text.split(",") if text else ():
        if each.strip() == "random":
            found.append("random")
        elif each.strip() == "reverse":
            found.append("reverse")
        else:
            raise click.BadParameter(f"{each!r}: give {' or '.join(_AGAINST)}, or both.")
    return found


def _picture(_: click.Context, __: click.Parameter, path: Path | None) -> Path | None:
    if path is not None and path.suffix not in (".png", ".svg"):
        raise click.BadParameter(f"'{path}': give a file that ends in .png or .svg.")
    return path


def _document(_: click.Context, __: click.Parameter, path: Path | None) -> Path | None:
    if path is not None and path.suffix != ".json":
        raise click.BadParameter(f"'{path}': a recipe is written as JSON, so end it in .json.")
    return path


@click.command()
@click.option(
    "--recipe",
    "recipe_name",
    required=True,
    metavar="R",
    help="A recipe file (JSON or YAML), - for standard input, or the name of a built-in recipe.",
)
@click.argument("source", required=False, type=click.Path(path_type=Path))
@click.option(
    "--statistics",
    type=click.Path(path_type=Path),
    metavar="S",
    help="What calibrate measured; left out: what the recipe names, if it does.",
)
@click.option("--top", type=click.IntRange(min=0), metavar="N", help="Protect the N noisiest.")
@click.option(
    "--budget",
    callback=_size,
    metavar="SIZE",
    help="Protect what leaves least noise for at most this much more output: 200MB.",
)
@click.option(
    "--quality",
    type=float,
    metavar="DB",
    help="Protect the least that brings signal to noise, over all modules, to this many decibels.",
)
@click.option("--per-part", is_flag=True, help="Hold each part by itself to --top and the like.")
@click.option(
    "--tie-parts/--no-tie-parts",
    default=False,
    show_default=True,
    help="Protect a module in all parts or in none.",
)
@click.option(
    "--tie-siblings/--no-tie-siblings",
    default=True,
    show_default=True,
    help="Protect modules that have the same input together.",
)
@click.option(
    "--dtype",
    type=click.Choice(get_args(PlainDType)),
    default="bfloat16",
    show_default=True,
    help="What protected modules are kept in.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    callback=_document,
    metavar="FILE",
    help="Write the recipe with what was chosen protected.",
)
@click.option("--force", is_flag=True, help="Replace the file of --out.")
@click.option(
    "--plot",
    "picture",
    type=click.Path(path_type=Path),
    callback=_picture,
    metavar="FILE",
    help="Draw bytes against noise: a .png or .svg file.",
)
@click.option(
    "--ladder",
    "function",
    metavar="MODULE:FUNCTION",
    help="Convert with the N noisiest protected, for growing N, and give each folder to this "
    "function, which returns a number: the less the better.",
)
@click.option("--rungs", callback=_rungs, metavar="N,N,...", help="The N of --ladder: 0,1,2,4,...")
@click.option(
    "--against",
    callback=_against,
    metavar="ORDERS",
    help="Sets of the same sizes to climb beside it: random, reverse, or both with a comma.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of --against random.")
@click.option("--jobs", type=click.IntRange(min=1), metavar="N", help="Threads to work with.")
@click.option("--all", "everything", is_flag=True, help="Leave nothing out of long tables.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output; no progress.")
def rank(
    recipe_name: str,
    source: Path | None,
    statistics: Path | None,
    top: int | None,
    budget: int | None,
    quality: float | None,
    per_part: bool,
    tie_parts: bool,
    tie_siblings: bool,
    dtype: PlainDType,
    out: Path | None,
    force: bool,
    picture: Path | None,
    function: str | None,
    rungs: list[int] | None,
    against: list[Order],
    seed: int,
    jobs: int | None,
    everything: bool,
    as_json: bool,
) -> None:
    """Rank the modules that a recipe quantizes by the noise that makes, and choose what to protect.

    SOURCE is the folder of the source checkpoint or one safetensors file; without it, the recipe
    says where the source is. Weights are read by rows; statistics say what they are multiplied by.

    Without --top, --budget or --quality, the choice is the knee of the curve of bytes against
    noise.
    """
    if sum(goal is not None for goal in (top, budget, quality)) > 1:
        raise click.UsageError("Give one of --top, --budget and --quality.")
    if per_part and tie_parts:
        raise click.UsageError("--per-part takes each part by itself, --tie-parts all together.")
    if function is None and (rungs is not None or against):
        raise click.UsageError("--rungs and --against are of --ladder.")
    # Nothing above this line needs torch: usage errors and --help are quick.
    from quantrecipe.cli.rank_view import Found, ranking_json, ranking_text, warnings
    from quantrecipe.converter.ranking import choose, ladder, plotting, protect, trade_off

    evaluate = None if function is None else find_function(function, "--ladder")
    with reporting(as_json):
        if picture is not None:
            plotting.check_plotting()
        loaded, planned = _planned(recipe_name, source)
        if out is not None:
            _check_out(out, loaded, force)
        ranking = _ranked(
            loaded,
            planned,
            as_json,
            statistics=statistics,
            dtype=dtype,
            tie_siblings=tie_siblings,
            tie_parts=tie_parts,
            jobs=jobs,
        )
        noise = None if quality is None else 10 ** (-quality / 10)
        chosen = choose(ranking.groups, count=top, budget=budget, noise=noise, per_part=per_part)
        if out is not None:
            _write(out, protect(loaded, planned, ranking, chosen), source)
        climbed = None
        if evaluate is not None:
            climbed = ladder(
                loaded,
                source,
                ranking,
                evaluate,
                rungs,
                against=against,
                seed=seed,
                jobs=jobs,
                notice=lambda text: click.echo(text, err=True) if not as_json else None,
            )
        found = Found(loaded.recipe.name, ranking, trade_off(ranking.groups), chosen, climbed, out)
        if picture is not None:
            plotting.plot(picture, found.curve, chosen, climbed)
        for warning in () if as_json else warnings(ranking):
            click.echo(f"warning: {warning}", err=True)
        text = json.dumps(ranking_json(found), indent=2) if as_json else None
        click.echo(text or ranking_text(found, everything))


def _planned(recipe_name: str, source: Path | None) -> tuple[OpenRecipe, Plan]:
    from quantrecipe.converter import open_recipe, plan

    loaded = open_recipe(recipe_name)
    return loaded, plan(loaded, source)


def _ranked(
    loaded: OpenRecipe,
    planned: Plan,
    quiet: bool,
    *,
    statistics: Path | None,
    dtype: PlainDType,
    tie_siblings: bool,
    tie_parts: bool,
    jobs: int | None,
) -> Ranking:
    from quantrecipe.cli.progress import ProgressLine
    from quantrecipe.converter.ranking import quantized_modules, rank_plan

    with loaded.locating():
        modules = quantized_modules(planned)
        total = sum(module.source.tensors["weight"].nbytes for module in modules)
        with ProgressLine(total, quiet=quiet) as progress:
            return rank_plan(
                planned,
                statistics=statistics,
                dtype=dtype,
                tie_siblings=tie_siblings,
                tie_parts=tie_parts,
                jobs=jobs,
                progress=progress.advance,
            )


def _check_out(out: Path, loaded: OpenRecipe, force: bool) -> None:
    """Whether the recipe can be written there, and would mean the same there.

    Raises:
        OutputExists: there is a file, and ``force`` is not given.
        OutputError: the recipe names files by where they lie from it.
    """
    from quantrecipe.checkpoint import OutputExists

    if out.exists() and not force:
        raise OutputExists(out.parent, [out.name])
    relative = sorted(set(_named_files(loaded.recipe)))
    if relative and out.parent.resolve() != loaded.folder.resolve():
        raise OutputError(
            f"{out}: the recipe names {', '.join(relative)} by where it lies from the recipe\n"
            f"  Write it into the folder of the recipe, {loaded.folder}."
        )


def _named_files(recipe: Recipe) -> Iterator[str]:
    if recipe.source.path is not None:
        yield recipe.source.path
    yield from recipe.statistics()


def _write(out: Path, protected: OpenRecipe, source: Path | None) -> None:
    """Write the recipe, once it has been planned.

    Raises:
        InvalidInput: it does not hold.
        OutputError: it cannot be written.
    """
    from quantrecipe.checkpoint.durable import output_error
    from quantrecipe.converter import plan
    from quantrecipe.schema.canonical import document_bytes

    plan(protected, source)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(document_bytes(protected.recipe.to_json_value()))
    except OSError as error:
        raise output_error(out, error) from error
