"""Schemes: a weight format, an activation format and smoothing, each chosen by its tags.

A weight format knows what it stores (the dtype of its codes, the grid of its scales), because the
plan needs that from headers alone. How numbers become codes lives in ``quantrecipe.formats``.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal

from pydantic import Discriminator, Field, Tag

from quantrecipe.schema.base import Model, NonEmpty, SourcePath, Yes, exactly
from quantrecipe.schema.dtypes import PlainDType

Float8Name = Literal["float8_e4m3fn", "float8_e5m2"]
ScaleDType = Literal["float32", "float16", "bfloat16"]
BlockScaleDType = Literal["float8_e8m0fnu", "float8_e4m3fn", "uint8"]
"""What scales of blocks that have a second level, or are powers of two, are stored in."""

GranularityName = Literal["tensor", "channel", "group", "block"]
RecordFormatName = Literal["q8_0", "q4_0", "q4_k", "q6_k"]
ScaledFormatName = Literal[
    "int8",
    Float8Name,
    "int4",
    "nf4",
    "llm_int8",
    "mxfp8",
    "mxfp4",
    "nvfp4",
    RecordFormatName,
]
FormatName = Literal[PlainDType, ScaledFormatName]
CODE_DTYPES: Final[Mapping[str, str]] = MappingProxyType(
    {"llm_int8": "int8", "mxfp8": "float8_e4m3fn"}
)
"""What the codes of a format are stored in, where it is not called like the format."""

PACKED_FORMATS: Final[tuple[ScaledFormatName, ...]] = ("int4", "nf4", "mxfp4", "nvfp4")
"""Formats whose codes are smaller than a byte: every layout says how it packs them."""

SmoothingPlacement = Literal["online", "fold"]


class Absmax(Model):
    """Scale from the absolute maximum of the scaling group: ``stored(amax / largest code)``."""

    kind: Literal["absmax"]


class ClipSearch(Model):
    """Scale of the least squared error: ``stored(c amax / largest code)`` for the best of a grid.

    Each scaling group takes a clip ratio ``c`` of ``1, ..., min_clip_ratio``, in equal steps. A
    ratio below 1 clips the group's largest numbers and rounds all others more finely.
    """

    kind: Literal["clip-search"]

    min_clip_ratio: Annotated[float, Field(ge=0.1, lt=1.0)] = 0.5
    """The smallest clip ratio."""

    steps: Annotated[int, Field(ge=1, le=256)] = 32
    """How many equal steps lead from 1 to the smallest ratio."""

    statistics: SourcePath | None = None
    """A statistics file, relative to the recipe: errors of a column are weighed by the mean square
    of its input. Absent: all columns weigh the same."""

    def ratios(self) -> tuple[float, ...]:
        """The clip ratios, from 1 downwards."""
        steps, least = self.steps, self.min_clip_ratio
        return tuple((steps - step + step * least) / steps for step in range(steps + 1))


class OcpFloor(Model):
    """The power of two that the OCP MX specification (1.0, section 6.3) chooses for a block.

    ``2^(floor(log2(amax)) - floor(log2(largest code)))``: the largest numbers of a block may be
    clamped. With absmax it is the least power of two that clamps nothing.
    """

    kind: Literal["ocp-floor"]


Quantizer = Annotated[Absmax | ClipSearch, Discriminator("kind")]
MxQuantizer = Annotated[Absmax | OcpFloor, Discriminator("kind")]
AnyQuantizer = Absmax | ClipSearch | OcpFloor


class PlainWeight(Model):
    """Numbers without a scale, rounded to nearest, ties to even."""

    format: PlainDType
    """The dtype that is stored."""

    def refuses(self, out_features: int, in_features: int) -> str | None:
        """``None``: a plain weight takes every shape."""
        return None


class ScaledWeight(Model):
    """What every format with codes and scales shares."""

    format: ScaledFormatName
    """The format of the codes."""

    granularity: GranularityName
    """How many numbers share one scale."""

    scale_dtype: ScaleDType | BlockScaleDType = "float32"
    """The dtype scales are stored in; codes are computed from the stored scale."""

    quantizer: AnyQuantizer = Absmax(kind="absmax")
    """How scales are chosen. It never changes what a reader must know."""

    @property
    def code_dtype(self) -> str:
        """The dtype of one code in memory; a layout may pack several into one stored number."""
        return CODE_DTYPES.get(self.format, self.format)

    def code_columns(self, in_features: int) -> int:
        """How many codes a row has in memory: one for each number, or the bytes of its records."""
        return in_features

    @property
    def stored_dtype(self) -> str:
        """The dtype that a header gives codes that are not packed."""
        return self.code_dtype

    def number_columns(self, code_columns: int) -> int:
        """How many numbers a row of so many codes stands for."""
        return code_columns

    @property
    def has_scales(self) -> bool:
        """Whether scales are tensors; otherwise they lie between the codes, in records."""
        return True

    @property
    def has_two_levels(self) -> bool:
        """Whether scales are stored as numbers that a second level of scales multiplies."""
        return False

    @property
    def grid_dtype(self) -> str:
        """The dtype of the grid of scales that codes are computed with."""
        return "float32" if self.has_two_levels else self.scale_dtype

    @property
    def stored_scale_dtypes(self) -> tuple[str, ...]:
        """What a header may call the dtype of the scales; the bits are the same."""
        return (self.scale_dtype,)

    @property
    def scales_together(self) -> bool:
        """Whether no scale is known before all of the weight has been seen."""
        return self.granularity == "tensor" or self.has_two_levels

    @property
    def has_zero_points(self) -> bool:
        """Whether every scale has a zero point beside it: the code that stands for 0."""
        return False

    @property
    def has_zero_scales(self) -> bool:
        """Whether a group of zeros has scale 0; elsewhere no scale is 0."""
        return False

    def scale_grid(self, out_features: int, in_features: int) -> tuple[int, int]:
        """Scales along out and in: that of ``w[o, i]`` is ``grid[o // rows, i // columns]``."""
        rows, columns = self.group_shape(out_features, in_features)
        return -(-out_features // max(1, rows)), -(-in_features // max(1, columns))

    def group_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        """Rows and columns of the weight that share one scale."""
        raise NotImplementedError

    def refuses(self, out_features: int, in_features: int) -> str | None:
        """Why a weight of this shape cannot be stored so, or ``None``."""
        return None


class _Freely(ScaledWeight):
    """Scales of any plain dtype, chosen in any way."""

    scale_dtype: ScaleDType = "float32"
    """The dtype scales are stored in; codes are computed from the stored scale."""

    quantizer: Quantizer = Absmax(kind="absmax")
    """How scales are chosen. It never changes what a reader must know."""


class _Tensor(_Freely):
    granularity: Literal["tensor"]
    """One scale for the whole weight."""

    def group_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        return out_features, in_features


class _Channel(_Freely):
    granularity: Literal["channel"]
    """One scale for each output channel (each row)."""

    def group_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        return 1, in_features


class _Int8(Model):
    format: Literal["int8"]
    """Signed 8-bit codes in [-127, 127]."""

    symmetric: Yes = True
    """Zero is code 0; there is no zero point."""


class Int8Tensor(_Int8, _Tensor):
    """int8, one scale for the weight."""


class Int8Channel(_Int8, _Channel):
    """int8, one scale for each output channel."""


class Int8Group(_Int8, _Freely):
    """int8, one scale for each run of ``group_size`` input columns in a row."""

    granularity: Literal["group"]
    """One scale for each group of columns in each row."""

    group_size: Annotated[int, Field(ge=1, le=1 << 20)]
    """Columns that share a scale; divides the number of input features."""

    def group_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        return 1, self.group_size

    def refuses(self, out_features: int, in_features: int) -> str | None:
        return _whole_groups(in_features, self.group_size, "group_size")


class _Float8(Model):
    format: Float8Name
    """8-bit floating-point codes, clamped to the largest finite value before the cast."""


class Float8Tensor(_Float8, _Tensor):
    """fp8, one scale for the weight."""


class Float8Channel(_Float8, _Channel):
    """fp8, one scale for each output channel."""


class Float8Block(_Float8, _Freely):
    """fp8, one scale for each block; blocks at the edges may be smaller."""

    granularity: Literal["block"]
    """One scale for each block of rows and columns."""

    block_size: Annotated[
        tuple[Annotated[int, Field(ge=1, le=1 << 20)], Annotated[int, Field(ge=1, le=1 << 20)]],
        Field(examples=[[128, 128]]),
    ]
    """Rows and columns of a block."""

    def group_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        return self.block_size


class Int4Group(_Freely):
    """int4, one scale for each run of ``group_size`` input columns in a row."""

    format: Literal["int4"]
    """Codes 0 to 15. Symmetric: 8 stands for zero, and 1 to 15 are written."""

    granularity: Literal["group"]
    """One scale for each group of columns in each row."""

    group_size: Annotated[int, Field(ge=1, le=1 << 20)]
    """Columns that share a scale; divides the number of input features."""

    symmetric: bool = True
    """Whether zero is code 8 everywhere; otherwise each group has a zero point, a code too."""

    @property
    def code_dtype(self) -> str:
        return "uint8"

    @property
    def has_zero_points(self) -> bool:
        return not self.symmetric

    def group_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        return 1, self.group_size

    def refuses(self, out_features: int, in_features: int) -> str | None:
        return _whole_groups(in_features, self.group_size, "group_size")


class Nf4(_Freely):
    """nf4, one scale for each run of ``block_size`` input columns in a row."""

    format: Literal["nf4"]
    """Codes 0 to 15: the quantiles of a normal distribution that QLoRA chose (arXiv 2305.14314),
    from -1 to 1."""

    granularity: Literal["block"]
    """One scale, the absolute maximum, for each block."""

    block_size: Annotated[Literal[64], exactly(int, "64")]
    """Numbers that share a scale, counted row after row as bitsandbytes does; it divides the number
    of input features, so that no block goes on in the next row."""

    scale_dtype: Literal["float32"] = "float32"
    """The dtype scales are stored in."""

    double_quantized: bool = False
    """Whether scales are themselves stored as 8-bit codes: of the scales less their mean, in blocks
    of 256 (QLoRA, arXiv 2305.14314, section 3)."""

    @property
    def code_dtype(self) -> str:
        return "uint8"

    @property
    def has_zero_scales(self) -> bool:
        return True

    @property
    def has_two_levels(self) -> bool:
        return self.double_quantized

    @property
    def stored_scale_dtypes(self) -> tuple[str, ...]:
        return ("uint8",) if self.double_quantized else (self.scale_dtype,)

    def group_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        return 1, self.block_size

    def refuses(self, out_features: int, in_features: int) -> str | None:
        return _whole_groups(in_features, self.block_size, "block_size") or _searched(
            self.double_quantized, self.quantizer
        )


class LlmInt8(ScaledWeight):
    """LLM.int8() (arXiv 2208.07339), one scale for each row: its absolute maximum."""

    format: Literal["llm_int8"]
    """Signed 8-bit codes in [-127, 127]; ``w = code * scale * (1 / 127)``."""

    granularity: Literal["channel"]
    """One scale, the absolute maximum, for each output channel (each row)."""

    scale_dtype: Literal["float32"] = "float32"
    """The dtype scales are stored in."""

    quantizer: Absmax = Absmax(kind="absmax")
    """How scales are chosen."""

    @property
    def has_zero_scales(self) -> bool:
        return True

    def group_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        return 1, in_features


class _Mx(ScaledWeight):
    """Blocks of 32 with a power of two each (OCP Microscaling Formats, 1.0)."""

    granularity: Literal["group"]
    """One scale for each run of ``group_size`` input columns in a row."""

    group_size: Annotated[Literal[32], exactly(int, "32")] = 32
    """Columns that share a scale; divides the number of input features."""

    scale_dtype: Literal["float8_e8m0fnu"] = "float8_e8m0fnu"
    """The dtype scales are stored in: powers of two."""

    quantizer: MxQuantizer = Absmax(kind="absmax")
    """How scales are chosen: the least power of two that clamps nothing, or that of the
    specification. It never changes what a reader must know."""

    @property
    def stored_scale_dtypes(self) -> tuple[str, ...]:
        return ("float8_e8m0fnu", "uint8")

    def group_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        return 1, self.group_size

    def refuses(self, out_features: int, in_features: int) -> str | None:
        return _whole_groups(in_features, self.group_size, "group_size")


class MxFp8(_Mx):
    """mxfp8, one power of two for each run of 32 input columns in a row."""

    format: Literal["mxfp8"]
    """8-bit floating-point codes (e4m3), clamped to the largest finite value before the cast."""


class MxFp4(_Mx):
    """mxfp4, one power of two for each run of 32 input columns in a row."""

    format: Literal["mxfp4"]
    """Codes 0 to 15: sign, two bits of exponent, one of mantissa (e2m1), up to 6."""

    @property
    def code_dtype(self) -> str:
        return "uint8"


class NvFp4(ScaledWeight):
    """nvfp4, one fp8 scale for each run of 16 input columns in a row, times one for the weight."""

    format: Literal["nvfp4"]
    """Codes 0 to 15: sign, two bits of exponent, one of mantissa (e2m1), up to 6."""

    granularity: Literal["group"]
    """One scale for each run of ``group_size`` input columns in a row."""

    group_size: Annotated[Literal[16], exactly(int, "16")] = 16
    """Columns that share a scale; divides the number of input features."""

    scale_dtype: Literal["float8_e4m3fn"] = "float8_e4m3fn"
    """The dtype block scales are stored in; one float32 scale multiplies all of them."""

    quantizer: Absmax = Absmax(kind="absmax")
    """How scales are chosen."""

    @property
    def code_dtype(self) -> str:
        return "uint8"

    @property
    def stored_scale_dtypes(self) -> tuple[str, ...]:
        return ("float8_e4m3fn", "uint8")

    @property
    def has_zero_scales(self) -> bool:
        return True

    @property
    def has_two_levels(self) -> bool:
        return True

    def group_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        return 1, self.group_size

    def refuses(self, out_features: int, in_features: int) -> str | None:
        return _whole_groups(in_features, self.group_size, "group_size")


_RECORDS: Final[Mapping[str, tuple[int, int]]] = MappingProxyType(
    {"q8_0": (32, 34), "q4_0": (32, 18), "q4_k": (256, 144), "q6_k": (256, 210)}
)


class GgmlRecords(ScaledWeight):
    """A format of ggml, scales inside records of 32 or 256 numbers of a row."""

    format: RecordFormatName
    """Which: ``q8_0`` and ``q4_0`` have 32 numbers in a record, ``q4_k`` and ``q6_k`` 256."""

    granularity: Literal["block"]
    """Scales for each record, inside it."""

    scale_dtype: Literal["float16"] = "float16"
    """The dtype of the scales inside a record."""

    quantizer: Absmax = Absmax(kind="absmax")
    """How scales are chosen: as the format's own encoder does."""

    @property
    def code_dtype(self) -> str:
        return "uint8"

    @property
    def stored_dtype(self) -> str:
        return self.format

    @property
    def has_scales(self) -> bool:
        return False

    @property
    def record(self) -> tuple[int, int]:
        """Numbers in a record, and its bytes."""
        return _RECORDS[self.format]

    def code_columns(self, in_features: int) -> int:
        numbers, size = self.record
        return in_features // numbers * size

    def number_columns(self, code_columns: int) -> int:
        numbers, size = self.record
        return code_columns // size * numbers

    def scale_grid(self, out_features: int, in_features: int) -> tuple[int, int]:
        return out_features, 0

    def group_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        return 1, self.record[0]

    def refuses(self, out_features: int, in_features: int) -> str | None:
        return _whole_groups(in_features, self.record[0], "the numbers in a record,")


def _searched(two_levels: bool, quantizer: AnyQuantizer) -> str | None:
    if two_levels and isinstance(quantizer, ClipSearch):
        return "scales of two levels are not searched; use the quantizer absmax"
    return None


def _whole_groups(in_features: int, size: int, name: str) -> str | None:
    if in_features % size:
        return f"its {in_features} input features are no multiple of {name} {size}"
    return None


Int8Weight = Annotated[Int8Tensor | Int8Channel | Int8Group, Discriminator("granularity")]
Float8Weight = Annotated[Float8Tensor | Float8Channel | Float8Block, Discriminator("granularity")]
AnyQuantizedWeight = Annotated[
    Int8Weight | Float8Weight | Int4Group | Nf4 | LlmInt8 | MxFp8 | MxFp4 | NvFp4 | GgmlRecords,
    Discriminator("format"),
]
Weight = Annotated[
    PlainWeight
    | Int8Weight
    | Float8Weight
    | Int4Group
    | Nf4
    | LlmInt8
    | MxFp8
    | MxFp4
    | NvFp4
    | GgmlRecords,
    Discriminator("format"),
]
AnyScaledWeight = (
    Int8Tensor
    | Int8Channel
    | Int8Group
    | Float8Tensor
    | Float8Channel
    | Float8Block
    | Int4Group
    | Nf4
    | LlmInt8
    | MxFp8
    | MxFp4
    | NvFp4
    | GgmlRecords
)
AnyWeight = PlainWeight | AnyScaledWeight


class DynamicActivation(Model):
    """Activations quantized at run time from the values of each call."""

    format: Literal["int8", "float8_e4m3fn"]
    """The format of the activation codes."""

    granularity: Literal["token", "tensor"]
    """One scale for each token (each row of the input) or one for the whole input."""

    dynamic: Yes
    """Scales are computed at run time; nothing is stored."""

    symmetric: Yes = True
    """Zero is code 0; there is no zero point."""


Strength = Annotated[float, Field(ge=0.0, le=1.0)]


class AlphaSearch(Model):
    """A choice of strengths: for each group of siblings, whichever does least harm."""

    search: Annotated[tuple[Strength, ...], NonEmpty, Field(max_length=64)]
    """The candidates. Taken is the one with the least squared error of the quantized product on the
    tokens that the statistics file keeps (``input_tokens``); of equals, the smallest."""


def _alpha_type(value: Any) -> str | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return "number"
    return "object" if isinstance(value, Mapping | Model) else None


Alpha = Annotated[
    Annotated[Strength, Tag("number")] | Annotated[AlphaSearch, Tag("object")],
    Discriminator(_alpha_type),
]


class SmoothQuant(Model):
    """Factors ``max|X_j|^alpha / max|W_j|^(1 - alpha)`` per input (arXiv 2211.10438, eq. 4).

    Both maxima are over all siblings: modules that share their input share their factors.
    """

    kind: Literal["smoothquant"]
    alpha: Alpha
    """How much of the difficulty moves from activations (1) to weights (0); or what to choose from,
    group by group."""

    apply: SmoothingPlacement
    """``online``: the loader divides activations by the stored factors. ``fold``: they go into the
    weights upstream."""

    statistics: SourcePath
    """The statistics file with the measured input maxima, relative to the recipe."""

    power_of_two: bool = False
    """Whether factors are rounded to the nearest power of two, by ratio: then dividing by them and
    multiplying by them rounds nothing."""

    @property
    def candidates(self) -> tuple[float, ...]:
        """The values of alpha to choose from, the smallest first; one where nothing is chosen."""
        if isinstance(self.alpha, AlphaSearch):
            return tuple(sorted(self.alpha.search))
        return (self.alpha,)


class Hadamard(Model):
    """Blocks of columns times a regular Hadamard matrix: ``y = Q((x / s) H) Q((W diag(s)) H)^T``.

    ``H`` is the Kronecker power of ``[[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1],
    [-1, 1, 1, 1]] / 2``: symmetric and orthonormal, its own inverse. The loader rotates activations
    after it has divided them by the smoothing factors.
    """

    kind: Literal["hadamard"]
    size: Literal[4, 16, 64, 256, 1024]
    """Input features in a block; divides their number."""

    def refuses(self, in_features: int) -> str | None:
        """Why a weight of so many input features cannot be rotated so, or ``None``."""
        if in_features % self.size:
            return f"its {in_features} input features are no multiple of {self.size}"
        return None


class Scheme(Model):
    """A weight format, with an activation format, smoothing and rotation where there are any."""

    weight: Weight
    """How weights are stored."""

    activation: DynamicActivation | None = None
    """How activations are quantized at run time; absent: they are not."""

    smoothing: SmoothQuant | None = None
    """Factors that move outliers from activations to weights; absent: none."""

    rotation: Hadamard | None = None
    """What spreads outliers over the input features, applied after smoothing; absent: nothing."""

    description: str | None = None
    """For people; no tool reads it."""

    def statistics(self) -> dict[str, str]:
        """The statistics files that it names, by the JSON pointer inside the scheme."""
        found = {}
        if self.smoothing is not None:
            found["/smoothing/statistics"] = self.smoothing.statistics
        weighed_by = second_moments(self.weight)
        if weighed_by is not None:
            found["/weight/quantizer/statistics"] = weighed_by
        return found


def second_moments(weight: AnyWeight) -> str | None:
    """The statistics file whose second moments the weight's quantizer weighs errors by."""
    if isinstance(weight, ScaledWeight) and isinstance(weight.quantizer, ClipSearch):
        return weight.quantizer.statistics
    return None
