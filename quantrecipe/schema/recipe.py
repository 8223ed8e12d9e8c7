"""The recipe, version 1."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field, JsonValue, StringConstraints, Tag

from quantrecipe.schema.base import (
    BYTE_SIZE,
    REPOSITORY,
    REVISION,
    Model,
    ModulePattern,
    Name,
    NonEmpty,
    PartName,
    ReverseDns,
    SourcePath,
    TargetFile,
    VersionOne,
    json_type,
)
from quantrecipe.schema.dtypes import PlainDType
from quantrecipe.schema.evaluation import Evaluation
from quantrecipe.schema.layout import Layout
from quantrecipe.schema.names import MappedName, NamesReference
from quantrecipe.schema.schemes import Scheme

RECIPE_VERSION = 1


LayoutReference = Annotated[
    Annotated[Name, Tag("string")] | Annotated[Layout, Tag("object")], Discriminator(json_type)
]
"""The name of a known layout, or a layout written out in place."""


class CountRange(Model):
    """How many modules an entry may take, when it is not one exact number."""

    min: Annotated[int, Field(ge=0)] = 1
    """The fewest modules; 0 says that taking none is fine."""

    max: Annotated[int, Field(ge=0)] | None = None
    """The most modules; absent: no limit."""


Row = Annotated[int, Field(ge=0)]

Count = Annotated[
    Annotated[Annotated[int, Field(ge=1)], Tag("integer")] | Annotated[CountRange, Tag("object")],
    Discriminator(json_type),
]


class Source(Model):
    """Where the weights come from, and how they are laid out there."""

    layout: LayoutReference
    """How the source is laid out on disk."""

    path: SourcePath | None = None
    """A local source, relative to the recipe file."""

    repo: (
        Annotated[
            str,
            StringConstraints(pattern=REPOSITORY, max_length=200),
        ]
        | None
    ) = None
    """A Hub repository, ``owner/name``."""

    revision: Annotated[str, StringConstraints(pattern=REVISION, max_length=200)] | None = None
    """A commit, tag or branch of ``repo``; a commit is the only one that never moves."""

    parts: Annotated[dict[PartName, SourcePath], NonEmpty] = Field(default={"model": "."})
    """Part name to file, folder or glob under the source's root."""


class _Selection(Model):
    modules: Annotated[tuple[ModulePattern, ...], NonEmpty]
    """Module patterns: exact names, globs on dotted names (``*`` one segment, ``**`` any number,
    ``{a,b}``, ``{0..33}``), or ``re:`` and a regular expression that matches the whole name."""

    parts: Annotated[tuple[PartName, ...], NonEmpty] | None = None
    """The parts it holds for; absent: all."""

    count: Count | None = None
    """How many modules it must take, over all its parts; absent: at least one."""


class Rule(_Selection):
    """Gives a scheme to the modules it matches; the first rule that matches a module takes it."""

    scheme: Name
    """A key of ``schemes``."""


class Protected(_Selection):
    """Keeps the modules it matches in a plain dtype, on purpose. Looked at before any rule."""

    dtype: PlainDType
    """The dtype their weights are kept in."""

    reason: Annotated[str, NonEmpty]
    """Why; it goes into the plan, the lock and the model card."""


class Fold(Model):
    """Into which weights the smoothing factors of modules go: those whose output is their input.

    The columns of the modules are multiplied by the factors, and what computes their input is
    divided by them, so that nothing is left for a loader to do.
    """

    modules: Annotated[tuple[MappedName, ...], NonEmpty]
    """Every module that reads this input, also those that are not smoothed. What each ``*`` stands
    for is carried over to ``into``."""

    into: MappedName
    """What their input comes out of: a module (its rows and its bias), a vector (as the weight of a
    norm), or what has a vector ``weight`` and perhaps a ``bias``."""

    rows: Annotated[tuple[Row, Row], Field(examples=[[9216, 13824]])] | None = None
    """The rows of ``into`` that are the input, from the first up to and without the second; absent:
    all."""


