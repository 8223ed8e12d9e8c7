"""The header of a statistics file, version 1: what calibration measured, and on what.

A statistics file is a safetensors file whose metadata holds this document under
``quantrecipe.statistics``. What was measured of a module's input is in tensors called
``{part}/{module}/{what}``; ``TENSORS`` has their dtypes and axes. A *token* is a row of the input,
``I`` the number of input features, ``B`` that of timestep bins. A mean over no token is 0.

* ``input_absmax`` ``[B, I]``: the largest absolute value of each channel. Always there; all else
  is optional.
* ``input_second_moment`` ``[B, I]``: the mean of ``x^2`` of each channel over the bin's tokens.
* ``input_moments`` ``[B, 4]``: the means of ``x``, ``x^2``, ``x^3``, ``x^4`` over all numbers of
  the bin.
* ``tokens`` ``[B]``: tokens seen.
* ``token_absmax_histogram`` ``[B, 256]``: tokens by their largest absolute value, between the edges
  that ``token_absmax_edges`` gives.
* ``token_absmax_second_moment`` ``[B]``: the mean over tokens of the square of that value:
  127^2 times the mean square of the scales that int8 by token would have.
* ``weight_absmax`` ``[I]``: the largest absolute weight of each column, for weights of a plain
  dtype.
* ``input_tokens`` ``[K, I]``, ``input_token_bins`` ``[K]``, ``input_token_keys`` ``[K]``: the
  different tokens with the smallest keys, ascending; a key is a hash of the token's content and its
  bin, so that what is kept does not depend on the order in which tokens came.

All numbers are of the inputs as float32.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Final, Literal

from pydantic import Field

from quantrecipe.schema.base import Model, NonEmpty, PartName, Sha256, VersionOne
from quantrecipe.schema.recipe import Fold

STATISTICS_VERSION = 1
STATISTICS_KEY = "quantrecipe.statistics"

HISTOGRAM_BINS: Final = 256
_BINS_PER_OCTAVE: Final = 4
_FIRST_OCTAVE: Final = -24

Measure = Literal[
    "input_absmax",
    "input_second_moment",
    "input_moments",
    "tokens",
    "token_absmax_histogram",
    "token_absmax_second_moment",
    "weight_absmax",
]
"""What may be measured of a module, apart from the tokens that are kept."""

KEPT_TOKENS: Final = ("input_tokens", "input_token_bins", "input_token_keys")
"""The tensors of the tokens that are kept."""

TENSORS: Final[Mapping[str, tuple[tuple[str, ...], tuple[str | int, ...]]]] = MappingProxyType(
    {
        "input_absmax": (("float32",), ("B", "I")),
        "input_second_moment": (("float64",), ("B", "I")),
        "input_moments": (("float64",), ("B", 4)),
        "tokens": (("int64",), ("B",)),
        "token_absmax_histogram": (("int64",), ("B", HISTOGRAM_BINS)),
        "token_absmax_second_moment": (("float64",), ("B",)),
        "weight_absmax": (("float32",), ("I",)),
        "input_tokens": (("bfloat16", "float32"), ("K", "I")),
        "input_token_bins": (("int64",), ("K",)),
        "input_token_keys": (("int64",), ("K",)),
    }
)
"""The dtypes a tensor may have, and its axes: a size, or a letter that has one size in a module."""


def token_absmax_edges() -> tuple[float, ...]:
    """The 255 edges between the bins of ``token_absmax_histogram``, each exact in float32.

    Edge ``i`` is ``2^((i + 1) / 4 - 24)``. A bin holds ``edge <= value < next edge``; the first one
    holds everything below as well, the last one everything above.
    """
    exact = (
        2.0 ** (index / _BINS_PER_OCTAVE + _FIRST_OCTAVE) for index in range(1, HISTOGRAM_BINS)
    )
    return tuple(struct.unpack("<f", struct.pack("<f", edge))[0] for edge in exact)


class TimestepBin(Model):
    """An interval of timesteps, ``[start, stop)``; the last bin holds its ``stop`` as well."""

    start: float
    stop: float
    samples: Annotated[int, Field(ge=0)]
    """Forward passes, of all parts together, that fell into it."""


class ProvenFold(Model):
    """An edge of a recipe's ``folds`` that was proven on the model: folding changes no output."""

    part: PartName
    fold: Fold
    """The edge."""

    fold_sha256: Sha256
    """Digest of the edge's canonical form (RFC 8785), so that it can be named."""

    sites: Annotated[int, Field(ge=1)]
    """The places of the model where it was proven: every one where its names fit."""

    relative_error: Annotated[float, Field(ge=0.0)]
    """The largest difference of an output that was seen, over the output's largest magnitude."""


class Statistics(Model):
    """What was measured, and on what."""

    kind: Literal["statistics"]
    version: VersionOne
    model: Annotated[str, NonEmpty]
    """The model that ran: a Hub repository with revision, or a path."""

    samples: Annotated[int, Field(ge=1)]
    """Prompts (or other inputs) that were run."""

    prompts_sha256: Sha256 | None = None
    """Digest of the inputs, so that two files can be told apart: the sum, modulo 2^256, of the
    SHA-256 of each, in whatever order they ran."""

    timesteps: Annotated[tuple[TimestepBin, ...], NonEmpty]
    """The bins, ascending, in the order of the first axis of every tensor; a model without
    timesteps has one."""

    modules: Annotated[dict[PartName, Annotated[tuple[str, ...], NonEmpty]], NonEmpty]
    """The modules that were measured, for each part."""

    siblings: dict[PartName, tuple[Annotated[tuple[str, ...], Field(min_length=2)], ...]] = Field(
        default={}
    )
    """For each part, groups of modules that were handed the very same input in every call."""

    holds: Annotated[tuple[Measure, ...], NonEmpty] | None = None
    """What the file has of every module (``weight_absmax`` only where the weight is of a plain
    dtype); absent: whatever is there."""

    reservoir: Annotated[int, Field(ge=0)] = 0
    """The most tokens that are kept of a module; 0: none are."""

    folds: tuple[ProvenFold, ...] = ()
    """The edges that were proven on the model; nothing else is folded."""
