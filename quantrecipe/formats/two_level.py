"""Scales of two levels: numbers that a second level of scales multiplies.

nvfp4 has fp8 scales of blocks under one float32 number (``formats.nvfp4``), a double-quantized nf4
8-bit codes under a float32 absolute maximum for each 256 and a mean over all
(``formats.double_quantization``). Either way no scale is known before all of a weight has been
seen, and codes are computed with a float32 grid.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from quantrecipe.formats.double_quantization import compress, decompress
from quantrecipe.formats.nvfp4 import block_scales, multiplied
from quantrecipe.schema.schemes import Nf4, ScaledWeight


@dataclass(frozen=True, slots=True)
class TwoLevelScales:
    """Scales of a whole weight as they are stored.

    Attributes:
        scale: the canonical grid ``spec.scale_grid(out, in)``: of nvfp4 in ``spec.scale_dtype``, of
            a double-quantized nf4 uint8, codes of the 8-bit map.
        second: float32. Of nvfp4 ``[1]``, what block scales are multiplied by; of nf4
            ``[ceil(out * groups / 256)]``, the absolute maximum of each 256 scales, counted row
            after row.
        offset: float32 ``[1]``, the mean that was taken off all scales; ``None`` for nvfp4.
    """

    scale: Tensor
    second: Tensor
    offset: Tensor | None


def choose_two_levels(amax: Tensor, spec: ScaledWeight) -> tuple[TwoLevelScales, Tensor]:
    """The scales of a whole weight.

    Args:
        amax: the absolute maxima of all groups, from ``WeightFormat.measure``: float32
            ``spec.scale_grid(out, in)``, finite.
        spec: how the weight shall be stored, with scales of two levels.

    Returns:
        What is stored, and the float32 grid to encode with: for nvfp4 that of
        ``effective_scales``; for nf4, as in bitsandbytes, the maxima themselves.

    Raises:
        ScaleOutOfRange: the scales of an nf4 have no mean in float32.
        ValueError: ``amax`` is no such grid, or ``spec`` has no two levels.
    """
    _check(spec)
    if isinstance(spec, Nf4):
        return TwoLevelScales(*compress(amax)), amax
    scale, second = block_scales(amax)
    return TwoLevelScales(scale, second, None), multiplied(scale, second)


def effective_scales(stored: TwoLevelScales, spec: ScaledWeight) -> Tensor:
    """What codes are multiplied by, a float32 grid of the shape of ``stored.scale``.

    Raises:
        ValueError: a part is missing or of another shape, or ``spec`` has no two levels.
    """
    _check(spec)
    if not isinstance(spec, Nf4):
        if stored.second.numel() != 1:
            raise ValueError(f"one number multiplies block scales, not {list(stored.second.shape)}")
        return multiplied(stored.scale, stored.second)
    if stored.offset is None:
        raise ValueError("double-quantized scales need the mean that was taken off them")
    return decompress(stored.scale, stored.second, stored.offset)


def _check(spec: ScaledWeight) -> None:
    if not spec.has_two_levels:
        raise ValueError(f"scales of {spec.format} have one level")
