"""One converter that works, from many threads and in no order, and some that do not."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace

import numpy as np
import torch

from quantrecipe.checkpoint import SourceReader
from quantrecipe.converter import Capabilities, Job, ModuleResult
from quantrecipe.formats import row_errors, sqnr_db
from quantrecipe.schema.lock import WeightError
from quantrecipe.schema.plan import PlannedModule, PlannedTensor
from quantrecipe.schema.schemes import ScaledWeight
from quantrecipe.schema.tensors import TensorInfo


class Threads:
    """int8 by row from bfloat16, in NumPy; modules and halves of them in whatever order."""

    name = "threads"
    version = "1.2"
    capabilities = Capabilities(
        schema_versions=frozenset({1}),
        formats={"bfloat16": frozenset(), "int8": frozenset({"channel"})},
    )

    def convert(self, job: Job) -> Iterator[ModuleResult]:
        with SourceReader(job.plan.source_files) as reader, ThreadPoolExecutor(3) as pool:
            copies = [
                pool.submit(_copy, job, reader, other.source, other.output)
                for other in job.plan.others
            ]
            modules = [
                pool.submit(_module, job, reader, module) for module in reversed(job.plan.modules)
            ]
            for done in as_completed(modules):
                yield done.result()
            for copy in copies:
                copy.result()


def _module(job: Job, reader: SourceReader, module: PlannedModule) -> ModuleResult:
    for role, output in module.outputs.items():
        if role == "bias" or module.copied:
            _copy(job, reader, module.source.tensors[role], output)
    if module.copied:
        return ModuleResult(module.part, module.name, None)
    assert isinstance(module.weight, ScaledWeight)
    bits = np.frombuffer(_read(reader, module.source.tensors["weight"]), np.uint16)
    weight = (bits.astype(np.uint32) << 16).view(np.float32).reshape(-1, module.source.in_features)
    largest = np.abs(weight).max(1, keepdims=True)
    smallest = np.float32(2.0**-126)
    scale = np.where(largest == 0, np.float32(1), np.maximum(largest / np.float32(127), smallest))
    codes = np.clip(np.rint(weight / scale), -127, 127).astype(np.int8)
    _write(job, module.outputs["weight_scale"], scale.tobytes())
    _write(job, module.outputs["weight"], codes.tobytes())
    return ModuleResult(module.part, module.name, _error(weight, codes, scale, module.weight))


def _error(
    weight: np.ndarray, codes: np.ndarray, scale: np.ndarray, spec: ScaledWeight
) -> WeightError:
    errors = row_errors(
        torch.from_numpy(weight), torch.from_numpy(codes), torch.from_numpy(scale), spec
    )
    sqnr = sqnr_db(errors.signal, errors.noise)
    return WeightError(
        sqnr_db=None if sqnr is None else round(sqnr, 2),
        max_error_in_scales=round(errors.worst_in_scales, 6),
    )


def _read(reader: SourceReader, info: TensorInfo) -> bytearray:
    buffer = bytearray(info.nbytes)
    reader.read_into(info, 0, buffer)
    return buffer


def _copy(job: Job, reader: SourceReader, info: TensorInfo, output: PlannedTensor) -> None:
    _write(job, output, bytes(_read(reader, info)))


def _write(job: Job, output: PlannedTensor, data: bytes) -> None:
    half = len(data) // 2
    job.write(output, half, memoryview(data)[half:])
    job.write(output, 0, memoryview(data)[:half])


class Forgetful(Threads):
    """Leaves a module out, and says nothing of it."""

    name = "forgetful"

    def convert(self, job: Job) -> Iterator[ModuleResult]:
        plan = replace(job.plan, modules=job.plan.modules[1:])
        return super().convert(replace(job, plan=plan))


class Hasty(Threads):
    """Claims every module, and stops short of the last byte of the other tensors."""

    name = "hasty"

    def convert(self, job: Job) -> Iterator[ModuleResult]:
        yield from super().convert(replace(job, plan=replace(job.plan, others=())))
        with SourceReader(job.plan.source_files) as reader:
            for other in job.plan.others:
                job.write(other.output, 0, memoryview(_read(reader, other.source))[:-1])


class Twice(Threads):
    """Gives a result twice."""

    name = "twice"

    def convert(self, job: Job) -> Iterator[ModuleResult]:
        results = tuple(super().convert(job))
        yield from (*results, results[0])


class Blind(Threads):
    """Measures nothing, so no bound would ever be missed."""

    name = "blind"

    def convert(self, job: Job) -> Iterator[ModuleResult]:
        for result in super().convert(job):
            yield replace(result, error=None)


class Outside(Threads):
    """Writes past the end of a tensor."""

    name = "outside"

    def convert(self, job: Job) -> Iterator[ModuleResult]:
        tensor = job.plan.modules[0].outputs["weight"]
        job.write(tensor, tensor.nbytes - 1, memoryview(b"ab"))
        return super().convert(job)
