"""``evaluate``: outputs scored, and variants compared by their scores."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from quantrecipe.cli.running import reporting
from quantrecipe.schema.evaluated import EVALUATION_NAME
from quantrecipe.schema.evaluation import DEFAULT_CONFIDENCE, KNOWN_METRICS, Evaluation, Metric
from quantrecipe.schema.problems import InvalidInput, Problem

if TYPE_CHECKING:
    from quantrecipe.evaluate.scores.reading import Score
    from quantrecipe.schema.evaluated import Evaluated, JudgedRecipe

RESAMPLES: Final = 10_000
_FAILURES: Final = ("worse", "not-shown")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def evaluate() -> None:
    """Score outputs, and compare variants with a reference by their scores."""


@evaluate.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--recipe",
    metavar="R",
    help="A recipe file, -, or the name of a built-in one; its evaluation says what is compared.",
)
@click.option("--reference", metavar="V", help="Without a recipe: what variants are compared with.")
@click.option("--higher", multiple=True, metavar="M", help="A metric of which more is better.")
@click.option("--lower", multiple=True, metavar="M", help="A metric of which less is better.")
@click.option("--without", multiple=True, metavar="M", help="A metric to leave out.")
@click.option(
    "--confidence",
    type=click.FloatRange(0.5, 1, min_open=True, max_open=True),
    help=f"Without a recipe: of the intervals; {DEFAULT_CONFIDENCE} if left out.",
)
@click.option(
    "--resamples",
    type=click.IntRange(100, 10_000_000),
    default=RESAMPLES,
    show_default=True,
    help="Of the bootstraps.",
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the bootstraps."
)
@click.option(
    "--fail-on",
    multiple=True,
    type=click.Choice(_FAILURES),
    help="A verdict to exit with 1 for; may be given again.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help=f"Write what was found, usually as {EVALUATION_NAME} beside the weights.",
)
@click.option("--force", is_flag=True, help="Replace the file of --out.")
@click.option("--json", "as_json", is_flag=True, help="Print what --out writes.")
@click.pass_context
def compare(
    context: click.Context,
    files: tuple[Path, ...],
    recipe: str | None,
    reference: str | None,
    higher: tuple[str, ...],
    lower: tuple[str, ...],
    without: tuple[str, ...],
    confidence: float | None,
    resamples: int,
    seed: int,
    fail_on: tuple[str, ...],
    out: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Compare variants with a reference, pair by pair: same prompt, same seed.

    FILES are scores, .jsonl or .csv: prompt, seed, metric, value, and variant, if they are not of
    the variant that the file is called after. Margins are declared in a recipe, before anything is
    measured.

    Exits with 0 unless --fail-on says otherwise.
    """
    if (recipe is None) == (reference is None):
        raise click.UsageError("Give --recipe, or --reference.")
    if recipe is not None and (higher or lower or confidence is not None):
        raise click.UsageError("--higher, --lower and --confidence are said in the recipe.")
    if set(higher) & set(lower):
        raise click.UsageError("A metric is in --higher and in --lower.")
    with reporting(as_json):
        if out is not None:
            _check_out(out, force)
        declared = None if recipe is None else _declared(recipe)
        found = _compared(
            files,
            declared,
            reference or "",
            {**dict.fromkeys(higher, True), **dict.fromkeys(lower, False)},
            confidence or DEFAULT_CONFIDENCE,
            without=without,
            resamples=resamples,
            seed=seed,
        )
        if out is not None:
            _write(out, found)
        if as_json:
            click.echo(json.dumps(found.to_json_value(), indent=2, ensure_ascii=False))
        else:
            from quantrecipe.cli.evaluate_view import evaluation_text

            click.echo(evaluation_text(found))
            for warning in found.warnings:
                click.echo(f"warning: {warning}", err=True)
    verdicts = {each.verdict.replace(" ", "-") for each in found.comparisons}
    context.exit(1 if verdicts & set(fail_on) else 0)


@evaluate.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--metric", "metrics", multiple=True, required=True, metavar="M", help="May be given again."
)
@click.option(
    "--reference",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The outputs to hold these against, of the same names.",
)
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A JSON object of the names and texts of prompts.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="FILE", help="A .jsonl file for the scores."
)
@click.option("--force", is_flag=True, help="Replace the file of --out.")
def score(
    folders: tuple[Path, ...],
    metrics: tuple[str, ...],
    reference: Path | None,
    prompts: Path | None,
    out: Path | None,
    force: bool,
) -> None:
    """Score the outputs in FOLDERS, each called after its variant.

    A file is called after its prompt, and its seed if there are several: p17-seed3.png. Scores are
    JSON Lines, as compare reads them.
    """
    from quantrecipe.evaluate.metrics.finding import find_scorer
    from quantrecipe.evaluate.metrics.scoring import read_prompts, score_folder

    if out is not None:
        if out.suffix != ".jsonl":
            raise click.UsageError(f"'{out}': scores are JSON Lines, so end it in .jsonl.")
        _check_out(out, force)
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        raise click.UsageError("Two folders have the same name, and variants are called after it.")
    scorers = [find_scorer(name) for name in dict.fromkeys(metrics)]
    texts = None if prompts is None else read_prompts(prompts)
    lines = [
        scored.line()
        for folder, name in zip(folders, names, strict=True)
        for scorer in scorers
        for scored in score_folder(scorer, folder, name, reference=reference, prompts=texts)
    ]
    if out is None:
        click.echo("\n".join(lines))
    else:
        _write_bytes(out, ("\n".join(lines) + "\n").encode())
        click.echo(f"{len(lines):,} scores written to {out}")


