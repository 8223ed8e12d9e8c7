"""One quantized module against its source: scales as they must be, every error within its bound."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from quantrecipe.formats import Unrepresentable, get_format, rows_together, sqnr_db
from quantrecipe.formats.base import WeightFormat, Workspace
from quantrecipe.formats.blocks import SourceBlock, TargetBlock
from quantrecipe.formats.clip_search import candidates
from quantrecipe.formats.folding import FoldedFactors, divide_scales, divides_scales, fold_rows
from quantrecipe.formats.kernels import decode_block
from quantrecipe.formats.proof import Proven, TargetNonFinite, block_proof
from quantrecipe.formats.refusals import first_index
from quantrecipe.formats.two_level import TwoLevelScales, choose_two_levels
from quantrecipe.loaders import Checkpoint
from quantrecipe.schema.layout_reading import StoredModule
from quantrecipe.schema.problems import InvalidInput, Problem
from quantrecipe.schema.schemes import (
    AnyQuantizer,
    AnyWeight,
    ClipSearch,
    PlainWeight,
    ScaledWeight,
)
from quantrecipe.schema.tensors import TensorInfo


@dataclass(frozen=True, slots=True)
class Measured:
    """How far a module is from its source.

    Attributes:
        problems: broken bounds, and scales that are not those of the source's maxima.
        sqnr_db, max_error_in_scales: as the lock has them, not rounded.
        of_bound: the largest error divided by its bound.
    """

    problems: tuple[Problem, ...]
    sqnr_db: float | None
    max_error_in_scales: float
    of_bound: float


def prove_bound(
    source: Checkpoint,
    output: Checkpoint,
    name: str,
    part: str,
    block_bytes: int,
    quantizer: AnyQuantizer,
    folds: FoldedFactors,
    *,
    prefer_compiled: bool = False,
) -> Measured:
    """Stream a module's rows from both and hold ``abs(w - w_hat)`` to the bound of its format.

    ``w`` is the source's weight in float32, times the smoothing factors that are stored or folded,
    rotated as the module is: bit for bit what its codes were computed from. ``w_hat`` is decoded
    from codes and scales as stored. Errors are compared in float64. Where factors are folded into
    the rows, ``w`` is divided by them, or codes are proven with the scales that they had before
    these were divided.

    A bound alone would prove little of a scale that is too small, since it allows for what is
    clipped; so scales are held to the source's absolute maxima, bit by bit: each must be one that
    the quantizer chooses from. Which of them has the least error is not asked, since that may take
    statistics that nobody kept.

    Raises:
        InvalidInput: a number of the source or the output is not finite.
    """
    original, module = source.module(name, part), output.module(name, part)
    assert isinstance(module.weight, ScaledWeight)
    spec = module.weight.model_copy(update={"quantizer": quantizer})
    factors = folds.factors(part, name)
    if "smoothing" in module.tensors:
        factors = output.tensor(module.tensors["smoothing"])
    divisors = folds.divisors(part, name, module.out_features)
    rows_divided = divisors is not None and not divides_scales(spec)
    rows_in, rows_out = source.stored(name, part), output.stored(name, part)
    given: AnyWeight = PlainWeight(format="float32") if rows_divided else rows_in.format
    prove = block_proof(given, spec, rotation=module.rotation, prefer_compiled=prefer_compiled)
    proof = _Proof(module, spec, get_format(spec))
    for start, stop in row_blocks(original, module, block_bytes):
        codes, zeros = rows_out.codes(start, stop), rows_out.zeros(start, stop)
        scale = rows_out.scales(start, stop)
        try:
            block = rows_in.given(start, stop, factors)
            if divisors is not None:
                rows = divisors[start:stop]
                rotation = None if rows_divided else module.rotation
                values = decode_block(rows_in.format, block, rotation, Workspace())
                if rows_divided:
                    block = SourceBlock(fold_rows(values, None, rows))
                else:
                    scale = proof.undivided(values, scale, zeros, rows, start)
            found = prove(block, TargetBlock(codes, scale, zeros))
            proof.take_in(found, scale, zeros, start)
        except Unrepresentable as refused:
            of = module if isinstance(refused, TargetNonFinite) else original
            info = of.tensors["weight"]
            problem = replace(refused.at(info.name, start), file=str(info.file))
            raise InvalidInput(problem) from None
    stored_levels = rows_out.two_levels() if module.weight.has_two_levels else None
    return proof.result(stored_levels)


def row_blocks(
    source: StoredModule, output: StoredModule, block_bytes: int
) -> Iterator[tuple[int, int]]:
    """Runs of rows of about ``block_bytes`` of float32 that both can be decoded by."""
    multiple = math.lcm(
        *(rows_together(module.weight, module.storage) for module in (source, output))
    )
    step = max(1, block_bytes // max(1, 4 * source.in_features * multiple)) * multiple
    for start in range(0, source.out_features, step):
        yield start, min(source.out_features, start + step)


@dataclass(slots=True)
class _Proof:
    """The sums over the blocks of one module so far."""

    module: StoredModule
    spec: ScaledWeight
    fmt: WeightFormat
    signal: Tensor = field(init=False)
    noise: Tensor = field(init=False)
    maxima: list[Tensor] = field(default_factory=list)
    worst: float = 0.0
    of_bound: float = 0.0
    amax: Tensor | None = None
    stored: Tensor | None = None
    broken: int = 0
    first_broken: str = ""
    wrong_scale: str = ""
    wrong_zero_point: str = ""

    def __post_init__(self) -> None:
        # Room for every row at once: small tensors kept between large ones that come and go would
        # leave holes in memory that nothing fits into.
        self.signal = torch.zeros(self.module.out_features, dtype=torch.float64)
        self.noise = torch.zeros_like(self.signal)

    def undivided(
        self,
        weight: Tensor,
        stored: Tensor,
        zero_point: Tensor | None,
        divisors: Tensor,
        start: int,
    ) -> Tensor:
        """The scales that were divided: those the quantizer chooses from that give what is stored.

        Where several do, one that goes with the zero point. Where none does, about what they would
        have been, and a problem.

        Args:
            weight: the source's rows, float32, before anything is divided.
            stored: their scales.
            zero_point: their zero points, where the format has them.
            divisors: of the rows, float32.
            start: the first of the rows.
        """
        found = (stored.double() * divisors.double().unsqueeze(1)).float()
        unknown = torch.ones_like(stored, dtype=torch.bool)
        misplaced = torch.full_like(unknown, zero_point is not None)
        amax = self.fmt.measure(weight, self.spec)
        for candidate, zeros in candidates(amax, self.fmt, self.spec):
            fits = divide_scales(candidate, divisors) == stored
            better = unknown
            if zeros is not None and zero_point is not None:
                together = fits & (zeros == zero_point)
                better = unknown | (misplaced & together)
                misplaced &= ~together
            found[fits & better] = candidate[fits & better]
            unknown = unknown & ~fits
        if bool(unknown.any()) and not self.wrong_scale:
            row, column = (int(index) for index in unknown.nonzero()[0])
            self.wrong_scale = (
                f"the scale at [{start + row}, {column}] of its grid is "
                f"{float(stored[row, column])!r}, and no scale of the source's weights there, "
                f"divided by the folded factor {float(divisors[row])!r}, makes it that"
            )
        return found

    def take_in(self, found: Proven, scale: Tensor, zero_point: Tensor | None, start: int) -> None:
        """Add one block of rows, the first of which is row ``start``."""
        if self.spec.has_two_levels:
            self.maxima.append(found.amax)
        elif self.spec.scales_together:
            self.amax = found.amax if self.amax is None else torch.maximum(self.amax, found.amax)
            self.stored = scale
        elif self.spec.has_scales:
            first = start // self.fmt.row_multiple(self.spec)
            self._check_scales(found.amax, scale, zero_point, first)
        if found.first is not None and not self.broken:
            row, column, error, bound = found.first
            self.first_broken = (
                f"at row {start + row}, column {column}: off by {error:.6g}, "
                f"and the bound is {bound:.6g}"
            )
        self.broken += found.broken
        self.of_bound = max(self.of_bound, found.of_bound)
        rows = slice(start, start + len(found.errors.signal))
        self.signal[rows] = found.errors.signal
        self.noise[rows] = found.errors.noise
        self.worst = max(self.worst, found.errors.worst_in_scales)

    def result(self, stored: TwoLevelScales | None) -> Measured:
        """What all blocks together say.

        Args:
            stored: the output's scales, where they have two levels.
        """
        if stored is not None:
            self._check_two_levels(stored)
        if self.amax is not None and self.stored is not None:
            self._check_scales(self.amax, self.stored, None, 0)
        return Measured(
            tuple(self._problems()),
            sqnr_db(self.signal, self.noise),
            self.worst,
            self.of_bound,
        )

    def _check_two_levels(self, stored: TwoLevelScales) -> None:
        """Scales of two levels are those that the source's maxima give, all of them together."""
        wanted, _ = choose_two_levels(torch.cat(self.maxima), self.spec)
        pairs = [("second level of scales", stored.second[None], wanted.second[None])]
        if wanted.offset is not None and stored.offset is not None:
            pairs.append(("offset of the scales", stored.offset[None], wanted.offset[None]))
        pairs.append(("scale", stored.scale, wanted.scale))
        for what, there, expected in pairs:
            index = first_index(there.float() != expected.float())
            if index is not None:
                row, column = index
                self.wrong_scale = (
                    f"the {what} at [{row}, {column}] of its grid is "
                    f"{float(there[row, column])!r}, and the source's weights make it "
                    f"{float(expected[row, column])!r}"
                )
                return

    def _check_scales(
        self, amax: Tensor, scale: Tensor, zero_point: Tensor | None, first: int
    ) -> None:
        differs = torch.ones_like(scale, dtype=torch.bool)
        misplaced = torch.full_like(differs, zero_point is not None)
        for candidate, zeros in candidates(amax, self.fmt, self.spec):
            other = candidate != scale
            differs &= other
            if zeros is not None and zero_point is not None:
                misplaced &= other | (zeros != zero_point)
            if not bool((differs | misplaced).any()):
                return
        index = first_index(differs)
        if index is not None and not self.wrong_scale:
            row, column = index
            unclipped = float(self.fmt.scales(amax, self.spec)[row, column])
            searched = isinstance(self.spec.quantizer, ClipSearch)
            self.wrong_scale = (
                f"the scale at [{first + row}, {column}] of its grid is "
                f"{float(scale[row, column])!r}, and the source's largest weight there makes it "
                f"{unclipped!r}{', or that times a clip ratio' if searched else ''}"
            )
        index = first_index(misplaced & ~differs)
        if index is not None and zero_point is not None and not self.wrong_zero_point:
            row, column = index
            self.wrong_zero_point = (
                f"the zero point at [{first + row}, {column}] of its grid is "
                f"{int(zero_point[row, column])}, and the source's smallest weight there makes it "
                "another"
            )

    def _problems(self) -> Iterator[Problem]:
        hint = "These are not the numbers that its recipe makes of this source; convert again."
        if self.broken:
            many = "1 element breaks" if self.broken == 1 else f"{self.broken:,} elements break"
            comma = "" if self.broken == 1 else ", the first"
            message = f"{many} the bound of {self.spec.format}{comma} {self.first_broken}"
            yield self._problem("bound-broken", message, hint, self.module.tensors["weight"])
        if self.wrong_scale:
            info = self.module.tensors["weight_scale"]
            yield self._problem("scale-differs", self.wrong_scale, hint, info)
        if self.wrong_zero_point:
            info = self.module.tensors["weight_zero_point"]
            yield self._problem("zero-point-differs", self.wrong_zero_point, hint, info)

    def _problem(self, kind: str, message: str, hint: str, info: TensorInfo) -> Problem:
        return Problem(kind, message, hint, file=str(info.file), tensor=info.name)