class Target(Model):
    """What is written, and how it is laid out."""

    layout: LayoutReference
    """How the output is laid out on disk."""

    names: NamesReference | None = None
    """What modules are called where the source calls them otherwise, and which are split or merged:
    the name of known names, or a list of entries. Rules, protected entries, siblings, folds and the
    lock speak of the names in the target. Absent: they are called as in the source."""

    file: TargetFile = "model.safetensors"
    """The output file, when all parts go into one."""

    parts: Annotated[dict[PartName, TargetFile], NonEmpty] | None = None
    """Part name to output file, when each part goes into its own; in place of ``file``."""

    passthrough_dtype: Literal[PlainDType, "keep"] = "bfloat16"
    """What a module that the source holds quantized, and that nothing matches, is dequantized to;
    ``keep`` passes its stored format on."""

    max_shard_size: Annotated[str, StringConstraints(pattern=BYTE_SIZE)] | None = None
    """The most bytes of tensors in one file (decimal units); more go into numbered shards with an
    index. A tensor that is larger by itself gets a shard of its own."""

    emit_loader: bool = False
    """Whether ``safetensors_loader.py`` is written beside the weights: one Python file that loads
    this checkpoint into any torch module, and needs nothing but torch and safetensors."""

    def file_of(self, part: str) -> str:
        """The file that a part goes into, before it is cut into shards."""
        return self.parts[part] if self.parts is not None else self.file


class Bounds(Model):
    """What the result must hold to; a conversion that misses one publishes nothing."""

    min_weight_sqnr_db: Annotated[float, Field(ge=0.0, le=400.0)] | None = None
    """The least signal-to-quantization-noise ratio of any quantized module's weight, in decibels:
    ``10 log10(sum w^2 / sum (w - w_hat)^2)``."""


class Extension(Model):
    """Something this schema does not know, under a reverse-DNS key of its owner."""

    must_understand: bool
    """Whether a tool that does not know the key has to refuse the recipe."""

    value: JsonValue = None
    """Whatever its owner puts there."""


class Recipe(Model):
    """What goes in, how each module is quantized, what is protected, and how all is stored."""

    schema_uri: Annotated[str, StringConstraints(max_length=1024)] | None = Field(
        default=None, alias="$schema"
    )
    """For editors: this schema's URN or the relative path of a copy of it."""

    kind: Literal["recipe"]
    version: VersionOne
    name: Name
    """What the recipe is called."""

    description: str | None = None
    """For people; no tool reads it."""

    source: Source
    """Where the weights come from."""

    schemes: dict[Name, Scheme]
    """The ways of quantizing that rules choose from, by name."""

    rules: tuple[Rule, ...]
    """In order: the first that matches a module takes it."""

    protected: tuple[Protected, ...] = ()
    """Looked at before any rule."""

    siblings: tuple[Annotated[tuple[MappedName, ...], Field(min_length=2)], ...] | None = None
    """Modules that have the same input and share their smoothing factors: names in which a segment
    may be ``*`` as a whole. The names of one list are tied where their ``*`` stand for the same.
    Absent: those that the statistics file names; an empty list: none."""

    folds: tuple[Fold, ...] = ()
    """Where smoothing goes that a scheme applies as ``fold``. Each has to be proven on the model:
    the statistics file says which are. What an edge takes in one place are siblings."""

    target: Target
    """What is written."""

    bounds: Bounds = Bounds()
    """What the result must hold to."""

    evaluation: Evaluation | None = None
    """How what the result produces is compared with what a reference does; absent: nothing is
    declared, and no equivalence can be shown."""

    extensions: dict[ReverseDns, Extension] = Field(default={})
    """What this schema does not know."""

    def statistics(self) -> tuple[str, ...]:
        """The statistics files that its schemes name, each once, in their order."""
        schemes = self.schemes.values()
        return tuple(dict.fromkeys(path for each in schemes for path in each.statistics().values()))
