# SPDX-License-Identifier: Apache-2.0
# Licensed under the Apache License, Version 2.0: https://www.apache.org/licenses/LICENSE-2.0
"""Loads the quantized checkpoint that lies beside this file. Needs torch and safetensors only.

    from safetensors_loader import load, without_weights

    with without_weights():
        model = MyModel(config)
    model = load(model, device="cuda")      # its quantized linears stay quantized

``state_dict()`` gives ordinary weights instead, for any other use, and ``python
safetensors_loader.py`` prints what is in the checkpoint. Everything is checked against what is
written below before a tensor is read: a missing, extra, misshaped or mistyped one is an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional

M = TypeVar("M", bound=nn.Module)
Shape = tuple[int, ...]
Block = tuple[int | str, int | str]
Name = str | tuple[str, range, str]
"""One name, or one for each number: ``("layers.", range(0, 34), ".attention.qkv")``."""
Names = tuple[tuple[str, tuple[str, ...]], ...]
"""Stored names and what a model calls them: ``(("blocks.*.qkv", ("blocks.*.q", "blocks.*.k")),)``.
``*`` stands for one segment. Several names: the rows are cut into as many equal parts."""


class Group(TypedDict):
    """Modules that are stored alike, or tensors of no module."""

    format: str  # for people
    block: Block | None  # rows and columns that share a scale
    activation: tuple[str, str] | None  # format of quantized inputs, and what shares a scale
    rotation: int | None  # columns that were rotated together, and inputs have to be
    tensors: dict[str, tuple[str, str, tuple[int | str, ...]]]  # role: name on disk, dtype, shape
    names: dict[Shape, tuple[Name, ...]]  # by the shape of the weight, or of the tensor
    bytes: int


class Part(TypedDict):
    """One network."""

    files: tuple[str, ...]
    groups: tuple[Group, ...]


# What the checkpoint consists of. In a name on disk, {} stands for the module's own name.
# <checkpoint>
RECIPE = ""
PARTS: dict[str, Part] = {}
# </checkpoint>

HERE = Path(__file__).resolve().parent
LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}
MAX_INT32_TERMS = 131_071  # products of two int8 numbers whose sum surely fits int32
EXACT_TERMS = 1024  # and float32


def load(
    model: M,
    folder: Path | str = HERE,
    *,
    part: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.bfloat16,
    names: Names = (),
) -> M:
    """Load a part into ``model``, in place. Each tensor is read once, straight to ``device``.

    Every quantized ``nn.Linear`` becomes a ``QuantizedLinear``; a quantized weight of any other
    kind of module (an embedding, a subclass of ``nn.Linear``) is multiplied out.

    Args:
        model: of the right architecture; it may be on the meta device.
        folder: of the weights.
        part: its name; may be left out where there is only one.
        device: where everything goes.
        dtype: of all numbers that are not quantized; None: as they are stored.
        names: for a model that calls modules otherwise, or has several in place of one.

    Raises:
        ValueError: checkpoint and model do not fit; it names every tensor that does not.
    """
    part = _only(part)
    entries, uncut = _named(part, names)
    with ExitStack() as stack:
        files, problems = _open(Path(folder), part, str(device), stack)
        linears, places, misfits = _fit(model, entries)
        _refuse(problems + uncut + misfits)
        for entry in entries:
            tensors = _read(entry, files)
            if entry.name in linears:
                _put(model, linears[entry.name], QuantizedLinear(entry, tensors))
                continue
            for key, tensor in _plain(entry, tensors, dtype).items():
                if tensor.is_floating_point() and dtype is not None:
                    tensor = tensor.to(dtype)
                _put(model, places[key], tensor)
    return model.to(device)


@contextmanager
def without_weights() -> Iterator[None]:
    """Within it, modules are made with parameters on the meta device, which take no memory.

    Buffers are real: those that no checkpoint holds (tables of rotary embeddings) stay so.
    """
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def state_dict(
    folder: Path | str = HERE, part: str | None = None, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Every tensor of a part, weights multiplied out, for an ordinary ``load_state_dict``.

    Args:
        folder: of the weights.
        part: its name; may be left out where there is only one.
        dtype: of weights that were quantized; everything else is as it is stored.

    Raises:
        ValueError: the checkpoint is not the one this file was written for.
    """
    part = _only(part)
    found: dict[str, Tensor] = {}
    with ExitStack() as stack:
        files, problems = _open(Path(folder), part, "cpu", stack)
        _refuse(problems)
        for entry in _entries(part):
            found |= _plain(entry, _read(entry, files), dtype)
    return found


