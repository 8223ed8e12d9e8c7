"""A first recipe for a checkpoint: int8 W8A8 for its linears, everything doubtful protected.

What is stored in 4 bits, or rotated, is carried over code by code: quantized once more, it would be
larger or lose again. Everything else that is quantized already is read and quantized to int8.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from quantrecipe.schema.base import TARGET_FILE
from quantrecipe.schema.layout_reading import StoredModule
from quantrecipe.schema.name_groups import collapse
from quantrecipe.schema.patterns import Patterns
from quantrecipe.schema.placement import shard_of
from quantrecipe.schema.planning import make_plan
from quantrecipe.schema.problems import InvalidInput, Problem
from quantrecipe.schema.recipe import Recipe
from quantrecipe.schema.recognition import Reading
from quantrecipe.schema.schemes import PlainWeight, ScaledWeight

# The planner refuses wildcards that take these, so a draft has to know them as the planner does.
from quantrecipe.schema.selection import EMBEDDING_NAMES
from quantrecipe.schema.validation import parse_recipe

SCHEME: Final = "w8a8"
SMALLEST_SIDE: Final = 16
SMALLEST_WEIGHT: Final = 4096
SHARD_SIZE: Final = "5GB"
_USUAL_STEMS: Final = ("model", "diffusion_pytorch_model", "pytorch_model")
_BLANK: Final = re.compile(r"[^a-z0-9._-]+|(?<=[._-])[._-]+")

_CONDITIONING = Patterns.compile(
    [
        "**.{*adaln*,*ada_ln*,*modulation*,*time_embed*,*timestep*,t_embed*,temb*,*_mod}.**",
        "**.{*time_text_embed*,guidance_embed*,time_emb*}.**",
        "**.norm*.linear",
    ]
)
_LAST = Patterns.compile(
    ["**.{lm_head,proj_out,final_layer,classifier,score,output_projection}.**"]
)
_ROUTER = Patterns.compile(["**.{router,gate}"])


@dataclass(frozen=True, slots=True)
class DraftSource:
    """Where the files of a reading lie, and how they are called.

    Attributes:
        location: below the source's root, as ``source.parts`` says it.
        reading: the files, read.
    """

    location: str
    reading: Reading

    @property
    def stem(self) -> str:
        """The file's name without shard number and suffix."""
        name = self.reading.parts[0].files[0].path.name
        return (shard_of(name) or name).removesuffix(".safetensors")


def draft_recipe(
    sources: Sequence[DraftSource], name: str, where: Mapping[str, str] = MappingProxyType({})
) -> tuple[Recipe, str]:
    """Write a recipe whose source these files are, and make sure that it plans.

    Args:
        sources: read through one layout.
        name: what to call it, in any characters.
        where: fields of ``source`` that say where it is: ``path``, or ``repo`` and ``revision``.

    Returns:
        The recipe, and its text.

    Raises:
        InvalidInput: there is nothing to quantize, or a plan would refuse the source.
    """
    parts = [part for source in sources for part in source.reading.parts]
    check_parts([part.name for part in parts])
    modules = {
        part: contents.modules
        for source in sources
        for part, contents in source.reading.contents.items()
    }
    schemes = _Schemes()
    rules, protected = _entries(modules, schemes)
    if not rules:
        raise InvalidInput(
            Problem(
                "nothing-to-quantize",
                "no module here is one that a recipe would quantize",
                hint="Every two-dimensional weight is an embedding, an output or conditioning "
                "layer, or empty.",
                file=str(parts[0].root),
            )
        )
    document: dict[str, Any] = {
        "kind": "recipe",
        "version": 1,
        "name": f"{slug(name)}-{'int8-w8a8' if SCHEME in schemes.used else 'kept'}",
        "description": "A draft from the checkpoint's headers: look through what is protected.",
        "source": {
            "layout": sources[0].reading.layout.name,
            **where,
            "parts": {
                part.name: source.location for source in sources for part in source.reading.parts
            },
        },
        "schemes": schemes.used,
        "rules": rules,
        "protected": protected,
        "target": _target(sources, carried=schemes.used.keys() != {SCHEME}),
        "bounds": {"min_weight_sqnr_db": 30},
    }
    text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    recipe = parse_recipe(text, "the drafted recipe")
    make_plan(recipe, parts)
    return recipe, text


def slug(name: str) -> str:
    """A name for a recipe, from any text."""
    cleaned = _BLANK.sub("-", name.lower()).strip("._-")[:100].rstrip("._-")
    return re.sub(r"[._-]{2,}", "-", cleaned) or "checkpoint"


def check_parts(names: Sequence[str]) -> None:
    """Part names are different.

    Raises:
        InvalidInput: two sets of files hold parts of one name.
    """
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InvalidInput(
            Problem(
                "part-named-twice",
                f"more than one set of files holds a part {twice[0]!r}",
                hint="Draft a recipe for one of them, or name the parts (--part NAME=LOCATION).",
            )
        )


@dataclass(frozen=True, slots=True)
class _Fate:
    """What a draft does with a module: ``reason`` is empty where it is quantized."""

    dtype: str
    reason: str
    scheme: str = ""


class _Schemes:
    """The schemes that a draft uses, by name."""

    def __init__(self) -> None:
        self.used: dict[str, dict[str, Any]] = {}

    def quantizing(self) -> str:
        """That of int8 W8A8."""
        self.used[SCHEME] = {"weight": _INT8, "activation": _TOKENS}
        return SCHEME

    def carrying(self, module: StoredModule) -> str:
        """One that a module fulfils as it is stored."""
        weight = module.weight.model_dump(mode="json", by_alias=True, exclude_defaults=True)
        wanted: dict[str, Any] = {"weight": weight}
        if module.rotation is not None:
            wanted["rotation"] = module.rotation.model_dump(mode="json")
        if module.weight.format == "int8":
            wanted["activation"] = _TOKENS
        name = stem = f"kept-{module.weight.format.replace('_', '-')}"
        number = 2
        while self.used.setdefault(name, wanted) != wanted:
            name, number = f"{stem}-{number}", number + 1
        return name


