"""Row blocks of a weight, as it is stored and as it shall be: what transforms and proofs are given.

A block is any run of rows that begins at a multiple of the row multiples of source and target
(``WeightFormat.row_multiple``), contiguous, and as stored: codes ``[rows, code columns]`` in the
dtype of the format, scales the rows of the canonical grid that belong to it, in the stored dtype,
zero points as uint8 of the shape of the scales.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class SourceBlock:
    """Rows of a weight that is read.

    Attributes:
        codes: its codes, or plain numbers ``[rows, in]``.
        scales: its scales, finite; ``None`` for a plain dtype.
        zeros: its zero points, where its format has them.
        factors: what its columns are multiplied by once they are decoded, float32 ``[in]``;
            ``None``: they stay as they are.
    """

    codes: Tensor
    scales: Tensor | None = None
    zeros: Tensor | None = None
    factors: Tensor | None = None


@dataclass(frozen=True, slots=True)
class TargetBlock:
    """The same rows in another format: memory that a transform fills, or what a proof looks at.

    Attributes:
        codes: its codes.
        scales: its scales. Where those of a weight are chosen together
            (``ScaledWeight.scales_together``) a transform reads them, chosen from ``absmax`` over
            all blocks.
        zeros: its zero points, where its format has them.
        encode_scales: the scales that a transform chooses codes by, where they are not those that
            codes are decoded with.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    encode_scales: Tensor | None = None

    @property
    def encoding(self) -> Tensor:
        """The scales that codes are chosen by."""
        return self.scales if self.encode_scales is None else self.encode_scales
