"""The default converter: row blocks through reused buffers, never a whole tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from quantrecipe import __version__
from quantrecipe.checkpoint import SourceReader, read_header
from quantrecipe.converter.buffers import Buffers, as_memory
from quantrecipe.converter.planning import statistics_tensor
from quantrecipe.converter.protocol import Job, ModuleResult
from quantrecipe.converter.refusals import naming
from quantrecipe.converter.smoothing import smoothquant_factors
from quantrecipe.converter.source_rows import SourceRows, read_slice, row_blocks, row_multiple
from quantrecipe.converter.workers import Workers
from quantrecipe.formats import cast, get_format, sqnr_db
from quantrecipe.formats.dtypes import TORCH_DTYPES
from quantrecipe.formats.refusals import first_index
from quantrecipe.formats.transform import COMPILED_PAYS_FROM_BYTES, BlockTransform, block_transform
from quantrecipe.schema.capabilities import BUILT_IN
from quantrecipe.schema.lock import WeightError
from quantrecipe.schema.plan import PlannedModule, PlannedTensor
from quantrecipe.schema.problems import InvalidInput, Problem
from quantrecipe.schema.schemes import AnyScaledWeight, PlainWeight
from quantrecipe.schema.tensors import TensorInfo


class StreamingConverter:
    """Reads a block of rows, decodes, smooths, quantizes and writes it, then takes the next."""

    name = "streaming"
    version = __version__
    capabilities = BUILT_IN

    def convert(self, job: Job) -> Iterator[ModuleResult]:
        """See ``Converter.convert``. Memory is set by ``job.block_bytes``, whatever the model."""
        plan, telling = job.plan, Lock()
        compiled = plan.source_bytes >= COMPILED_PAYS_FROM_BYTES

        def progress(count: int, name: str) -> None:
            workers.check()
            with telling:
                job.progress(count, name)

        with one_thread(), SourceReader(plan.source_files) as reader:
            shared = replace(job, progress=progress)
            workers = Workers(job.workers, lambda: _Work(shared, reader, compiled))
            tasks: list[Callable[[_Work], ModuleResult | None]] = [
                partial(_Work.module, module=module) for module in plan.modules
            ]
            tasks += [
                partial(_Work.copy, source=other.source, output=other.output)
                for other in plan.others
            ]
            yield from (result for result in workers.run(tasks) if result is not None)


@dataclass(slots=True)
class _Work:
    job: Job
    reader: SourceReader
    compiled: bool
    buffers: Buffers = field(default_factory=Buffers)

    def module(self, module: PlannedModule) -> ModuleResult:
        error = None
        if module.copied:
            for role, tensor in module.outputs.items():
                self.copy(module.source.tensors[role], tensor)
            self._settle(module)
            return ModuleResult(module.part, module.name, None)
        if isinstance(module.weight, PlainWeight):
            self._cast(module, module.weight)
        else:
            error = self._quantize(module, module.weight)
        if "bias" in module.outputs:
            self.copy(module.source.tensors["bias"], module.outputs["bias"])
        self._settle(module)
        return ModuleResult(module.part, module.name, error)

    def _settle(self, module: PlannedModule) -> None:
        """Tell of what was read beside the weight, so that progress ends at the whole."""
        told = {"weight", *module.outputs} if module.copied else {"weight", "bias"}
        rest = [info.nbytes for role, info in module.source.tensors.items() if role not in told]
        self.job.progress(sum(rest), module.name)

    def copy(self, source: TensorInfo, output: PlannedTensor) -> None:
        """Carry a tensor over byte for byte."""
        step = self.job.block_bytes
        for start in range(0, source.nbytes, step):
            stop = min(source.nbytes, start + step)
            piece = self.buffers.view("copy", (stop - start,), torch.uint8)
            self.reader.read_into(source, start, as_memory(piece))
            self.job.write(output, start, as_memory(piece))
            self.job.progress(stop - start, source.name)

    def _write_rows(self, output: PlannedTensor, first: int, rows: Tensor) -> None:
        """Write rows ``[rows, columns]`` of a tensor, the first of which is row ``first`` of it."""
        offset = first * rows.shape[1] * rows.dtype.itemsize
        self.job.write(output, offset, as_memory(rows))

    def _blocks(self, module: PlannedModule, multiple: int = 1) -> Iterator[tuple[int, int]]:
        source = module.source
        multiple = math.lcm(multiple, row_multiple(source))
        return row_blocks(source.out_features, source.in_features, multiple, self.job.block_bytes)

    def _rows(self, module: PlannedModule) -> SourceRows:
        return SourceRows(module.source, self.reader, self.buffers)

    def _advance(self, module: PlannedModule, rows: int) -> None:
        weight = module.source.tensors["weight"]
        self.job.progress(rows * (weight.nbytes // module.source.out_features), module.name)

    def _cast(self, module: PlannedModule, weight: PlainWeight) -> None:
        rows, output = self._rows(module), module.outputs["weight"]
        direct = isinstance(module.source.weight, PlainWeight)
        for start, stop in self._blocks(module):
            block = rows.codes(start, stop) if direct else rows.read(start, stop)
            target = self.buffers.view("cast", tuple(block.shape), TORCH_DTYPES[weight.format])
            with naming(module.source.tensors["weight"], start):
                cast(block, weight.format, out=target)
            self._write_rows(output, start, target)
            self._advance(module, stop - start)

    def _quantize(self, module: PlannedModule, weight: AnyScaledWeight) -> WeightError:
        fmt, rows, source = get_format(weight), self._rows(module), module.source.tensors["weight"]
        transform = block_transform(module.source.weight, weight, prefer_compiled=self.compiled)
        factors = self._smoothing_factors(module, rows, transform)
        whole = weight.granularity == "tensor"
        scale = self._tensor_scale(module, weight, rows, transform, factors) if whole else None
        signal, noise, worst = [], [], 0.0
        for start, stop in self._blocks(module, fmt.row_multiple(weight)):
            first, shape = start // fmt.row_multiple(weight), (stop - start, rows.columns)
            stored, stored_scales = rows.stored(start, stop)
            codes = self.buffers.view("codes out", shape, fmt.code_dtype)
            if not whole:
                grid = weight.scale_grid(*shape)
                scale = self.buffers.view("scales out", grid, TORCH_DTYPES[weight.scale_dtype])
            assert scale is not None
            with naming(source, start, first):
                errors = transform(stored, stored_scales, factors, codes, scale)
            if not whole:
                self._write_rows(module.outputs["weight_scale"], first, scale)
            self._write_rows(module.outputs["weight"], start, codes)
            signal.append(errors.signal)
            noise.append(errors.noise)
            worst = max(worst, errors.worst_in_scales)
            self._advance(module, stop - start)
        return weight_error(torch.cat(signal), torch.cat(noise), worst)

    def _tensor_scale(
        self,
        module: PlannedModule,
        weight: AnyScaledWeight,
        rows: SourceRows,
        transform: BlockTransform,
        factors: Tensor | None,
    ) -> Tensor:
        """One scale for the weight needs the maximum of all of it first."""
        amax = torch.zeros(1, 1)
        for start, stop in self._blocks(module):
            with naming(module.source.tensors["weight"], start):
                largest = transform.absmax(*rows.stored(start, stop), factors)
            torch.maximum(amax, largest, out=amax)
        with naming(module.source.tensors["weight"]):
            scale = get_format(weight).scales(amax, weight)
        self.job.write(module.outputs["weight_scale"], 0, as_memory(scale))
        return scale

    def _smoothing_factors(
        self, module: PlannedModule, rows: SourceRows, transform: BlockTransform
    ) -> Tensor | None:
        smoothing, statistics = module.smoothing, self.job.plan.statistics
        if smoothing is None or statistics is None:
            return None
        weight_absmax = torch.zeros(rows.columns)
        for start, stop in self._blocks(module):
            with naming(module.source.tensors["weight"], start):
                transform.column_absmax(*rows.stored(start, stop), weight_absmax)
        inputs = read_input_absmax(statistics, module)
        factors = smoothquant_factors(inputs, weight_absmax, smoothing.alpha)
        if smoothing.apply == "online":
            self.job.write(module.outputs["smoothing"], 0, as_memory(factors))
        return factors


@contextmanager
def one_thread() -> Iterator[None]:
    """Blocks stay in one core's cache: more threads for one block only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def read_input_absmax(statistics: Path, module: PlannedModule) -> Tensor:
    """The largest absolute input of each channel over all timestep bins, float32 ``[in]``.

    Raises:
        InvalidInput: a maximum is negative or no finite number: it was not measured.
    """
    header = read_header(statistics)
    info = header.tensors[statistics_tensor(module.part, module.name)]
    values = torch.empty(info.shape, dtype=torch.float32)
    with SourceReader([header]) as reader:
        read_slice(reader, info, 0, info.shape, values)
    index = first_index(~(values.isfinite() & (values >= 0)))
    if index is not None:
        raise InvalidInput(
            Problem(
                "bad-statistics",
                f"{float(values[index])} at index {list(index)} is no absolute maximum",
                hint="Measure again, or take the smoothing out of the scheme.",
                file=str(statistics),
                tensor=info.name,
            )
        )
    return values.amax(0)


def weight_error(signal: Tensor, noise: Tensor, worst: float) -> WeightError:
    """The figures of the lock: decibels to two decimals, so that no block size shows in them."""
    sqnr = sqnr_db(signal, noise)
    return WeightError(
        sqnr_db=None if sqnr is None else round(sqnr, 2),
        max_error_in_scales=round(worst, 6),
    )
