"""``tune``: the fastest way to cut up the products of a model, measured on this GPU."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from quantrecipe.cli.running import reporting
from quantrecipe.schema.problems import InvalidInput, OutputError, Problem, QuantrecipeError

if TYPE_CHECKING:
    import torch

    from quantrecipe.loaders import Checkpoint
    from quantrecipe.loaders.kernels.configs import Measured

_ROWS: Final = "4352,1024,16,1"


def _shapes(_: click.Context, __: click.Parameter, texts: tuple[str, ...]) -> list[list[int]]:
    """``OUTxIN``, several times."""
    found = [_sizes(text, "x") for text in texts]
    for text, sizes in zip(texts, found, strict=True):
        if len(sizes) != 2:
            raise click.BadParameter(f"{text!r}: give OUTxIN, as in 4608x12288.")
    return found


def _rows(_: click.Context, __: click.Parameter, text: str) -> list[int]:
    """Numbers with commas between them."""
    found = _sizes(text, ",")
    if not found:
        raise click.BadParameter(f"{text!r}: give whole numbers from 1 on, with commas between.")
    return found


def _sizes(text: str, separator: str) -> list[int]:
    """Positive whole numbers, or none if one of them is something else."""
    texts = [each.strip() for each in text.split(separator)]
    sizes = [int(each) for each in texts if re.fullmatch("[0-9]{1,8}", each)]
    return sizes if len(sizes) == len(texts) and all(sizes) else []


@click.command()
@click.argument("checkpoint", required=False, type=click.Path(path_type=Path))
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    callback=_shapes,
    metavar="OUTxIN",
    help="The shape of a weight; may be given again.",
)
@click.option(
    "--rows",
    callback=_rows,
    default=_ROWS,
    show_default=True,
    metavar="M,M,...",
    help="Rows of activations; what is measured stands for half as many to twice as many.",
)
@click.option("--device", default="cuda", show_default=True, metavar="D", help="cuda, or cuda:N.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output, at the end.")
def tune(
    checkpoint: Path | None,
    shapes: list[list[int]],
    rows: list[int],
    device: str,
    as_json: bool,
) -> None:
    """Measure how this GPU computes W8A8 products fastest, and keep what was found.

    CHECKPOINT is the folder that convert wrote, or one safetensors file: the shapes of all its
    modules of int8 weights and activations are measured, each once; nothing but headers is read.

    Each measurement is kept as soon as it is made. Calls of these shapes use it from then on.
    """
    if checkpoint is None and not shapes:
        raise click.UsageError("Give a CHECKPOINT, or shapes with --shape.")
    with reporting(as_json):
        found = [] if checkpoint is None else _shapes_of(checkpoint)
        found += [(out_features, in_features) for out_features, in_features in shapes]
        _measure(list(dict.fromkeys(found)), list(dict.fromkeys(rows)), _gpu(device), as_json)


def _measure(
    shapes: list[tuple[int, int]], rows: list[int], device: torch.device, as_json: bool
) -> None:
    from quantrecipe.loaders.kernels.configs import add_measured, tuned_file
    from quantrecipe.loaders.kernels.tuning import tune as measure

    done: list[Measured] = []
    for each in measure(shapes, rows, device):
        file = tuned_file(each.architecture)
        try:
            add_measured(each)
        except OSError as error:
            raise OutputError(f"{file}: cannot be written: {error.strerror or error}") from error
        if not as_json:
            if not done:
                click.echo(f"{each.device} ({each.architecture}), kept in {file}")
            click.echo(_line(each))
        done.append(each)
    if as_json:
        value = {
            "file": str(tuned_file(done[0].architecture)),
            "measured": [each.to_json_value() | {"tops": _tops(each)} for each in done],
        }
        click.echo(json.dumps(value, indent=2))


def _line(measured: Measured) -> str:
    product = measured.to_json_value()["product"]
    config = " ".join([product.pop("engine"), *(f"{k}={v}" for k, v in product.items())])
    shape = f"{measured.out_features}x{measured.in_features}"
    return (
        f"{shape:>13} rows {measured.rows:>6} {measured.microseconds:>9.1f} us "
        f"{_tops(measured):>7.1f} TOPS  {config}"
    )


def _tops(measured: Measured) -> float:
    """Operations of int8 in a second, in units of 10^12; an addition counts as one."""
    operations = 2 * measured.rows * measured.out_features * measured.in_features
    return round(operations / measured.microseconds / 1e6, 1)


def _gpu(name: str) -> torch.device:
    import torch

    from quantrecipe.loaders.kernels.tuning import cannot_tune

    try:
        device = torch.device(name)
    except RuntimeError:
        raise click.UsageError(f"--device {name!r}: give cuda, or cuda:N.") from None
    reason = cannot_tune(device)
    if reason is not None:
        raise QuantrecipeError(f"nothing can be measured on device {name!r}: {reason}")
    return device


def _shapes_of(path: Path) -> list[tuple[int, int]]:
    from quantrecipe.loaders import open_checkpoint

    with open_checkpoint(path) as checkpoint:
        found = list(_w8a8_shapes(checkpoint))
    if not found:
        raise InvalidInput(
            Problem(
                "no-w8a8",
                "no module has int8 weights by row and int8 activations",
                hint="There is nothing to tune for other formats.",
                file=str(path),
            )
        )
    return found


def _w8a8_shapes(checkpoint: Checkpoint) -> Iterator[tuple[int, int]]:
    from quantrecipe.loaders.naming import activations
    from quantrecipe.schema.schemes import Int8Channel, Int8Tensor

    for part, opened in checkpoint.parts.items():
        formats = activations(checkpoint, part)
        for name, module in opened.modules.items():
            activation = formats.get(name)
            by_row = isinstance(module.weight, Int8Channel | Int8Tensor)
            if by_row and activation is not None and activation.format == "int8":
                yield module.out_features, module.in_features
