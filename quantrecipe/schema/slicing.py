"""Modules that are rows of another.

Safetensors stores rows one after the other, so a slice of them is a tensor at another offset of the
same file: nothing is moved or computed to split a module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Final

from quantrecipe.schema.layout_reading import StoredModule
from quantrecipe.schema.schemes import Nf4, ScaledWeight
from quantrecipe.schema.storage import WRITTEN_ANEW, padded
from quantrecipe.schema.tensors import TensorInfo

IN_ROWS: Final = frozenset({"weight", "weight_scale", "weight_zero_point", "bias"})
"""Roles of which every slice has rows of its own; it shares the others."""


def unsplittable(module: StoredModule, pieces: int) -> str | None:
    """Why rows of a module cannot become as many modules of their own, or ``None``."""
    whole = module.out_features, module.in_features
    rows, rest = divmod(module.out_features, pieces)
    if rest:
        return f"its {whole[0]} rows cannot be cut into {pieces} equal parts"
    weight = module.weight
    if pieces == 1 or not isinstance(weight, ScaledWeight) or weight.granularity == "tensor":
        return None
    height = weight.group_shape(*whole)[0]
    if rows % height:
        return f"parts of {rows} rows begin inside blocks of {height} rows that share a scale"
    if isinstance(weight, Nf4) and weight.double_quantized:
        return "its scales are stored in blocks that go on from row to row"
    scale = module.tensors.get("weight_scale")
    tile = module.stored("weight_scale").rows_together
    if rows % tile:
        return f"parts of {rows} rows begin inside tiles of {tile} rows of scales"
    if scale is not None and tile == 1 and rows_of(scale, weight.scale_grid(*whole)[0]) is None:
        return "its scales are not stored row by row"
    packing = module.stored("weight_zero_point").packing
    if packing is not None and rows % packing.codes:
        return f"parts of {rows} rows begin inside numbers that hold {packing.codes} zero points"
    return None


def split(module: StoredModule, names: Sequence[str]) -> Iterator[StoredModule]:
    """A module's rows as modules of these names, all of the same size.

    Where its shape is stored beside it, they are without: theirs is another.
    """
    rows = module.out_features // len(names)
    for index, name in enumerate(names):
        first = index * rows
        yield replace(
            module,
            name=name,
            out_features=rows,
            tensors={
                role: _slice(module, role, info, first, first + rows)
                for role, info in module.tensors.items()
                if role not in WRITTEN_ANEW
            },
            renamed_from=(module.name,),
        )


def _slice(module: StoredModule, role: str, info: TensorInfo, start: int, stop: int) -> TensorInfo:
    """The part of a module's tensor that is of the rows from ``start`` to ``stop``."""
    weight, total = module.weight, module.out_features
    if role not in IN_ROWS or stop - start == total:
        return info
    packing = module.stored(role).packing
    if role == "weight_zero_point" and packing is not None:
        codes = packing.codes
        start, stop, total = start // codes, -(-stop // codes), -(-total // codes)
    if role == "weight_scale":
        assert isinstance(weight, ScaledWeight)
        if weight.granularity == "tensor":
            return info
        height = weight.group_shape(total, module.in_features)[0]
        start, stop, total = start // height, -(-stop // height), -(-total // height)
        # Tiles have rows of their own beyond those of the grid.
        total = padded(total, module.stored(role).rows_together)
    shape = rows_of(info, total)
    assert shape is not None
    size = info.nbytes // total
    return replace(
        info,
        shape=shape(stop - start),
        offset=info.offset + start * size,
        nbytes=(stop - start) * size,
    )


def rows_of(info: TensorInfo, rows: int) -> Callable[[int], tuple[int, ...]] | None:
    """The shape that a tensor has with any number of its rows.

    ``None`` if rows do not lie one after the other in the file.

    Args:
        info: the tensor.
        rows: how many it has.
    """
    for axis, size in enumerate(info.shape):
        if size == rows:
            before, after = info.shape[:axis], info.shape[axis + 1 :]
            return lambda count: (*before, count, *after)
        if size != 1:
            break
    # All numbers in one dimension, row after row.
    if rows and info.shape and info.shape[0] % rows == 0 and info.shape[1:] in ((), (1,)):
        width, rest = info.shape[0] // rows, info.shape[1:]
        return lambda count: (count * width, *rest)
    return None
