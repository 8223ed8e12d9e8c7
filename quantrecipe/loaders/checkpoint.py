"""A converted checkpoint, opened: its modules and other tensors, read when asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from quantrecipe.checkpoint import SourceReader, xxh3_128
from quantrecipe.checkpoint.reading import WritableBuffer
from quantrecipe.formats import Unrepresentable, cast, dequantize, to_float32
from quantrecipe.formats.dtypes import TORCH_DTYPES
from quantrecipe.formats.packing import unpack, unpack_down
from quantrecipe.formats.rotation import rotate_
from quantrecipe.loaders.values import bad_number
from quantrecipe.schema.dtypes import PLAIN_DTYPES, PlainDType
from quantrecipe.schema.layout import Layout
from quantrecipe.schema.layout_reading import StoredModule
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


class Checkpoint:
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
        digests: Mapping[tuple[Path, str], str],
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

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

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
        module = self.module(name, part)
        info = module.tensors["weight"]
        codes = self.tensor(info)
        stored = module.weight
        if isinstance(stored, PlainWeight):
            return codes
        if "weight" in module.packings:
            codes = unpack(codes, module.packings["weight"], module.in_features)
        grid = stored.scale_grid(module.out_features, module.in_features)
        scale = self.tensor(module.tensors["weight_scale"]).reshape(grid)
        zero_point = None
        if "weight_zero_point" in module.tensors:
            zero_point = self.tensor(module.tensors["weight_zero_point"])
            if "weight_zero_point" in module.packings:
                packing = module.packings["weight_zero_point"]
                zero_point = unpack_down(zero_point, packing, module.out_features)
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

    def codes(self, name: str, part: str | None, start: int, stop: int) -> Tensor:
        """Rows of a module's weight in the dtype of its codes, unpacked: ``[rows, in]``."""
        module = self.module(name, part)
        info, columns = module.tensors["weight"], module.in_features
        packing = module.packings.get("weight")
        if packing is None:
            return self._slice(info, start, (stop - start, columns))
        stored = self._slice(info, start, (stop - start, packing.stored(columns)))
        return unpack(stored, packing, columns)

    def scales(self, name: str, part: str | None, start: int, stop: int) -> Tensor:
        """The scales of these rows of a module's weight: the rows of its grid that they need.

        Raises:
            ValueError: ``start`` is inside a block of rows that share scales.
        """
        module = self.module(name, part)
        stored = module.weight
        if isinstance(stored, PlainWeight):
            raise ValueError(f"{name!r} is stored as {stored.format}, without scales")
        whole = module.out_features, module.in_features
        height, columns = stored.group_shape(*whole)[0], stored.scale_grid(*whole)[1]
        if start % height and stored.granularity != "tensor":
            raise ValueError(f"rows from {start} on do not begin a block of {height}")
        shape = -(-stop // height) - start // height, columns
        return self._slice(module.tensors["weight_scale"], start // height, shape)

    def zero_points(self, name: str, part: str | None, start: int, stop: int) -> Tensor | None:
        """The zero points of these rows of a module's weight, uint8 as the grid of their scales.

        ``None`` where its format has none.

        Raises:
            ValueError: ``start`` is inside rows whose zero points are packed together.
        """
        module = self.module(name, part)
        info, packing = (
            module.tensors.get("weight_zero_point"),
            module.packings.get("weight_zero_point"),
        )
        if info is None:
            return None
        columns = info.shape[1]
        if packing is None:
            return self._slice(info, start, (stop - start, columns))
        if start % packing.codes:
            raise ValueError(f"rows from {start} on do not begin {packing.codes} packed ones")
        shape = packing.stored(stop - start), columns
        stored = self._slice(info, start // packing.codes, shape)
        return unpack_down(stored, packing, stop - start)

    def rows(self, name: str, part: str | None, start: int, stop: int) -> Tensor:
        """Rows of a module's weight as the numbers that are stored, float32 ``[rows, in]``.

        Memory does not grow with the module. Smoothing factors are not applied, and
        rotated rows stay so.

        Raises:
            InvalidInput: there is no such part or module, or a number is not finite.
            ValueError: ``start`` is inside a block of rows that share scales.
        """
        module = self.module(name, part)
        codes = self.codes(name, part, start, stop)
        info, stored = module.tensors["weight"], module.weight
        try:
            if isinstance(stored, PlainWeight):
                return to_float32(codes)
            scales = self.scales(name, part, start, stop)
            zeros = self.zero_points(name, part, start, stop)
            return dequantize(codes, scales, stored, zero_point=zeros)
        except Unrepresentable as refused:
            raise InvalidInput(replace(refused.at(info.name, start), file=str(info.file))) from None

    def _slice(self, info: TensorInfo, first: int, shape: tuple[int, int]) -> Tensor:
        """Rows of a tensor as stored, from row ``first`` on, all of one width."""
        dtype = TORCH_DTYPES[info.dtype]
        width = shape[1] * dtype.itemsize
        buffer = bytearray(shape[0] * width)
        self._reader.read_into(info, first * width, buffer)
        if not buffer:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(buffer, dtype=dtype).view(shape)

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


def plain_dtype(dtype: torch.dtype) -> PlainDType:
    """The name that recipes give a plain dtype.

    Raises:
        ValueError: it is none.
    """
    for name in PLAIN_DTYPES:
        if TORCH_DTYPES[name] == dtype:
            return name
    raise ValueError(f"{dtype} does not hold plain numbers")
