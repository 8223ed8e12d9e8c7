"""The recipe that carries a quantized checkpoint over into another layout, inferred from headers.

What the target holds as the source has it is carried over; what it does not hold goes into the
nearest format that it does; plain modules stay plain.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Final

from quantrecipe.schema.base import TARGET_FILE
from quantrecipe.schema.drafting import SHARD_SIZE, DraftSource, check_parts, slug
from quantrecipe.schema.dtypes import PlainDType
from quantrecipe.schema.layout import Layout
from quantrecipe.schema.layout_reading import PartContents, StoredModule
from quantrecipe.schema.layout_writing import holds_many_parts
from quantrecipe.schema.names import NameMapping
from quantrecipe.schema.nearest import Wanted, as_it_is, nearest, with_its_own
from quantrecipe.schema.problems import InvalidInput, Problem, Reasons
from quantrecipe.schema.provenance import with_rotations
from quantrecipe.schema.recipe import Recipe
from quantrecipe.schema.registry import layout_names, named_layout, resolve_names
from quantrecipe.schema.renaming import renamed
from quantrecipe.schema.schemes import (
    AnyScaledWeight,
    DynamicActivation,
    Hadamard,
    Nf4,
    ScaledWeight,
)
from quantrecipe.schema.short_patterns import short_patterns
from quantrecipe.schema.stated_activations import Activations
from quantrecipe.schema.validation import parse_recipe

ONLY_PART: Final = "model"
"""What the one part of a checkpoint is called where nobody named it."""

ONE_PART_GGUF: Final = "gguf-one-part"
"""The layout of GGUF files whose names do not begin with a part's."""

ARCHITECTURE: Final = "general.architecture"
_OWN_ARCHITECTURES: Final = ("ideogram4-original", "ideogram4-diffusers")
"""Names of the model that layout gguf says it is of."""


@dataclass(frozen=True, slots=True)
class Transcoding:
    """What somebody wants to have made of a checkpoint.

    Attributes:
        layout: the target's.
        names: what modules are called there, as ``target.names`` of a recipe says it.
        wanted: what becomes of modules that the target does not hold as they are: a format with
            codes, or a plain dtype; ``None``: the nearest format that it does.
        requantize: whether smoothing and rotation that the target does not hold are undone, and the
            numbers quantized anew.
        architecture: what a GGUF file says of its model.
    """

    layout: Layout
    names: str | tuple[NameMapping, ...] | None = None
    wanted: Wanted | PlainDType | None = None
    requantize: bool = False
    architecture: str | None = None


@dataclass(frozen=True, slots=True)
class _Fate:
    """What becomes of a module that has codes; without a weight, it is decoded."""

    weight: AnyScaledWeight
    rotation: Hadamard | None
    activation: DynamicActivation | None

    @property
    def name(self) -> str:
        """What its scheme is called."""
        weight = self.weight
        rows, columns = weight.group_shape(0, 0)
        words: list[str] = [weight.format, *([weight.granularity] * weight.has_scales)]
        if weight.granularity == "group":
            words.append(str(columns))
        if weight.granularity == "block" and weight.has_scales:
            words.append(f"{rows}x{columns}")
        words += ["zeros"] * weight.has_zero_points
        words += ["double"] * (isinstance(weight, Nf4) and weight.double_quantized)
        if self.rotation is not None:
            words += ["rotated", str(self.rotation.size)]
        if self.activation is not None:
            words += ["a8", self.activation.granularity]
        return "-".join(words)

    @property
    def scheme(self) -> dict[str, Any]:
        """Its scheme, as a recipe has it."""
        weight = self.weight.model_dump(mode="json", exclude_defaults=True)
        # The quantizer is what there is only one of; what tells formats apart stays.
        found: dict[str, Any] = {"weight": weight | {"format": self.weight.format}}
        for key, value in (("activation", self.activation), ("rotation", self.rotation)):
            if value is not None:
                found[key] = value.model_dump(mode="json")
        return found


@dataclass(slots=True)
class _Inference:
    wish: Transcoding
    activations: Mapping[str, Activations]
    refused: Reasons = field(default_factory=Reasons)

    def fates(self, part: str, contents: PartContents) -> dict[str, _Fate | None]:
        """Of every module with codes what becomes of it; ``None``: it is decoded."""
        return {
            name: self._fate(part, module)
            for name, module in contents.modules.items()
            if isinstance(module.weight, ScaledWeight)
        }

    def _fate(self, part: str, module: StoredModule) -> _Fate | None:
        layout, activation = self.wish.layout, self._activation(part, module)
        carried = as_it_is(layout, module)
        if carried is not None and with_its_own(layout, module, carried):
            return _Fate(carried, module.rotation, activation)
        own = module.rotation is not None or "smoothing" in module.tensors
        other = self._other(module, carried)
        if other is None:
            return None
        if own and not self.wish.requantize:
            self.refused.add(_not_held(layout, module, carried), module.name)
        same = isinstance(module.weight, ScaledWeight) and other.format == module.weight.format
        # Activations are quantized to go with codes of one format.
        return _Fate(other, None, activation if same else None)

    def _other(
        self, module: StoredModule, carried: AnyScaledWeight | None
    ) -> AnyScaledWeight | None:
        """What a module becomes that does not stay as it is; ``None``: plain numbers."""
        wanted = self.wish.wanted
        if wanted is None:
            return carried or nearest(self.wish.layout, module)
        return nearest(self.wish.layout, module, wanted) if isinstance(wanted, Wanted) else None

    def _activation(self, part: str, module: StoredModule) -> DynamicActivation | None:
        """What all that it is made of have in common."""
        said = self.activations.get(part, {})
        found = {said.get(name) for name in module.renamed_from or (module.name,)}
        return found.pop() if len(found) == 1 else None


