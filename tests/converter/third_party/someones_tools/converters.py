"""One converter that works, on whole tensors in pieces of its own, and some that do not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from quantrecipe.checkpoint import SourceReader
from quantrecipe.converter import Capabilities, ErrorSums, Job
from quantrecipe.formats import row_errors
from quantrecipe.schema.lock import Role
from quantrecipe.schema.plan import PlannedModule, PlannedOther
from quantrecipe.schema.schemes import ScaledWeight
from quantrecipe.schema.tensors import TensorInfo


class NumPy:
    """int8 by row from bfloat16, in NumPy."""

    name = "numpy"
    version = "1.2"
    capabilities = Capabilities(
        schema_versions=frozenset({1}),
        formats={"bfloat16": frozenset(), "int8": frozenset({"channel"})},
    )

    def convert(self, job: Job) -> ErrorSums | None:
        of, start, stop = job.unit.of, job.unit.start, job.unit.stop
        if isinstance(of, PlannedOther):
            _write(job, "other", _read(job.reader, of.source)[start:stop])
            return None
        for role, part in job.unit.ranges().items():
            if role == "bias" or of.carried:
                first = part.position - of.outputs[role].offset
                content = _read(job.reader, of.source.tensors[role])
                _write(job, role, content[first : first + part.nbytes])
        return None if of.carried else _module(job, of, start, stop)


def _module(job: Job, module: PlannedModule, start: int, stop: int) -> ErrorSums:
    assert isinstance(module.weight, ScaledWeight)
    bits = np.frombuffer(_read(job.reader, module.source.tensors["weight"]), np.uint16)
    weight = (bits.astype(np.uint32) << 16).view(np.float32).reshape(-1, module.source.in_features)
    weight = weight[start:stop]
    largest = np.abs(weight).max(1, keepdims=True)
    smallest = np.float32(2.0**-126)
    scale = np.where(largest == 0, np.float32(1), np.maximum(largest / np.float32(127), smallest))
    codes = np.clip(np.rint(weight / scale), -127, 127).astype(np.int8)
    _write(job, "weight_scale", bytearray(scale.tobytes()))
    _write(job, "weight", bytearray(codes.tobytes()))
    stored = torch.from_numpy(codes), torch.from_numpy(scale)
    return ErrorSums.of_blocks([row_errors(torch.from_numpy(weight), *stored, module.weight)])


def _read(reader: SourceReader, info: TensorInfo) -> bytearray:
    buffer = bytearray(info.nbytes)
    reader.read_into(info, 0, buffer)
    return buffer


def _write(job: Job, role: Role, data: bytearray) -> None:
    half = len(data) // 2
    job.write(role, memoryview(data)[:half])
    job.write(role, memoryview(data)[half:])


class Forgetful(NumPy):
    """Leaves a module out, and says nothing of it."""

    name = "forgetful"

    def convert(self, job: Job) -> ErrorSums | None:
        return None if job.unit.of.name == "a" else super().convert(job)


class Hasty(NumPy):
    """Stops short of the last byte of the other tensors."""

    name = "hasty"

    def convert(self, job: Job) -> ErrorSums | None:
        if not isinstance(job.unit.of, PlannedOther):
            return super().convert(job)
        job.write("other", memoryview(_read(job.reader, job.unit.of.source))[:-1])
        return None


class Blind(NumPy):
    """Measures nothing, so no bound would ever be missed."""

    name = "blind"

    def convert(self, job: Job) -> ErrorSums | None:
        super().convert(job)
        return None


class Outside(NumPy):
    """Writes past the end of a tensor."""

    name = "outside"

    def convert(self, job: Job) -> ErrorSums | None:
        found = super().convert(job)
        job.write(next(iter(job.unit.ranges())), memoryview(bytearray(2)))
        return found


class Stray(NumPy):
    """Writes a tensor that its unit does not have."""

    name = "stray"

    def convert(self, job: Job) -> ErrorSums | None:
        def write(role: Role, data: memoryview) -> None:
            job.write("smoothing" if role == "bias" else role, data)

        return super().convert(replace(job, write=write))
