"""The plan, as a table that a person likes to read and as JSON."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from quantrecipe.cli.tables import human_bytes, table
from quantrecipe.schema.name_groups import collapse, skeleton
from quantrecipe.schema.plan import Plan, PlannedModule, PlannedTensor
from quantrecipe.schema.schemes import AnyWeight, PlainWeight, Scheme

_TITLES = {"quantized": "Quantized", "protected": "Protected", "passthrough": "Passed through"}


def describe_weight(weight: AnyWeight) -> str:
    """A weight format in a few words: ``int8 channel``, ``int8 group 64``, ``bfloat16``."""
    if isinstance(weight, PlainWeight):
        return weight.format
    extra = ""
    if weight.granularity == "group":
        extra = f" {weight.group_size}"
    if weight.granularity == "block":
        extra = f" {weight.block_size[0]}x{weight.block_size[1]}"
    return f"{weight.format} {weight.granularity}{extra}"


def describe_scheme(name: str, scheme: Scheme) -> str:
    """A scheme in one line."""
    pieces = [describe_weight(scheme.weight)]
    if scheme.activation is not None:
        pieces.append(
            f"activations {scheme.activation.format} per {scheme.activation.granularity}, dynamic"
        )
    if scheme.smoothing is not None:
        smoothing = scheme.smoothing
        pieces.append(f"{smoothing.kind} alpha {smoothing.alpha:g} applied {smoothing.apply}")
    return f"{name}: {'; '.join(pieces)}"


def plan_text(plan: Plan) -> str:
    """The plan for people."""
    lines = [
        f"{plan.recipe.name}: {plan.source_layout.name} -> {plan.target_layout.name}",
        *_schemes(plan),
        "",
    ]
    for disposition, title in _TITLES.items():
        modules = [module for module in plan.modules if module.disposition == disposition]
        if modules:
            lines += [f"{title}: {_count(len(modules), 'module')}", _modules_table(modules), ""]
    if plan.others:
        size = sum(other.output.nbytes for other in plan.others)
        lines += [
            f"Other tensors: {len(plan.others):,}, copied as they are, {human_bytes(size)}",
            "",
        ]
    lines += [_files_table(plan), "", _total(plan)]
    lines += [f"warning: {warning}" for warning in plan.warnings]
    return "\n".join(lines)


def _schemes(plan: Plan) -> list[str]:
    used = {module.scheme for module in plan.modules}
    return [
        f"  {describe_scheme(name, scheme)}"
        for name, scheme in plan.recipe.schemes.items()
        if name in used
    ]


def _modules_table(modules: Iterable[PlannedModule]) -> str:
    groups: dict[tuple[str, ...], list[PlannedModule]] = {}
    for module in modules:
        key = (
            module.part,
            skeleton(module.name),
            f"[{module.source.out_features}, {module.source.in_features}]",
            describe_weight(module.source.weight),
            describe_weight(module.weight),
            module.scheme or module.reason or "",
        )
        groups.setdefault(key, []).append(module)
    rows: list[tuple[str, ...]] = []
    shown_part = None
    for (part, _, shape, before, after, why), members in groups.items():
        for group in collapse(module.name for module in members):
            names = set(group.names)
            chosen = [module for module in members if module.name in names]
            rows.append(
                (
                    part if part != shown_part else "",
                    group.pattern,
                    f"{len(chosen)}",
                    shape,
                    f"{before} -> {after}" if before != after else before,
                    human_bytes(sum(module.source.nbytes for module in chosen)),
                    human_bytes(sum(module.nbytes for module in chosen)),
                    why,
                )
            )
            shown_part = part
    headers = ("part", "modules", "n", "shape", "weight", "in", "out", "scheme or reason")
    return table(rows, headers, "llrllrrl")


def _files_table(plan: Plan) -> str:
    rows = [(file.path, f"{len(file.tensors):,}", f"{file.size:,}") for file in plan.files]
    return table(rows, ("file", "tensors", "bytes"), "lrr")


def _total(plan: Plan) -> str:
    ratio = plan.output_bytes / plan.source_bytes if plan.source_bytes else 1.0
    return (
        f"{_count(len(plan.modules), 'module')}, {human_bytes(plan.source_bytes)} in, "
        f"{human_bytes(plan.output_bytes)} out ({ratio:.0%})"
    )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def plan_json(plan: Plan) -> dict[str, Any]:
    """The plan for machines: every module, every tensor, every offset."""
    return {
        "recipe": plan.recipe.name,
        "recipe_sha256": plan.recipe_sha256,
        "source_layout": plan.source_layout.name,
        "target_layout": plan.target_layout.name,
        "source_bytes": plan.source_bytes,
        "output_bytes": plan.output_bytes,
        "modules": [
            {
                "part": module.part,
                "name": module.name,
                "disposition": module.disposition,
                "scheme": module.scheme,
                "reason": module.reason,
                "taken_by": module.pointer,
                "pattern": module.pattern,
                "shape": [module.source.out_features, module.source.in_features],
                "source": module.source.weight.model_dump(mode="json"),
                "weight": module.weight.model_dump(mode="json"),
                "bytes_in": module.source.nbytes,
                "bytes_out": module.nbytes,
                "tensors": {role: _tensor(tensor) for role, tensor in module.outputs.items()},
            }
            for module in plan.modules
        ],
        "others": [
            {"part": other.part, "name": other.name, "tensor": _tensor(other.output)}
            for other in plan.others
        ],
        "files": [
            {"path": file.path, "bytes": file.size, "tensors": len(file.tensors)}
            for file in plan.files
        ],
        "warnings": [warning.as_dict() for warning in plan.warnings],
    }


def _tensor(tensor: PlannedTensor) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "file": tensor.file,
        "offset": tensor.offset,
        "bytes": tensor.nbytes,
    }
