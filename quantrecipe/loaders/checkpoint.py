"""A converted checkpoint, opened: its modules and other tensors, read when asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantrecipe.checkpoint import SourceReader, xxh3_128
from quantrecipe.checkpoint.closing import Closing
from quantrecipe.checkpoint.reading import WritableBuffer
from quantrecipe.formats import Unrepresentable, cast, dequantize, plain_dtype, to_float32
from quantrecipe.formats.dtypes import TORCH_DTYPES
from quantrecipe.formats.memory import as_memory
from quantrecipe.formats.rotation import rotate_
from quantrecipe.formats.stored import Fresh, StoredRows
from quantrecipe.loaders.values import bad_number
from quantrecipe.schema.layout import Layout
from quantrecipe.schema.layout_reading import StoredModule
from quantrecipe.schema.location import Location
from quantrecipe.schema.lock import Lock, LockedModule
from quantrecipe.schema.problems import InvalidInput, Problem, did_you_mean
from quantrecipe.schema.recipe import Recipe
from quantrecipe.schema.schemes import PlainWeight
from quantrecipe.schema.tensors import SourceFileInfo, TensorInfo


@dataclass(frozen=True, slots=True)
class OpenPart:
    """One part of an open checkpoint.

    Attributes:
        modules: by dotted name.
        others: tensors of no module, by their name inside the part.
    """

    modules: Mapping[str, StoredModule]
    others: Mapping[str, TensorInfo]


class Checkpoint(Closing):
    """An open checkpoint; nothing but headers is read until a tensor is asked for.

    Attributes:
        layout: how it is laid out on disk.
        source_layout: how the checkpoint that it was made from was; ``None`` if that is not known.
        recipe: what it was made by, if it says.
        lock: what vouches for it, if there is one.
        parts: by name.
    """

    def __init__(
        self,
        *,
        files: tuple[SourceFileInfo, ...],
        layout: Layout,
        source_layout: Layout | None,
        recipe: Recipe | None,
        lock: Lock | None,
        parts: Mapping[str, OpenPart],
        digests: Mapping[tuple[Location, str], str],
    ) -> None:
        self.layout = layout
        self.source_layout = source_layout
        self.recipe = recipe
        self.lock = lock
        self.parts = parts
        self._reader = SourceReader(files)
        self._digests = digests
        self._locked = (
            {(module.part, module.name): module for module in lock.modules} if lock else {}
        )

    def close(self) -> None:
        """Close its files."""
        self._reader.close()

    def part(self, name: str | None = None) -> OpenPart:
        """A part by name; ``None``: the only one.

        Raises:
            InvalidInput: there is no such part, or none was named and there are several.
        """
        if name is None and len(self.parts) == 1:
            return next(iter(self.parts.values()))
        if name is None:
            raise InvalidInput(
                Problem(
                    "which-part",
                    f"the checkpoint has {len(self.parts)} parts: {', '.join(self.parts)}",
                    hint="Say which one (part=).",
                )
            )
        if name not in self.parts:
            raise InvalidInput(
                Problem(
                    "unknown-part",
                    f"the checkpoint has no part {name!r}",
                    hint=did_you_mean(name, list(self.parts)),
                )
            )
        return self.parts[name]

    def module(self, name: str, part: str | None = None) -> StoredModule:
        """A module by its dotted name.

        Raises:
            InvalidInput: there is no such part or module.
        """
        modules = self.part(part).modules
        if name not in modules:
            raise InvalidInput(
                Problem(
                    "unknown-module",
                    f"there is no module {name!r}",
                    hint=did_you_mean(name, list(modules)),
                )
            )
        return modules[name]

    def locked(self, name: str, part: str) -> LockedModule | None:
        """What the lock says of a module: its scheme, its activation format, its measured error."""
        return self._locked.get((part, name))

    def tensor(self, info: TensorInfo) -> Tensor:
        """A tensor as it is stored.

        Raises:
            InvalidInput: its bytes are not those that the lock vouches for (where digests are
                checked), or the file has changed since it was opened.
        """
        buffer = bytearray(info.nbytes)
        self._reader.read_into(info, 0, buffer)
        expected = self.digest(info)
        if expected is not None and xxh3_128(buffer) != expected:
            raise InvalidInput(damaged(info))
        dtype = TORCH_DTYPES.get(info.dtype)
        if dtype is None:
            raise InvalidInput(
                Problem(
                    "unsupported-dtype",
                    f"torch has no dtype for {info.dtype}",
                    file=str(info.file),
                    tensor=info.name,
                )
            )
        if not info.nbytes:
            return torch.empty(info.shape, dtype=dtype)
        return torch.frombuffer(buffer, dtype=dtype).reshape(info.shape)

    def weight(
        self, name: str, part: str | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """A module's weight as the numbers that it stands for, ``[out, in]``.

        A plain weight keeps its own dtype. Where activations are divided by smoothing factors and
        rotated, the weight is rotated back in float32 and its columns are divided by the factors
        instead, which means the same.

        Raises:
            InvalidInput: there is no such module, a number is not finite or too large for
                ``dtype``, or a smoothing factor is not positive.
        """
        module, stored = self.module(name, part), self.module(name, part).weight
        info = module.tensors["weight"]
        if isinstance(stored, PlainWeight):
            return self.tensor(info)
        self._check(module)
        rows, whole = self.stored(name, part), (0, module.out_features)
        codes, scale, zero_point = rows.codes(*whole), rows.scales(*whole), rows.zeros(*whole)
        if "weight_shape" in module.tensors:
            self._check_shape(module)
        try:
            values = dequantize(codes, scale, stored, zero_point=zero_point)
            if module.rotation is not None:
                values = rotate_(values, module.rotation.size)
            if "smoothing" in module.tensors:
                values = values / self._factors(module.tensors["smoothing"])
            return values if dtype == torch.float32 else cast(values, plain_dtype(dtype))
        except Unrepresentable as refused:
            raise InvalidInput(replace(refused.at(info.name), file=str(info.file))) from refused

    def read_into(self, info: TensorInfo, start: int, buffer: WritableBuffer) -> None:
        """Fill ``buffer`` with bytes of a tensor as stored, from byte ``start`` of it on.

        Raises:
            InvalidInput: the file has changed since it was opened.
        """
        self._reader.read_into(info, start, buffer)

    def announce(self, info: TensorInfo, start: int, nbytes: int) -> None:
        """Have the system fetch bytes of a tensor that will be read soon, where it listens."""
        self._reader.announce(info, start, nbytes)

    def digest(self, info: TensorInfo) -> str | None:
        """What the bytes of a tensor have to hash to, where digests are checked."""
        return self._digests.get((info.file, info.name))

    def stored(self, name: str, part: str | None = None) -> StoredRows:
        """A module's codes, scales and zero points, by rows, in the order of memory."""

        def read(info: TensorInfo, start: int, out: Tensor) -> None:
            self._reader.read_into(info, start, as_memory(out))

        return StoredRows(self.module(name, part), read, Fresh())

    def rows(self, name: str, part: str | None, start: int, stop: int) -> Tensor:
        """Rows of a module's weight as the numbers that are stored, float32 ``[rows, in]``.

        Memory does not grow with the module. Smoothing factors are not applied, and
        rotated rows stay so.

        Raises:
            InvalidInput: there is no such part or module, or a number is not finite.
            ValueError: ``start`` is inside a block of rows that share scales.
        """
        module, rows = self.module(name, part), self.stored(name, part)
        info, stored = module.tensors["weight"], module.weight
        codes = rows.codes(start, stop)
        try:
            if isinstance(stored, PlainWeight):
                return to_float32(codes)
            scales, zeros = rows.scales(start, stop), rows.zeros(start, stop)
            return dequantize(codes, scales, stored, zero_point=zeros)
        except Unrepresentable as refused:
            raise InvalidInput(replace(refused.at(info.name, start), file=str(info.file))) from None

    def _check(self, module: StoredModule) -> None:
        """Hold a module's tensors to their digests, where those are checked."""
        for info in module.tensors.values():
            if self.digest(info) is not None:
                self.tensor(info)

    def _check_shape(self, module: StoredModule) -> None:
        info = module.tensors["weight_shape"]
        said, is_so = self.tensor(info).tolist(), [module.out_features, module.in_features]
        if said != is_so:
            raise InvalidInput(
                Problem(
                    "misshaped-weight",
                    f"it says {said}, and the codes of {module.name!r} are {is_so}",
                    hint="The file is damaged, or was written by a broken tool.",
                    file=str(info.file),
                    tensor=info.name,
                )
            )

    def _factors(self, info: TensorInfo) -> Tensor:
        factors = self.tensor(info)
        problem = bad_number("smoothing", factors, info)
        if problem is not None:
            raise InvalidInput(problem)
        return factors


def damaged(info: TensorInfo) -> Problem:
    """What is said of a tensor whose bytes have another digest than the lock says."""
    return Problem(
        "digest-mismatch",
        "its bytes are not those that were written",
        hint="The file was damaged or edited; fetch or convert it again.",
        file=str(info.file),
        tensor=info.name,
    )
