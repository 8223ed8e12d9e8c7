"""What the tests of the formats share: the NumPy oracle, every spec, and weights to try."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis.strategies import SearchStrategy
from pydantic import TypeAdapter
from torch import Tensor

from quantrecipe.schema.schemes import ScaledWeight, Weight
from quantrecipe.testing import strategies

ADAPTER: TypeAdapter[Any] = TypeAdapter(Weight)
FLOAT8 = ("float8_e4m3fn", "float8_e5m2")


def _load_oracle() -> ModuleType:
    name = "quantrecipe_formats_oracle"
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("oracle.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


class Kit:
    """Specs, weights and the oracle, for tests to draw from."""

    oracle = _load_oracle()
    formats = ("int8", *FLOAT8)
    """Those whose codes fill a byte; formats of 4 bits have tests of their own too."""

    @staticmethod
    def spec(fmt: str, granularity: str = "channel", scale_dtype: str = "float32") -> ScaledWeight:
        document: dict[str, Any] = {
            "format": fmt,
            "granularity": granularity,
            "scale_dtype": scale_dtype,
        }
        if granularity == "group":
            document["group_size"] = strategies.GROUP_SIZE
        if granularity == "block":
            document["block_size"] = strategies.BLOCK_SIZE
        return Kit.read_spec(document)

    @staticmethod
    def read_spec(document: dict[str, Any]) -> ScaledWeight:
        spec = ADAPTER.validate_json(json.dumps(document))
        assert isinstance(spec, ScaledWeight)
        return spec

    @classmethod
    def specs(cls) -> list[ScaledWeight]:
        """Every format, granularity and scale dtype."""
        return [
            cls.spec(fmt, granularity, dtype)
            for fmt in cls.formats
            for granularity in ("tensor", "channel", "group" if fmt == "int8" else "block")
            for dtype in strategies.SCALE_DTYPES
        ]

    @classmethod
    def cases(
        cls,
        *,
        formats: Sequence[str] | None = None,
        moderate: bool = False,
        two_levels: bool = False,
    ) -> SearchStrategy[tuple[Tensor, ScaledWeight]]:
        """Weights and specs of ``formats``: unless said otherwise, those of a byte.

        Those whose scales have two levels are left out unless they are asked for.
        """
        specs = strategies.weight_specs(formats=formats or cls.formats)
        if not two_levels:
            specs = specs.filter(lambda spec: not getattr(spec, "has_two_levels", False))
        return strategies.quantizable(specs, moderate=moderate)


@pytest.fixture(scope="session")
def kit() -> type[Kit]:
    return Kit
