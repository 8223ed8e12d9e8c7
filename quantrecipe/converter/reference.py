"""The oracle: whole tensors, one plain step after the other, slow and easy to check."""

from __future__ import annotations

import torch
from torch import Tensor

from quantrecipe import __version__
from quantrecipe.checkpoint import SourceReader
from quantrecipe.converter.measured import column_importance
from quantrecipe.converter.protocol import ErrorSums, Job
from quantrecipe.converter.refusals import check_scales, naming
from quantrecipe.converter.storing import shape_tensor, stored_zero_points
from quantrecipe.formats import cast, dequantize, quantize, row_errors, to_float32
from quantrecipe.formats.dtypes import TORCH_DTYPES
from quantrecipe.formats.folding import divide_scales, divides_scales, fold_rows, fold_vector
from quantrecipe.formats.memory import as_memory
from quantrecipe.formats.packing import pack, unpack, unpack_down
from quantrecipe.formats.refusals import all_finite, refuse_non_finite
from quantrecipe.formats.rotation import rotate_
from quantrecipe.schema.capabilities import BUILT_IN
from quantrecipe.schema.plan import PlannedModule, PlannedOther
from quantrecipe.schema.schemes import PlainWeight
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
            whole = _divided(job, of.source) if of.divided else _read_bytes(job.reader, of.source)
            job.write("other", memoryview(whole)[unit.start : unit.stop])
            return None
        if "smoothing" in unit.ranges():
            assert job.factors is not None
            job.write("smoothing", as_memory(job.factors))
        for role, part in unit.ranges().items():
            if role == "weight_shape":
                job.write(role, as_memory(shape_tensor(of)))
            elif role == "bias" or of.copied:
                start = part.position - of.outputs[role].offset
                info = of.source.tensors[role]
                content = _divided(job, info) if of.divided else _read_bytes(job.reader, info)
                job.write(role, memoryview(content)[start : start + part.nbytes])
        return None if of.copied else _convert(job, of)


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
    height, _ = module.weight.group_shape(*weight.shape)
    grid = slice(rows.start // height, -(-rows.stop // height))
    weight, codes, scale = weight[rows], quantized.codes[rows], quantized.scale[grid]
    packing = module.packings.get("weight")
    job.write("weight", as_memory(codes if packing is None else pack(codes, packing)))
    job.write("weight_scale", as_memory(stored[grid]))
    zero_point = None
    if quantized.zero_point is not None:
        zero_point = quantized.zero_point[grid]
        job.write("weight_zero_point", as_memory(stored_zero_points(zero_point, module.packings)))
    errors = row_errors(weight, codes, scale, module.weight, zero_point=zero_point)
    return ErrorSums.of_blocks([errors])


def _divided(job: Job, info: TensorInfo) -> bytes:
    """A vector, divided by what is folded into it."""
    assert job.divisors is not None
    with naming(info):
        return bytes(as_memory(fold_vector(_read(job.reader, info), job.divisors)))


def _decode(reader: SourceReader, module: PlannedModule) -> Tensor:
    """The weight as the source means it: its own dtype if plain, float32 if it has scales."""
    source, stored = module.source, module.source.weight
    codes = _read(reader, source.tensors["weight"])
    if isinstance(stored, PlainWeight):
        return codes
    if "weight" in source.packings:
        codes = unpack(codes, source.packings["weight"], source.in_features)
    grid = stored.scale_grid(source.out_features, source.in_features)
    info = source.tensors["weight_scale"]
    scale = _read(reader, info).reshape(grid)
    check_scales(scale, info)
    zero_point = None
    if "weight_zero_point" in source.tensors:
        zero_point = _read(reader, source.tensors["weight_zero_point"])
        if "weight_zero_point" in source.packings:
            packing = source.packings["weight_zero_point"]
            zero_point = unpack_down(zero_point, packing, source.out_features)
    return dequantize(codes, scale, stored, zero_point=zero_point)


def _read_bytes(reader: SourceReader, info: TensorInfo) -> bytearray:
    buffer = bytearray(info.nbytes)
    reader.read_into(info, 0, buffer)
    return buffer


def _read(reader: SourceReader, info: TensorInfo) -> Tensor:
    buffer = _read_bytes(reader, info)
    return torch.frombuffer(buffer, dtype=TORCH_DTYPES[info.dtype]).reshape(info.shape)
