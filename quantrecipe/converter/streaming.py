"""The default converter: row blocks through reused buffers, never a whole tensor."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from quantrecipe import __version__
from quantrecipe.converter.buffers import target_block
from quantrecipe.converter.carrying import Carried
from quantrecipe.converter.devices import CPU, Device
from quantrecipe.converter.given_scales import GivenScales
from quantrecipe.converter.measured import column_importance
from quantrecipe.converter.protocol import ErrorSums, Job
from quantrecipe.converter.refusals import naming
from quantrecipe.converter.source_rows import SourceRows, read_slice
from quantrecipe.converter.storing import written_anew
from quantrecipe.converter.units import row_blocks, rows_together
from quantrecipe.formats import RowErrors, cast, get_format, plain_dtype
from quantrecipe.formats.base import Workspace
from quantrecipe.formats.blocks import SourceBlock
from quantrecipe.formats.dtypes import TORCH_DTYPES
from quantrecipe.formats.folding import divide_scales, divides_scales, fold_rows, fold_vector
from quantrecipe.formats.kernels import decode_block
from quantrecipe.formats.memory import as_memory
from quantrecipe.formats.stored import to_stored
from quantrecipe.formats.transform import BlockTransform, block_transform
from quantrecipe.schema.capabilities import BUILT_IN
from quantrecipe.schema.lock import Role
from quantrecipe.schema.plan import PlannedModule, PlannedOther, PlannedTensor
from quantrecipe.schema.schemes import AnyScaledWeight, AnyWeight, PlainWeight
from quantrecipe.schema.storage import WRITTEN_ANEW
from quantrecipe.schema.tensors import TensorInfo


class StreamingConverter:
    """Reads a block of rows, decodes, smooths, rotates, quantizes and writes it, then the next."""

    name = "streaming"
    version = __version__
    capabilities = BUILT_IN

    def __init__(self) -> None:
        self._device = Device(CPU)

    def convert(self, job: Job) -> ErrorSums | None:
        """See ``Converter.convert``. Memory is set by ``job.block_bytes``, whatever the unit."""
        if self._device.name != job.device:
            self._device = Device(job.device)
        with self._device.working():
            return _Work(job, self._device).run()


class _Work:
    """One unit."""

    def __init__(self, job: Job, device: Device) -> None:
        self.job = job
        self.unit = job.unit
        self.device = device
        self.buffers = device.host

    def run(self) -> ErrorSums | None:
        module, unit = self.unit.of, self.unit
        if isinstance(module, PlannedOther):
            place = unit.start, unit.stop
            self._vector("other", module.source, module.output, *place, divided=module.divided)
            return None
        if module.carried:
            self._carry(module)
            return None
        if "bias" in module.outputs and unit.first:
            self._bias(module)
        if "smoothing" in module.outputs and unit.first:
            assert self.job.factors is not None
            self.job.write("smoothing", as_memory(self.job.factors))
        if isinstance(module.weight, PlainWeight):
            self._cast(module, module.weight)
            return None
        return self._quantize(module, module.weight)

    def _carry(self, module: PlannedModule) -> None:
        """Codes and scales as they are, wherever and in whatever order they shall lie."""
        carried = Carried(module, self._rows(module))
        for role, part in self.unit.ranges().items():
            if module.same_bytes(role):
                start = part.position - module.outputs[role].offset
                self._copy(role, module.source.tensors[role], start, start + part.nbytes)
            elif role == "bias":
                self._bias(module)
            elif role == "weight":
                for start, stop in self._blocks(module):
                    self.job.write(role, as_memory(carried.stored(role, start, stop)))
                    self._advance(module, stop - start)
            else:
                found = carried.stored(role, self.unit.start, self.unit.stop)
                self.job.write(role, as_memory(found))

    def _bias(self, module: PlannedModule) -> None:
        bias, output = module.source.tensors["bias"], module.outputs["bias"]
        self._vector("bias", bias, output, 0, bias.nbytes, divided=module.divided)

    def _copy(self, role: Role, source: TensorInfo, start: int, stop: int) -> None:
        """Carry bytes of a tensor over as they are."""
        for first in range(start, stop, self.job.block_bytes):
            last = min(stop, first + self.job.block_bytes)
            piece = self.buffers.view("copy", (last - first,), torch.uint8)
            self.job.reader.read_into(source, first, as_memory(piece))
            self.job.write(role, as_memory(piece))
            self.job.progress(last - first, source.name)

    def _vector(
        self,
        role: Role,
        source: TensorInfo,
        output: PlannedTensor,
        start: int,
        stop: int,
        *,
        divided: bool,
    ) -> None:
        """Bytes of a tensor that is no weight: copied, or divided, or in another plain dtype."""
        if not divided and output.dtype == source.dtype:
            self._copy(role, source, start, stop)
            return
        dtype, target = TORCH_DTYPES[source.dtype], plain_dtype(output.dtype)
        first, count = start // dtype.itemsize, (stop - start) // dtype.itemsize
        values = read_slice(
            self.job.reader, source, first, (count,), self.buffers.view("copy", (count,), dtype)
        )
        divisors = self.job.divisors if divided else None
        with naming(source, first):
            found = fold_vector(
                values, None if divisors is None else divisors[first : first + count], target
            )
        self.job.write(role, as_memory(found))
        self.job.progress(stop - start, source.name)

    def _divisors(self, start: int, stop: int) -> Tensor | None:
        divisors = self.job.divisors
        return None if divisors is None else divisors[start:stop]

    def _blocks(self, module: PlannedModule) -> Iterator[tuple[int, int]]:
        multiple = rows_together(module)
        columns, size = module.source.in_features, self.job.block_bytes
        return row_blocks(self.unit.start, self.unit.stop, columns, multiple, size)

    def _rows(self, module: PlannedModule) -> SourceRows:
        return SourceRows(module.source, self.job.reader, self.buffers)

    def _advance(self, module: PlannedModule, rows: int) -> None:
        weight = module.source.tensors["weight"]
        self.job.progress(rows * (weight.nbytes // module.source.out_features), module.name)

    def _cast(self, module: PlannedModule, weight: PlainWeight) -> None:
        rows = self._rows(module)
        direct = isinstance(module.source.weight, PlainWeight)
        folded = module.multiplied or module.divided
        for start, stop in self._blocks(module):
            block = rows.codes(start, stop) if direct else rows.read(start, stop)
            target = self.buffers.view("cast", tuple(block.shape), TORCH_DTYPES[weight.format])
            with naming(module.source.tensors["weight"], start):
                if folded:
                    block = fold_rows(block, self.job.factors, self._divisors(start, stop))
                cast(block, weight.format, out=target)
            self.job.write("weight", as_memory(target))
            self._advance(module, stop - start)

    def _quantize(self, module: PlannedModule, weight: AnyScaledWeight) -> ErrorSums:
        source = module.source.tensors["weight"]
        inputs = _Inputs(module, weight, self._rows(module), self.job, self.device)
        transform = block_transform(
            inputs.format, weight, rotation=module.rotation, prefer_compiled=self.job.compiled
        )
        importance = column_importance(self.job.statistics, module, self.job.factors)
        if importance is not None:
            importance = importance.to(self.device.name)
        fmt = get_format(weight)
        given = self._given(module, weight, inputs, transform) if weight.scales_together else None
        errors: list[RowErrors] = []
        for start, stop in self._blocks(module):
            shape = (stop - start, module.source.in_features)
            scales = () if given is None else given.rows(start, stop)
            target = target_block(self.device.memory, weight, shape, *scales)
            with naming(source, start, start // fmt.row_multiple(weight)):
                found = transform(inputs.read(start, stop), target, importance)
                divided = inputs.divided(target.scales, start, stop)
            out = self.device.give("out", target.codes, divided, found.signal, found.noise)
            self._write(module, "weight", out[0])
            if given is None and weight.has_scales:
                self._write(module, "weight_scale", out[1])
            if target.zeros is not None:
                self._write(module, "weight_zero_point", target.zeros.cpu())
            errors.append(RowErrors(out[2].clone(), out[3].clone(), found.worst_in_scales))
            self._advance(module, stop - start)
        if self.unit.first:
            for role in module.outputs:
                if role in WRITTEN_ANEW:
                    offset = None if given is None else given.offset
                    self.job.write(role, as_memory(written_anew(module, role, offset)))
        return ErrorSums.of_blocks(errors)

    def _write(self, module: PlannedModule, role: Role, tensor: Tensor) -> None:
        """A block of codes, scales or zero points, as they are stored."""
        storage, out = module.stored(role), None
        if storage.packing is not None and role == "weight":
            shape = tensor.shape[0], storage.packing.stored(tensor.shape[1])
            out = self.buffers.view("packed", shape, TORCH_DTYPES[storage.packing.dtype])
        self.job.write(role, as_memory(to_stored(tensor, role, storage, out)))

    def _given(
        self,
        module: PlannedModule,
        weight: AnyScaledWeight,
        inputs: _Inputs,
        transform: BlockTransform,
    ) -> GivenScales:
        """Write the scales that nobody can choose before all of the weight has been seen."""
        maxima: list[Tensor] = []
        for start, stop in self._blocks(module):
            with naming(module.source.tensors["weight"], start):
                maxima.append(transform.absmax(inputs.read(start, stop)))
        with naming(module.source.tensors["weight"]):
            given = GivenScales.of(maxima, weight)
        for role, tensor in given.stored.items():
            if role in module.outputs:
                self._write(module, role, tensor.cpu())
        return given


class _Inputs:
    """What a weight's transform is given, on the device: as stored, or with its rows divided.

    Attributes:
        format: what it is given the rows in.
    """

    def __init__(
        self,
        module: PlannedModule,
        weight: AnyScaledWeight,
        rows: SourceRows,
        job: Job,
        device: Device,
    ) -> None:
        def there(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device.name)

        self._source = rows.format
        self._rows, self._device = rows, device
        self._factors, self._divisors = there(job.factors), there(job.divisors)
        self._scratch = Workspace()
        self._rows_divided = module.divided and not divides_scales(weight)
        self.format: AnyWeight = (
            PlainWeight(format="float32") if self._rows_divided else self._source
        )

    def read(self, start: int, stop: int) -> SourceBlock:
        """Some rows, and the factors that their columns are to be multiplied by.

        Raises:
            InvalidInput: a number is not finite.
        """
        block = self._rows.stored_on(self._device, start, stop, self._factors)
        if not self._rows_divided:
            return block
        assert self._divisors is not None
        values = decode_block(self._source, block, None, self._scratch)
        return SourceBlock(fold_rows(values, None, self._divisors[start:stop]))

    def divided(self, scales: Tensor, start: int, stop: int) -> Tensor:
        """The scales of some rows, as they are stored."""
        if self._divisors is None or self._rows_divided:
            return scales
        return divide_scales(scales, self._divisors[start:stop])
