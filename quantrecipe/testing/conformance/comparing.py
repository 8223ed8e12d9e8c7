"""Tensors against those that a case expects, and problems against those that must be found."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from quantrecipe.schema.problems import InvalidInput, Problem
from quantrecipe.testing.conformance.cases import Refusal, TensorFile


class Deviation(AssertionError):  # noqa: N818 - reads as what it says
    """What a candidate did is not what a case says; a line for each difference."""

    def __init__(self, differences: Sequence[str]) -> None:
        self.differences = tuple(differences)
        super().__init__("\n".join(differences))


def same_tensors(
    found: Mapping[str, Tensor], expected: TensorFile, where: str = ""
) -> Iterator[str]:
    """A line for each tensor that is missing, too many, or differs in any bit."""
    prefix = f"{where}: " if where else ""
    for name in expected:
        if name not in found:
            yield f"{prefix}[{name}] is missing"
    for name, tensor in found.items():
        if name not in expected:
            yield f"{prefix}[{name}] is not expected"
            continue
        difference = _difference(tensor.detach().cpu(), expected[name].tensor())
        if difference is not None:
            yield f"{prefix}[{name}] {difference}"


def _difference(found: Tensor, expected: Tensor) -> str | None:
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return f"is {_kind(found)}, expected {_kind(expected)}"
    wrong = (_bits(found) != _bits(expected)).any(-1)
    if not wrong.any():
        return None
    first = int(wrong.nonzero()[0])
    index = [int(i) for i in torch.unravel_index(torch.tensor(first), found.shape or (1,))]
    values = (float(tensor.reshape(-1)[first].double()) for tensor in (found, expected))
    return "at index {}: {!r}, expected {!r} ({} of {} differ)".format(
        index[: found.ndim], *values, int(wrong.sum()), found.numel()
    )


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _bits(tensor: Tensor) -> Tensor:
    """The bytes of each element, uint8 ``[numbers, bytes]``."""
    return tensor.contiguous().reshape(-1, 1).view(torch.uint8).view(-1, tensor.element_size())


def outside(found: Tensor, expected: Tensor, tolerance: Tensor, what: str) -> str | None:
    """A line for the output furthest beyond its tolerance; ``None`` if all are within."""
    error = (found.double() - expected).abs()
    wrong = ~(error <= tolerance)
    if not wrong.any():
        return None
    excess = torch.where(wrong, (error / tolerance).nan_to_num(nan=torch.inf), -1.0)
    row, column = divmod(int(excess.argmax()), found.shape[1])
    place = row, column
    return (
        f"{what} at index {list(place)}: {float(found[place])!r}, expected "
        f"{float(expected[place])!r} to within {float(tolerance[place]):.3g} "
        f"({int(wrong.sum())} of {found.numel()} differ by more)"
    )


def same_problems(found: Iterable[Problem], expected: Iterable[Refusal]) -> Iterator[str]:
    """A line for each problem that was not found, and each that is not there."""
    kinds = {(problem.kind, problem.pointer or problem.tensor) for problem in found}
    wanted = {(refusal.kind, refusal.pointer or refusal.tensor) for refusal in expected}
    for kind, place in sorted(wanted - kinds, key=str):
        yield f"{kind} at {place} was not found"
    for kind, place in sorted(kinds - wanted, key=str):
        yield f"{kind} at {place} was found, and is not there"


def refusal_of(error: InvalidInput | None, expected: Iterable[Refusal]) -> Iterator[str]:
    """A line for each way in which a refusal is not the expected one."""
    if error is None:
        wanted = ", ".join(refusal.kind for refusal in expected)
        yield f"nothing was refused, expected {wanted}"
        return
    yield from same_problems(error.problems, expected)
