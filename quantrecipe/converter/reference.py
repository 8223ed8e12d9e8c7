"""The oracle: whole tensors, one plain step after the other, slow and easy to check."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from quantrecipe import __version__
from quantrecipe.checkpoint import SourceReader
from quantrecipe.converter.buffers import as_memory
from quantrecipe.converter.protocol import Job, ModuleResult
from quantrecipe.converter.refusals import check_scales, naming
from quantrecipe.converter.smoothing import smoothquant_factors
from quantrecipe.converter.streaming import read_input_absmax, weight_error
from quantrecipe.formats import cast, dequantize, quantize, row_errors, to_float32
from quantrecipe.formats.dtypes import TORCH_DTYPES
from quantrecipe.schema.capabilities import BUILT_IN
from quantrecipe.schema.plan import PlannedModule
from quantrecipe.schema.schemes import PlainWeight
from quantrecipe.schema.tensors import TensorInfo


class ReferenceConverter:
    """Reads each module whole, and writes it whole; every other converter must match its bytes."""

    name = "reference"
    version = __version__
    capabilities = BUILT_IN

    def convert(self, job: Job) -> Iterator[ModuleResult]:
        """See ``Converter.convert``. Memory grows with the largest module."""
        with SourceReader(job.plan.source_files) as reader:
            for module in job.plan.modules:
                yield _module(job, reader, module)
                job.progress(module.source.nbytes, module.name)
            for other in job.plan.others:
                job.write(other.output, 0, memoryview(_read_bytes(reader, other.source)))
                job.progress(other.source.nbytes, other.name)


def _module(job: Job, reader: SourceReader, module: PlannedModule) -> ModuleResult:
    for role, output in module.outputs.items():
        if role == "bias" or module.copied:
            job.write(output, 0, memoryview(_read_bytes(reader, module.source.tensors[role])))
    if module.copied:
        return ModuleResult(module.part, module.name, None)
    source = module.source.tensors["weight"]
    with naming(source):
        weight = _decode(reader, module)
        if isinstance(module.weight, PlainWeight):
            job.write(module.outputs["weight"], 0, as_memory(cast(weight, module.weight.format)))
            return ModuleResult(module.part, module.name, None)
        weight = to_float32(weight)
        if module.smoothing is not None and job.plan.statistics is not None:
            inputs = read_input_absmax(job.plan.statistics, module)
            factors = smoothquant_factors(inputs, weight.abs().amax(0), module.smoothing.alpha)
            job.write(module.outputs["smoothing"], 0, as_memory(factors))
            weight = weight * factors
        quantized = quantize(weight, module.weight)
    assert quantized.scale is not None
    job.write(module.outputs["weight"], 0, as_memory(quantized.codes))
    job.write(module.outputs["weight_scale"], 0, as_memory(quantized.scale))
    errors = row_errors(weight, quantized.codes, quantized.scale, module.weight)
    return ModuleResult(module.part, module.name, weight_error(*errors))


def _decode(reader: SourceReader, module: PlannedModule) -> Tensor:
    """The weight as the source means it: its own dtype if plain, float32 if it has scales."""
    stored = module.source.weight
    codes = _read(reader, module.source.tensors["weight"])
    if isinstance(stored, PlainWeight):
        return codes
    grid = stored.scale_grid(module.source.out_features, module.source.in_features)
    info = module.source.tensors["weight_scale"]
    scale = _read(reader, info).reshape(grid)
    check_scales(scale, info)
    return dequantize(codes, scale, stored)


def _read_bytes(reader: SourceReader, info: TensorInfo) -> bytearray:
    buffer = bytearray(info.nbytes)
    reader.read_into(info, 0, buffer)
    return buffer


def _read(reader: SourceReader, info: TensorInfo) -> Tensor:
    buffer = _read_bytes(reader, info)
    return torch.frombuffer(buffer, dtype=TORCH_DTYPES[info.dtype]).reshape(info.shape)
