"""``publish``: a converted folder as a repository that stands on its own, and onto the Hub."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantrecipe.cli.progress import ProgressLine, silence_the_client
from quantrecipe.cli.running import reporting
from quantrecipe.schema.base import REPOSITORY

if TYPE_CHECKING:
    from quantrecipe.publishing.facts import Gate, License
    from quantrecipe.publishing.publication import Publication
    from quantrecipe.publishing.pushing import Push
    from quantrecipe.schema.address import HubAddress

_FILE = click.Path(path_type=Path, exists=True, dir_okay=False)


def _repository(_: click.Context, __: click.Parameter, text: str | None) -> str | None:
    if text is not None and re.fullmatch(REPOSITORY, text) is None:
        raise click.BadParameter(f"{text!r}: give owner/name.")
    return text


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--base",
    metavar="OWNER/NAME[@REVISION]",
    help="What the weights were made from, where the lock does not say so.",
)
@click.option(
    "--pipeline",
    metavar="OWNER/NAME[@REVISION]",
    help="Where the other components of the pipeline are, if not in the base.",
)
@click.option("--license", "license_id", metavar="ID", help="As the Hub spells it: apache-2.0.")
@click.option("--license-name", metavar="NAME", help="What it is called, if that is 'other'.")
@click.option("--license-link", metavar="URL", help="Where it is to be read.")
@click.option("--usage", type=_FILE, metavar="FILE", help="A usage.py of your own.")
@click.option(
    "--evaluation",
    "evaluations",
    multiple=True,
    type=_FILE,
    metavar="FILE",
    help="What evaluate compare found; may be given again.",
)
@click.option("--variant", metavar="NAME", help="What this checkpoint is called there.")
@click.option(
    "--scores",
    multiple=True,
    type=_FILE,
    metavar="FILE",
    help="Scores that an evaluation was made of, so that it can be repeated; may be given again.",
)
@click.option(
    "--statistics",
    multiple=True,
    type=_FILE,
    metavar="FILE",
    help="What the recipe smooths by, so that it can be converted again.",
)
@click.option("--benchmarks", type=_FILE, metavar="FILE", help="Speeds, as report reads them.")
@click.option(
    "--push", "repo", callback=_repository, metavar="OWNER/NAME", help="Send it to the Hub."
)
@click.option("--private", is_flag=True, help="With --push: only its owner may see it.")
@click.option(
    "--gated",
    type=click.Choice(["auto", "manual"]),
    help="With --push: only for those who accept its terms; manual: whom you let in.",
)
@click.option("--message", metavar="TEXT", help="With --push: of the commit.")
@click.option("--dry-run", is_flag=True, help="Show all of it; write and send nothing.")
@click.option("--force", is_flag=True, help="Replace files of the same names.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output; no progress.")
def publish(
    folder: Path,
    base: str | None,
    pipeline: str | None,
    license_id: str | None,
    license_name: str | None,
    license_link: str | None,
    usage: Path | None,
    evaluations: tuple[Path, ...],
    variant: str | None,
    scores: tuple[Path, ...],
    statistics: tuple[Path, ...],
    benchmarks: Path | None,
    repo: str | None,
    private: bool,
    gated: Gate | None,
    message: str | None,
    dry_run: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Make FOLDER, which convert wrote, a repository that stands on its own.

    A model card, usage.py, a loader and what else is needed to run it are put beside the weights.
    What the card says comes from the lock, from the card of the base model, and from evaluations.
    """
    if repo is None and (private or gated or message):
        raise click.UsageError("--private, --gated and --message go with --push.")
    with reporting(as_json):
        from quantrecipe.publishing.building import prepare
        from quantrecipe.publishing.publication import Wishes, write
        from quantrecipe.publishing.pushing import plan_push
        from quantrecipe.publishing.pushing import push as send

        wishes = Wishes(
            base=_address(base),
            pipeline=_address(pipeline),
            license=_license(license_id, license_name, license_link),
            usage=usage,
            evaluations=evaluations,
            scores=scores,
            variant=variant,
            statistics=statistics,
            benchmarks=benchmarks,
            repo=repo,
        )
        publication = prepare(folder, wishes)
        planned = None
        if repo is not None:
            planned = plan_push(publication, repo, private=private, gated=gated, force=force)
        for warning in (*publication.warnings, *_open_to_all(publication, planned)):
            click.echo(f"warning: {warning}", err=True)
        if dry_run:
            _show(publication, planned, as_json=as_json)
            return
        if planned is not None:
            _verify(folder, quiet=as_json)
        written = write(publication, force=force)
        commit = None
        if planned is not None:
            if as_json:
                silence_the_client()
            commit = send(
                planned,
                publication,
                message=message or f"{publication.facts.lock.recipe.name}, converted",
                notice=lambda text: click.echo(f"sent {text}", err=True),
            )
        if as_json:
            click.echo(json.dumps(_json(publication, planned, written, commit), indent=2))
        else:
            click.echo("\n".join(str(folder / path) for path in written) or f"{folder}: as it was")
            if planned is not None:
                click.echo(f"{planned.page} at {commit}")


