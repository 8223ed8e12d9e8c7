"""What the tests of the formats share: the NumPy oracle, every spec, and weights to try."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pydantic import TypeAdapter

from quantrecipe.schema.schemes import ScaledWeight, Weight

ADAPTER: TypeAdapter[Any] = TypeAdapter(Weight)
SCALE_DTYPES = ("float32", "float16", "bfloat16")
FLOAT8 = ("float8_e4m3fn", "float8_e5m2")
GROUP, BLOCK = 4, (3, 5)


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

    @staticmethod
    def spec(fmt: str, granularity: str = "channel", scale_dtype: str = "float32") -> ScaledWeight:
        document: dict[str, Any] = {
            "format": fmt,
            "granularity": granularity,
            "scale_dtype": scale_dtype,
        }
        if granularity == "group":
            document["group_size"] = GROUP
        if granularity == "block":
            document["block_size"] = BLOCK
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
            for dtype in SCALE_DTYPES
        ]

    @classmethod
    def cases(cls, *, moderate: bool = False) -> st.SearchStrategy[tuple[torch.Tensor, Any]]:
        """A weight and a spec that takes it.

        Args:
            moderate: only magnitudes whose scales are normal in every scale dtype, and no zeros.
        """

        @st.composite
        def build(draw: Callable[..., Any]) -> tuple[torch.Tensor, Any]:
            spec = draw(st.sampled_from(cls.specs()))
            rows = draw(st.integers(1, 10))
            columns = GROUP * draw(st.integers(1, 6))
            if spec.granularity != "group":
                columns -= draw(st.integers(0, GROUP - 1))
            weight = draw(_weights(rows, columns, spec, moderate))
            return torch.from_numpy(weight), spec

        return build()


def _weights(
    rows: int, columns: int, spec: Any, moderate: bool
) -> st.SearchStrategy[np.ndarray[Any, Any]]:
    seeds = st.integers(0, 2**32 - 1)
    shape = (rows, columns)
    if moderate:
        return st.builds(lambda seed: _gaussian(seed, shape) * np.float32(1000), seeds)
    limit = 2.0**20 if spec.scale_dtype == "float16" else 2.0**127
    low, high = (-149, 18) if spec.scale_dtype == "float16" else (-149, 120)
    finite = st.floats(-limit, limit, width=32)
    return st.one_of(
        hnp.arrays(np.float32, shape, elements=finite),
        st.builds(lambda seed: _gaussian(seed, shape), seeds),
        st.builds(_ties, seeds, st.just(shape), st.integers(-20, 8)),
        st.builds(_wide, seeds, st.just(shape), st.just((low, high))),
        st.builds(_outliers, seeds, st.just(shape)),
    )


def _gaussian(seed: int, shape: tuple[int, int]) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _ties(seed: int, shape: tuple[int, int], exponent: int) -> Any:
    """Half steps below an absolute maximum of 127 steps, in every row."""
    halves = np.random.default_rng(seed).integers(-254, 255, shape)
    halves[:, 0] = 254
    return (halves * 2.0 ** (exponent - 1)).astype(np.float32)


def _wide(seed: int, shape: tuple[int, int], exponents: tuple[int, int]) -> Any:
    random = np.random.default_rng(seed)
    low, high = sorted(random.integers(exponents[0], exponents[1], 2))
    powers = random.integers(low, high + 1, shape)
    weight = np.ldexp(random.uniform(-1, 1, shape), powers).astype(np.float32)
    weight[random.random(shape) < 0.2] = 0
    weight[random.random(shape[0]) < 0.2] = 0
    return weight


def _outliers(seed: int, shape: tuple[int, int]) -> Any:
    random = np.random.default_rng(seed)
    weight = random.standard_t(1.5, shape) * 0.02
    return np.clip(weight, -1e4, 1e4).astype(np.float32)


@pytest.fixture(scope="session")
def kit() -> type[Kit]:
    return Kit
