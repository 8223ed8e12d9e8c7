"""What is known of a GPU, asked for once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU.

    Attributes:
        name: what it is sold as.
        architecture: ``sm_90``, say.
        multiprocessors: how many it has.
    """

    name: str
    architecture: str
    multiprocessors: int


@cache
def gpu(device: torch.device) -> Gpu:
    """The GPU that a device is."""
    found = torch.cuda.get_device_properties(device)
    return Gpu(found.name, f"sm_{found.major}{found.minor}", int(found.multi_processor_count))