_INT8: Final = {"format": "int8", "granularity": "channel"}
_TOKENS: Final = {"format": "int8", "granularity": "token", "dynamic": True}


def _is_carried(module: StoredModule) -> bool:
    rotated = module.rotation is not None and isinstance(module.weight, ScaledWeight)
    return rotated or module.weight.format in _FOUR_BITS


_FOUR_BITS: Final = ("int4", "nf4", "mxfp4", "nvfp4")


def _entries(
    modules: Mapping[str, Mapping[str, StoredModule]], schemes: _Schemes
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rules and protected entries; parts with the same modules share theirs."""
    alike: dict[frozenset[tuple[str, _Fate]], list[str]] = {}
    fates = {part: _fates(found, schemes) for part, found in modules.items()}
    for part, decided in fates.items():
        alike.setdefault(frozenset(decided.items()), []).append(part)
    rules: list[dict[str, Any]] = []
    protected: list[dict[str, Any]] = []
    for parts in alike.values():
        by_fate: dict[_Fate, list[str]] = {}
        for name, fate in fates[parts[0]].items():
            by_fate.setdefault(fate, []).append(name)
        for fate, names in by_fate.items():
            entry: dict[str, Any] = {"modules": [group.pattern for group in collapse(names)]}
            if len(alike) > 1:
                entry["parts"] = parts
            if fate.reason:
                entry |= {"dtype": fate.dtype}
                protected.append(entry | _counted(names, parts) | {"reason": fate.reason})
            else:
                rules.append(entry | {"scheme": fate.scheme} | _counted(names, parts))
    return rules, protected


def _counted(names: Sequence[str], parts: Sequence[str]) -> dict[str, int]:
    return {"count": len(names) * len(parts)}


def _fates(modules: Mapping[str, StoredModule], schemes: _Schemes) -> dict[str, _Fate]:
    fates = {name: _fate(name, module, schemes, small=True) for name, module in modules.items()}
    if all(fate.reason for fate in fates.values()):
        # In a toy model everything is small; there is still something to show in it.
        fates = {
            name: _fate(name, module, schemes, small=False) for name, module in modules.items()
        }
    return fates


def _fate(name: str, module: StoredModule, schemes: _Schemes, *, small: bool) -> _Fate:
    if _is_carried(module) and EMBEDDING_NAMES.matches(name) is None:
        return _Fate("", "", schemes.carrying(module))
    for reason, holds in _REASONS:
        if holds(name, module) and (small or reason != _SMALL):
            weight = module.weight
            dtype = weight.format if isinstance(weight, PlainWeight) else "bfloat16"
            return _Fate(dtype, reason)
    return _Fate("", "", schemes.quantizing())


def _is_small(name: str, module: StoredModule) -> bool:
    sides = (module.out_features, module.in_features)
    return min(sides) < SMALLEST_SIDE or sides[0] * sides[1] < SMALLEST_WEIGHT


_SMALL: Final = "too small for the saving to be worth an error"
_REASONS: Final[tuple[tuple[str, Callable[[str, StoredModule], bool]], ...]] = (
    ("it is empty", lambda _, module: 0 in (module.out_features, module.in_features)),
    (
        "by its name an embedding table: its rows are looked up, never multiplied",
        lambda name, _: EMBEDDING_NAMES.matches(name) is not None,
    ),
    (
        "conditioning: it runs on few rows, where quantized activations cost most and save least",
        lambda name, _: _CONDITIONING.matches(name) is not None,
    ),
    (
        "last layer: its error goes straight into the output",
        lambda name, _: _LAST.matches(name) is not None,
    ),
    (
        "router: a small error sends tokens elsewhere",
        lambda name, _: _ROUTER.matches(name) is not None,
    ),
    (_SMALL, _is_small),
)


def _target(sources: Sequence[DraftSource], *, carried: bool) -> dict[str, Any]:
    """Parts that shared files share one again; others get each their own.

    What is carried over goes into the one layout that has a place for all of it.
    """
    parts = [part for source in sources for part in source.reading.parts]
    target: dict[str, Any] = {"layout": "quantrecipe" if carried else "int8-scaled"}
    if len(parts) == 1:
        target["file"] = _file(sources[0].stem)
    elif len(sources) == 1:
        target |= {"layout": "transformerlab", "file": _file(sources[0].stem)}
    else:
        target["parts"] = dict(_files(sources))
    if any(len(part.files) > 1 for part in parts):
        target["max_shard_size"] = SHARD_SIZE
    return target


def _file(stem: str, folder: str = "") -> str:
    clean = re.sub(r"[^A-Za-z0-9_.-]", "_", stem).lstrip(".-") or "model"
    suffix = "" if clean in _USUAL_STEMS else "-int8-w8a8"
    return f"{folder}{clean[:100]}{suffix}.safetensors"


def _files(sources: Sequence[DraftSource]) -> Iterable[tuple[str, str]]:
    taken: set[str] = set()
    for source in sources:
        for part in source.reading.parts:
            folder = source.location if len(source.reading.parts) == 1 else part.name
            file = _file(source.stem, f"{folder}/")
            if re.search(TARGET_FILE, file) is None or file.casefold() in taken:
                file = _file(source.stem, f"{part.name}/")
            taken.add(file.casefold())
            yield part.name, file
