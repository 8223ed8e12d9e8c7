"""What a ``config.json`` says of how weights are stored, held against the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Final

from quantrecipe.schema.dtypes import BLOCK_DTYPES
from quantrecipe.schema.layout_reading import StoredModule
from quantrecipe.schema.problems import InvalidInput, Problem
from quantrecipe.schema.quantization_config import configured_modules, parse_quantization_config
from quantrecipe.schema.schemes import ScaledWeight
from quantrecipe.schema.tensors import TensorInfo

_IGNORED_KEYS: Final = (
    "ignore",
    "ignored_layers",
    "modules_to_not_convert",
    "llm_int8_skip_modules",
)
_PACKED: Final = frozenset({"uint8", "int32", "uint32"})
_CODED: Final = _PACKED | BLOCK_DTYPES.keys() | {"int8"}
_MOST_NAMED: Final = 3


def model_type(config: Mapping[str, Any]) -> str | None:
    """What class or architecture a ``config.json`` is of, where it says so."""
    architectures = config.get("architectures")
    if isinstance(architectures, list) and architectures and isinstance(architectures[0], str):
        return architectures[0]
    for key in ("_class_name", "model_type"):
        if isinstance(config.get(key), str):
            return str(config[key])
    return None


def quantization_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The ``quantization_config`` of a ``config.json``, or ``None``."""
    found = config.get("quantization_config", config.get("compression_config"))
    return found if isinstance(found, dict) else None


def claimed_formats(quantization: Mapping[str, Any]) -> frozenset[str] | None:
    """The formats that the settings speak of; ``None`` if they do not say, or speak of others."""
    method = str(quantization.get("quant_method", ""))
    found: frozenset[str] | None = None
    if method == "compressed-tensors":
        found = _of_groups(quantization)
    elif method in ("fp8", "fbgemm_fp8"):
        found = _FLOAT8
    elif method == "int8":
        found = frozenset({"int8"})
    elif method.startswith("bitsandbytes"):
        four = quantization.get("load_in_4bit") or method.endswith("4bit")
        found = frozenset({str(quantization.get("bnb_4bit_quant_type", "nf4"))})
        found = found if four else frozenset({"llm_int8"})
    elif method == "torchao":
        found = _of_torchao(quantization)
    elif method == "sdnq":
        said = quantization.get("weights_dtype")
        found = frozenset({"int8"}) if said == "int8" else None
    elif quantization.get("bits") == 4:
        found = _FOUR_BITS
    return found


_FLOAT8: Final = frozenset({"float8_e4m3fn", "float8_e5m2"})
_FOUR_BITS: Final = frozenset({"int4", "nf4", "mxfp4", "nvfp4"})
_BY_BITS: Final[Mapping[tuple[object, object], frozenset[str]]] = {
    ("int", 8): frozenset({"int8"}),
    ("int", 4): frozenset({"int4"}),
    ("float", 8): frozenset({*_FLOAT8, "mxfp8"}),
    ("float", 4): frozenset({"nvfp4", "mxfp4"}),
}


def _of_groups(quantization: Mapping[str, Any]) -> frozenset[str] | None:
    found: set[str] = set()
    for weights in _group_weights(quantization):
        said = _BY_BITS.get((weights.get("type"), weights.get("num_bits")))
        if said is None:
            return None
        found |= said
    return frozenset(found) or None


def _group_weights(quantization: Mapping[str, Any]) -> Iterator[Mapping[Any, Any]]:
    groups = quantization.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict):
            yield weights


def _of_torchao(quantization: Mapping[str, Any]) -> frozenset[str] | None:
    said = quantization.get("quant_type")
    default = said.get("default") if isinstance(said, dict) else None
    kind = str(default.get("_type", "")) if isinstance(default, dict) else ""
    if kind.startswith("Int8"):
        return frozenset({"int8"})
    return _FLOAT8 if kind.startswith("Float8") else None


_ONE_WORD: Final = ("bitsandbytes", "torchao")


def config_problems(
    quantization: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    modules: Mapping[str, StoredModule],
    file: str,
) -> Iterator[Problem]:
    """Where a ``quantization_config`` and the tensors beside it contradict each other.

    Args:
        quantization: the settings.
        tensors: of the part, by name.
        modules: of the part as they were read, by name; empty if they were not.
        file: the ``config.json``, for the problems.
    """
    quantized = {
        name: module.weight
        for name, module in modules.items()
        if isinstance(module.weight, ScaledWeight)
    }
    said = _what_is_wrong(quantization, tensors, quantized)
    if said is not None:
        yield Problem(
            "config-contradicts",
            said,
            hint="Loaders believe the config: take the one that belongs to these weights.",
            file=file,
            pointer="/quantization_config",
        )
    yield from _named(quantization, modules, quantized, file)
    if quantization.get("quant_method") == "quantrecipe" and modules:
        yield from _own(quantization, modules, file)


