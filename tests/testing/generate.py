"""The cases of the conformance suite, with expected numbers from exact arithmetic alone.

``python -m tests.testing.generate`` writes ``quantrecipe/testing/cases/`` anew. Nothing of the
package is imported.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from tests.testing.exact import (
    FLOAT32,
    Json,
    Spec,
    Tensor,
    cast,
    dequantize,
    divide,
    quantize,
    rotate,
    scale_columns,
    smoothing_factors,
    tensor,
)

CASES = Path(__file__).parents[2] / "quantrecipe" / "testing" / "cases"
FILE = "model.safetensors"
INT8 = Spec("int8")
W8A8 = {"activation": {"format": "int8", "granularity": "token", "dynamic": True}}


@dataclass(frozen=True)
class Linear:
    """A module of the source, and how it shall be stored.

    Attributes:
        name: dotted.
        weight: as the source holds it.
        bias: kept as it is.
        scale: of a source that holds codes, as it is stored there.
        held: how those are to be read.
        scale_name: what the source calls it.
        spec: how it is to be stored; ``None``: in ``dtype``.
        dtype: of a module that no scheme takes; ``None``: its own, or that of its scale is kept.
        measured: input maxima by bin and channel, where it is smoothed.
        alpha: of its smoothing.
        beside: weights of the siblings that it shares its factors with.
        power_of_two: whether factors are rounded to one.
        rotation: input features in a block, where it is rotated.
        activation: whether inputs are quantized at run time.
        inputs: what the loaded module is called with.
    """

    name: str
    weight: Tensor
    bias: Tensor | None = None
    scale: Tensor | None = None
    held: Spec | None = None
    scale_name: str = "weight_scale"
    spec: Spec | None = INT8
    dtype: str | None = None
    measured: tuple[tuple[float, ...], ...] = ()
    alpha: float = 0.5
    beside: tuple[Tensor, ...] = ()
    power_of_two: bool = False
    rotation: int | None = None
    activation: bool = False
    inputs: tuple[Tensor, ...] = ()

    @property
    def meaning(self) -> Tensor:
        """The numbers that the source stands for."""
        if self.scale is None or self.held is None:
            return self.weight
        return dequantize(self.weight, self.scale, self.held)

    @property
    def factors(self) -> Tensor | None:
        """What activations are divided by."""
        if not self.measured:
            return None
        largest = [max(column) for column in zip(*self.measured, strict=True)]
        together = [cast(weight, "float32") for weight in (self.meaning, *self.beside)]
        rows = [row for weight in together for row in weight.rows]
        return smoothing_factors(
            largest, tensor("float32", rows), self.alpha, power_of_two=self.power_of_two
        )

    @property
    def prepared(self) -> Tensor:
        """Smoothed, then rotated: what is quantized."""
        weight, factors = cast(self.meaning, "float32"), self.factors
        weight = weight if factors is None else scale_columns(weight, factors, up=True)
        return weight if self.rotation is None else rotate(weight, self.rotation)

    def source(self) -> dict[str, Tensor]:
        found = {f"{self.name}.weight": self.weight}
        if self.scale is not None:
            found[f"{self.name}.{self.scale_name}"] = self.scale
        return found | self._bias(self.name)

    def _bias(self, name: str) -> dict[str, Tensor]:
        return {} if self.bias is None else {f"{name}.bias": self.bias}

    def stored(self, layout: str, part: str) -> dict[str, Tensor]:
        """What the target holds."""
        one_file = layout == "transformerlab"
        name = f"{part}.{self.name}" if one_file else self.name
        if self.spec is None:
            if self.dtype is not None:
                return {f"{name}.weight": cast(self.meaning, self.dtype), **self._bias(name)}
            kept = {f"{name}.weight": self.weight}
            if self.scale is not None:
                kept[f"{name}.weight_scale"] = self.scale
            return kept | self._bias(name)
        codes, grid = quantize(self.prepared, self.spec)
        shape: tuple[int, ...] = grid.shape
        if self.spec.granularity == "tensor":
            shape = ()
        elif self.spec.granularity == "channel" and layout not in ("int8-scaled", "quantrecipe"):
            shape = shape[:1]
        weight, scale = ("wq", "ws") if one_file else ("weight", "weight_scale")
        found = {
            f"{name}.{weight}": codes,
            f"{name}.{scale}": Tensor(grid.dtype, shape, grid.flat),
        }
        if self.factors is not None:
            found[f"{name}.{'smooth' if one_file else 'smoothing'}"] = self.factors
        return found | self._bias(name)

    def loaded(self, dtype: str = "float32") -> dict[str, Tensor]:
        """What a loader makes of it, under the names of the source."""
        weight = self.plain_weight()
        if self.spec is not None:
            weight = cast(weight, dtype)
        return {f"{self.name}.weight": weight, **self._bias(self.name)}

    def plain_weight(self) -> Tensor:
        """The weight as it stands in the target, as numbers."""
        if self.spec is None:
            if self.dtype is not None:
                return cast(self.meaning, self.dtype)
            return self.meaning
        codes, grid = quantize(self.prepared, self.spec)
        weight = dequantize(codes, grid, self.spec)
        if self.rotation is not None:
            weight = rotate(weight, self.rotation)
        factors = self.factors
        return weight if factors is None else scale_columns(weight, factors, up=False)

    def outputs(self, part: str) -> list[Json]:
        """Inputs, and what the module makes of them."""
        compute = self._quantized_output if self.activation else self._plain_output
        return [{"part": part, "module": self.name, **compute(x)} for x in self.inputs]

    def _bias_of(self, row: int) -> Fraction:
        return Fraction(0) if self.bias is None else Fraction(self.bias.flat[row])

    def _plain_output(self, x: Tensor) -> Json:
        products = [
            [[Fraction(a) * Fraction(b) for a, b in zip(w, row, strict=True)] for w in weight]
            for weight in [self.plain_weight().rows]
            for row in x.rows
        ]
        exact = [[sum(p) + self._bias_of(o) for o, p in enumerate(row)] for row in products]
        size = [
            [sum(map(abs, p)) + abs(self._bias_of(o)) for o, p in enumerate(row)]
            for row in products
        ]
        return {
            "rule": "weight-only",
            "input": x.as_json(),
            "output": _floats(exact),
            "magnitude": _floats(size),
        }

    def _quantized_output(self, x: Tensor) -> Json:
        assert self.spec is not None
        codes, scales = quantize(self.prepared, self.spec)
        factors = self.factors
        rows = cast(x, "float32") if factors is None else scale_columns(x, factors, up=False)
        if self.rotation is not None:
            rows = _rotated_exactly(rows, self.rotation)
        exact: list[list[Fraction]] = []
        size: list[list[Fraction]] = []
        plain: list[list[Fraction]] = []
        bound: list[list[Fraction]] = []
        for given, row in zip(x.rows, rows.rows, strict=True):
            largest = max(map(abs, row))
            s_x = divide(largest, 127.0) if largest else 1.0
            acts = [_activation_code(v, s_x) for v in row]
            line: tuple[list[Fraction], ...] = ([], [], [], [])
            for o, (q, w, v) in enumerate(
                zip(codes.rows, self.meaning.rows, self.prepared.rows, strict=True)
            ):
                s_w = Fraction(scales.flat[o if self.spec.granularity == "channel" else 0])
                total = sum(a * int(b) for a, b in zip(acts, q, strict=True))
                product, bias = total * Fraction(s_x) * s_w, self._bias_of(o)
                line[0].append(product + bias)
                line[1].append(abs(product) + abs(bias))
                line[2].append(_dot(given, w) + bias)
                line[3].append(
                    (s_w * _sum(row) + Fraction(s_x) * _sum(v)) / 2
                    + len(row) * Fraction(s_x) * s_w / 4
                )
            for kept, values in zip((exact, size, plain, bound), line, strict=True):
                kept.append(values)
        return {
            "rule": "w8a8",
            "input": x.as_json(),
            "output": _floats(exact),
            "magnitude": _floats(size),
            "unquantized": _floats(plain),
            "bound": _floats(bound),
        }


def _rotated_exactly(rows: Tensor, size: int) -> Tensor:
    """Rotated, if no sum is rounded: a loader may add in any order, and has the same numbers."""
    found = rotate(rows, size)
    back = rotate(found, size)
    digits = [Fraction(value) * 2**12 for value in (*rows.flat, *found.flat)]
    assert back.flat == rows.flat
    assert all(each.denominator == 1 and abs(each) < 2**20 for each in digits)
    return found


def _activation_code(value: float, scale: float) -> int:
    exact = Fraction(value) / Fraction(scale)
    code = round(FLOAT32.round(exact))
    # An exact tie is decided by the definition; near one, float32 arithmetic would decide.
    near = abs(abs(exact - int(exact)) - Fraction(1, 2))
    assert near == 0 or near > Fraction(1, 2000), f"{value} / {scale} is too near a tie"
    return max(-127, min(127, code))


def _dot(a: Sequence[float], b: Sequence[float]) -> Fraction:
    return sum((Fraction(x) * Fraction(y) for x, y in zip(a, b, strict=True)), Fraction(0))


def _sum(values: Sequence[float]) -> Fraction:
    return sum((abs(Fraction(value)) for value in values), Fraction(0))


def _floats(rows: Sequence[Sequence[Fraction]]) -> Json:
    return tensor("float64", [[float(v) for v in row] for row in rows]).as_json()


def file_json(tensors: Mapping[str, Tensor], *, with_bytes: bool = False) -> Json:
    return {name: kept.as_json(with_bytes=with_bytes) for name, kept in tensors.items()}


def recipe(linears: Iterable[Linear], source: Any, target: Any, **fields: Any) -> Json:
    """One scheme for each way of storing; modules that no scheme takes pass through."""
    schemes: Json = {}
    rules: list[Json] = []
    for linear in linears:
        if linear.spec is None:
            continue
        scheme = {"weight": linear.spec.as_json()}
        if linear.activation:
            scheme |= W8A8
        if linear.measured:
            smoothing = {"kind": "smoothquant", "alpha": linear.alpha, "apply": "online"}
            scheme["smoothing"] = {**smoothing, "statistics": "statistics.safetensors"}
            if linear.power_of_two:
                scheme["smoothing"]["power_of_two"] = True
        if linear.rotation is not None:
            scheme["rotation"] = {"kind": "hadamard", "size": linear.rotation}
        name = next((n for n, known in schemes.items() if known == scheme), None)
        if name is None:
            name = f"s{len(schemes) + 1}"
            schemes[name] = scheme
            rules.append({"modules": [], "scheme": name})
        (rule,) = (rule for rule in rules if rule["scheme"] == name)
        if linear.name not in rule["modules"]:
            rule["modules"].append(linear.name)
    target = target if isinstance(target, dict) and "layout" in target else {"layout": target}
    return {
        "kind": "recipe",
        "version": 1,
        "name": "case",
        "source": {"layout": source, **fields.pop("source_fields", {})},
        "schemes": schemes,
        "rules": rules,
        **fields,
        "target": target,
    }


@dataclass(frozen=True)
class Case:
    """A conversion of one part into one file, and what becomes of it.

    Attributes:
        linears: the modules of the target, and of the source unless it is ``apart``.
        apart: the source's tensors, where it has the rows of modules under other names.
    """

    id: str
    title: str
    shows: str
    linears: tuple[Linear, ...]
    source: Any = "plain"
    target: Any = "int8-scaled"
    others: Mapping[str, Tensor] = field(default_factory=dict)
    markers: Mapping[str, Tensor] = field(default_factory=dict)
    apart: Mapping[str, Tensor] = field(default_factory=dict)
    fields: Json = field(default_factory=dict)
    dtypes: tuple[str, ...] = ("float32",)

    def as_json(self) -> Json:
        source = self.apart or merged(linear.source() for linear in self.linears)
        stored = merged(linear.stored(layout_name(self.target), "model") for linear in self.linears)
        found = heading(self) | {
            "recipe": recipe(self.linears, self.source, self.target, **self.fields),
            "source": {FILE: file_json({**source, **self.others, **self.markers})},
            **statistics({"model": self.linears}),
            "target": {FILE: file_json({**stored, **self.others}, with_bytes=True)},
            "loads": [
                {
                    "part": "model",
                    "names": "source",
                    "dtype": dtype,
                    "tensors": file_json(
                        {**merged(one.loaded(dtype) for one in self.linears), **self.others}
                    ),
                }
                for dtype in self.dtypes
            ],
        }
        outputs = [entry for linear in self.linears for entry in linear.outputs("model")]
        return found | ({"outputs": outputs} if outputs else {})


def heading(case: Any) -> Json:
    return {"id": case.id, "title": case.title, "shows": case.shows}


def layout_name(target: Any) -> str:
    layout = target.get("layout", target) if isinstance(target, dict) else target
    return layout["name"] if isinstance(layout, dict) else str(layout)


def merged(found: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: kept for each in found for name, kept in each.items()}


def statistics(parts: Mapping[str, Sequence[Linear]]) -> Json:
    """The file of measured input maxima, if anything was measured."""
    measured = {
        f"{part}/{linear.name}/input_absmax": tensor("float32", linear.measured)
        for part, linears in parts.items()
        for linear in linears
        if linear.measured
    }
    if not measured:
        return {}
    bins = {kept.shape[0] for kept in measured.values()}
    header = {
        "kind": "statistics",
        "version": 1,
        "model": "case",
        "samples": 1,
        "timesteps": [
            {"start": float(i), "stop": float(i + 1), "samples": 1} for i in range(max(bins))
        ],
        "modules": {
            part: sorted(linear.name for linear in linears if linear.measured)
            for part, linears in parts.items()
        },
    }
    return {"statistics": {"header": header, "tensors": file_json(measured)}}


def noise(seed: int, *shape: int, size: float = 1.0, dtype: str = "float32") -> Tensor:
    """Sixteenths between -8 and 8 times ``size``, some of them larger; exact in every dtype."""
    draw = random.Random(seed)
    values: list[Any] = [
        [draw.randint(-127, 127) / 16 * size for _ in range(shape[-1])]
        for _ in range(shape[0] if len(shape) > 1 else 1)
    ]
    return tensor(dtype, values if len(shape) > 1 else values[0])


def rough(seed: int, *shape: int, dtype: str = "bfloat16", size: float = 0.05) -> Tensor:
    """Normal numbers, as weights are."""
    draw = random.Random(seed)
    values = [[draw.gauss(0, size) for _ in range(shape[1])] for _ in range(shape[0])]
    return tensor(dtype, values)


def dump(cases: Sequence[Json]) -> str:
    """JSON with rows of numbers, and small objects, on a line each."""
    return _dump(list(cases), "") + "\n"


def _dump(value: Any, indent: str) -> str:
    flat = json.dumps(value, ensure_ascii=False)
    nested = isinstance(value, dict) and any(isinstance(v, dict) for v in value.values())
    if not isinstance(value, dict | list) or (len(flat) + len(indent) <= 98 and not nested):
        return flat
    inner = indent + " "
    if isinstance(value, dict):
        lines = [f"{inner}{json.dumps(k)}: {_dump(v, inner)}" for k, v in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    if all(isinstance(v, int | float) for v in value):
        return flat
    return "[\n" + ",\n".join(inner + _dump(v, inner) for v in value) + f"\n{indent}]"


def documents() -> dict[str, str]:
    """Every file of cases, by its name."""
    # Here, since they are made of what stands above.
    from tests.testing.families import FAMILIES

    return {f"{family}.json": dump(cases) for family, cases in FAMILIES.items()}


def main() -> None:
    CASES.mkdir(exist_ok=True)
    for name, text in documents().items():
        (CASES / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
