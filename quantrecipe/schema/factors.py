"""Tensors whose values are factors: which values each of them cannot have."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from quantrecipe.schema.layout_reading import StoredModule
from quantrecipe.schema.schemes import GgmlRecords, Nf4, ScaledWeight
from quantrecipe.schema.tensors import TensorInfo

NAN: Final = "nan-scale"
INFINITE: Final = "infinite-scale"
ZERO: Final = "zero-scale"
NEGATIVE: Final = "negative-scale"
DENORMAL: Final = "denormal-scale"
_ANY_FINITE: Final = frozenset({ZERO, NEGATIVE, DENORMAL})


@dataclass(frozen=True, slots=True)
class Factor:
    """A tensor of factors.

    Attributes:
        info: the tensor.
        fine: kinds of values that are as they should be.
        dtype: what its numbers are, where its header calls them otherwise: exponents in uint8.
        codes: what it scales, if zeros are fine where nothing but zeros is scaled.
        weight: how ``codes`` are stored.
        shape: out and in features of the weight.
    """

    info: TensorInfo
    fine: frozenset[str] = frozenset()
    dtype: str | None = None
    codes: TensorInfo | None = None
    weight: ScaledWeight | None = None
    shape: tuple[int, int] = (0, 0)


def factors(modules: Iterable[StoredModule]) -> dict[tuple[str, str], Factor]:
    """The factors of modules, by file and name; scales inside records are none of them."""
    return {
        (str(factor.info.file), factor.info.name): factor
        for module in modules
        for factor in _of(module)
    }


def record_weights(modules: Iterable[StoredModule]) -> list[tuple[TensorInfo, GgmlRecords]]:
    """Weights whose scales lie between their codes."""
    return [
        (module.tensors["weight"], module.weight)
        for module in modules
        if isinstance(module.weight, GgmlRecords)
    ]


def _of(module: StoredModule) -> Iterator[Factor]:
    for role, info in module.tensors.items():
        if role == "weight_scale" and isinstance(module.weight, ScaledWeight):
            yield from _scales(module, module.weight, info)
        elif role == "second_scale":
            nested = isinstance(module.weight, Nf4)
            yield Factor(info, frozenset({ZERO}) if nested else frozenset())
        elif role == "scale_offset":
            yield Factor(info, _ANY_FINITE)
        elif role in ("smoothing", "input_scale"):
            yield Factor(info)


def _scales(module: StoredModule, weight: ScaledWeight, info: TensorInfo) -> Iterator[Factor]:
    if isinstance(weight, Nf4) and weight.double_quantized:
        # Codes of scales: every byte is one.
        return
    if weight.has_zero_scales:
        small = {DENORMAL} if weight.has_two_levels else set()
        # A header may call numbers in 8 bits bytes.
        dtype = "float8_e4m3fn" if weight.scale_dtype == "float8_e4m3fn" else None
        yield Factor(info, frozenset({ZERO, *small}), dtype)
        return
    codes = module.tensors["weight"]
    whole = not module.storage and codes.nbytes == module.out_features * module.in_features
    exponents = weight.scale_dtype == "float8_e8m0fnu"
    yield Factor(
        info,
        # Where the numbers of a scale are not at hand, an exponent of 0 is left alone: programs
        # write it for runs of zeros.
        fine=frozenset({ZERO}) if exponents and not whole else frozenset(),
        dtype="float8_e8m0fnu" if exponents else None,
        codes=codes if whole else None,
        weight=weight if whole else None,
        shape=(module.out_features, module.in_features),
    )