def _address(text: str | None) -> HubAddress | None:
    from quantrecipe.schema.address import SCHEME, is_address, parse_address

    if text is None:
        return None
    return parse_address(text if is_address(text) else SCHEME + text)


def _license(identifier: str | None, name: str | None, link: str | None) -> License | None:
    from quantrecipe.publishing.facts import License

    if identifier is None:
        if name or link:
            raise click.UsageError("--license-name and --license-link go with --license.")
        return None
    if identifier == "other" and not (name and link):
        raise click.UsageError("--license other needs --license-name and --license-link.")
    return License(identifier, name, link)


def _open_to_all(publication: Publication, planned: Push | None) -> list[str]:
    """What is made from a gated model would be there for everybody."""
    base = publication.facts.base
    if planned is None or base is None or base.gated is None:
        return []
    if planned.private or planned.gated or not (planned.create or planned.sent):
        return []
    return [f"{base.repo} is gated, and {planned.repo} would not be: see --gated and --private"]


def _verify(folder: Path, *, quiet: bool) -> None:
    """Nothing damaged is sent."""
    from quantrecipe.evaluate import verify, workload
    from quantrecipe.schema.problems import InvalidInput

    with ProgressLine(workload(folder, against=False, quick=False), quiet=quiet) as progress:
        found = verify(folder, progress=progress.advance)
    if found.problems:
        raise InvalidInput(found.problems)


def _show(publication: Publication, planned: Push | None, *, as_json: bool) -> None:
    from quantrecipe.cli.tables import human_bytes, table

    if as_json:
        click.echo(json.dumps(_json(publication, planned, (), None), indent=2))
        return
    changed = publication.changed()
    rows = []
    for path, size in publication.sizes().items():
        here = {False: "new", True: "replaced"}.get(changed[path], "") if path in changed else ""
        there = "" if planned is None else ("sent" if path in planned.sent else "there")
        rows.append((path, human_bytes(size), here, there))
    rows += [(path, "", "", "deleted") for path in (planned.deleted if planned else ())]
    click.echo(table(rows, ("FILE", "SIZE", "HERE", "HUB" if planned else ""), align="lr"))
    if planned is not None:
        click.echo(f"\n{planned.page}: {_settings(planned)}")
    click.echo(f"\n{_card(publication)}")


def _settings(planned: Push) -> str:
    words = ["would be made" if planned.create else f"is there, at {planned.parent}"]
    words += ["private"] if planned.private else []
    words += [f"gated ({planned.gated})"] if planned.gated else []
    return ", ".join(words)


def _card(publication: Publication) -> str:
    from quantrecipe.publishing.base import CARD_NAME

    content = publication.added[CARD_NAME]
    assert isinstance(content, bytes)
    return content.decode()


def _json(
    publication: Publication, planned: Push | None, written: tuple[str, ...], commit: str | None
) -> dict[str, Any]:
    facts = publication.facts
    found: dict[str, Any] = {
        "folder": str(facts.folder),
        "license": facts.license.identifier,
        "base": None if facts.base is None else facts.base.repo,
        "files": publication.sizes(),
        "changed": sorted(publication.changed()) if not written else [],
        "written": list(written),
        "warnings": list(publication.warnings),
    }
    if planned is not None:
        found["push"] = {
            "repository": planned.repo,
            "create": planned.create,
            "private": planned.private,
            "gated": planned.gated,
            "sent": dict(planned.sent),
            "kept": list(planned.kept),
            "deleted": list(planned.deleted),
            "commit": commit,
        }
    return found
