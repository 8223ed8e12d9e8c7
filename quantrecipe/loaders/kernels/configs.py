"""How products are cut up on each GPU: what was measured, and rules for what was not."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from quantrecipe.loaders.kernels.cache import cache_folder
from quantrecipe.loaders.kernels.hopper import HopperProduct

_NEAR: Final = 2.0  # a measurement stands for this many times more or fewer rows


@dataclass(frozen=True, slots=True)
class TritonProduct:
    """How the portable product is cut up.

    Attributes:
        rows: of a tile.
        columns: of a tile.
        depth: codes of a row that are loaded at a time.
        warps: of a block.
        stages: loads that may be under way.
        group: rows of tiles that are worked on together.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    group: int


Product = HopperProduct | TritonProduct
_ENGINES: Final[dict[str, type[Product]]] = {"hopper": HopperProduct, "triton": TritonProduct}


@dataclass(frozen=True, slots=True)
class Measured:
    """The fastest way that was found for one shape.

    Attributes:
        architecture: ``sm_90``, say.
        device: the GPU it was measured on.
        out_features: rows of the weight.
        in_features: columns of the weight.
        rows: of the activations.
        product: how it is cut up.
        microseconds: that the product took.
    """

    architecture: str
    device: str
    out_features: int
    in_features: int
    rows: int
    product: Product
    microseconds: float

    def to_json_value(self) -> dict[str, Any]:
        """As it is kept in a file."""
        engine = next(name for name, kind in _ENGINES.items() if isinstance(self.product, kind))
        value = asdict(self)
        return value | {"product": {"engine": engine, **value["product"]}}

    @classmethod
    def from_json_value(cls, value: dict[str, Any]) -> Measured:
        """What ``to_json_value`` made.

        Raises:
            KeyError, TypeError: it was made by something else.
        """
        product = dict(value["product"])
        return cls(**value | {"product": _ENGINES[product.pop("engine")](**product)})


def tuned_file(architecture: str) -> Path:
    """Where the user's own measurements for an architecture are kept."""
    return cache_folder() / "tuned" / f"{architecture}.json"


def read_measured(text: str) -> tuple[Measured, ...]:
    """The measurements in a file; none if it is not one of ours."""
    try:
        return tuple(Measured.from_json_value(value) for value in json.loads(text)["measured"])
    except (KeyError, TypeError, ValueError):
        return ()


def write_measured(measured: Iterable[Measured]) -> str:
    """A file's content: one measurement a line, so that changes can be seen."""
    lines = ",\n".join(json.dumps(each.to_json_value()) for each in measured)
    return f'{{"measured": [\n{lines}\n]}}\n'


@cache
def _known(architecture: str) -> dict[tuple[int, int], dict[int, Product]]:
    shipped = files("quantrecipe.loaders.kernels").joinpath("tuned.json").read_text("utf-8")
    try:
        own = tuned_file(architecture).read_text("utf-8")
    except OSError:
        own = ""
    known: dict[tuple[int, int], dict[int, Product]] = {}
    for each in (*read_measured(shipped), *read_measured(own)):
        if each.architecture == architecture:
            shape = each.out_features, each.in_features
            known.setdefault(shape, {})[each.rows] = each.product
    return known


@lru_cache(maxsize=4096)
def product_config(
    architecture: str,
    multiprocessors: int,
    rows: int,
    out_features: int,
    in_features: int,
    hopper: bool,
) -> Product:
    """How to cut up a product.

    Args:
        architecture: ``sm_90``, say.
        multiprocessors: of the GPU.
        rows: of the activations.
        out_features: rows of the weight.
        in_features: columns of the weight.
        hopper: whether ``hopper.product`` can compute it.
    """
    measured = _known(architecture).get((out_features, in_features), {})
    for near in sorted(measured, key=lambda each: abs(math.log(each / rows))):
        if not 1 / _NEAR <= near / rows <= _NEAR:
            break
        if hopper or isinstance(measured[near], TritonProduct):
            return measured[near]
    if hopper and rows > 64:
        return _hopper_rule(multiprocessors, rows, out_features)
    return _triton_rule(architecture, rows)


def _hopper_rule(multiprocessors: int, rows: int, out_features: int) -> HopperProduct:
    """Wide tiles, unless narrower ones keep more of the chip at work to the end."""

    def waves_times_columns(candidate: HopperProduct) -> float:
        at_once = multiprocessors // candidate.cluster
        waves = -(-candidate.tiles(rows, out_features) // at_once)
        # Measured: a column takes the same time in tiles of any width, and each tile that of 24.
        return waves * (candidate.columns + 24)

    cluster = 2 if rows > 128 else 1
    return min(
        (
            HopperProduct(256, 64, 6, cluster, 0, 8),
            HopperProduct(208, 64, 8, cluster, 2, 8),
            HopperProduct(192, 128, 4, cluster, 1, 8),
            HopperProduct(176, 128, 4, cluster, 1, 8),
            HopperProduct(144, 128, 5, cluster, 1, 8),
            HopperProduct(128, 128, 5, cluster, 1, 8),
        ),
        key=waves_times_columns,
    )


def _triton_rule(architecture: str, rows: int) -> TritonProduct:
    """Measured on sm_90 for few rows; the rest follows from how much shared memory there is."""
    if rows <= 16:
        return TritonProduct(16, 64, 256, 4, 4, 1)
    if rows <= 64:
        return TritonProduct(64, 64, 256, 4, 3, 1)
    if architecture in ("sm_86", "sm_89", "sm_120"):  # 99 KiB of shared memory
        return TritonProduct(128, 128, 64, 8, 4, 8)
    return TritonProduct(128, 128, 128, 8, 3, 8)
