"""Formats whose codes and scales lie together in records: what all of them share.

A record holds a fixed number of neighbouring numbers of a row, in a fixed number of bytes. A row is
a whole number of records. Nothing outside a record is needed to read it, so there is no tensor of
scales: where ``WeightFormat`` has a grid of scales, it has no columns here.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Final, Self

import torch
from torch import Tensor

from quantrecipe.formats.base import Workspace
from quantrecipe.formats.loops import load_loops
from quantrecipe.formats.refusals import (
    NonFinite,
    OutOfRange,
    extremes,
    first_index,
    refuse_non_finite,
)
from quantrecipe.formats.scaled import check_block
from quantrecipe.schema.schemes import ScaledWeight

# Numbers whose intermediate results stay in a core's cache; a GPU would rather take large steps.
_AT_A_TIME: Final = {"cpu": 1 << 16}
_AT_A_TIME_ELSEWHERE: Final = 1 << 24


class RecordFormat(ABC):
    """A ``WeightFormat`` of records: encoding a row needs no other row, decoding no other tensor.

    Attributes:
        name: the name recipes use.
        code_dtype: uint8; a "code" is a byte of a record.
        largest_code: the largest magnitude of a code inside a record.
        numbers: how many numbers a record holds.
        record_bytes: its size.
        reach: no magnitude beyond it is taken: a scale would overflow float16.
    """

    name: str
    code_dtype = torch.uint8
    largest_code: float
    numbers: int
    record_bytes: int
    reach: float

    _encode_loop: Callable[[Any, Any], None] | None = None
    _decode_loop: Callable[[Any, Any], None] | None = None

    def compiled(self) -> Self:
        """The same format with loops that numba compiles, for tensors on the CPU.

        Every bit is the same. The format itself where there is no numba (extra ``fast``).
        """
        loops = load_loops("compiled_ggml")
        if loops is None:
            return self
        fast = copy.copy(self)
        fast._encode_loop = getattr(loops, f"encode_{self.name}")
        fast._decode_loop = getattr(loops, f"decode_{self.name}")
        return fast

    @abstractmethod
    def _encode(self, weight: Tensor) -> Tensor:
        """uint8 ``[n, record_bytes]`` from finite float32 ``[n, numbers]`` within ``reach``."""

    @abstractmethod
    def _decode(self, records: Tensor) -> Tensor:
        """float32 ``[n, numbers]`` from uint8 ``[n, record_bytes]``."""

    @abstractmethod
    def _scales(self, records: Tensor) -> Tensor:
        """The float16 scales that records hold, ``[n, scales]``."""

    @abstractmethod
    def _bound(self, weight: Tensor, records: Tensor) -> Tensor:
        """The bound, float64, from float64 ``[n, numbers]`` and uint8 ``[n, record_bytes]``."""

    def row_multiple(self, spec: ScaledWeight) -> int:
        return 1

    def code_columns(self, in_features: int) -> int:
        """The bytes of a row.

        Raises:
            ValueError: the row is no whole number of records.
        """
        if in_features < 1 or in_features % self.numbers:
            raise ValueError(
                f"{self.name} holds {self.numbers} numbers in a record, "
                f"and {in_features} are no whole number of records"
            )
        return in_features // self.numbers * self.record_bytes

    def measure(self, weight: Tensor, spec: ScaledWeight) -> Tensor:
        """An empty grid, float32 ``[rows, 0]``: it is only looked whether all can be stored.

        Raises:
            NonFinite: the block holds a NaN or an infinity; carries its row and column.
            OutOfRange: it holds a number beyond ``reach``; carries its row and column.
            ValueError: the rows are no whole number of records.
        """
        check_block(weight, torch.float32, "a weight")
        self.code_columns(weight.shape[1])
        low, high = extremes(weight)
        if not max(-low, high) <= self.reach:
            refuse_non_finite(weight)
            index = first_index(weight.abs() > self.reach)
            assert index is not None
            raise OutOfRange(
                f"{float(weight[index])!r} is too large for {self.name}, whose scales are float16",
                index,
            )
        return weight.new_empty((len(weight), 0))

    def scales(self, amax: Tensor, spec: ScaledWeight) -> Tensor:
        """An empty grid, float16 ``[rows, 0]``."""
        return amax.new_empty((len(amax), 0), dtype=torch.float16)

    def zero_points(self, amax: Tensor, scale: Tensor, spec: ScaledWeight) -> Tensor | None:
        return None

    def levels(self, codes: Tensor, zero_point: Tensor | None, group: tuple[int, int]) -> Tensor:
        """The decoded numbers, float32 ``[rows, in]``: nothing is left to multiply them by."""
        return self._decoded(codes, self._as_records(codes), None)

    def encode(
        self,
        weight: Tensor,
        scale: Tensor,
        spec: ScaledWeight,
        out: Tensor | None = None,
        *,
        zero_point: Tensor | None = None,
        workspace: Workspace | None = None,
        checked: bool = True,
    ) -> Tensor:
        """Records, uint8 ``[rows, code_columns(in)]``.

        The block must have passed ``measure``. ``scale`` has no columns, and nothing is read of it.

        Raises:
            ValueError: the rows are no whole number of records, or ``out`` is not of their shape.
        """
        check_block(weight, torch.float32, "a weight")
        shape = len(weight), self.code_columns(weight.shape[1])
        records = _output(out, shape, torch.uint8, weight.device)
        if self._encode_loop is not None and _on_cpu(weight, records):
            self._encode_loop(weight.view(-1).numpy(), records.view(-1).numpy())
            return records
        numbers = weight.reshape(-1, self.numbers)
        target = records.view(-1, self.record_bytes)
        step = _records_at_a_time(numbers)
        for top in range(0, len(numbers), step):
            target[top : top + step] = self._encode(numbers[top : top + step])
        return records

    def decode(
        self,
        codes: Tensor,
        scale: Tensor,
        spec: ScaledWeight,
        out: Tensor | None = None,
        *,
        zero_point: Tensor | None = None,
        checked: bool = True,
    ) -> Tensor:
        """float32 ``[rows, in]``, with the bits that ggml computes.

        ``checked`` is false for records that come from ``encode``: their scales are numbers.

        Raises:
            NonFinite: a scale inside a record is no finite number; carries the row and the first
                column of the record.
            ValueError: the rows are no whole number of records, or ``out`` is not of their shape.
        """
        records = self._as_records(codes)
        if checked:
            self._refuse_scales(records, len(codes))
        return self._decoded(codes, records, out)

    def _decoded(self, codes: Tensor, records: Tensor, out: Tensor | None) -> Tensor:
        shape = len(codes), len(records) // len(codes) * self.numbers
        values = _output(out, shape, torch.float32, codes.device)
        if self._decode_loop is not None and _on_cpu(records, values):
            self._decode_loop(records.view(-1).numpy(), values.view(-1).numpy())
            return values
        target = values.view(-1, self.numbers)
        step = _records_at_a_time(target)
        for top in range(0, len(target), step):
            target[top : top + step] = self._decode(records[top : top + step])
        return values

    def bound(
        self,
        weight: Tensor,
        codes: Tensor,
        scale: Tensor,
        spec: ScaledWeight,
        *,
        zero_point: Tensor | None = None,
    ) -> Tensor:
        """What ``abs(weight - decode(codes))`` cannot exceed, float64 ``[rows, in]``.

        It follows from the scales inside the records; float32 arithmetic is allowed for.
        """
        records = self._as_records(codes)
        numbers = weight.reshape(-1, self.numbers)
        result = torch.empty(numbers.shape, dtype=torch.float64, device=weight.device)
        step = _records_at_a_time(numbers)
        for top in range(0, len(numbers), step):
            some = slice(top, top + step)
            result[some] = self._bound(numbers[some].double(), records[some])
        return result.view(weight.shape)

    def _as_records(self, codes: Tensor) -> Tensor:
        check_block(codes, torch.uint8, f"{self.name} records")
        if codes.shape[1] % self.record_bytes:
            raise ValueError(
                f"a record of {self.name} has {self.record_bytes} bytes, "
                f"and {codes.shape[1]} are no whole number of records"
            )
        return codes.reshape(-1, self.record_bytes)

    def _refuse_scales(self, records: Tensor, rows: int) -> None:
        scales = self._scales(records)
        index = first_index(~torch.isfinite(scales))
        if index is not None:
            row, record = divmod(index[0], len(records) // rows)
            raise NonFinite(
                f"a {self.name} record whose scale is {float(scales[index])}",
                (row, record * self.numbers),
            )


def halves(records: Tensor, place: int, count: int = 1) -> Tensor:
    """``count`` float16 numbers of each record, from the byte ``place`` on, ``[n, count]``."""
    return records[:, place : place + 2 * count].contiguous().view(torch.float16)


def half_bytes(numbers: Tensor) -> Tensor:
    """Numbers ``[n]`` as the bytes of float16, ``[n, 2]``."""
    return numbers.to(torch.float16)[:, None].view(torch.uint8)


def reciprocal(numbers: Tensor) -> Tensor:
    """``1 / numbers`` in float32, and 0 where that is infinite."""
    # A tensor: how torch divides a Python number is its own business.
    inverse = torch.div(torch.ones_like(numbers), numbers)
    return inverse.masked_fill_(torch.isinf(inverse), 0.0)


def _output(
    out: Tensor | None, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    if out is None:
        return torch.empty(shape, dtype=dtype, device=device)
    if tuple(out.shape) != shape or out.dtype != dtype or not out.is_contiguous():
        raise ValueError(
            f"out must be contiguous, {list(shape)} of {dtype}, "
            f"not {list(out.shape)} of {out.dtype}"
        )
    return out


def _on_cpu(*tensors: Tensor) -> bool:
    """Whether the loops, which check nothing, may be given the memory of these tensors."""
    return all(each.device.type == "cpu" and each.is_contiguous() for each in tensors)


def _records_at_a_time(numbers: Tensor) -> int:
    return _AT_A_TIME.get(numbers.device.type, _AT_A_TIME_ELSEWHERE) // numbers.shape[1]
