"""A linear layer that holds its weight as codes and scales, and computes with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, Self, cast

import torch
from torch import Tensor, nn

from quantrecipe.formats import get_format
from quantrecipe.formats.dtypes import TORCH_DTYPES
from quantrecipe.loaders.kernels import AUTO, LEVEL_DTYPES, activation_key
from quantrecipe.schema.schemes import AnyScaledWeight, DynamicActivation, Hadamard
from quantrecipe.schema.storage import (
    AS_IT_IS,
    PACKINGS,
    TILE_COLUMNS,
    TILE_ROWS,
    PackingName,
    Storage,
    padded,
)
from quantrecipe.schema.stored_weights import NESTED_BLOCK

ROLES: Final = (
    "weight",
    "weight_scale",
    "weight_zero_point",
    "second_scale",
    "scale_offset",
    "smoothing",
    "bias",
)
"""The tensors of a module, by role."""

_PACKINGS: Final[Mapping[str, PackingName]] = {
    "int4": "int32-low-nibble",
    "nf4": "uint8-high-nibble",
    "mxfp4": "uint8-high-nibble",
    "nvfp4": "uint8-high-nibble",
}
"""How layout ``quantrecipe`` packs codes of 4 bits."""


class QuantizedLinear(nn.Linear):
    """``y = x W^T + bias`` with ``W`` in the format of a recipe.

    Its tensors are parameters without gradients, registered under the names that the layout gives
    them (``wq`` and ``ws``, say), so that ``state_dict`` has the keys of the checkpoint; the
    attributes ``weight``, ``weight_scale``, ``weight_zero_point``, ``second_scale``,
    ``scale_offset``, ``smoothing`` and ``bias`` are there under any name. All are held as they are
    stored: packed codes and records are unpacked, scales in tiles or of two levels brought into the
    rows of their grid, in every call. Codes, scales and factors keep their dtype whatever the
    module is cast to; only the bias follows. Gradients flow to the input and to the bias, and past
    the rounding of activations.

    Args:
        in_features: columns of the weight.
        out_features: rows of the weight.
        weight_format: how the weight is stored.
        activation: how activations are quantized in each call; ``None``: they are not.
        smoothing: whether activations are divided by factors first.
        rotation: how activations are rotated after that, as the columns of the weight were.
        bias: whether a bias is added.
        shapes: of tensors as stored, by role, where they are not those of layout ``quantrecipe``.
        storage: how tensors lie that are not as in memory, by role; ``None``: as layout
            ``quantrecipe`` stores them.
        scale_offset: what is added to scales of two levels, where no tensor says it.
        names: role to the name its tensor is registered under, where that differs.
        kernel: a kernel's name, or ``auto``.
        device: of the (uninitialized) tensors.
        dtype: of the bias; torch's default dtype if ``None``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        weight_format: AnyScaledWeight,
        activation: DynamicActivation | None = None,
        *,
        smoothing: bool = False,
        rotation: Hadamard | None = None,
        bias: bool = True,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
        storage: Mapping[str, Storage] | None = None,
        scale_offset: float | None = None,
        names: Mapping[str, str] | None = None,
        kernel: str = AUTO,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self.weight_format = weight_format
        self.activation = activation
        self.rotation = rotation
        self.kernel = kernel
        self.offset = scale_offset
        self._names = {role: (names or {}).get(role, role) for role in ROLES}
        self._activation = activation_key(activation)
        self._group = list(weight_format.group_shape(out_features, in_features))
        if not weight_format.has_scales:  # one scale for all, which is 1
            self._group = [out_features, in_features]
        if storage is None:
            default = _PACKINGS.get(weight_format.format)
            storage = {} if default is None else {"weight": Storage(PACKINGS[default])}
        self.storage = dict(storage)
        for role, (shape, held_in) in self._expected(smoothing, bias, dtype).items():
            given = shape if shape is None else (shapes or {}).get(role, shape)
            self._hold(role, given, held_in, device)

    def _expected(
        self, smoothing: bool, bias: bool, dtype: torch.dtype | None
    ) -> dict[str, tuple[tuple[int, ...] | None, torch.dtype | None]]:
        """Shape and dtype of every tensor by role; ``None`` for the shape of one that is absent."""
        weight, rows, columns = self.weight_format, self.out_features, self.in_features
        grid = weight.scale_grid(rows, columns)
        codes = get_format(weight).code_dtype
        held: dict[str, tuple[tuple[int, ...] | None, torch.dtype | None]] = dict.fromkeys(
            ROLES, (None, None)
        )
        packing = self._storage("weight").packing
        if packing is None:
            held["weight"] = (rows, weight.code_columns(columns)), codes
        else:
            held["weight"] = (rows, packing.stored(columns)), TORCH_DTYPES[packing.dtype]
        if weight.has_scales:
            tiles = padded(grid[0], TILE_ROWS), padded(grid[1], TILE_COLUMNS)
            shape = grid if self._storage("weight_scale").arrangement == "rows" else tiles
            held["weight_scale"] = shape, TORCH_DTYPES[weight.stored_scale_dtypes[0]]
        if weight.has_zero_points:
            packing = self._storage("weight_zero_point").packing
            if packing is None:
                held["weight_zero_point"] = grid, torch.uint8
            else:
                shape = packing.stored(grid[0]), grid[1]
                held["weight_zero_point"] = shape, TORCH_DTYPES[packing.dtype]
        if weight.has_two_levels:
            nested = weight.format == "nf4"
            blocks = -(-grid[0] * grid[1] // NESTED_BLOCK) if nested else 1
            held["second_scale"] = (blocks,), torch.float32
            if nested and self.offset is None:
                held["scale_offset"] = (1,), torch.float32
        if smoothing:
            held["smoothing"] = (columns,), torch.float32
        if bias:
            held["bias"] = (rows,), dtype
        return held

    def _storage(self, role: str) -> Storage:
        return self.storage.get(role, AS_IT_IS)

    def _hold(
        self,
        role: str,
        shape: tuple[int, ...] | None,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
    ) -> None:
        made = None
        if shape is not None:
            empty = torch.empty(shape, dtype=dtype, device=device)
            made = nn.Parameter(empty, requires_grad=False)
        # Not by attribute: the roles below are properties, and their names may be the same.
        self._parameters[self._names[role]] = made

    @property
    def names(self) -> Mapping[str, str]:
        """Role to the name that its tensor has in ``state_dict``."""
        return dict(self._names)

    @property
    def weight(self) -> nn.Parameter:  # type: ignore[override]
        """The codes as they are stored: ``[out, in]``, packed, or the bytes of records."""
        return cast(nn.Parameter, self._parameters[self._names["weight"]])

    @property
    def weight_scale(self) -> nn.Parameter | None:
        """The scales as they are stored; ``None`` for records, which hold theirs."""
        return self._parameters[self._names["weight_scale"]]

    @property
    def weight_zero_point(self) -> nn.Parameter | None:
        """The zero points, as they are stored."""
        return self._parameters[self._names["weight_zero_point"]]

    @property
    def second_scale(self) -> nn.Parameter | None:
        """What the scales are multiplied by, where they have two levels."""
        return self._parameters[self._names["second_scale"]]

    @property
    def scale_offset(self) -> nn.Parameter | None:
        """What is added to the scales of a double-quantized nf4, where a tensor says it."""
        return self._parameters[self._names["scale_offset"]]

    @property
    def level_dtype(self) -> torch.dtype:
        """The dtype of what is multiplied by scales: that of the codes, unless they are packed."""
        return LEVEL_DTYPES.get(self.weight_format.format, self.weight.dtype)

    @property
    def grid_dtype(self) -> torch.dtype:
        """The dtype of the scales that a kernel gets."""
        if self.weight_scale is None or self._are_made:
            return torch.float32
        return self.weight_scale.dtype

    @property
    def call_group(self) -> tuple[int, int]:
        """Rows and columns of the weight that share a scale, as a kernel gets them."""
        return self._group[0], self._group[1]

    @property
    def smoothing(self) -> nn.Parameter | None:
        """The factors that activations are divided by, float32 ``[in]``."""
        return self._parameters[self._names["smoothing"]]

    @property
    def bias(self) -> nn.Parameter | None:  # type: ignore[override]
        """The bias, ``[out]``."""
        return self._parameters[self._names["bias"]]

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in]`` of a floating dtype to ``[..., out]`` of the same."""
        if torch.is_autocast_enabled(input.device.type):
            input = input.to(torch.get_autocast_dtype(input.device.type))
        result: Tensor = torch.ops.quantrecipe.linear(
            input,
            self._levels(),
            self._scales(),
            self.smoothing,
            self.bias,
            0 if self.rotation is None else self.rotation.size,
            self._group,
            self._activation,
            self.kernel,
        )
        return result

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight as plain numbers, ``[out, in]``; smoothing factors are not applied.

        Rotated columns stay so.
        """
        result: Tensor = torch.ops.quantrecipe.dequantize(
            self._levels(), self._scales(), self._group, dtype
        )
        return result

    def _levels(self) -> Tensor:
        """The weight before it is multiplied by its scales, ``[out, in]``."""
        codes: Tensor = self.weight
        name = self.weight_format.format
        if codes.ndim != 2 or len(codes) != self.out_features:
            codes = codes.view(self.out_features, -1)
        if name not in LEVEL_DTYPES:
            return codes
        packing = self._storage("weight").packing
        zero_packing = self._storage("weight_zero_point").packing
        result: Tensor = torch.ops.quantrecipe.levels(
            codes,
            self.weight_zero_point,
            self.in_features,
            self._group,
            name,
            "" if packing is None else packing.name,
            "" if zero_packing is None else zero_packing.name,
        )
        return result

    @property
    def _are_made(self) -> bool:
        """Whether scales are not what is stored, but made from it."""
        weight = self.weight_format
        named = weight.format in ("llm_int8", "mxfp8", "mxfp4")
        return weight.has_two_levels or named

    def _scales(self) -> Tensor:
        """What codes are multiplied by, a grid, or as many numbers in another shape."""
        if self.weight_scale is None:
            return self.weight.new_ones((1, 1), dtype=torch.float32)
        if not self._are_made:
            return self.weight_scale
        rows, columns = self.weight_format.scale_grid(self.out_features, self.in_features)
        result: Tensor = torch.ops.quantrecipe.scales(
            self.weight_scale,
            self.second_scale,
            self.scale_offset,
            self.offset,
            [rows, columns],
            self.weight_format.format,
            self._storage("weight_scale").arrangement,
            self._storage("second_scale").reciprocal,
        )
        return result

    def reset_parameters(self) -> None:
        """Nothing: codes and scales come from a checkpoint."""

    def extra_repr(self) -> str:
        """Shapes, formats and kernel."""
        weight, activation = self.weight_format, self.activation
        said = [
            f"in_features={self.in_features}, out_features={self.out_features}",
            f"bias={self.bias is not None}",
            f"weight={weight.format} by {weight.granularity}",
        ]
        if activation is not None:
            said.append(f"activation={activation.format} by {activation.granularity}")
        if self.smoothing is not None:
            said.append("smoothing")
        if self.rotation is not None:
            said.append(f"rotation={self.rotation.kind} of {self.rotation.size}")
        said.append(f"kernel={self.kernel}")
        return ", ".join(said)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keeping_dtypes(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.dtype == tensor.dtype or tensor is self.bias:
                return moved
            return tensor.to(moved.device)

        result: Any = super()._apply(keeping_dtypes, recurse)  # type: ignore[no-untyped-call]
        return cast(Self, result)