def _what_is_wrong(
    quantization: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    quantized: Mapping[str, ScaledWeight],
) -> str | None:
    method = quantization.get("quant_method", "something unnamed")
    # A file of a scale each and nothing else would be as wrong; numbers of one dimension are never
    # weights.
    stored = {info.dtype for info in tensors.values() if len(info.shape) >= 2}
    low = {dtype for dtype in stored if dtype.startswith("float8") or dtype in _CODED}
    if not low:
        return (
            f"quantization_config says that the weights are quantized ({method}), and every weight "
            "is in a plain dtype"
        )
    claimed = claimed_formats(quantization)
    if claimed is None:
        return None
    found = {weight.format for weight in quantized.values()}
    if quantized:
        other = sorted(found - claimed)
        # Some configs have one word for all modules; then each says itself what it is.
        mixed = method in _ONE_WORD and bool(found & claimed)
        if other and not mixed:
            return (
                f"quantization_config says {' or '.join(sorted(claimed))} ({method}), and the "
                f"weights are {' and '.join(other)}"
            )
        return _finer(quantization, quantized, method)
    if not low & _PACKED and not any(_explains(dtype, claimed) for dtype in low):
        return (
            f"quantization_config says {' or '.join(sorted(claimed))} ({method}), and the weights "
            f"are {' and '.join(sorted(low))}"
        )
    return None


def _explains(dtype: str, claimed: frozenset[str]) -> bool:
    eight_bits = {"int8": {"int8", "llm_int8"}}.get(dtype, {dtype, "mxfp8"})
    return bool(claimed & eight_bits)


def _finer(
    quantization: Mapping[str, Any], quantized: Mapping[str, ScaledWeight], method: object
) -> str | None:
    """Whether groups and levels of scales are as they are said to be."""
    nested = quantization.get("bnb_4bit_use_double_quant")
    nf4 = {name: each.has_two_levels for name, each in quantized.items() if each.format == "nf4"}
    if isinstance(nested, bool) and nf4 and any(nf4.values()) != nested:
        name = min(nf4, key=lambda each: (nf4[each] == nested, each))
        return (
            f"quantization_config says bnb_4bit_use_double_quant: {str(nested).lower()}, "
            f"and the scales of {name!r} have {'one level' if nested else 'two levels'}"
        )
    sizes = {weights.get("group_size") for weights in _group_weights(quantization)}
    for name, weight in quantized.items():
        size = getattr(weight, "group_size", None)
        if size is not None and sizes and None not in sizes and size not in sizes:
            return (
                f"quantization_config says groups of {' or '.join(map(str, sizes))} "
                f"({method}), and {name!r} has a scale for each {size} columns"
            )
    return None


def _named(
    quantization: Mapping[str, Any],
    modules: Mapping[str, StoredModule],
    quantized: Mapping[str, ScaledWeight],
    file: str,
) -> Iterator[Problem]:
    """Modules that are said to be plain or quantized by their names, and are not."""
    for key in _IGNORED_KEYS:
        ignored = quantization.get(key)
        if not isinstance(ignored, list):
            continue
        names = {name.removesuffix(".weight") for name in ignored if isinstance(name, str)}
        wrong = sorted(name for name in quantized if any(each in names for each in _within(name)))
        if wrong:
            yield Problem(
                "config-contradicts",
                f"quantization_config says that {_some(wrong)} "
                "stayed unquantized, and the tensors are quantized",
                hint="A loader that believes it takes codes for plain numbers, or refuses.",
                file=file,
                pointer=f"/quantization_config/{key}",
            )
    groups = quantization.get("config_groups")
    for key, group in groups.items() if isinstance(groups, dict) and modules else ():
        targets = group.get("targets") if isinstance(group, dict) else None
        exact = {
            name
            for name in (targets if isinstance(targets, list) else ())
            if isinstance(name, str) and "." in name and not name.startswith("re:")
        }
        wrong = sorted(exact - quantized.keys())
        if wrong:
            yield Problem(
                "config-contradicts",
                f"quantization_config says that {_some(wrong)} "
                "is quantized, and there are no codes of it",
                hint="A loader that believes it asks for tensors that are not there.",
                file=file,
                pointer=f"/quantization_config/config_groups/{key}/targets",
            )


def _own(
    quantization: Mapping[str, Any], modules: Mapping[str, StoredModule], file: str
) -> Iterator[Problem]:
    """What this project's own settings say of each module."""
    try:
        said = configured_modules(parse_quantization_config(dict(quantization)))
    except InvalidInput as error:
        yield from (replace(problem, file=file) for problem in error.problems)
        return
    stored = {name for name, module in modules.items() if isinstance(module.weight, ScaledWeight)}
    for names, what in (
        (said.keys() - stored, "is quantized, and there are no codes of it"),
        (stored - said.keys(), "stayed unquantized, and the tensors are quantized"),
        (
            {
                name
                for name in said.keys() & stored
                if said[name].weight.format != modules[name].weight.format
            },
            "is in another format than its tensors are",
        ),
    ):
        if names:
            yield Problem(
                "config-contradicts",
                f"quantization_config says that {_some(sorted(names))} {what}",
                hint="Loaders believe the config: take the one that belongs to these weights.",
                file=file,
                pointer="/quantization_config/modules",
            )


def _within(name: str) -> Iterator[str]:
    """A module, and what it is part of: a list may name a whole block."""
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        yield ".".join(parts[:count])


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return f"{', '.join(names[:_MOST_NAMED])}{more}"
