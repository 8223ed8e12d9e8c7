"""How products are cut up on each GPU: what was measured, and rules for what was not."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from quantrecipe.loaders.kernels.cache import cache_folder, write_whole
from quantrecipe.loaders.kernels.hopper import HopperProduct

FEW_ROWS: Final = 64
"""Up to this many rows of activations a product is one of Triton's, with low tiles."""

_NEAR: Final = 2.0  # a measurement stands for this many times more or fewer rows
_LARGEST: Final = 1 << 31  # of the numbers in a file
_LEAST_TILE, _LEAST_DEPTH, _LARGEST_TILE, _MOST_WARPS = 16, 32, 1 << 16, 16
_OPERANDS_IN_SHARED: Final = ("sm_90", "sm_100", "sm_103")
_SHARED: Final = {"sm_80": 163, "sm_87": 163, "sm_90": 227, "sm_100": 227, "sm_103": 227}
"""KiB of shared memory that a block may have; 99 on every other GPU from Ampere on."""


def shared_limit(architecture: str) -> int:
    """Bytes of shared memory that a block may have on an architecture: ``sm_90``, say."""
    return _SHARED.get(architecture, 99) << 10


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

    def runs(self, architecture: str) -> bool:
        """Whether Triton takes it, and its tiles fit into the shared memory of a GPU."""
        sizes = self.rows, self.columns, self.depth, self.warps
        return (
            all(size > 0 and size & (size - 1) == 0 for size in sizes)
            and self.group > 0
            and self.stages > 0
            and min(self.rows, self.columns) >= _LEAST_TILE
            and self.depth >= _LEAST_DEPTH
            and self.rows * self.columns <= _LARGEST_TILE
            and self.warps <= _MOST_WARPS
            and self.shared(architecture) <= shared_limit(architecture)
        )

    def shared(self, architecture: str) -> int:
        """Bytes of shared memory for loads under way, at most.

        Where tensor cores read operands from registers, as on all but sm_90 and sm_10x, the load
        that is worked on has left shared memory.
        """
        held = self.stages if architecture in _OPERANDS_IN_SHARED else max(1, self.stages - 1)
        return held * (self.rows + self.columns) * self.depth


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
    def from_json_value(cls, value: Any) -> Measured:
        """What ``to_json_value`` made.

        Raises:
            KeyError, TypeError, ValueError: it was made by something else, or no kernel can be cut
                up like that.
        """
        product = dict(value["product"])
        kind = _ENGINES[product.pop("engine")]
        found = cls(**value | {"product": kind(**product)})
        sizes = (found.out_features, found.in_features, found.rows)
        for each in (*sizes, *product.values()):
            if type(each) is not int or not 0 <= each < _LARGEST:
                raise ValueError(f"{each!r} is no size")
        texts = type(found.architecture) is str and type(found.device) is str
        time = found.microseconds
        timed = type(time) in (int, float) and 0 < time < math.inf
        if not (texts and timed and all(sizes)):
            raise ValueError("it does not say what was measured")
        if not found.product.runs(found.architecture):
            raise ValueError(f"no kernel can be cut up as {found.product}")
        return found


def tuned_file(architecture: str) -> Path:
    """Where the user's own measurements for an architecture are kept."""
    return cache_folder() / "tuned" / f"{architecture}.json"


def read_measured(content: bytes, name: str) -> tuple[Measured, ...]:
    """The measurements in a file. What is none of ours is left out, with a warning.

    Args:
        content: of the file.
        name: what to call it in the warning.
    """
    try:
        values = list(json.loads(content)["measured"])
    except (KeyError, TypeError, ValueError, RecursionError):
        warnings.warn(f"{name} is ignored: it holds no measurements", stacklevel=2)
        return ()
    found = []
    for value in values:
        with suppress(KeyError, TypeError, ValueError):
            found.append(Measured.from_json_value(value))
    if len(found) < len(values):
        count = len(values) - len(found)
        warnings.warn(f"{name}: {count} of {len(values)} measurements are ignored", stacklevel=2)
    return tuple(found)


def write_measured(measured: Iterable[Measured]) -> bytes:
    """A file's content: one measurement a line, so that changes can be seen."""
    lines = ",\n".join(json.dumps(each.to_json_value()) for each in measured)
    return f'{{"measured": [\n{lines}\n]}}\n'.encode()


def own_measured(architecture: str) -> tuple[Measured, ...]:
    """The user's own measurements for an architecture; none if no file can be read."""
    file = tuned_file(architecture)
    try:
        content = file.read_bytes()
    except OSError:
        return ()
    return read_measured(content, str(file))


def add_measured(new: Measured) -> None:
    """Put a measurement into the user's file, from where calls take it from now on.

    It replaces an older one of the same shape and rows.

    Raises:
        OSError: the file cannot be written.
    """
    file = tuned_file(new.architecture)
    kept = {_key(each): each for each in own_measured(new.architecture)} | {_key(new): new}
    write_whole(file, write_measured(kept.values()))
    _known.cache_clear()
    product_config.cache_clear()


def _key(measured: Measured) -> tuple[int, int, int]:
    return measured.out_features, measured.in_features, measured.rows


def shipped_measured() -> tuple[Measured, ...]:
    """The measurements that come with the package."""
    file = files("quantrecipe.loaders.kernels").joinpath("tuned.json")
    return read_measured(file.read_bytes(), str(file))


@cache
def _known(architecture: str) -> dict[tuple[int, int], dict[int, Product]]:
    known: dict[tuple[int, int], dict[int, Product]] = {}
    for each in (*shipped_measured(), *own_measured(architecture)):
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
    if hopper and rows > FEW_ROWS:
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
    if rows <= FEW_ROWS:
        return TritonProduct(64, 64, 256, 4, 3, 1)
    deep = TritonProduct(128, 128, 128, 8, 3, 8)
    if shared_limit(architecture) < 2 * deep.shared(architecture):  # no two blocks side by side
        return TritonProduct(128, 128, 64, 8, 4, 8)
    return deep
