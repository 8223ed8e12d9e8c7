"""A stored row block held to its source: scales' maxima, errors and bounds, in one operation.

As in ``transform`` there are two implementations with the same results, bit for bit. The plain one
takes the steps of ``WeightFormat`` in torch. The compiled one takes one pass over each row on the
CPU, and hands over to the plain one whatever must be told in detail: a number that is refused, a
bound that is broken.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Final, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from quantrecipe.formats import NonFinite, get_format
from quantrecipe.formats.blocks import SourceBlock, TargetBlock
from quantrecipe.formats.error import RowErrors, errors_of
from quantrecipe.formats.kernels import PlainSteps, SourceArguments, load_kernels, takes
from quantrecipe.formats.refusals import extremes
from quantrecipe.schema.schemes import AnyScaledWeight, AnyWeight, Hadamard

COMPILED_PAYS_FROM_BYTES: Final = 200_000_000
"""Bytes of source weights from which the compiled proof is worth starting: seconds of the plain."""

SLACK: Final = 1 + 1e-6
"""The bound follows from numbers that were computed in float32."""


class Broken(NamedTuple):
    """An element beyond its bound: where it is in the block, how far it is off, and the bound."""

    row: int
    column: int
    error: float
    bound: float


class Proven(NamedTuple):
    """What holding a block to its source found.

    Attributes:
        amax: what ``measure`` says of the source in the target's scaling groups: as a rule the
            absolute maxima, a float32 grid.
        errors: as ``row_errors`` measures them.
        of_bound: the largest ``abs(w_hat - w)`` divided by its bound, slack included, in float64.
        broken: how many elements are beyond theirs.
        first: the first of them in row-major order.
    """

    amax: Tensor
    errors: RowErrors
    of_bound: float
    broken: int
    first: Broken | None


class TargetNonFinite(NonFinite):
    """A NaN or an infinity in what is held to the source, not in the source."""


class BlockProof(Protocol):
    """Row blocks of one weight, source and target, cut as for ``BlockTransform``.

    Threads may share it.
    """

    def __call__(self, source: SourceBlock, target: TargetBlock) -> Proven:
        """Hold the target's codes and scales, as stored, to the source's.

        Args:
            source: what the target is held to. Where the source's columns were rotated, bounds are
                of the rotated ones: the same float32 numbers that the codes were computed from.
            target: codes, scales and zero points.

        Raises:
            Unrepresentable: a number of the source is none; carries its row and column.
            TargetNonFinite: the same of the target.
        """


def block_proof(
    source: AnyWeight,
    target: AnyScaledWeight,
    *,
    rotation: Hadamard | None = None,
    prefer_compiled: bool = True,
) -> BlockProof:
    """The proof of a target format against a source format, chosen as ``block_transform`` is."""
    plain = PlainProof(source, target, rotation)
    kernels = load_kernels() if prefer_compiled else None
    if kernels is None or not {source.format, target.format} <= set(kernels.KINDS):
        return plain
    return CompiledProof(plain, kernels)


class PlainProof(PlainSteps):
    """``BlockProof`` in torch, step by step."""

    def __call__(self, source: SourceBlock, target: TargetBlock) -> Proven:
        fmt, spec = self.format, self.target
        codes, scales, zeros = target.codes, target.scales, target.zeros
        weight = self.decode(source)
        amax = fmt.measure(weight, spec)
        decoded = self._scratch.steps.like(weight)
        try:
            fmt.decode(codes, scales, spec, out=decoded, zero_point=zeros)
        except NonFinite as refused:
            raise TargetNonFinite(refused.what, refused.index) from None
        error = decoded.double().sub_(weight).abs_()
        bound = fmt.bound(weight, codes, scales, spec, zero_point=zeros).mul_(SLACK)
        errors = errors_of(decoded.sub_(weight), weight, scales, spec)
        return Proven(amax, errors, *_compared(error, bound))


def _compared(error: Tensor, bound: Tensor) -> tuple[float, int, Broken | None]:
    beyond = ~(error <= bound)
    # No error is none of any bound, of that of a scale of 0 too.
    ratio = (error / bound).masked_fill_(error == 0, 0)
    of_bound, broken = torch.stack((ratio.amax(), beyond.sum().double())).tolist()
    if not broken:
        return of_bound, 0, None
    row, column = (int(index) for index in beyond.nonzero()[0])
    first = Broken(row, column, float(error[row, column]), float(bound[row, column]))
    return of_bound, int(broken), first


class CompiledProof:
    """``BlockProof`` in compiled loops, for tensors in the CPU's memory.

    Args:
        plain: the same proof, for what this one does not take.
        kernels: ``quantrecipe.formats.compiled``.
    """

    def __init__(self, plain: PlainProof, kernels: ModuleType) -> None:
        self._plain = plain
        self._kernels = kernels
        self._target = plain.target
        self._format = get_format(plain.target)
        self._source = SourceArguments(
            plain.source, plain.rotation, kernels.KINDS[plain.source.format]
        )

    def __call__(self, source: SourceBlock, target: TargetBlock) -> Proven:
        block, codes, scales = self._source.of(source), target.codes, target.scales
        if block is not None and self._takes(source.codes, codes, scales):
            rows, columns = source.codes.shape
            signal, noise = np.empty(rows), np.empty(rows)
            amax = torch.empty(scales.shape)
            of_bound, worst = self._kernels.prove(
                *block,
                self._kernels.KINDS[self._target.format],
                codes.view(torch.uint8).numpy(),
                scales.float().numpy(),
                *self._target.group_shape(rows, columns),
                SLACK,
                amax.numpy(),
                signal,
                noise,
            )
            if 0 <= of_bound <= 1:
                sums = torch.from_numpy(signal), torch.from_numpy(noise)
                return Proven(amax, RowErrors(*sums, float(worst)), float(of_bound), 0, None)
        return self._plain(source, target)

    def _takes(self, codes_in: Tensor, codes: Tensor, scales: Tensor) -> bool:
        """Whether the target is what the kernel expects, and none of its numbers can overflow."""
        grid = self._target.scale_grid(*codes_in.shape)
        if not takes(codes, self._format.code_dtype, tuple(codes_in.shape)):
            return False
        if not takes(scales, scales.dtype, grid):
            return False
        low, high = extremes(scales.float() * (self._format.largest_code + 1))
        return 0 < low <= high < math.inf
