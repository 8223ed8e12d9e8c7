"""``report``: one page that shows what became of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import click

from quantrecipe.schema.placement import parse_size

_PAGES = (".html", ".htm")


def _page(_: click.Context, __: click.Parameter, path: Path) -> Path:
    if path.suffix.lower() not in _PAGES:
        raise click.BadParameter(f"'{path}': the page is HTML, so end it in .html.")
    return path


def _folders(_: click.Context, __: click.Parameter, texts: tuple[str, ...]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for text in texts:
        name, _equals, folder = text.partition("=")
        if not name or not folder:
            raise click.BadParameter(f"{text!r}: give NAME=DIR, a name and a folder of images.")
        if name in found:
            raise click.BadParameter(f"{name!r} is given twice.")
        found[name] = Path(folder)
    return found


def _size(_: click.Context, __: click.Parameter, text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise click.BadParameter(f"{error}.") from None


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--rank", type=click.Path(path_type=Path), metavar="FILE", help="What rank --json printed."
)
@click.option(
    "--evaluation",
    "evaluations",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="What evaluate found; may be given again.",
)
@click.option(
    "--statistics",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="What calibrate measured; may be given again.",
)
@click.option(
    "--images",
    multiple=True,
    callback=_folders,
    metavar="NAME=DIR",
    help="A folder of images and what they are of; may be given again. Images of the same file "
    "name are shown side by side.",
)
@click.option(
    "--image-count",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="How many images of each folder to show.",
)
@click.option(
    "--image-side",
    type=click.IntRange(min=64, max=4096),
    default=320,
    show_default=True,
    help="Their longest side, in pixels.",
)
@click.option(
    "--image-bytes",
    callback=_size,
    default="6MB",
    show_default=True,
    metavar="SIZE",
    help="What they may add to the page; smaller and then fewer ones are shown to keep to it.",
)
@click.option(
    "--benchmarks",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Measurements: a JSON list of objects of texts and numbers, or such objects by name.",
)
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    callback=_page,
    metavar="FILE",
    help="The page.",
)
@click.option(
    "--png",
    "pictures",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Also write every figure as a PNG file into this folder.",
)
@click.option("--force", is_flag=True, help="Replace files of the same names.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
def report(
    folder: Path,
    rank: Path | None,
    evaluations: tuple[Path, ...],
    statistics: tuple[Path, ...],
    images: dict[str, Path],
    image_count: int,
    image_side: int,
    image_bytes: int,
    benchmarks: Path | None,
    out: Path,
    pictures: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Show what became of a checkpoint on one page: modules, noise, sizes, verdicts, digests.

    FOLDER is what convert wrote. The page needs no other file and runs no script. What is not given
    is left out of it.
    """
    import quantrecipe
    from quantrecipe.cli.running import reporting
    from quantrecipe.evaluate.reporting import build, gather, write
    from quantrecipe.evaluate.reporting.raster import check_raster
    from quantrecipe.evaluate.reporting.writing import check_free

    with reporting(as_json):
        if pictures is not None:
            check_raster()
        check_free(out, force)
        materials = gather(
            folder,
            rank=rank,
            evaluations=evaluations,
            statistics=statistics,
            benchmarks=benchmarks,
            images=images,
            most_images=image_count,
            image_side=image_side,
            image_bytes=image_bytes,
        )
        built = build(materials, quantrecipe.__version__)
        written = write(built, out, pictures=pictures, force=force)
    if as_json:
        found = {
            "out": str(out),
            "bytes": len(built.html.encode()),
            "sections": [section.name for section in built.sections],
            "figures": [str(path) for path in written[1:]],
        }
        click.echo(json.dumps(found, indent=2))
    else:
        click.echo("\n".join(map(str, written)))
