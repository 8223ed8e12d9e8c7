"""Loading a model: quantized modules take their places, and every tensor is read once."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from quantrecipe.formats import plain_dtype
from quantrecipe.loaders.checkpoint import Checkpoint
from quantrecipe.loaders.kernels import AUTO, LinearCall, activation_key, choose, find_kernel
from quantrecipe.loaders.kernels.choosing import AUTO_OR_DEQUANTIZED
from quantrecipe.loaders.linear import QuantizedLinear
from quantrecipe.loaders.matching import Load, Match, match
from quantrecipe.loaders.opening import Check, open_checkpoint
from quantrecipe.loaders.placement import DeviceLike, Placement
from quantrecipe.loaders.report import LoadReport
from quantrecipe.loaders.sites import Model, Place
from quantrecipe.loaders.transfer import read_tensors
from quantrecipe.loaders.values import JUDGED, bad_number, is_good
from quantrecipe.schema.layout import Layout
from quantrecipe.schema.problems import InvalidInput, Problem, QuantrecipeError
from quantrecipe.schema.schemes import PlainWeight
from quantrecipe.schema.storage import AS_IT_IS

ROWS: Final = 4096
"""Rows of a call that a report takes for an ordinary one."""

_EMPTIED: Final = (
    "The model is left without its tensors (on the meta device): load into it again, or build it "
    "anew."
)
_HOOKS: Final = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def load_model(
    model: nn.Module,
    path: Path | str,
    *,
    device: DeviceLike | Mapping[str, DeviceLike] | None = None,
    dtype: torch.dtype | None = None,
    kernel: str = AUTO,
    part: str | None = None,
    check: Check = "headers",
    layout: str | Layout | None = None,
    parts: Mapping[str, str] | None = None,
    allow_dequantized: bool = False,
) -> LoadReport:
    """Load a part of a converted checkpoint into a model, to compute with what is stored.

    Every linear that is stored quantized becomes a ``QuantizedLinear``. Every parameter and every
    persistent buffer is read once, onto its device; what the model held before is let go first.
    Tied weights and shared modules stay so. Everything is checked before the model is touched.

    Args:
        model: its modules have the names of the checkpoint's; it may be on the meta device.
        path: the folder that ``convert`` wrote, or one safetensors file.
        device: where everything goes; or names of modules to devices, as in a ``device_map``: the
            longest that a tensor's name begins with counts, ``""`` is for the rest. ``None``: each
            where the model has it, what is on the meta device to the CPU.
        dtype: of floating tensors that are stored plain, biases of quantized modules among them;
            each keeps the dtype it is stored in by default. Codes, scales and factors always do.
        kernel: a kernel's name, or ``auto``: the fastest that fits, call by call.
        part: which part; ``None``: the only one.
        check: as ``open_checkpoint``; digests are looked at while loading.
        layout: as ``open_checkpoint``.
        parts: as ``open_checkpoint``.
        allow_dequantized: whether ``kernel="auto"`` may hold weights as plain numbers.

    Returns:
        what was loaded, and which kernels will compute with it.

    Raises:
        InvalidInput: with everything that does not fit: modules and tensors that one side lacks,
            shapes, dtypes, devices, modules without a quantized form, a kernel that refuses. The
            model is as it was. Digests that differ, and scales and smoothing factors that are not
            positive and finite, are found while loading: the model is left without its tensors.
        SourceError: the system could not read a file; the model is left without its tensors.
        ValueError: ``dtype`` holds no plain numbers.
    """
    if dtype is not None:
        plain_dtype(dtype)
    started = time.perf_counter()
    if kernel != AUTO:
        find_kernel(kernel)
    elif allow_dequantized:
        kernel = AUTO_OR_DEQUANTIZED
    with open_checkpoint(path, layout=layout, parts=parts, check=check) as checkpoint:
        opened = checkpoint.part(part)
        name = next(each for each, it in checkpoint.parts.items() if it is opened)
        placement = Placement(device)
        found = match(checkpoint, name, Model(model), placement, dtype=dtype, kernel=kernel)
        kernels, problems = _kernels(found, kernel)
        if found.problems or problems:
            raise InvalidInput([*found.problems, *problems])
        try:
            _make_room(found, kernel)
            _fill(checkpoint, found)
        except QuantrecipeError as error:
            error.add_note(_EMPTIED)
            raise
    return LoadReport(
        quantized=sum(kernels[ROWS].values()),
        plain=sum(isinstance(each.weight, PlainWeight) for each in opened.modules.values()),
        others=len(opened.others),
        kernels=kernels[ROWS],
        kernels_for_one_row=kernels[1],
        nbytes=_nbytes(found),
        left_out=tuple(found.left_out),
        seconds=time.perf_counter() - started,
    )


def _kernels(found: Match, kernel: str) -> tuple[dict[int, dict[str, int]], list[Problem]]:
    """Modules by the kernel that would compute them, by rows; and what a kernel refuses."""
    counts: dict[int, Counter[str]] = {ROWS: Counter(), 1: Counter()}
    refusals: dict[Problem, list[str]] = {}
    dtype = next(
        (
            load.wanted.dtype
            for load in found.loads
            if load.role == "other" and load.wanted.dtype.is_floating_point
        ),
        torch.get_default_dtype(),
    )
    devices = {
        id(place.module): load.wanted.device
        for load in found.loads
        if load.role == "weight"
        for place in load.places
    }
    for swap in found.swaps:
        for rows, count in counts.items():
            call = _call(swap.made, rows, dtype, devices[id(swap.made)])
            try:
                count[choose(call, kernel).name] += 1
            except InvalidInput as refused:
                count["refused"] += 1
                if rows == ROWS:
                    refusals.setdefault(refused.problems[0], []).append(swap.stored.name)
    problems = [
        Problem(
            problem.kind,
            f"{problem.message} ({len(names):,} modules, the first named)",
            hint=problem.hint,
            tensor=names[0],
        )
        for problem, names in refusals.items()
    ]
    return {rows: dict(count.most_common()) for rows, count in counts.items()}, problems


def _call(
    module: QuantizedLinear, rows: int, dtype: torch.dtype, device: torch.device
) -> LinearCall:
    return LinearCall(
        rows=rows,
        out_features=module.out_features,
        in_features=module.in_features,
        dtype=dtype,
        device=device,
        code_dtype=module.level_dtype,
        scale_dtype=module.grid_dtype,
        group=module.call_group,
        activation=activation_key(module.activation),
        smoothing=module.smoothing is not None,
        rotation=0 if module.rotation is None else module.rotation.size,
        bias=module.bias is not None,
    )


def _make_room(found: Match, kernel: str) -> None:
    """Put quantized modules in their places, and let go of every tensor that will be read."""
    for swap in found.swaps:
        swap.made.kernel = kernel
        for name in _HOOKS:
            getattr(swap.made, name).update(getattr(swap.site.module, name))
        for owner, attribute in swap.site.owners:
            setattr(owner, attribute, swap.made)
    found.swaps.clear()  # they hold the linears that were replaced
    for load in found.loads:
        wanted = load.wanted
        _set(load, torch.empty(wanted.shape, dtype=wanted.dtype, device="meta"))
    if any(load.wanted.device.type == "cuda" for load in found.loads):
        torch.cuda.empty_cache()


def _fill(checkpoint: Checkpoint, found: Match) -> None:
    tensors, problems = read_tensors(checkpoint, [load.wanted for load in found.loads])
    foreign = checkpoint.recipe is None and checkpoint.lock is None
    problems += _bad_numbers(found.loads, tensors, foreign)
    if problems:
        raise InvalidInput(_with_hint(problems))
    for load, tensor in zip(found.loads, tensors, strict=True):
        _set(load, tensor)
    for held, device in found.moves:
        moved = held.tensor.detach().to(device)
        if not held.places[0].buffer:
            moved = nn.Parameter(moved, requires_grad=held.tensor.requires_grad)
        for place in held.places:
            _put(place, moved)


def _with_hint(problems: list[Problem]) -> Iterator[Problem]:
    for problem in dict.fromkeys(problems):
        hint = f"{problem.hint} {_EMPTIED}" if problem.hint else _EMPTIED
        yield Problem(problem.kind, problem.message, hint, problem.file, tensor=problem.tensor)


def _bad_numbers(loads: list[Load], tensors: list[Tensor], foreign: bool) -> list[Problem]:
    """Scales and factors that are not positive and finite; each device is asked once."""
    judged: dict[torch.device, list[tuple[Load, Tensor]]] = {}
    for load, tensor in zip(loads, tensors, strict=True):
        if load.role in JUDGED and load.wanted.device.type != "meta":
            judged.setdefault(load.wanted.device, []).append((load, tensor))
    problems: list[Problem | None] = []
    for pairs in judged.values():
        good = torch.stack(
            [is_good(tensor, zero=_may_be_zero(load, foreign)) for load, tensor in pairs]
        ).tolist()
        problems += [
            bad_number(load.role, tensor, load.wanted.info, zero=_may_be_zero(load, foreign))
            for (load, tensor), fine in zip(pairs, good, strict=True)
            if not fine
        ]
    return [problem for problem in problems if problem is not None]


def _may_be_zero(load: Load, foreign: bool) -> bool:
    """Whether a scale of 0 is one: in some formats, and where another program wrote zeros so.

    A code of fp8 may be no number, and by 0 it stays none.
    """
    module = load.places[0].module
    if not isinstance(module, QuantizedLinear) or load.role == "smoothing":
        return False
    if load.role == "second_scale" and module.storage.get(load.role, AS_IT_IS).reciprocal:
        return False
    whole = foreign and module.level_dtype == torch.int8
    return whole or module.weight_format.has_zero_scales


def _set(load: Load, tensor: Tensor) -> None:
    parameter = None
    for place in load.places:
        if place.buffer:
            _put(place, tensor)
        else:
            if parameter is None:
                parameter = nn.Parameter(tensor, requires_grad=load.trainable)
            _put(place, parameter)


def _put(place: Place, tensor: Tensor) -> None:
    if isinstance(place.module, QuantizedLinear):
        assert isinstance(tensor, nn.Parameter)
        place.module._parameters[place.attribute] = tensor
    else:
        # By attribute: recurrent modules keep a list of their weights up to date that way.
        setattr(place.module, place.attribute, tensor)


def _nbytes(found: Match) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for load in found.loads:
        wanted = load.wanted
        counts[str(wanted.device)] += math.prod(wanted.shape) * wanted.dtype.itemsize
    return dict(counts)
