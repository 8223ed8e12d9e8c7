"""A linear layer that holds its weight as codes and scales, and computes with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, Self, cast

import torch
from torch import Tensor, nn

from quantrecipe.formats import get_format
from quantrecipe.formats.dtypes import TORCH_DTYPES
from quantrecipe.formats.scaled import SCALE_DTYPES
from quantrecipe.loaders.kernels import AUTO, LEVEL_DTYPES, activation_key
from quantrecipe.schema.schemes import AnyScaledWeight, DynamicActivation, Hadamard
from quantrecipe.schema.storage import PACKINGS, Packing, PackingName

ROLES: Final = ("weight", "weight_scale", "weight_zero_point", "smoothing", "bias")
"""The tensors of a module, by role."""

_PACKINGS: Final[Mapping[str, PackingName]] = {
    "int4": "int32-low-nibble",
    "nf4": "uint8-high-nibble",
}
"""How layout ``quantrecipe`` packs codes of 4 bits."""


class QuantizedLinear(nn.Linear):
    """``y = x W^T + bias`` with ``W`` in the format of a recipe.

    Its tensors are parameters without gradients, registered under the names that the layout gives
    them (``wq`` and ``ws``, say), so that ``state_dict`` has the keys of the checkpoint; the
    attributes ``weight``, ``weight_scale``, ``weight_zero_point``, ``smoothing`` and ``bias`` are
    there under any name. Codes are held as they are stored: packed codes are unpacked in every
    call. Codes, scales and factors keep their dtype whatever the module is cast to; only the bias
    follows. Gradients flow to the input and to the bias, and past the rounding of activations.

    Args:
        in_features: columns of the weight.
        out_features: rows of the weight.
        weight_format: how the weight is stored.
        activation: how activations are quantized in each call; ``None``: they are not.
        smoothing: whether activations are divided by factors first.
        rotation: how activations are rotated after that, as the columns of the weight were.
        bias: whether a bias is added.
        scale_shape: of the scales as stored; the canonical grid by default.
        packings: how codes and zero points are packed, by role; ``None``: as layout
            ``quantrecipe`` packs them.
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
        scale_shape: tuple[int, ...] | None = None,
        packings: Mapping[str, Packing] | None = None,
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
        self._names = {role: (names or {}).get(role, role) for role in ROLES}
        self._group = list(weight_format.group_shape(out_features, in_features))
        self._activation = activation_key(activation)
        grid = weight_format.scale_grid(out_features, in_features)
        if packings is None:
            default = _PACKINGS.get(weight_format.format)
            packings = {} if default is None else {"weight": PACKINGS[default]}
        self.packings = dict(packings)
        self._hold_codes("weight", (out_features, in_features), device)
        self._hold_codes(
            "weight_zero_point", grid if weight_format.has_zero_points else None, device
        )
        self._hold(
            "weight_scale",
            grid if scale_shape is None else scale_shape,
            SCALE_DTYPES[weight_format.scale_dtype],
            device,
        )
        self._hold("smoothing", (in_features,) if smoothing else None, torch.float32, device)
        self._hold("bias", (out_features,) if bias else None, dtype, device)

    def _hold_codes(
        self, role: str, shape: tuple[int, int] | None, device: torch.device | str | None
    ) -> None:
        """Codes along rows and zero points along columns, packed where they are."""
        dtype, packing = get_format(self.weight_format).code_dtype, self.packings.get(role)
        if packing is not None and shape is not None:
            rows, columns = shape
            packed = role == "weight"
            shape = (rows, packing.stored(columns)) if packed else (packing.stored(rows), columns)
            dtype = TORCH_DTYPES[packing.dtype]
        self._hold(role, shape, dtype, device)

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
        """The codes, ``[out, in]``, or as many numbers in a row as they are packed into."""
        return cast(nn.Parameter, self._parameters[self._names["weight"]])

    @property
    def weight_scale(self) -> nn.Parameter:
        """The scales, in the shape and dtype they are stored in."""
        return cast(nn.Parameter, self._parameters[self._names["weight_scale"]])

    @property
    def weight_zero_point(self) -> nn.Parameter | None:
        """The zero points, as they are stored."""
        return self._parameters[self._names["weight_zero_point"]]

    @property
    def level_dtype(self) -> torch.dtype:
        """The dtype of what is multiplied by scales: that of the codes, unless they are packed."""
        return LEVEL_DTYPES.get(self.weight_format.format, self.weight.dtype)

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
            self.weight_scale,
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
            self._levels(), self.weight_scale, self._group, dtype
        )
        return result

    def _levels(self) -> Tensor:
        """The weight before it is multiplied by its scales, ``[out, in]``."""
        packing = self.packings.get("weight")
        if packing is None:
            return self.weight
        zero_packing = self.packings.get("weight_zero_point")
        result: Tensor = torch.ops.quantrecipe.levels(
            self.weight,
            self.weight_zero_point,
            self.in_features,
            self._group,
            self.weight_format.format,
            packing.name,
            "" if zero_packing is None else zero_packing.name,
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
