"""Writing a report: whole or not at all, and over nothing that was there unless asked to."""

from __future__ import annotations

import os
from pathlib import Path

from quantrecipe.checkpoint import OutputExists
from quantrecipe.checkpoint.durable import output_error
from quantrecipe.evaluate.reporting.page import Report
from quantrecipe.schema.problems import OutputError


def check_free(out: Path, force: bool) -> None:
    """Whether the page can go there; to be asked before any work.

    Raises:
        OutputExists: there is a file, and ``force`` is not given.
        OutputError: it is a folder.
    """
    if out.is_dir():
        raise OutputError(f"{out}: this is a folder\n  Name the file of the page.")
    if out.exists() and not force:
        raise OutputExists(out.parent, [out.name])


def write(
    report: Report, out: Path, *, pictures: Path | None = None, force: bool = False
) -> list[Path]:
    """Write the page, and its figures as PNG files if there is a folder for them.

    Args:
        report: what to write.
        out: the page.
        pictures: a folder, made if it is not there.
        force: replace files of the same names.

    Returns:
        What was written, the page first.

    Raises:
        OutputExists: there are such files, and ``force`` is not given.
        OutputError: something cannot be written.
        QuantrecipeError: ``pictures`` is given, and matplotlib is not there.
    """
    check_free(out, force)
    contents = {out: report.html.encode("utf-8")}
    if pictures is not None:
        from quantrecipe.evaluate.reporting.raster import png

        names = [f"{figure.name}.png" for figure in report.figures]
        taken = [name for name in names if (pictures / name).exists()]
        if taken and not force:
            raise OutputExists(pictures, taken)
        for name, figure in zip(names, report.figures, strict=True):
            contents[pictures / name] = png(figure)
    for path, content in contents.items():
        _write_whole(path, content)
    return list(contents)


def _write_whole(path: Path, content: bytes) -> None:
    made = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        made.write_bytes(content)
        made.replace(path)
    except OSError as error:
        made.unlink(missing_ok=True)
        raise output_error(path, error) from error
