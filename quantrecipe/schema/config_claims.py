"""What a ``config.json`` says of how weights are stored, held against the weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from quantrecipe.schema.problems import Problem
from quantrecipe.schema.tensors import TensorInfo

_IGNORED_KEYS: Final = ("ignore", "ignored_layers", "modules_to_not_convert")
_PACKED: Final = frozenset({"uint8", "int32", "uint32"})
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


def claimed_kind(quantization: Mapping[str, Any]) -> str | None:
    """``int8``, ``float8`` or ``4 bits``, as far as the settings say; ``None`` if they do not."""
    method = str(quantization.get("quant_method", ""))
    if method == "compressed-tensors":
        return _group_kind(quantization)
    if method in ("fp8", "fbgemm_fp8"):
        return "float8"
    if method == "int8":
        return "int8"
    if method.startswith("bitsandbytes"):
        if quantization.get("load_in_4bit") or method.endswith("4bit"):
            return "4 bits"
        return "int8"
    return "4 bits" if quantization.get("bits") == 4 else None


def _group_kind(quantization: Mapping[str, Any]) -> str | None:
    groups = quantization.get("config_groups")
    kinds = set()
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict):
            bits, kind = weights.get("num_bits"), weights.get("type")
            kinds.add("4 bits" if bits == 4 else f"{kind}{bits}")
    return kinds.pop() if len(kinds) == 1 else None


def config_problems(
    quantization: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    quantized: Iterable[str],
    file: str,
) -> Iterator[Problem]:
    """Where a ``quantization_config`` and the tensors beside it contradict each other.

    Args:
        quantization: the settings.
        tensors: of the part, by name.
        quantized: names of the modules that are stored quantized.
        file: the ``config.json``, for the problems.
    """
    method = quantization.get("quant_method", "something unnamed")
    # A file of a scale each and nothing else would be as wrong; numbers of one dimension are never
    # weights.
    stored = {info.dtype for info in tensors.values() if len(info.shape) >= 2}
    kinds = {"float8" if dtype.startswith("float8") else dtype for dtype in stored}
    low = {kind for kind in kinds if kind in ("int8", "float8") or kind in _PACKED}
    claimed = claimed_kind(quantization)
    hint = "Loaders believe the config: take the one that belongs to these weights."
    if not low:
        yield Problem(
            "config-contradicts",
            f"quantization_config says that the weights are quantized ({method}), and every weight "
            "is in a plain dtype",
            hint=hint,
            file=file,
            pointer="/quantization_config",
        )
    elif claimed in ("int8", "float8") and claimed not in low and not low & _PACKED:
        yield Problem(
            "config-contradicts",
            f"quantization_config says {claimed} ({method}), and the weights are "
            f"{' and '.join(sorted(low))}",
            hint=hint,
            file=file,
            pointer="/quantization_config",
        )
    elif claimed == "4 bits" and not low & _PACKED:
        yield Problem(
            "config-contradicts",
            f"quantization_config says 4 bits ({method}), and the weights are "
            f"{' and '.join(sorted(low))}",
            hint=hint,
            file=file,
            pointer="/quantization_config",
        )
    yield from _ignored(quantization, quantized, file)


def _ignored(
    quantization: Mapping[str, Any], quantized: Iterable[str], file: str
) -> Iterator[Problem]:
    names = set(quantized)
    for key in _IGNORED_KEYS:
        ignored = quantization.get(key)
        if not isinstance(ignored, list):
            continue
        wrong = sorted(names & {name for name in ignored if isinstance(name, str)})
        if wrong:
            more = f" and {len(wrong) - _MOST_NAMED} more" if len(wrong) > _MOST_NAMED else ""
            yield Problem(
                "config-contradicts",
                f"quantization_config says that {', '.join(wrong[:_MOST_NAMED])}{more} "
                "stayed unquantized, and the tensors are quantized",
                file=file,
                pointer=f"/quantization_config/{key}",
            )
