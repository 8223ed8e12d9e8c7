"""The oracle: whole tensors, one plain step after the other, slow and easy to check."""

from __future__ import annotations

import torch
from torch import Tensor

from quantrecipe import __version__
from quantrecipe.checkpoint import SourceReader
from quantrecipe.converter.measured import column_importance
from quantrecipe.converter.protocol import ErrorSums, Job
from quantrecipe.converter.refusals import check_scales, naming
from quantrecipe.converter.storing import written_anew
from quantrecipe.formats import (
    Quantized,
    cast,
    dequantize,
    plain_dtype,
    quantize,
    row_errors,
    to_float32,
)
from quantrecipe.formats.dtypes import TORCH_DTYPES
from quantrecipe.formats.folding import divide_scales, divides_scales, fold_rows, fold_vector
from quantrecipe.formats.memory import as_memory
from quantrecipe.formats.refusals import all_finite, refuse_non_finite
from quantrecipe.formats.rotation import rotate_
from quantrecipe.formats.stored import Fresh, StoredRows, to_stored
from quantrecipe.schema.capabilities import BUILT_IN
from quantrecipe.schema.layout_reading import StoredModule
from quantrecipe.schema.lock import Role
from quantrecipe.schema.plan import PlannedModule, PlannedOther
from quantrecipe.schema.schemes import PlainWeight, ScaledWeight
from quantrecipe.schema.storage import WRITTEN_ANEW
from quantrecipe.schema.tensors import TensorInfo


class ReferenceConverter:
    """Reads each unit's tensors whole; every other converter must match its bytes."""

    name = "reference"
    version = __version__
    capabilities = BUILT_IN

    def convert(self, job: Job) -> ErrorSums | None:
        """See ``Converter.convert``. Memory grows with the largest module."""
        of, unit = job.unit.of, job.unit
        if isinstance(of, PlannedOther):
            part = unit.ranges()["other"]
            start = part.position - of.output.offset
            whole = _vector(job, of.source, of.output.dtype, divided=of.divided)
            job.write("other", memoryview(whole)[start : start + part.nbytes])
            return None
        for role, part in unit.ranges().items():
            output = of.outputs[role]
            start = part.position - output.offset
            if role == "bias":
                whole = _vector(job, of.source.tensors[role], output.dtype, divided=of.divided)
            elif of.carried:
                whole = bytes(as_memory(_carried(job.reader, of, role)))
            elif role == "smoothing":
                assert job.factors is not None
                whole = bytes(as_memory(job.factors))
            else:
                continue
            job.write(role, memoryview(whole)[start : start + part.nbytes])
        return None if of.carried else _convert(job, of)


def _convert(job: Job, module: PlannedModule) -> ErrorSums | None:
    rows = slice(job.unit.start, job.unit.stop)
    source = module.source.tensors["weight"]
    with naming(source):
        weight, divisors = _decode(job.reader, module), job.divisors
        scales_divided = divisors is not None and divides_scales(module.weight)
        if isinstance(module.weight, PlainWeight):
            if module.multiplied or module.divided:
                weight = fold_rows(weight, job.factors, divisors)
            job.write("weight", as_memory(cast(weight, module.weight.format)[rows]))
            return None
        weight = to_float32(weight)
        if job.factors is not None:
            weight = weight * job.factors
        if divisors is not None and not scales_divided:
            weight = fold_rows(weight, None, divisors)
        if module.rotation is not None:
            if not all_finite(weight):
                refuse_non_finite(weight)
            weight = rotate_(weight.clone(), module.rotation.size)
        importance = column_importance(job.statistics, module, job.factors)
        quantized = quantize(weight, module.weight, importance)
        assert quantized.scale is not None
        stored = quantized.scale
        if divisors is not None and scales_divided:
            stored = divide_scales(stored, divisors)
    return _written(job, module, weight, quantized, stored)


