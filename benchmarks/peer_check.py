"""How far a quantized checkpoint is from the weights it was made of, without any code of ours.

    python benchmarks/peer_check.py SOURCE_FILE OUT_FOLDER --convention scaled

Reads both with the safetensors library, gives every linear its weights back by the convention of
the program that wrote the output, and prints one JSON object: the relative error of each linear,
norm(w - w') / norm(w) in float64 sums, and what became of all other tensors. A source weight
in FP8 is worth its code times the scale of its row.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

LOOKUP_TABLES = ("embed_image_indicator",)
_CHUNK_NUMBERS = 1 << 24


@dataclass(frozen=True, slots=True)
class Convention:
    """Where a format keeps a linear's numbers: weight = (codes - zero) * scale, scales by row."""

    codes: str
    scale: str
    zero: str | None = None


CONVENTIONS = {
    "scaled": Convention("{module}.weight", "{module}.weight_scale"),
    "torchao": Convention(
        "{module}._weight_qdata", "{module}._weight_scale", "{module}._weight_zero_point"
    ),
    "quanto": Convention("{module}.weight._data", "{module}.weight._scale"),
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found.

    Attributes:
        modules: linears in the source.
        dtypes: how many of them the output stores in which dtype.
        missing: linears and other tensors of the source that the output does not have.
        changed: other tensors that have other values or another shape there.
        median: relative error of the linears.
        worst: the same, of the worst one; not finite where the output has a number that is not.
        worst_module: its name.
    """

    modules: int
    dtypes: dict[str, int]
    missing: list[str]
    changed: list[str]
    median: float
    worst: float
    worst_module: str


class Tensors:
    """The tensors of all safetensors files of a folder, read when asked for."""

    def __init__(self, paths: list[Path]) -> None:
        files: list[Any] = [safe_open(path, "pt") for path in paths]
        self._home = {name: file for file in files for name in file.keys()}  # noqa: SIM118

    def __contains__(self, name: str) -> bool:
        return name in self._home

    def __iter__(self) -> Iterator[str]:
        return iter(self._home)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._home[name].get_slice(name).get_shape())

    def whole(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._home[name].get_tensor(name)
        return tensor

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        tensor: torch.Tensor = self._home[name].get_slice(name)[start:stop]
        return tensor


def check(source: Tensors, output: Tensors, convention: Convention) -> Verdict:
    """Compare every linear and every other tensor of the source with the output."""
    linears = {name.removesuffix(".weight") for name in source if is_linear(source, name)}
    errors: dict[str, float] = {}
    dtypes: Counter[str] = Counter()
    missing = []
    for module in sorted(linears):
        name = f"{module}.weight"
        codes = convention.codes.format(module=module)
        codes = codes if codes in output else name  # left in a plain dtype
        if codes not in output or output.shape(codes) != source.shape(name):
            missing.append(name)
            continue
        dtypes[str(output.rows(codes, 0, 1).dtype).removeprefix("torch.")] += 1
        errors[module] = relative_error(source, output, module, codes, convention)
    of_linears = {f"{module}.{part}" for module in linears for part in ("weight", "weight_scale")}
    others = sorted(set(source) - of_linears)
    worst = max(errors, key=lambda module: _size(errors[module]), default="")
    return Verdict(
        modules=len(linears),
        dtypes=dict(dtypes),
        missing=missing + [name for name in others if name not in output],
        changed=[name for name in others if name in output and differs(source, output, name)],
        median=statistics.median(errors.values()) if errors else math.nan,
        worst=errors.get(worst, math.nan),
        worst_module=worst,
    )


def is_linear(source: Tensors, name: str) -> bool:
    """Whether a source tensor is the weight of a linear."""
    module = name.removesuffix(".weight")
    return module != name and len(source.shape(name)) == 2 and module not in LOOKUP_TABLES


def differs(source: Tensors, output: Tensors, name: str) -> bool:
    """Whether a tensor has other values, in whatever dtype."""
    return not torch.equal(source.whole(name).float(), output.whole(name).float())


def relative_error(
    source: Tensors, output: Tensors, module: str, codes: str, convention: Convention
) -> float:
    """The error of one linear, a few million numbers at a time."""
    name = f"{module}.weight"
    rows, columns = source.shape(name)
    source_scale = _by_row(source, f"{name}_scale", rows)
    scale = _by_row(output, convention.scale.format(module=module), rows)
    zero = None
    if convention.zero is not None:
        zero = _by_row(output, convention.zero.format(module=module), rows)
    error = norm = 0.0
    step = max(1, _CHUNK_NUMBERS // columns)
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        true = source.rows(name, start, stop).to(torch.float32)
        if source_scale is not None:
            true.mul_(source_scale[start:stop])
        back = output.rows(codes, start, stop).to(torch.float32)
        if zero is not None:
            back.sub_(zero[start:stop])
        if scale is not None:
            back.mul_(scale[start:stop])
        norm += float(torch.linalg.vector_norm(true, dtype=torch.float64)) ** 2
        error += float(torch.linalg.vector_norm(back.sub_(true), dtype=torch.float64)) ** 2
    return math.sqrt(error / norm)


def _by_row(tensors: Tensors, name: str, rows: int) -> torch.Tensor | None:
    """A scale or zero point as a column, one for each row or one for all."""
    if name not in tensors:
        return None
    values = tensors.whole(name).to(torch.float32).reshape(-1, 1)
    if len(values) not in (1, rows):
        raise ValueError(f"{name}: {len(values)} values for {rows} rows")
    return values.expand(rows, 1)


def _size(error: float) -> float:
    return error if math.isfinite(error) else math.inf


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path, help="the source's safetensors file")
    parser.add_argument("out", type=Path, help="the folder that the program wrote")
    parser.add_argument("--convention", choices=CONVENTIONS, required=True)
    options = parser.parse_args()

    output = Tensors(sorted(options.out.rglob("*.safetensors")))
    verdict = check(Tensors([options.source]), output, CONVENTIONS[options.convention])
    result: dict[str, Any] = asdict(verdict)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