class QuantizedLinear(nn.Module):
    """A linear layer on quantized weights, and on quantized inputs where the checkpoint says so.

    Its tensors keep their dtypes: ``model.to(torch.float16)`` and the like only move it.
    """

    weight: Tensor  # codes, [out, in]
    weight_scale: Tensor | None  # one for each block
    smoothing: Tensor | None  # [in]: inputs are divided by it
    bias: Tensor | None  # [out]

    def __init__(self, entry: Entry, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.out_features, self.in_features = entry.shape
        self.block, self.activation = entry.block, entry.group["activation"]
        self.rotation = entry.group["rotation"]
        for role in ("weight", "weight_scale", "smoothing", "bias"):
            self.register_buffer(role, tensors.get(role))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` is ``[..., in]``; the result is ``[..., out]`` in its dtype."""
        rows = x.reshape(x.shape[:-1].numel(), self.in_features)
        with torch.autocast(x.device.type, enabled=False):
            if self.smoothing is not None:
                rows = rows.float() / self.smoothing
            if self.rotation is not None:
                rows = rotate(rows.float(), self.rotation)
            y = self._quantized(rows) if self.activation else self._plain(rows.to(x.dtype))
        return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def _plain(self, rows: Tensor) -> Tensor:
        """Inputs as they are, on weights multiplied out."""
        bias = self.bias.to(rows.dtype) if self.bias is not None else None
        weight = dequantize(self.weight, self.weight_scale, self.block)
        return functional.linear(rows, weight.to(rows.dtype), bias)

    def _quantized(self, rows: Tensor) -> Tensor:
        """Inputs quantized as well; float32 from there on."""
        assert self.activation is not None
        codes, scale = quantize(rows.float(), *self.activation)
        grid = self.weight_scale
        if (
            codes.dtype == self.weight.dtype == torch.int8
            and grid is not None
            and grid.shape[1] == 1  # each output has one scale
            and self.in_features <= MAX_INT32_TERMS
        ):
            y = int_matmul(codes, self.weight).float() * scale * grid.float().t()
        else:
            y = functional.linear(codes.float() * scale, dequantize(self.weight, grid, self.block))
        return y if self.bias is None else y + self.bias.float()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        # As bytes, so that a change of dtype leaves codes and scales alone.
        for name, tensor in self._buffers.items():
            if tensor is not None:
                self._buffers[name] = fn(tensor.view(torch.uint8)).view(tensor.dtype)
        return self

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.weight.dtype}, {self.activation}"


def quantize(x: Tensor, name: str, granularity: str) -> tuple[Tensor, Tensor]:
    """Codes ``[M, K]`` and scales ``[M, 1]`` (token) or ``[1, 1]`` (tensor) of float32 inputs."""
    largest = LARGEST[name]
    amax = x.abs().amax(1, keepdim=True)
    if granularity == "tensor" and len(x):
        amax = amax.amax(0, keepdim=True)
    # By a tensor: torch may multiply by the reciprocal of a Python number, which rounds twice.
    scale = amax / amax.new_full((), largest)
    scale = scale.masked_fill(scale == 0, 1.0)
    ratio = x / scale
    if name == "int8":
        ratio = ratio.round()  # half to even
    return ratio.clamp(-largest, largest).to(getattr(torch, name)), scale


def rotate(values: Tensor, size: int) -> Tensor:
    """Every ``size`` columns times a regular Hadamard matrix, which is its own inverse.

    The matrix is the Kronecker power of [[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1],
    [-1, 1, 1, 1]] / 2.
    """
    stride, scale, rotated = 1, 1.0, values
    while stride < size:
        a, b, c, d = rotated.reshape(-1, 4, stride).unbind(1)
        upper, lower, left, right = a + b, c - d, c + d, a - b
        rotated = torch.stack((upper + lower, upper - lower, left + right, left - right), 1)
        stride, scale = 4 * stride, scale / 2
    return rotated.reshape(values.shape) * scale


def dequantize(codes: Tensor, scale: Tensor | None, block: tuple[int, int]) -> Tensor:
    """float32 weights ``[out, in]``: codes times the scale of the block that each lies in."""
    if scale is None:
        return codes.float()
    grid = scale.float()
    for dim, size in enumerate(block):
        if size > 1 and grid.shape[dim] > 1:
            grid = grid.repeat_interleave(size, dim).narrow(dim, 0, codes.shape[dim])
    return codes.float() * grid


def int_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """int8 ``[M, K]`` times int8 ``[N, K]`` transposed, int32 ``[M, N]``, exact on every device."""
    if x.is_cuda and all(size % 8 == 0 for size in weight.shape):
        padding = max(0, 17 - len(x))  # it takes no fewer rows
        padded = functional.pad(x, (0, 0, 0, padding))
        return torch._int_mm(padded, weight.t())[: len(x)]
    total = torch.zeros(len(x), len(weight), dtype=torch.int32, device=x.device)
    for start in range(0, x.shape[1], EXACT_TERMS):
        terms = slice(start, start + EXACT_TERMS)
        total += (x[:, terms].float() @ weight[:, terms].float().t()).to(torch.int32)
    return total


@dataclass(frozen=True)
class Entry:
    """A module or a tensor of no module, with its tensors by role: name on disk, dtype, shape.

    Of a module whose rows are cut into equal parts it may be one: ``piece`` says which.
    """

    name: str
    shape: Shape
    group: Group
    block: tuple[int, int]
    tensors: dict[str, tuple[str, str, Shape]]
    piece: int = 0

    def in_model(self) -> Iterator[tuple[str, str, Shape, bool]]:
        """What it is in an ordinary model: role, name, shape, whether it is floating-point."""
        for role, (_, dtype, shape) in self.tensors.items():
            if role in ("weight", "bias", "tensor"):
                key = self.name if role == "tensor" else f"{self.name}.{role}"
                yield role, key, shape, role == "weight" or dtype.startswith(("F", "BF"))


def _entries(part: str) -> Iterator[Entry]:
    for group in PARTS[part]["groups"]:
        for shape, names in group["names"].items():
            dims, block = _dims(shape, group["block"])
            described = {
                role: (dtype, shape if role == "tensor" else _filled(sizes, dims))
                for role, (_, dtype, sizes) in group["tensors"].items()
            }
            for name in _expand(names):
                tensors = {
                    role: (group["tensors"][role][0].replace("{}", name), *each)
                    for role, each in described.items()
                }
                yield Entry(name, shape, group, block, tensors)


def _named(part: str, names: Names) -> tuple[list[Entry], list[str]]:
    """The entries under the names that a model has for them, and what cannot be cut."""
    found: list[Entry] = []
    problems: list[str] = []
    for entry in _entries(part):
        others = _renamed(entry.name, names)
        if "tensor" in entry.tensors and not others:  # it may be called after a module
            owner, _, own = entry.name.rpartition(".")
            others = tuple(f"{other}.{own}" for other in _renamed(owner, names))
        if len(others) > 1 and (reason := _uncuttable(entry, len(others))):
            problems.append(f"cannot be cut into {len(others)}: {entry.name!r}, {reason}")
        elif len(others) > 1:
            found += _cut(entry, others)
        else:
            found.append(replace(entry, name=others[0]) if others else entry)
    return found, problems


def _renamed(name: str, names: Names) -> tuple[str, ...]:
    """What ``names`` say that a stored name is called; nothing: they do not say."""
    segments = name.split(".")
    for stored, others in names:
        pattern = stored.split(".")
        if len(pattern) == len(segments) and all(
            wanted in ("*", segment) for wanted, segment in zip(pattern, segments, strict=True)
        ):
            stars = [segments[i] for i, wanted in enumerate(pattern) if wanted == "*"]
            return tuple(_starred(other, iter(stars)) for other in others)
    return ()


def _starred(pattern: str, stars: Iterator[str]) -> str:
    return ".".join(next(stars) if each == "*" else each for each in pattern.split("."))


def _uncuttable(entry: Entry, count: int) -> str | None:
    """Why the rows of an entry cannot be cut into so many parts; None: they can."""
    if "tensor" in entry.tensors:
        return "which is of no module"
    rows, block = entry.shape[0], entry.block[0]
    if rows % count:
        return f"which has {rows} rows"
    if "weight_scale" in entry.tensors and block < rows and rows // count % block:
        return f"whose scales are for {block} rows each"
    return None


def _cut(entry: Entry, names: tuple[str, ...]) -> Iterator[Entry]:
    """A module as equal parts. What does not differ from row to row is for all of them."""
    rows, columns = entry.shape
    cut = {"weight", "bias"} | ({"weight_scale"} if entry.block[0] < rows else set())
    tensors = {
        role: (stored, dtype, (shape[0] // len(names), *shape[1:]) if role in cut else shape)
        for role, (stored, dtype, shape) in entry.tensors.items()
    }
    shape = rows // len(names), columns
    for piece, name in enumerate(names):
        yield replace(entry, name=name, shape=shape, tensors=tensors, piece=piece)


def _dims(shape: Shape, block: Block | None) -> tuple[dict[str, int], tuple[int, int]]:
    """What the words in shapes stand for, and the rows and columns that share a scale."""
    if len(shape) != 2:
        return {}, (1, 1)
    dims = {"out": shape[0], "in": shape[1]}
    if block is None:  # nothing shares a scale; there may be no rows at all
        return dims, (shape[0], shape[1])
    rows, columns = _filled(block, dims)
    dims["row_blocks"] = -(-shape[0] // rows)
    dims["column_blocks"] = dims["groups"] = -(-shape[1] // columns)
    return dims, (rows, columns)


def _filled(sizes: tuple[int | str, ...], dims: dict[str, int]) -> Shape:
    return tuple(size if isinstance(size, int) else dims[size] for size in sizes)


def _expand(names: tuple[Name, ...]) -> Iterator[str]:
    for name in names:
        if isinstance(name, str):
            yield name
        else:
            yield from (f"{name[0]}{number}{name[2]}" for number in name[1])


def _only(part: str | None) -> str:
    if part is None and len(PARTS) == 1:
        return next(iter(PARTS))
    if part is None or part not in PARTS:
        raise ValueError(f"part={part!r}: it is one of {', '.join(map(repr, PARTS))}")
    return part


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ValueError("\n  ".join([f"{len(problems)} thing(s) do not fit:", *problems]))


def _open(
    folder: Path, part: str, device: str, stack: ExitStack
) -> tuple[dict[str, Any], list[str]]:
    """The open file of each tensor on disk, and what is not as written above."""
    files: dict[str, Any] = {}
    problems: list[str] = []
    mine = set(PARTS[part]["files"])
    for name in sorted(mine):
        if not (folder / name).is_file():
            problems.append(f"missing file: {folder / name}")
            continue
        file = stack.enter_context(safe_open(folder / name, framework="pt", device=device))
        keys = list(file.keys())
        problems += [f"extra: {key!r} is in two files" for key in keys if key in files]
        files.update(dict.fromkeys(keys, file))
    known: set[str] = set()
    for other in PARTS:
        if mine & set(PARTS[other]["files"]):
            known.update(stored for each in _entries(other) for stored, *_ in each.tensors.values())
    problems += [f"extra: {key!r} is in no part" for key in files if key not in known]
    for entry in _entries(part):
        for stored, dtype, shape in entry.tensors.values():
            if stored not in files:
                problems.append(f"missing: {stored!r} is in no file")
                continue
            header = files[stored].get_slice(stored)
            if tuple(header.get_shape()) != shape:
                problems.append(f"misshaped: {stored!r} is {header.get_shape()}, not {list(shape)}")
            if header.get_dtype() != dtype:
                problems.append(f"mistyped: {stored!r} is {header.get_dtype()}, not {dtype}")
    return files, problems


def _read(entry: Entry, files: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of an entry by role; scales as a grid."""
    tensors: dict[str, Tensor] = {}
    for role, (stored, _, shape) in entry.tensors.items():
        rows = files[stored].get_slice(stored)
        if shape == tuple(rows.get_shape()):
            tensors[role] = files[stored].get_tensor(stored)
        else:
            start = entry.piece * shape[0]
            tensors[role] = rows[start : start + shape[0]]
    if "weight_scale" in tensors:
        grid = [-(-size // each) for size, each in zip(entry.shape, entry.block, strict=True)]
        tensors["weight_scale"] = tensors["weight_scale"].reshape(grid)
    return tensors


def _plain(
    entry: Entry, tensors: dict[str, Tensor], dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """An entry as an ordinary model has it; ``dtype`` is that of a weight that was quantized."""
    found = {key: tensors[role] for role, key, *_ in entry.in_model()}
    if "weight_scale" in tensors:
        weight = dequantize(tensors["weight"], tensors["weight_scale"], entry.block)
        rotation = entry.group["rotation"]
        if rotation is not None:  # in place of rotating the inputs
            weight = rotate(weight, rotation)
        if "smoothing" in tensors:  # in place of dividing the inputs
            weight = weight / tensors["smoothing"]
        found[f"{entry.name}.weight"] = weight.to(dtype or weight.dtype)
    return found


def _fit(
    model: nn.Module, entries: list[Entry]
) -> tuple[dict[str, list[str]], dict[str, list[str]], list[str]]:
    """Where each quantized linear goes, where each other tensor goes, and what does not fit.

    What has several names in the model (tied weights, shared modules) goes to all of them.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    slots: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    slots |= dict(model.named_buffers(remove_duplicate=False))
    names: dict[int, list[str]] = {}
    for name, each in [*modules.items(), *slots.items()]:
        names.setdefault(id(each), []).append(name)
    given = Counter(key for entry in entries for _, key, *_ in entry.in_model())
    linears: dict[str, list[str]] = {}
    places: dict[str, list[str]] = {}
    filled: set[str] = set()
    problems = [f"extra: several are called {key!r}" for key in given if given[key] > 1]
    for entry in entries:
        module = modules.get(entry.name)
        quantized = entry.group["block"] is not None or entry.group["activation"] is not None
        if quantized and type(module) is nn.Linear:
            linears[entry.name] = names[id(module)]
        for role, key, shape, floating in entry.in_model():
            slot = slots.get(key)
            if slot is None:
                problems.append(f"extra: the model has no {key!r}")
                continue
            if tuple(slot.shape) != shape:
                has, wants = list(shape), list(slot.shape)
                problems.append(f"misshaped: {key!r} is {has}, and {wants} in the model")
            if slot.is_floating_point() != floating:
                problems.append(f"mistyped: {key!r} is {slot.dtype} in the model")
            if entry.name in linears:
                filled.update(f"{place}.{role}" for place in linears[entry.name])
            else:
                places[key] = [name for name in names[id(slot)] if name == key or name not in given]
                filled.update(places[key])
    needed = model.state_dict().keys()
    for key, slot in slots.items():
        if key not in filled and key in needed:
            problems.append(f"missing: the checkpoint has no {key!r}")
        elif key not in filled and slot.is_meta:
            problems.append(f"missing: {key!r} is meta and not kept in checkpoints: make it first")
    return linears, places, problems


def _put(model: nn.Module, places: list[str], value: nn.Module | Tensor) -> None:
    kept = nn.Parameter(value, requires_grad=False) if isinstance(value, Tensor) else value
    for place in places:
        parent, _, leaf = place.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, leaf, value if leaf in owner._buffers else kept)


def main() -> None:
    """Print a table of what is in the checkpoint."""
    print(f"{RECIPE}\n\n{'part':<18}{'stored as':<44}{'count':>7}{'bytes':>17}")
    for part, contents in PARTS.items():
        for group in contents["groups"]:
            count = sum(1 for names in group["names"].values() for _ in _expand(names))
            print(f"{part:<18}{group['format']:<44}{count:>7,}{group['bytes']:>17,}")


if __name__ == "__main__":
    main()
