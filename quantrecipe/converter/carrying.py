"""Carrying a module over: its numbers, in the order and the dtypes of another layout."""

from __future__ import annotations

from torch import Tensor

from quantrecipe.converter.source_rows import SourceRows
from quantrecipe.converter.storing import written_anew
from quantrecipe.formats.dtypes import TORCH_DTYPES
from quantrecipe.formats.stored import to_stored
from quantrecipe.schema.lock import Role
from quantrecipe.schema.plan import PlannedModule
from quantrecipe.schema.schemes import PlainWeight
from quantrecipe.schema.storage import WRITTEN_ANEW


class Carried:
    """A module that is carried over, as it will be stored.

    Args:
        module: which; its codes and scales stay what they are.
        rows: its weight in the source.
    """

    def __init__(self, module: PlannedModule, rows: SourceRows) -> None:
        self._module = module
        self._rows = rows

    def stored(self, role: Role, start: int, stop: int) -> Tensor:
        """What some rows of the module's weight have in a tensor of it; valid until the next call.

        Of tensors that have nothing to do with rows: all of it.

        Raises:
            InvalidInput: a scale is not finite.
        """
        module, rows = self._module, self._rows.as_stored
        weight, storage = module.weight, module.stored(role)
        if role in WRITTEN_ANEW:
            return written_anew(module, role, rows.scale_offset() if role == "marker" else None)
        if role == "weight":
            return to_stored(rows.codes(start, stop), role, storage)
        assert not isinstance(weight, PlainWeight)
        if role == "weight_zero_point":
            zeros = rows.zeros(start, stop)
            assert zeros is not None
            return to_stored(zeros, role, storage)
        if role == "scale_offset":
            offset = rows.scale_offset()
            assert offset is not None
            return offset
        if role == "second_scale":
            return to_stored(rows.two_levels().second, role, storage)
        if weight.has_two_levels:
            return to_stored(rows.two_levels().scale, role, storage)
        # The same numbers, in a dtype that holds them all.
        scales = self._rows.scales(start, stop).to(TORCH_DTYPES[weight.scale_dtype])
        return to_stored(scales, role, storage)
