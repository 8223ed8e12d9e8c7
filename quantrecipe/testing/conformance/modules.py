"""A model loader over one case: modules are built, loaded and called."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from quantrecipe.formats.dtypes import TORCH_DTYPES
from quantrecipe.testing.conformance.cases import Case, Output
from quantrecipe.testing.conformance.comparing import Deviation, outside
from quantrecipe.testing.conformance.files import make_checkpoint

LoadModel = Callable[[nn.Module, Path, str], nn.Module]
"""``load(model, path, part)``: a model with the numbers of one part of the checkpoint in ``path``.

The model given has plain ``nn.Linear`` and parameters under the names of the source, in the dtype
that it will be called with and filled with NaN; it may be changed in place and returned, or another
one may be. Called for each part and dtype. A checkpoint that does not hold is to be refused with an
exception that names the tensor at fault.
"""

_FLOAT32: Final = 2.0**-24
_ROUNDOFF: Final = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""What rounding a number once may do to it, relative to it."""


def check_model_loader(load: LoadModel, case: Case, folder: Path) -> None:
    """Load every part of the case's checkpoint and call its modules.

    Raises:
        Deviation: an output is further from the expected one than its rule allows, or a checkpoint
            was not refused.
    """
    path = make_checkpoint(case, folder)
    if case.refused:
        differences = list(_refusal(load, case, path))
    else:
        differences = [
            line
            for (part, dtype), outputs in _calls(case).items()
            for line in _outputs(load(build_model(case, part, dtype), path, part), outputs)
        ]
    if differences:
        raise Deviation(differences)


def _calls(case: Case) -> dict[tuple[str, torch.dtype], list[Output]]:
    """Outputs by part and dtype: a model is called in its own."""
    found: dict[tuple[str, torch.dtype], list[Output]] = {}
    for output in case.outputs:
        found.setdefault((output.part, TORCH_DTYPES[output.input.dtype]), []).append(output)
    return found


def _outputs(model: nn.Module, outputs: Iterable[Output]) -> Iterator[str]:
    for output in outputs:
        given = output.input.tensor()
        with torch.inference_mode():
            found = model.get_submodule(output.module)(given)
        what = f"part {output.part}: {output.module} ({output.rule}, {output.input.dtype})"
        yield from _judge(found, output, what)


def _judge(found: Tensor, output: Output, what: str) -> Iterator[str]:
    expected, dtype = output.output.tensor(), output.input.tensor().dtype
    if found.shape != expected.shape or found.dtype != dtype:
        yield (
            f"{what} is {found.dtype} {list(found.shape)}, expected {dtype} {list(expected.shape)}"
        )
        return
    tolerance = rounding(output)
    line = outside(found, expected, tolerance, what)
    if line is not None:
        yield line
    if output.unquantized is not None and output.bound is not None:
        bound = output.bound.tensor() * (1 + 4e-5) + tolerance
        line = outside(found, output.unquantized.tensor(), bound, f"{what}, without quantizing,")
        if line is not None:
            yield line


def rounding(output: Output) -> Tensor:
    """How far rounding may take a result from the exact one, float64 ``[tokens, out]``.

    ``w8a8``: sums of codes are exact, and float32 rounds three times after them; a 16-bit output
    once more. ``weight-only``: float32 rounds weights, products and sums, in any order; in 16 bits
    the weights and the output may be rounded once each.
    """
    given = output.input.tensor()
    columns, sixteen = given.shape[1], given.dtype != torch.float32
    if output.rule == "w8a8":
        relative = 3 * _FLOAT32 + (_ROUNDOFF[given.dtype] if sixteen else 0.0)
    else:
        relative = (columns + 3) * _FLOAT32 + (2 * _ROUNDOFF[given.dtype] if sixteen else 0.0)
    return output.magnitude.tensor() * relative


def build_model(case: Case, part: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Modules under the names of the source, filled with NaN, which no loader may leave.

    Args:
        case: what it is built for.
        part: of the case.
        dtype: of all that holds numbers with fractions.
    """
    model = nn.Module()
    tensors = next(load.tensors for load in case.loads if load.part == part)
    for name, tensor in tensors.items():
        owner, _, attribute = name.rpartition(".")
        if attribute == "weight" and len(tensor.shape) == 2:
            out_features, in_features = tensor.shape
            linear = nn.Linear(in_features, out_features, bias=f"{owner}.bias" in tensors)
            _owner(model, owner.rpartition(".")[0]).add_module(owner.rpartition(".")[2], linear)
    for name, tensor in tensors.items():
        owner, _, attribute = name.rpartition(".")
        like = tensor.tensor()
        if like.is_floating_point():
            empty = torch.full(like.shape, torch.nan, dtype=dtype)
        else:
            empty = torch.zeros_like(like)
        parameter = nn.Parameter(empty, requires_grad=False)
        _owner(model, owner).register_parameter(attribute, parameter)
    return model


def _owner(model: nn.Module, name: str) -> nn.Module:
    for piece in filter(None, name.split(".")):
        if piece not in dict(model.named_children()):
            model.add_module(piece, nn.Module())
        model = model.get_submodule(piece)
    return model


def _refusal(load: LoadModel, case: Case, path: Path) -> Iterator[str]:
    part = case.loads[0].part
    try:
        load(build_model(case, part), path, part)
    except Exception as error:  # noqa: BLE001 - a candidate may raise what it likes
        named = [refusal.tensor for refusal in case.refused if refusal.tensor is not None]
        # A loader that goes by the recipe may see the weight at fault where another sees its scale.
        named += [name for edit in case.edited.values() for name in (*edit.remove, *edit.put)]
        if not any(name in str(error) for name in named):
            yield f"refused without naming {' or '.join(dict.fromkeys(named))}: {error}"
        return
    yield "a checkpoint was loaded that has to be refused: " + ", ".join(
        f"{refusal.kind} at {refusal.tensor}" for refusal in case.refused
    )
