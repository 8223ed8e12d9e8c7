"""Hypothesis strategies: specs, schemes, layouts, weights, activations, recipes with sources.

They draw what the schema allows and what tends to go wrong: rows of zeros, subnormal numbers,
outliers, ties between codes, shapes that fill no block. Hypothesis comes with the extra ``test``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, get_args

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from pydantic import TypeAdapter
from torch import Tensor

from quantrecipe.formats.dtypes import TORCH_DTYPES
from quantrecipe.schema.capabilities import BUILT_IN
from quantrecipe.schema.dtypes import PLAIN_DTYPES
from quantrecipe.schema.layout import Layout
from quantrecipe.schema.recipe import Recipe
from quantrecipe.schema.schemes import (
    AnyWeight,
    Nf4,
    RecordFormatName,
    ScaledWeight,
    Scheme,
    Weight,
)
from quantrecipe.schema.validation import parse_layout, parse_recipe

__all__ = [
    "activations",
    "conversions",
    "layout_of_everything",
    "linear_shapes",
    "quantizable",
    "schemes",
    "weight_specs",
    "weights",
]

Floats = NDArray[np.float32]

SCALED: Final[Mapping[str, tuple[str, ...]]] = {
    name: tuple(sorted(granularities))
    for name, granularities in BUILT_IN.formats.items()
    if granularities and name not in get_args(RecordFormatName)
}
"""Every format with codes and scales, and its granularities; but those of ggml, which lie in
records that only their own container holds."""

SCALE_DTYPES: Final = ("float32", "float16", "bfloat16")
GROUP_SIZE: Final = 4
BLOCK_SIZE: Final = (3, 5)
"""Small, so that small weights have several groups, and blocks that are cut short."""

NF4_BLOCK: Final = 64
"""The one block size of nf4."""

_PACKINGS: Final = {
    "int4": "uint8-high-nibble",
    "nf4": "int32-low-nibble",
    "mxfp4": "uint8-low-nibble",
    "nvfp4": "uint8-high-nibble",
}
_FIXED: Final[Mapping[str, dict[str, Any]]] = {
    "nf4": {"block_size": NF4_BLOCK},
    "llm_int8": {},
    "mxfp8": {},
    "mxfp4": {},
    "nvfp4": {},
}
"""Formats that leave scales no choice."""

_OWN_SCALES: Final[Mapping[str, list[str]]] = {
    "nf4": ["float32", "uint8"],
    "mxfp8": ["float8_e8m0fnu"],
    "mxfp4": ["uint8"],
    "nvfp4": ["float8_e4m3fn"],
}
_TILES: Final = ("padded_out", "padded_groups")
_WEIGHT: Final[TypeAdapter[AnyWeight]] = TypeAdapter(Weight)
# Scales of larger numbers would be no float16, nor would the numbers themselves.
_FLOAT16_LIMIT: Final = 2.0**15
_LIMIT: Final = float(np.finfo(np.float32).max)
_GROUP_SIZES: Final = st.just(GROUP_SIZE)
_BLOCK_SIZES: Final = st.just(BLOCK_SIZE)
_SEEDS: Final = st.integers(0, 2**32 - 1)


@st.composite
def weight_specs(
    draw: st.DrawFn,
    *,
    formats: Sequence[str] = (*PLAIN_DTYPES, *SCALED),
    scale_dtypes: Sequence[str] = SCALE_DTYPES,
    group_sizes: st.SearchStrategy[int] = _GROUP_SIZES,
    block_sizes: st.SearchStrategy[tuple[int, int]] = _BLOCK_SIZES,
    quantizers: Sequence[str] = ("absmax",),
) -> AnyWeight:
    """How a weight may be stored.

    Args:
        draw: given by Hypothesis.
        formats: to choose from; plain dtypes too.
        scale_dtypes: to choose from.
        group_sizes: columns of a group; 4 unless said otherwise.
        block_sizes: rows and columns of a block; 3 and 5 unless said otherwise.
        quantizers: to choose from where there is more than one scale; absmax unless said otherwise.
    """
    document: dict[str, Any] = {"format": draw(st.sampled_from(formats))}
    if document["format"] in SCALED:
        document["granularity"] = draw(st.sampled_from(SCALED[document["format"]]))
        if document["format"] in _FIXED:
            document |= _FIXED[document["format"]]
            if document["format"] == "nf4":
                document["double_quantized"] = draw(st.booleans())
            if document["format"].startswith("mx"):
                kind = draw(st.sampled_from(["absmax", "ocp-floor"]))
                document["quantizer"] = {"kind": kind}
            return _WEIGHT.validate_python(document)
        document["scale_dtype"] = draw(st.sampled_from(scale_dtypes))
        if document["granularity"] == "group":
            document["group_size"] = draw(group_sizes)
        if document["granularity"] == "block":
            document["block_size"] = draw(block_sizes)
        if document["granularity"] != "tensor":
            document["quantizer"] = draw(_quantizers(quantizers))
        if document["format"] == "int4":
            document["symmetric"] = draw(st.booleans())
    return _WEIGHT.validate_python(document)


@st.composite
def _quantizers(draw: st.DrawFn, kinds: Sequence[str]) -> dict[str, Any]:
    document: dict[str, Any] = {"kind": draw(st.sampled_from(kinds))}
    if document["kind"] == "clip-search":
        document["min_clip_ratio"] = draw(st.sampled_from([0.1, 0.5, 0.9]))
        document["steps"] = draw(st.integers(1, 6))
    return document


@st.composite
def linear_shapes(
    draw: st.DrawFn, spec: AnyWeight | None = None, *, max_rows: int = 10, max_columns: int = 24
) -> tuple[int, int]:
    """Shapes ``(out, in)``; with ``spec`` only such as it takes."""
    step = spec.block_size if isinstance(spec, Nf4) else getattr(spec, "group_size", 1)
    return draw(st.integers(1, max_rows)), step * draw(st.integers(1, max(1, max_columns // step)))


def weights(
    shape: tuple[int, int], *, limit: float = _LIMIT, dtype: str = "float32"
) -> st.SearchStrategy[Tensor]:
    """Finite weights ``[out, in]`` of the kinds that break things.

    Gaussian; any numbers at all; half steps below a largest weight of 127 steps; magnitudes from
    subnormal to huge in one row; heavy tails; rows of zeros, negative zeros, subnormal and huge
    numbers beside each other.

    Args:
        shape: out and in.
        limit: the largest magnitude.
        dtype: a plain dtype; numbers are rounded to it.
    """
    if dtype == "float16":
        limit = min(limit, 65504.0)
    if dtype == "bfloat16":
        limit = min(limit, float(torch.finfo(torch.bfloat16).max))
    top = int(np.floor(np.log2(limit)))
    bound = float(np.nextafter(np.float32(2.0**top), np.float32(0)))
    kinds: list[st.SearchStrategy[Floats]] = [
        hnp.arrays(np.float32, shape, elements=st.floats(-bound, bound, width=32)),
        st.builds(_gaussian, _SEEDS, st.just(shape)),
        st.builds(_ties, _SEEDS, st.just(shape), st.integers(-20, min(8, top - 7))),
        st.builds(_wide, _SEEDS, st.just(shape), st.just((-149, top))),
        st.builds(_outliers, _SEEDS, st.just(shape)),
        st.builds(
            _mixed,
            _SEEDS,
            st.lists(st.sampled_from(sorted(_ROWS)), min_size=shape[0], max_size=shape[0]),
            st.just(shape[1]),
            st.just(top),
        ),
    ]

    def finish(values: Floats) -> Tensor:
        within = np.clip(values, -bound, bound)
        return torch.from_numpy(within).to(TORCH_DTYPES[dtype])

    return st.one_of(kinds).map(finish)


@st.composite
def quantizable(
    draw: st.DrawFn,
    specs: st.SearchStrategy[AnyWeight] | None = None,
    *,
    moderate: bool = False,
) -> tuple[Tensor, ScaledWeight]:
    """A float32 weight, and a spec with codes and scales that takes it.

    Args:
        draw: given by Hypothesis.
        specs: of those formats; every one unless said otherwise.
        moderate: only magnitudes whose scales are normal in every scale dtype, and no zeros.
    """
    spec = draw(specs if specs is not None else weight_specs(formats=tuple(SCALED)))
    assert isinstance(spec, ScaledWeight)
    shape = draw(linear_shapes(spec))
    if moderate:
        return torch.from_numpy(_gaussian(draw(_SEEDS), shape) * np.float32(1000)), spec
    # Scales that are a seventh of the largest weight still fit float16, and 127 of them float32.
    limit = 2.0**18 if spec.scale_dtype == "float16" else _LIMIT
    limit = 2.0**120 if spec.format == "llm_int8" else limit
    return draw(weights(shape, limit=limit)), spec


@st.composite
def activations(
    draw: st.DrawFn,
    features: int,
    *,
    max_tokens: int = 6,
    dtype: str = "float32",
    spike: float = 1000.0,
) -> Tensor:
    """Inputs ``[tokens, features]``: Gaussian, with spikes in a few channels and rows of zeros.

    Args:
        draw: given by Hypothesis.
        features: of each token.
        max_tokens: the most tokens.
        dtype: a plain dtype; numbers are rounded to it.
        spike: how many times larger a channel with spikes may be.
    """
    tokens = draw(st.integers(1, max_tokens))
    random = np.random.default_rng(draw(_SEEDS))
    values = random.standard_normal((tokens, features))
    for channel in draw(st.lists(st.integers(0, features - 1), max_size=2, unique=True)):
        values[:, channel] *= draw(st.floats(1.0, spike))
    for token in draw(st.lists(st.integers(0, tokens - 1), max_size=2, unique=True)):
        values[token] = 0
    return torch.from_numpy(values).to(TORCH_DTYPES[dtype])


@st.composite
def schemes(
    draw: st.DrawFn,
    specs: st.SearchStrategy[AnyWeight] | None = None,
    *,
    statistics: str | None = None,
) -> Scheme:
    """A scheme: a weight format, and perhaps quantized activations and smoothing.

    Args:
        draw: given by Hypothesis.
        specs: the weight formats; every one unless said otherwise.
        statistics: the statistics file that smoothing needs; ``None``: no smoothing.
    """
    spec = draw(specs if specs is not None else weight_specs())
    document: dict[str, Any] = {"weight": spec.to_json_value()}
    if isinstance(spec, ScaledWeight):
        if draw(st.booleans()):
            document["activation"] = {
                "format": draw(st.sampled_from(sorted(BUILT_IN.activations))),
                "granularity": draw(st.sampled_from(["token", "tensor"])),
                "dynamic": True,
            }
        if statistics is not None and draw(st.booleans()):
            document["smoothing"] = {
                "kind": "smoothquant",
                "alpha": draw(st.sampled_from([0.0, 0.5, 0.8, 1.0])),
                "apply": "online",
                "statistics": statistics,
            }
    return Scheme.model_validate_json(json.dumps(document))


def layout_of_everything(block_size: tuple[int, int] = BLOCK_SIZE) -> Layout:
    """A layout that holds every format in every granularity, smoothed or not.

    Args:
        block_size: of formats by block; a layout has one.
    """
    shapes = {"tensor": [[], [1]], "channel": [["out"], ["out", 1]]}
    module: dict[str, dict[str, Any]] = {
        "weight": {"name": "{module}.weight"},
        "bias": {"name": "{module}.bias", "optional": True},
    }

    def scaled(**more: Any) -> dict[str, Any]:
        return module | {
            "weight_scale": {
                "name": "{module}.weight_scale",
                "dtypes": list(SCALE_DTYPES),
                "shapes": {**shapes, **more},
            },
            "smoothing": {
                "name": "{module}.smoothing",
                "dtype": "float32",
                "activations": "divide",
                "optional": True,
            },
        }

    document: dict[str, Any] = {
        "kind": "layout",
        "version": 1,
        "name": "everything",
        "modules": {"plain": module},
        "others": {"name": "{tensor}"},
        "holds": {},
    }
    for name, granularities in SCALED.items():
        held: dict[str, Any] = {"granularity": list(granularities), "smoothing": ["online"]}
        tensors: dict[str, Any]
        if "block" in granularities:
            tensors = scaled(block=[["row_blocks", "column_blocks"]])
            held["block_size"] = [1, NF4_BLOCK] if name == "nf4" else list(block_size)
        else:
            tensors = scaled(group=[["out", "groups"]])
        scales = tensors["weight_scale"]
        scales["shapes"] = {each: scales["shapes"][each] for each in granularities}
        scales["dtypes"] = _OWN_SCALES.get(name, scales["dtypes"])
        if name in _PACKINGS:
            # Rows of a group of 4 fill bytes, but not each 32 bits.
            tensors["weight"] = module["weight"] | {"packing": _PACKINGS[name]}
        if name == "llm_int8":
            scales["name"] = "{module}.absmax"
        if name == "mxfp8":
            scales |= {"arrangement": "tiles-128x4", "shapes": {"group": [list(_TILES)]}}
        if name == "int4":
            tensors["weight_zero_point"] = {
                "name": "{module}.weight_zero_point",
                "optional": True,
                "packing": "int32-low-nibble",
            }
        tensors |= _second_level(name)
        document["modules"][name], document["holds"][name] = tensors, held
    return parse_layout(json.dumps(document), "layout everything")


def _second_level(name: str) -> dict[str, Any]:
    """What formats with scales of two levels have beside the first."""
    second = {"name": "{module}.second_scale", "dtype": "float32"}
    if name == "nvfp4":
        return {"second_scale": second | {"shapes": [[1]]}}
    if name == "nf4":
        offset = {"name": "{module}.scale_offset", "dtype": "float32", "optional": True}
        return {
            "second_scale": second | {"shapes": [["scale_blocks"]], "optional": True},
            "scale_offset": offset,
        }
    return {}


@st.composite
def conversions(draw: st.DrawFn, *, max_modules: int = 3) -> tuple[Recipe, dict[str, Tensor]]:
    """A recipe, and the tensors of a source in layout ``plain`` that it holds for.

    Modules of one to three names, with and without bias; some are quantized, some protected, some
    pass through, and a tensor of no module lies between. The target is ``layout_of_everything``.
    Nothing is smoothed, since that takes a file of statistics beside the recipe.

    Args:
        draw: given by Hypothesis.
        max_modules: the most modules.
    """
    segment = st.sampled_from(["layers", "0", "1", "attention", "w"])
    names = draw(
        st.lists(
            st.lists(segment, min_size=1, max_size=3).map(".".join),
            min_size=1,
            max_size=max_modules,
            unique=True,
        )
    )
    specs = weight_specs(quantizers=("absmax", "clip-search"))
    dtype = draw(st.sampled_from(PLAIN_DTYPES))
    tensors = {"embedding_gain": draw(weights((1, 3), limit=_FLOAT16_LIMIT, dtype=dtype))[0]}
    document: dict[str, Any] = {"schemes": {}, "rules": [], "protected": []}
    for number, name in enumerate(names):
        fate = draw(st.sampled_from(["quantized", "protected", "passed through"]))
        scheme = draw(schemes(specs)) if fate == "quantized" else None
        shape = draw(linear_shapes(scheme.weight if scheme is not None else None))
        tensors[f"{name}.weight"] = draw(weights(shape, limit=_FLOAT16_LIMIT, dtype=dtype))
        if draw(st.booleans()):
            bias = draw(weights((1, shape[0]), limit=_FLOAT16_LIMIT, dtype=dtype))
            tensors[f"{name}.bias"] = bias[0]
        if scheme is not None:
            document["schemes"][f"s{number}"] = scheme.to_json_value()
            document["rules"].append({"modules": [name], "scheme": f"s{number}"})
        elif fate == "protected":
            kept = draw(st.sampled_from(PLAIN_DTYPES))
            document["protected"].append({"modules": [name], "dtype": kept, "reason": "drawn"})
    document |= {
        "kind": "recipe",
        "version": 1,
        "name": "drawn",
        "source": {"layout": "plain"},
        "target": {"layout": layout_of_everything().to_json_value()},
    }
    return parse_recipe(json.dumps(document), "recipe"), tensors


def _gaussian(seed: int, shape: tuple[int, int]) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _ties(seed: int, shape: tuple[int, int], exponent: int) -> Floats:
    """Half steps below an absolute maximum of 127 steps, in every row."""
    halves = np.random.default_rng(seed).integers(-254, 255, shape)
    halves[:, 0] = 254
    return (halves * 2.0 ** (exponent - 1)).astype(np.float32)


def _wide(seed: int, shape: tuple[int, int], exponents: tuple[int, int]) -> Floats:
    random = np.random.default_rng(seed)
    low, high = sorted(random.integers(exponents[0], exponents[1], 2))
    powers = random.integers(low, high + 1, shape)
    weight = np.ldexp(random.uniform(-1, 1, shape), powers).astype(np.float32)
    weight[random.random(shape) < 0.2] = 0
    weight[random.random(shape[0]) < 0.2] = 0
    return weight


def _outliers(seed: int, shape: tuple[int, int]) -> Floats:
    random = np.random.default_rng(seed)
    weight = random.standard_t(1.5, shape) * 0.02
    return np.clip(weight, -1e4, 1e4).astype(np.float32)


_ROWS: Final[Mapping[str, Callable[[np.random.Generator, int, int], Any]]] = {
    "zero": lambda random, columns, top: np.zeros(columns),
    "negative zero": lambda random, columns, top: np.full(columns, -0.0),
    "normal": lambda random, columns, top: random.standard_normal(columns),
    "subnormal": lambda random, columns, top: random.standard_normal(columns) * 1e-41,
    "huge": lambda random, columns, top: np.ldexp(random.uniform(-1, 1, columns), top),
    "ties": lambda random, columns, top: random.integers(-254, 255, columns) / 2,
    "one": lambda random, columns, top: np.eye(1, columns, int(random.integers(columns)))[0],
}


def _mixed(seed: int, kinds: Iterable[str], columns: int, top: int) -> Floats:
    """A row of each kind."""
    random = np.random.default_rng(seed)
    return np.stack([_ROWS[kind](random, columns, top) for kind in kinds]).astype(np.float32)
