"""What loading a model did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What was loaded, and what will compute with it.

    Attributes:
        quantized: modules that compute with codes.
        plain: modules stored in a plain dtype.
        others: tensors of no module.
        kernels: kernel to modules, for calls of 4096 rows.
        kernels_for_one_row: the same for calls of one row.
        nbytes: device to the bytes of the tensors that were put there.
        left_out: tensors of the checkpoint that nothing computes with (static activation scales:
            activations are quantized from their own values).
        seconds: from opening the checkpoint on.
    """

    quantized: int
    plain: int
    others: int
    kernels: Mapping[str, int]
    kernels_for_one_row: Mapping[str, int]
    nbytes: Mapping[str, int]
    left_out: tuple[str, ...]
    seconds: float

    def __str__(self) -> str:
        total = sum(self.nbytes.values())
        rows = [
            ("modules", f"{self.quantized:,} quantized, {self.plain:,} plain"),
            ("other tensors", f"{self.others:,}"),
            ("kernels, 4096 rows", _counts(self.kernels)),
            ("kernels, 1 row", _counts(self.kernels_for_one_row)),
            *((device, f"{count / 1e6:,.1f} MB") for device, count in self.nbytes.items()),
            ("seconds", f"{self.seconds:.2f} ({total / 1e9 / max(self.seconds, 1e-9):.2f} GB/s)"),
        ]
        if self.left_out:
            rows.append(("left out", f"{len(self.left_out):,} static activation scales"))
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _counts(kernels: Mapping[str, int]) -> str:
    return ", ".join(f"{name}: {count:,}" for name, count in kernels.items()) or "none"