def infer_recipe(
    sources: Sequence[DraftSource],
    wish: Transcoding,
    activations: Mapping[str, Activations],
    name: str,
) -> tuple[Recipe, str]:
    """The recipe that makes of a checkpoint what somebody wants.

    Args:
        sources: the checkpoint, read through one layout.
        wish: what to make of it.
        activations: of its modules, by part, under the names that they have in it.
        name: what to call it, in any characters.

    Returns:
        The recipe, and its text; the same for the same headers.

    Raises:
        InvalidInput: names that do not fit, smoothing or rotation that the target does not hold, a
            format that was asked for and that it does not hold, or a model that nobody named.
    """
    parts = [part for source in sources for part in source.reading.parts]
    check_parts([part.name for part in parts])
    layout = sources[0].reading.layout
    _check_wanted(wish)
    contents = dict(_renamed_contents(sources, wish))
    inference = _Inference(wish, activations)
    fates = {part: inference.fates(part, found) for part, found in contents.items()}
    refused = [*inference.refused]
    if refused:
        raise InvalidInput(refused)
    schemes, rules = _rules(contents, fates)
    document: dict[str, Any] = {
        "kind": "recipe",
        "version": 1,
        "name": f"{slug(name)[:60].rstrip('._-')}-{wish.layout.name}"[:128],
        "description": f"Inferred from the headers of a checkpoint in layout {layout.name}.",
        "source": {
            "layout": reference_to(layout),
            "parts": {part.name: each.location for each in sources for part in each.reading.parts},
        },
        "schemes": schemes,
        "rules": rules,
        "target": _target(sources, wish),
    }
    text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    return parse_recipe(text, "the inferred recipe"), text


def _renamed_contents(
    sources: Sequence[DraftSource], wish: Transcoding
) -> Iterator[tuple[str, PartContents]]:
    names = resolve_names(wish.names)
    problems: list[Problem] = []
    for source in sources:
        reading = source.reading
        for part in reading.parts:
            found = with_rotations(reading.layout, part, reading.contents[part.name])
            found = renamed(found, names)
            problems += found.problems
            yield part.name, found
    if problems:
        raise InvalidInput(dict.fromkeys(problems))