def _written(
    job: Job, module: PlannedModule, weight: Tensor, quantized: Quantized, stored: Tensor
) -> ErrorSums:
    """Write the rows of a unit, and measure their errors.

    Args:
        job: the unit.
        module: what it is of.
        weight: the whole weight that was quantized, float32.
        quantized: all of it.
        stored: its scales as they are stored.
    """
    assert isinstance(module.weight, ScaledWeight)
    assert quantized.scale is not None
    rows = slice(job.unit.start, job.unit.stop)
    height, _ = module.weight.group_shape(*weight.shape)
    grid = slice(rows.start // height, -(-rows.stop // height))
    weight, codes, scale = weight[rows], quantized.codes[rows], quantized.scale[grid]
    zero_point = None if quantized.zero_point is None else quantized.zero_point[grid]
    found: dict[Role, Tensor | None] = {"weight": codes, "weight_zero_point": zero_point}
    found["weight_scale"] = stored[grid] if module.weight.has_scales else None
    offset = None
    if quantized.two_levels is not None:
        found["weight_scale"] = quantized.two_levels.scale
        found["second_scale"] = quantized.two_levels.second
        found["scale_offset"] = offset = quantized.two_levels.offset
    for role in module.outputs:
        tensor = found.get(role)
        if tensor is not None:
            job.write(role, as_memory(to_stored(tensor, role, module.stored(role))))
    if job.unit.first:
        for role in module.outputs:
            if role in WRITTEN_ANEW:
                job.write(role, as_memory(written_anew(module, role, offset)))
    errors = row_errors(weight, codes, scale, module.weight, zero_point=zero_point)
    return ErrorSums.of_blocks([errors])


def _vector(job: Job, info: TensorInfo, dtype: str, *, divided: bool) -> bytes:
    """A tensor that is no weight: as it is, divided by what is folded into it, or cast."""
    if not divided and dtype == info.dtype:
        return bytes(_read_bytes(job.reader, info))
    with naming(info):
        divisors = job.divisors if divided else None
        return bytes(as_memory(fold_vector(_read(job.reader, info), divisors, plain_dtype(dtype))))


def _carried(reader: SourceReader, module: PlannedModule, role: Role) -> Tensor:
    """All of a tensor of a module whose codes and scales stay as they are."""
    source, weight = module.source, module.weight
    rows = _rows(reader, source)
    if role in WRITTEN_ANEW:
        return written_anew(module, role, rows.scale_offset() if role == "marker" else None)
    if module.same_bytes(role) or isinstance(weight, PlainWeight):
        return torch.frombuffer(_read_bytes(reader, source.tensors[role]), dtype=torch.uint8)
    found: Tensor | None = None
    if role == "weight":
        found = rows.codes(0, source.out_features)
    elif role == "weight_zero_point":
        found = rows.zeros(0, source.out_features)
    elif role == "scale_offset":
        found = rows.scale_offset()
    elif weight.has_two_levels:
        levels = rows.two_levels()
        found = levels.second if role == "second_scale" else levels.scale
    else:
        found = rows.scales(0, source.out_features).to(TORCH_DTYPES[weight.scale_dtype])
        check_scales(found, source.tensors["weight_scale"])
    assert found is not None
    return to_stored(found, role, module.stored(role))


def _rows(reader: SourceReader, source: StoredModule) -> StoredRows:
    def read(info: TensorInfo, start: int, out: Tensor) -> None:
        reader.read_into(info, start, as_memory(out))

    return StoredRows(source, read, Fresh())


def _decode(reader: SourceReader, module: PlannedModule) -> Tensor:
    """The weight as the source means it: its own dtype if plain, float32 if it has scales."""
    source, stored = module.source, module.source.weight
    rows, whole = _rows(reader, source), (0, source.out_features)
    codes = rows.codes(*whole)
    if isinstance(stored, PlainWeight):
        return codes
    scale = rows.scales(*whole)
    if stored.has_scales:
        check_scales(scale, source.tensors["weight_scale"])
    values = dequantize(codes, scale, stored, zero_point=rows.zeros(*whole))
    if source.rotation is not None:
        values = rotate_(values, source.rotation.size)
    if "smoothing" in source.tensors:
        with naming(source.tensors["smoothing"]):
            factors = rows.factors()
        assert factors is not None
        values = values / factors
    return values


def _read_bytes(reader: SourceReader, info: TensorInfo) -> bytearray:
    buffer = bytearray(info.nbytes)
    reader.read_into(info, 0, buffer)
    return buffer


def _read(reader: SourceReader, info: TensorInfo) -> Tensor:
    buffer = _read_bytes(reader, info)
    return torch.frombuffer(buffer, dtype=TORCH_DTYPES[info.dtype]).reshape(info.shape)
