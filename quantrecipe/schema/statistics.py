"""The header of a statistics file, version 1: what calibration measured, and on what.

A statistics file is a safetensors file whose metadata holds this document under
``quantrecipe.statistics``. For a module it holds, as float32:

* ``{part}/{module}/input_absmax`` ``[bins, in]``: the largest absolute input of each channel;
* ``{part}/{module}/input_second_moment`` ``[bins, in]``: the mean square of each channel
  (optional).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from quantrecipe.schema.base import Model, NonEmpty, PartName, Sha256, VersionOne

STATISTICS_VERSION = 1
STATISTICS_KEY = "quantrecipe.statistics"


class TimestepBin(Model):
    """A half-open interval of timesteps, ``[start, stop)``."""

    start: float
    stop: float
    samples: Annotated[int, Field(ge=0)]
    """Forward passes that fell into it."""


class Statistics(Model):
    """What was measured, and on what."""

    kind: Literal["statistics"]
    version: VersionOne
    model: Annotated[str, NonEmpty]
    """The model that ran: a Hub repository with revision, or a path."""

    samples: Annotated[int, Field(ge=1)]
    """Prompts (or other inputs) that were run."""

    prompts_sha256: Sha256 | None = None
    """Digest of the inputs, so that two files can be told apart."""

    timesteps: Annotated[tuple[TimestepBin, ...], NonEmpty]
    """The bins, in the order of the first axis of every tensor; a model without timesteps has
    one."""

    modules: Annotated[dict[PartName, Annotated[tuple[str, ...], NonEmpty]], NonEmpty]
    """The modules that were measured, for each part."""
