"""``convert --target-layout``: from a checkpoint to the recipe that carries it over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, cast, get_args

import click

from quantrecipe.checkpoint.config_file import read_config
from quantrecipe.checkpoint.folder import GGUF_SUFFIX
from quantrecipe.cli.draft import name_of
from quantrecipe.cli.examining import Examined, examine, parse_parts
from quantrecipe.schema.config_claims import quantization_of
from quantrecipe.schema.drafting import DraftSource
from quantrecipe.schema.dtypes import PLAIN_DTYPES, PlainDType
from quantrecipe.schema.location import Location
from quantrecipe.schema.names import NameMapping, Names
from quantrecipe.schema.nearest import Wanted
from quantrecipe.schema.plan import Plan, PlannedModule
from quantrecipe.schema.problems import InvalidInput, Problem, Reasons, did_you_mean
from quantrecipe.schema.provenance import with_rotations
from quantrecipe.schema.recipe import Recipe
from quantrecipe.schema.recognition import Reading, recognise_together
from quantrecipe.schema.registry import layout_names, named_layout, named_names
from quantrecipe.schema.schemes import DynamicActivation, GranularityName, ScaledFormatName
from quantrecipe.schema.stated_activations import stated_beside, stated_by_recipe
from quantrecipe.schema.transcoding import ONE_PART_GGUF, Transcoding, infer_recipe
from quantrecipe.schema.validation import examine as examine_document

_LAYOUT_OF_METHOD: Final[Mapping[str, str]] = {
    "quantrecipe": "quantrecipe",
    "compressed-tensors": "compressed-tensors",
    "bitsandbytes": "bitsandbytes",
    "torchao": "torchao",
    "sdnq": "sdnq",
    "int8": "vllm-omni",
}
"""The layout that a ``quant_method`` of a ``config.json`` is written for."""

_VALUES_ONLY: Final = frozenset({"zero-scale"})
"""What looks wrong and keeps nobody from carrying numbers over: rows of zeros have such scales."""


@dataclass(frozen=True, slots=True)
class Inferred:
    """A recipe for a checkpoint, and what it was inferred from.

    Attributes:
        recipe: the recipe.
        text: as it is shown.
        root: the source's root, for the planner.
        layout: that the source is in, and how that is known.
        notes: what is worth knowing.
    """

    recipe: Recipe
    text: str
    root: Location
    layout: str
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """The recipe as JSON values."""
        return self.recipe.to_json_value()


@dataclass(frozen=True, slots=True)
class Asked:
    """Options of ``convert`` that go with ``--target-layout``, as they were given.

    Attributes:
        layout: the source's layout.
        parts: ``NAME=LOCATION`` each.
        names: known names, or a file of names.
        wanted: a format.
        requantize: whether smoothing and rotation may be undone.
        architecture: what a GGUF file says.
    """

    layout: str | None = None
    parts: tuple[str, ...] = ()
    names: str | None = None
    wanted: str | None = None
    requantize: bool = False
    architecture: str | None = None

    def given(self) -> list[str]:
        """The options that were given."""
        said = {
            "--layout": self.layout,
            "--part": self.parts,
            "--names": self.names,
            "--format": self.wanted,
            "--requantize": self.requantize,
            "--architecture": self.architecture,
        }
        return [option for option, value in said.items() if value]


def check_usage(
    recipe: str | None, target_layout: str | None, source: Path | str | None, asked: Asked
) -> None:
    """Either a recipe, or a target layout and what goes with it.

    Raises:
        click.UsageError: neither, both, or options that do not go together.
    """
    if recipe is None and target_layout is None:
        raise click.UsageError(
            "Missing option '--recipe' (or --target-layout, to carry a checkpoint over without)."
        )
    if recipe is not None and target_layout is not None:
        raise click.UsageError(
            "--recipe and --target-layout: a recipe says its target's layout itself."
        )
    if recipe is not None and asked.given():
        raise click.UsageError(
            f"{asked.given()[0]} goes with --target-layout: a recipe says that itself."
        )
    if target_layout is not None and source is None:
        raise click.UsageError("Missing argument 'SOURCE': what --target-layout is to convert.")
    if asked.wanted is not None:
        parse_format(asked.wanted)
    parse_parts(asked.parts)


def infer(path: Location, target_layout: str, asked: Asked) -> Inferred:
    """Find out what a checkpoint is, and infer the recipe that carries it over.

    Args:
        path: a file, an index or a folder, here or in a repository.
        target_layout: the name of the layout to carry it over into.
        asked: what else was asked for.

    Raises:
        InvalidInput: it is not what can be read, or the recipe cannot be.
    """
    wish = Transcoding(
        layout=named_layout(target_layout),
        names=None if asked.names is None else read_names(asked.names),
        wanted=None if asked.wanted is None else parse_format(asked.wanted),
        requantize=asked.requantize,
        architecture=asked.architecture,
    )
    layout, parts = asked.layout, parse_parts(asked.parts)
    examined, how = _examined(path, layout, parts)
    if layout is None and parts is None and examined.origin is None:
        examined, how = _flat(examined, how)
    problems = [each for each in examined.problems if each.kind not in _VALUES_ONLY]
    if examined.foreign:
        names = ", ".join(dict.fromkeys(part.foreign for part in examined.parts if part.foreign))
        hint = "If it is in a layout that quantrecipe layouts lists, say so with --layout."
        problems.append(
            Problem("not-readable-yet", f"layout {names} cannot be read", hint, file=str(path))
        )
    if problems:
        raise InvalidInput(problems)
    pieces = examined.survey.pieces
    readings = recognise_together(
        [piece.parts for piece in pieces],
        examined.layouts,
        named=examined.named,
        methods=examined.methods,
    )
    sources: list[DraftSource] = []
    notes: list[str] = []
    for piece, reading in zip(pieces, readings, strict=True):
        problems += reading.problems
        if any(contents.modules for contents in reading.contents.values()):
            sources.append(DraftSource(piece.location, reading))
        else:
            notes.append(f"{piece.location} is left out: it has no two-dimensional weight")
    if problems or not sources:
        raise InvalidInput(problems or Problem("no-modules", notes[0], file=str(path)))
    activations, said = _activations(examined, [each.reading for each in sources])
    recipe, text = infer_recipe(sources, wish, activations, name_of(path))
    found = f"{sources[0].reading.layout.name} ({how or examined.parts[0].reason})"
    return Inferred(recipe, text, examined.survey.root, found, (*notes, *said))


def _examined(
    path: Location, layout: str | None, parts: Mapping[str, str] | None
) -> tuple[Examined, str | None]:
    """What a checkpoint is; where several layouts have its tensors, as its ``config.json`` says."""
    found = examine(path, layout, parts)
    if layout is not None or found.origin is not None:
        return found, None
    methods = {
        str(said.get("quant_method")) for said in _configs(found).values() if said is not None
    }
    written = _LAYOUT_OF_METHOD.get(methods.pop()) if len(methods) == 1 else None
    how = "as its config.json says"
    if found.foreign and written is None:
        seen = {part.foreign for part in found.parts if part.foreign in layout_names()}
        written, how = (seen.pop(), "by its markers") if len(seen) == 1 else (None, how)
    if written is None or (not found.foreign and written in {p.layout for p in found.parts}):
        return found, None
    declared = examine(path, written, parts)
    readable = not [each for each in declared.problems if each.kind not in _VALUES_ONLY]
    return (declared, how) if readable or found.foreign else (found, None)


def _flat(examined: Examined, how: str | None) -> tuple[Examined, str | None]:
    """GGUF files that nobody says the parts of: other programs write models of one part alone."""
    files = examined.survey.files
    if not files or not all(file.path.name.endswith(GGUF_SUFFIX) for file in files):
        return examined, how
    layouts = (named_layout(ONE_PART_GGUF),)
    return replace(examined, layouts=layouts, named=True), "a GGUF file of one part"


def _configs(examined: Examined) -> dict[str, Mapping[str, Any] | None]:
    """The ``quantization_config`` beside each part."""
    found = {}
    for piece in examined.survey.pieces:
        for part in piece.parts:
            file = part.root / "config.json"
            found[part.name] = quantization_of(read_config(file)) if file.is_file() else None
    return found


def _activations(
    examined: Examined, readings: list[Reading]
) -> tuple[dict[str, Mapping[str, DynamicActivation]], list[str]]:
    """What the source says of activations: its recipe, else its metadata and ``config.json``."""
    modules = {
        part.name: with_rotations(
            reading.layout, part, reading.contents[part.name]
        ).modules
        for reading in readings
        for part in reading.parts
    }  # fmt: skip
    if examined.origin is not None:
        return dict(stated_by_recipe(examined.origin.recipe, modules)), []
    configs, notes = _configs(examined), dict[str, None]()
    found: dict[str, Mapping[str, DynamicActivation]] = {}
    for reading in readings:
        for part in reading.parts:
            # Parts that layouts find in names share the config of their files.
            said = configs.get(part.name, next(iter(configs.values()), None))
            found[part.name], more = stated_beside(reading.layout, part, modules[part.name], said)
            notes |= dict.fromkeys(more)
    return found, list(notes)


def parse_format(text: str) -> Wanted | PlainDType:
    """What ``--format`` says.

    Raises:
        click.UsageError: it is no format.
    """
    name, *rest = text.split(":")
    if name in PLAIN_DTYPES and not rest:
        return name
    formats, granularities = get_args(ScaledFormatName), get_args(GranularityName)
    if name not in formats:
        hint = did_you_mean(name, [*formats, *PLAIN_DTYPES])
        raise click.BadParameter(f"no format is called {name!r}. {hint}", param_hint="'--format'")
    if len(rest) > 2 or (rest and rest[0] not in granularities):
        hint = f"Give FORMAT, FORMAT:GRANULARITY ({', '.join(granularities)}) or int4:group:64."
        raise click.BadParameter(f"{text!r}. {hint}", param_hint="'--format'")
    size = None
    if len(rest) == 2:
        if rest[0] != "group" or not rest[1].isdecimal() or not int(rest[1][:9]):
            raise click.BadParameter(
                f"{text!r}: only groups have a size, a whole number of columns.",
                param_hint="'--format'",
            )
        size = int(rest[1][:9])
    granularity = cast(GranularityName, rest[0]) if rest else None
    return Wanted(cast(ScaledFormatName, name), granularity, size)


def read_names(text: str) -> str | tuple[NameMapping, ...]:
    """What ``--names`` says: the name of known names, or the entries in a file.

    Raises:
        InvalidInput: it is neither.
    """
    path = Path(text)
    if path.suffix not in (".json", ".yaml", ".yml"):
        return named_names(text).name
    model = examine_document(path, kind="names")
    if not isinstance(model.model, Names):
        raise InvalidInput(model.problems)
    return model.model.names


def check_lossless(planned: Plan) -> None:
    """Every number of a plan is kept as it is.

    Raises:
        InvalidInput: some are not; one problem for each way in which they are not.
    """
    refused = Reasons()
    for module in planned.modules:
        if module.transfer != "lossless":
            refused.add(_not_lossless(module), module.name)
    problems = [*refused]
    if problems:
        raise InvalidInput(problems)


def _not_lossless(module: PlannedModule) -> Problem:
    from quantrecipe.cli.plan_view import TRANSFERS, describe_weight

    before, after = describe_weight(module.source.weight), describe_weight(module.weight)
    return Problem(
        "not-lossless",
        f"{before} -> {after} is {module.transfer}: {TRANSFERS[module.transfer]}",
        hint="Choose a layout that holds it as it is, or leave --lossless-only out.",
    )


def summary_of(inferred: Inferred, planned: Plan) -> list[str]:
    """What was inferred, in a few lines."""
    from quantrecipe.cli.plan_view import describe_scheme

    recipe = inferred.recipe
    lines = [f"the source is in layout {inferred.layout}"]
    lines.append(f"inferred recipe {recipe.name}; it is saved with the result, as recipe.json")
    for name, scheme in recipe.schemes.items():
        patterns = [
            pattern for rule in recipe.rules if rule.scheme == name for pattern in rule.modules
        ]
        count = sum(module.scheme == name for module in planned.modules)
        more = f" and {len(patterns) - 3} more" if len(patterns) > 3 else ""
        lines.append(
            f"  {describe_scheme(name, scheme)}: {count:,} module{'' if count == 1 else 's'}, "
            f"{', '.join(patterns[:3])}{more}"
        )
    return lines + [f"note: {note}" for note in inferred.notes]