def _rules(
    contents: Mapping[str, PartContents], fates: Mapping[str, Mapping[str, _Fate | None]]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Schemes and rules; parts in which the same becomes of the same modules share theirs."""
    alike: dict[tuple[frozenset[tuple[str, _Fate | None]], frozenset[str]], list[str]] = {}
    for part, found in contents.items():
        key = frozenset(fates[part].items()), frozenset(found.modules)
        alike.setdefault(key, []).append(part)
    named: dict[_Fate, str] = {}
    rules: list[dict[str, Any]] = []
    for (_, names), parts in alike.items():
        by_fate: dict[_Fate, list[str]] = {}
        for name, fate in fates[parts[0]].items():
            if fate is not None:
                by_fate.setdefault(fate, []).append(name)
        for fate, mine in by_fate.items():
            entry: dict[str, Any] = {"modules": short_patterns(mine, names - set(mine))}
            if len(alike) > 1:
                entry["parts"] = parts
            entry |= {"scheme": _named(fate, named), "count": len(mine) * len(parts)}
            rules.append(entry)
    return {name: fate.scheme for fate, name in named.items()}, rules


def _named(fate: _Fate, named: dict[_Fate, str]) -> str:
    name, number = fate.name, 1
    while fate not in named and name in named.values():
        number += 1
        name = f"{fate.name}-{number}"
    return named.setdefault(fate, name)


def _not_held(layout: Layout, module: StoredModule, carried: AnyScaledWeight | None) -> Problem:
    """Smoothing or rotation that would be lost."""
    smoothed, rotation = "smoothing" in module.tensors, module.rotation
    words = ["smoothed"] * smoothed
    if rotation is not None:
        words.append(f"rotated ({rotation.kind} of {rotation.size})")
    how = " and ".join(words)
    weight = carried or module.weight
    holding = [name for name in layout_names() if _holds(named_layout(name), module)]
    elsewhere = f"{' and '.join(holding)} hold it as it is" if holding else "no layout holds it"
    if len(holding) == 1:
        elsewhere = f"{holding[0]} holds it as it is"
    return Problem(
        "needs-requantizing",
        f"it is stored {how}, and layout {layout.name!r} has no place for that with "
        f"{weight.format}",
        hint="With --requantize it is undone and the numbers are quantized once more; "
        f"{elsewhere}. Best is to convert the original anew"
        + (', with the smoothing folded ("apply": "fold").' if smoothed else "."),
    )


def _holds(layout: Layout, module: StoredModule) -> bool:
    carried = as_it_is(layout, module)
    return carried is not None and with_its_own(layout, module, carried)


def _check_wanted(wish: Transcoding) -> None:
    """A format that was asked for is one that the target holds, in some size."""
    wanted, layout = wish.wanted, wish.layout
    if not isinstance(wanted, Wanted):
        return
    holds = layout.holds.get(wanted.format)
    held = ", ".join(
        f"{name}:{granularity}" for name, each in layout.holds.items()
        for granularity in each.granularity
    )  # fmt: skip
    if holds is None or wanted.granularity not in (None, *holds.granularity):
        asked = wanted.format + (f":{wanted.granularity}" if wanted.granularity else "")
        raise InvalidInput(
            Problem(
                "target-cannot-hold",
                f"layout {layout.name!r} has no place for {asked}",
                hint=f"It holds: {held}." if held else "It holds plain dtypes only.",
            )
        )


def _target(sources: Sequence[DraftSource], wish: Transcoding) -> dict[str, Any]:
    """Where everything goes: called as in the source, but for the suffix."""
    parts = [part for source in sources for part in source.reading.parts]
    layout, suffix = wish.layout, f".{wish.layout.container}"
    target: dict[str, Any] = {"layout": _layout_reference(sources, wish)}
    if wish.names is not None:
        target["names"] = (
            wish.names
            if isinstance(wish.names, str)
            else [each.to_json_value() for each in wish.names]
        )
    if len(parts) == 1 or holds_many_parts(layout):
        gguf = layout.container == "gguf"
        target["file"] = f"{'model' if gguf or len(sources) > 1 else _stem(sources[0])}{suffix}"
    else:
        target["parts"] = dict(_files(sources, suffix))
    if isinstance(wish.wanted, str):
        target["passthrough_dtype"] = wish.wanted
    sharded = any(len(part.files) > 1 for part in parts)
    if sharded and layout.container == "safetensors":
        target["max_shard_size"] = SHARD_SIZE
    return target


def _stem(source: DraftSource) -> str:
    clean = re.sub(r"[^A-Za-z0-9_.-]", "_", source.stem.removesuffix(".gguf")).lstrip(".-")
    return clean[:100] or "model"


def _files(sources: Iterable[DraftSource], suffix: str) -> Iterator[tuple[str, str]]:
    """Each part in a folder of its own: that of the source, or one of the part's name."""
    taken: set[str] = set()
    for source in sources:
        several = len(source.reading.parts) > 1
        for part in source.reading.parts:
            folder = part.name
            own = PurePosixPath(source.location)
            if not several and own.suffix not in (".safetensors", ".gguf", ".json"):
                folder = source.location
            file = f"{folder}/{_stem(source)}{suffix}"
            if re.search(TARGET_FILE, file) is None or folder.casefold() in taken:
                folder = part.name
                file = f"{folder}/{_stem(source)}{suffix}"
            taken.add(folder.casefold())
            yield part.name, file


def _layout_reference(sources: Sequence[DraftSource], wish: Transcoding) -> Any:
    """The target layout by name; written out, where a GGUF file is to say another model."""
    layout = wish.layout
    if layout.container != "gguf":
        return reference_to(layout)
    said = {
        value
        for source in sources
        for part in source.reading.parts
        for file in part.files
        if (value := file.metadata.get(ARCHITECTURE)) is not None
    }
    architecture = wish.architecture or (said.pop() if len(said) == 1 else None)
    if architecture is None and wish.names not in _OWN_ARCHITECTURES:
        raise InvalidInput(
            Problem(
                "no-architecture",
                "a GGUF file says which model it is of, and nothing here does",
                hint="Give it: --architecture flux, or what programs that read the file call it.",
            )
        )
    parts = [part.name for source in sources for part in source.reading.parts]
    if parts == [ONLY_PART] and holds_many_parts(layout):
        architecture = architecture or layout.metadata.get(ARCHITECTURE)
        layout = named_layout(ONE_PART_GGUF)
    if architecture in (None, layout.metadata.get(ARCHITECTURE)):
        return reference_to(layout)
    document = layout.to_json_value()
    document["metadata"] = {**layout.metadata, ARCHITECTURE: architecture}
    return document


def reference_to(layout: Layout) -> Any:
    """A layout as a recipe refers to it: by name, if it is known, else written out."""
    known = layout.name in layout_names() and named_layout(layout.name) == layout
    return layout.name if known else layout.to_json_value()
