"""What a module is stored as in a layout that does not hold it as it is.

Codes of another kind are a rounding of a rounding, so never fewer bits than before: first the same
format with scales of another granularity, then formats of as many bits and the same kind, then of
more bits and the same kind, then of another kind and more bits, or as many where there are no more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError

from quantrecipe.schema.layout import Layout
from quantrecipe.schema.layout_reading import StoredModule
from quantrecipe.schema.layout_writing import has_place_for_bias, refusal, unfit
from quantrecipe.schema.merging import by_channel
from quantrecipe.schema.plan import as_stored
from quantrecipe.schema.schemes import (
    AnyScaledWeight,
    AnyWeight,
    GranularityName,
    Hadamard,
    ScaledFormatName,
    ScaledWeight,
    Weight,
)

_WHOLE: Final[tuple[ScaledFormatName, ...]] = ("int8", "llm_int8", "q8_0")
_FLOAT: Final[tuple[ScaledFormatName, ...]] = ("float8_e4m3fn", "mxfp8", "float8_e5m2")
_FOUR: Final[tuple[ScaledFormatName, ...]] = ("q6_k", *_WHOLE, *_FLOAT)

NEAREST: Final[Mapping[ScaledFormatName, tuple[ScaledFormatName, ...]]] = MappingProxyType(
    {
        "int8": ("int8", "llm_int8", "q8_0", *_FLOAT),
        "llm_int8": ("llm_int8", "int8", "q8_0", *_FLOAT),
        "q8_0": ("q8_0", "int8", "llm_int8", *_FLOAT),
        "float8_e4m3fn": ("float8_e4m3fn", "mxfp8", "float8_e5m2", *_WHOLE),
        "float8_e5m2": ("float8_e5m2", "float8_e4m3fn", "mxfp8", *_WHOLE),
        "mxfp8": ("mxfp8", "float8_e4m3fn", "float8_e5m2", *_WHOLE),
        "q6_k": ("q6_k", *_WHOLE, *_FLOAT),
        "int4": ("int4", "q4_k", "q4_0", *_FOUR),
        "q4_k": ("q4_k", "int4", "q4_0", *_FOUR),
        "q4_0": ("q4_0", "int4", "q4_k", *_FOUR),
        "nf4": ("nf4", *_FOUR),
        "nvfp4": ("nvfp4", "mxfp4", *_FLOAT, *_WHOLE),
        "mxfp4": ("mxfp4", "nvfp4", *_FLOAT, *_WHOLE),
    }
)
"""For each format, what it is stored as: the first of these that a layout holds."""

COARSE_TO_FINE: Final[tuple[GranularityName, ...]] = ("tensor", "channel", "block", "group")
"""Of the granularities of a format: the source's own, then the next finer ones, then coarser."""

_GROUP_SIZES: Final = (128, 64, 32, 16)
_WEIGHT: Final[TypeAdapter[AnyWeight]] = TypeAdapter(Weight)


@dataclass(frozen=True, slots=True)
class Wanted:
    """A format that somebody chose.

    Attributes:
        format: its name.
        granularity: that of its scales; ``None``: the nearest that fits.
        size: columns of a group; ``None``: what fits.
    """

    format: ScaledFormatName
    granularity: GranularityName | None = None
    size: int | None = None


def as_it_is(layout: Layout, module: StoredModule) -> AnyScaledWeight | None:
    """How ``layout`` holds exactly the codes and scales of a module; ``None``: not at all.

    Scales may be stored in a wider dtype, and one scale for all rows as one for each.

    Args:
        layout: where to.
        module: which; one whose weight has codes and scales.
    """
    for stored in (module, by_channel(module)):
        weight = stored.weight
        assert isinstance(weight, ScaledWeight)
        wide = weight.model_copy(update={"scale_dtype": "float32"})
        for each in (weight, wide):
            if as_stored(weight, each) == each and _fits(layout, module, each):
                return each
    return None


def with_its_own(layout: Layout, module: StoredModule, weight: AnyWeight) -> bool:
    """Whether ``layout`` holds what a module is smoothed and rotated by, beside ``weight``."""
    return _refusal_of_its_own(layout, module, weight) is None


def _refusal_of_its_own(
    layout: Layout, module: StoredModule, weight: AnyWeight
) -> tuple[str, str] | None:
    smoothed = "smoothing" in module.tensors
    rotation: Hadamard | None = module.rotation
    return refusal(layout, weight, smoothed=smoothed, factors=smoothed, rotation=rotation)


def nearest(
    layout: Layout, module: StoredModule, wanted: Wanted | None = None
) -> AnyScaledWeight | None:
    """What a module becomes whose codes ``layout`` does not hold; ``None``: plain numbers.

    Args:
        layout: where to.
        module: which; one whose weight has codes and scales.
        wanted: a format that takes the place of the nearest one.
    """
    return next(
        (each for each in _candidates(layout, module, wanted) if _fits(layout, module, each)), None
    )


def _fits(layout: Layout, module: StoredModule, weight: AnyScaledWeight) -> bool:
    shape = module.out_features, module.in_features
    return (
        refusal(layout, weight) is None
        and weight.refuses(*shape) is None
        and 0 not in shape
        and unfit(layout, weight, shape) is None
        and ("bias" not in module.tensors or has_place_for_bias(layout, weight))
    )


def _candidates(
    layout: Layout, module: StoredModule, wanted: Wanted | None
) -> Iterator[AnyScaledWeight]:
    source = module.weight
    assert isinstance(source, ScaledWeight)
    for name in NEAREST[source.format] if wanted is None else (wanted.format,):
        holds = layout.holds.get(name)
        for granularity in _granularities(source.granularity):
            if holds is None or granularity not in holds.granularity:
                continue
            if wanted is not None and wanted.granularity not in (None, granularity):
                continue
            document: dict[str, Any] = {"format": name, "granularity": granularity}
            if granularity == "block" and holds.block_size is not None:
                size = holds.block_size
                document["block_size"] = size[1] if name == "nf4" else size
            sizes = _sizes(source, wanted) if granularity == "group" else (None,)
            for size_of_group in sizes:
                for scales in _scale_dtypes(source):
                    found = _weight(document, size_of_group, scales)
                    if found is not None:
                        yield found


def _granularities(own: GranularityName) -> tuple[GranularityName, ...]:
    place = COARSE_TO_FINE.index(own)
    return (*COARSE_TO_FINE[place:], *reversed(COARSE_TO_FINE[:place]))


def _sizes(source: ScaledWeight, wanted: Wanted | None) -> tuple[int | None, ...]:
    if wanted is not None and wanted.size is not None:
        return (wanted.size,)
    own = source.group_shape(1, 1)[1] if source.granularity in ("group", "block") else 128
    # ``None``: formats whose groups have one size.
    return tuple(dict.fromkeys((own, *_GROUP_SIZES, None)))


def _scale_dtypes(source: ScaledWeight) -> tuple[str | None, ...]:
    own = source.scale_dtype if source.scale_dtype in ("bfloat16", "float16") else "float32"
    # ``None``: formats whose scales have one dtype.
    return tuple(dict.fromkeys((own, "float32", "bfloat16", "float16", None)))


def _weight(
    document: Mapping[str, Any], size: int | None, scales: str | None
) -> AnyScaledWeight | None:
    more: dict[str, Any] = {}
    if size is not None:
        more["group_size"] = size
    if scales is not None:
        more["scale_dtype"] = scales
    try:
        found = _WEIGHT.validate_python({**document, **more})
    except ValidationError:
        return None
    return found if isinstance(found, ScaledWeight) else None
