"""The front matter of a model card: what the Hub sorts and finds models by."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Final

import yaml

from quantrecipe.publishing.facts import Base, Facts
from quantrecipe.schema.lock import Lock, LockedModule
from quantrecipe.schema.quantization_config import CONFIG_NAME
from quantrecipe.schema.registry import resolve_layout
from quantrecipe.schema.schemes import PlainWeight

RELATION: Final = "quantized"
GATE_PREFIX: Final = "extra_gated_"
_PLAIN: Final = re.compile(r"[A-Za-z][A-Za-z_/-]*( [A-Za-z_/-]+)*")
"""Strings of words, which readers of YAML 1.1 and 1.2 take for strings unless they are reserved."""

_GIVEN_BY_THE_HUB: Final = ("base_model:", "license:", "region:", "endpoints_", "autotrain_")
_OF_FORMATS: Final = re.compile(
    r"(fp|bf|int|nf|mxfp|nvfp|float|uint|e[0-9]m)_?[0-9]+\S*|[0-9]+-?bits?|w[0-9]+a[0-9]+\S*|"
    r"(ggml|gguf|awq|gptq|hqq|exl[0-9]|bitsandbytes|compressed-tensors|torchao|quanto|sdnq|"
    r"modelopt|quantized|smoothquant|original|full-precision)",
    re.IGNORECASE,
)
"""Tags that say how numbers are stored: of the base, and no longer."""

_BITS: Final[Mapping[str, int]] = MappingProxyType(
    {
        **dict.fromkeys(("int8", "llm_int8", "float8_e4m3fn", "float8_e5m2", "mxfp8", "q8_0"), 8),
        "q6_k": 6,
        **dict.fromkeys(("int4", "nf4", "mxfp4", "nvfp4", "q4_0", "q4_k"), 4),
    }
)


class _Dumper(yaml.SafeDumper):
    """Quotes every string that could be anything else to any reader."""


def _string(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = None if _PLAIN.fullmatch(value) else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _string)


def front_matter(facts: Facts) -> str:
    """The YAML block, with its lines of dashes."""
    values = metadata(facts)
    written = _dumped(values, ascii_only=False)
    if not written.replace("\n", "").isprintable():
        # What turns the direction of a line around, say, is for YAML as good as a letter.
        written = _dumped(values, ascii_only=True)
    return f"---\n{written}---\n"


def _dumped(value: Mapping[str, Any], *, ascii_only: bool) -> str:
    options: dict[str, Any] = {"sort_keys": False, "width": math.inf}
    written: str = yaml.dump(value, Dumper=_Dumper, allow_unicode=not ascii_only, **options)
    return written


def metadata(facts: Facts) -> dict[str, Any]:
    """What the front matter says, in the Hub's own terms."""
    base, license = facts.base, facts.license
    found: dict[str, Any] = {
        "license": license.identifier,
        "license_name": license.name,
        "license_link": license.link,
    }
    if base is not None:
        found |= {
            "base_model": [base.repo],
            "base_model_relation": RELATION,
            "pipeline_tag": base.pipeline_tag,
            "library_name": base.library_name if _opens(facts.lock) else None,
            "language": list(base.languages) or None,
        }
    found["tags"] = list(dict.fromkeys([*_kept(base), *_words(facts.lock.modules)]))
    if base is not None and base.gated is not None:
        found |= {key: value for key, value in base.gate.items() if key.startswith(GATE_PREFIX)}
    return {key: value for key, value in found.items() if value is not None}


def _opens(lock: Lock) -> bool:
    """Whether ``config.json`` says how it is stored; otherwise libraries misread the codes."""
    configured = any(file.path.rpartition("/")[2] == CONFIG_NAME for file in lock.sidecars)
    plain = all(isinstance(module.weight, PlainWeight) for module in lock.modules)
    return configured and (plain or resolve_layout(lock.recipe.target.layout).config is not None)


def _kept(base: Base | None) -> Iterator[str]:
    """The base's tags that are as true of what was made from it."""
    for tag in () if base is None else base.tags:
        if not tag.startswith(_GIVEN_BY_THE_HUB) and not _OF_FORMATS.fullmatch(tag):
            yield tag


def _words(modules: Iterable[LockedModule]) -> Iterator[str]:
    """How it is stored, in the words that people look for."""
    yield RELATION
    quantized = [module for module in modules if module.disposition == "quantized"]
    for module in quantized:
        if not isinstance(module.weight, PlainWeight):
            yield module.weight.format
            if module.activation is not None:
                activation = _BITS[module.activation.format]
                yield f"w{_BITS[module.weight.format]}a{activation}"
    for word, there in (
        ("smoothquant", any(module.smoothing for module in quantized)),
        ("hadamard", any(module.rotation for module in quantized)),
    ):
        if there:
            yield word
    yield "quantrecipe"