@evaluate.command()
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def metrics(as_json: bool) -> None:
    """List the metrics that score can compute."""
    from quantrecipe.cli.tables import table
    from quantrecipe.evaluate.metrics.finding import find_scorer, scorer_names

    with reporting(as_json):
        found = [find_scorer(name) for name in scorer_names()]
        if as_json:
            listed = [
                {
                    "name": each.name,
                    "higher_is_better": each.higher_is_better,
                    "suffixes": list(each.suffixes),
                    "against": each.against,
                }
                for each in found
            ]
            click.echo(json.dumps(listed, indent=2))
            return
        rows = [
            (
                each.name,
                "higher" if each.higher_is_better else "lower",
                each.against,
                " ".join(each.suffixes),
            )
            for each in found
        ]
        click.echo(table(rows, ("METRIC", "BETTER", "AGAINST", "FILES")))


def _declared(name: str) -> tuple[Evaluation, JudgedRecipe]:
    """What a recipe says of its evaluation.

    Raises:
        InvalidInput: it does not hold, or says nothing of it.
    """
    from quantrecipe.schema.canonical import recipe_digest
    from quantrecipe.schema.document import STDIN
    from quantrecipe.schema.evaluated import JudgedRecipe
    from quantrecipe.schema.registry import recipe_text
    from quantrecipe.schema.validation import load_recipe, parse_recipe

    path = Path(name)
    if name == STDIN or path.suffix in (".json", ".yaml", ".yml") or path.is_file():
        recipe = load_recipe(name)
    else:
        recipe = parse_recipe(recipe_text(name), f"recipe {name}")
    if recipe.evaluation is None:
        raise InvalidInput(
            Problem(
                "no-evaluation",
                "the recipe declares no evaluation",
                "Add its reference, metrics and margins; or give --reference, to compare without.",
                file=name,
            )
        )
    return recipe.evaluation, JudgedRecipe(name=recipe.name, sha256=recipe_digest(recipe))


def _compared(
    files: Sequence[Path],
    declared: tuple[Evaluation, JudgedRecipe] | None,
    reference: str,
    directions: Mapping[str, bool],
    confidence: float,
    *,
    without: Sequence[str],
    resamples: int,
    seed: int,
) -> Evaluated:
    from quantrecipe.evaluate.metrics.protocol import needs
    from quantrecipe.evaluate.scores.reading import read_scores

    needs("scipy", "comparison", "'quantrecipe[evaluate]'")
    from quantrecipe.evaluate.scores.comparing import compare as run_comparison

    scores, inputs = read_scores(files)
    if declared is None:
        evaluation = _undeclared(scores, reference, directions, confidence, without)
        recipe = None
    else:
        evaluation, recipe = declared
    return run_comparison(
        scores,
        evaluation,
        inputs=inputs,
        recipe=recipe,
        leave_out=without,
        resamples=resamples,
        seed=seed,
    )


def _undeclared(
    scores: Sequence[Score],
    reference: str,
    directions: Mapping[str, bool],
    confidence: float,
    without: Sequence[str],
) -> Evaluation:
    """Every metric of the scores, without margins.

    Raises:
        InvalidInput: nobody says which way a metric is better.
    """
    there = dict.fromkeys(each.metric for each in scores if each.metric not in without)
    known = {name: metric.higher_is_better for name, metric in KNOWN_METRICS.items()}
    known.update(directions)
    unknown = sorted(set(there) - known.keys())
    if unknown:
        raise InvalidInput(
            Problem(
                "unknown-metric",
                f"nothing says whether more of {', '.join(unknown)} is better",
                "Give --higher or --lower with it, or --without to leave it out.",
            )
        )
    if not there:
        raise InvalidInput(Problem("no-scores", "no metric is left to compare"))
    return Evaluation(
        reference=reference,
        metrics={name: Metric(higher_is_better=known[name]) for name in sorted(there)},
        confidence=confidence,
    )


def _check_out(out: Path, force: bool) -> None:
    from quantrecipe.checkpoint import OutputExists

    if out.exists() and not force:
        raise OutputExists(out.parent, [out.name])


def _write(out: Path, found: Evaluated) -> None:
    from quantrecipe.schema.canonical import document_bytes

    _write_bytes(out, document_bytes(found.to_json_value()))


def _write_bytes(out: Path, data: bytes) -> None:
    from quantrecipe.checkpoint.durable import output_error

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(data)
    except OSError as error:
        raise output_error(out, error) from error
