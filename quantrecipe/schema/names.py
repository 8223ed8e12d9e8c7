"""Names, version 1: what the modules of a model are called elsewhere, as data.

How tensors lie on disk is a property of whoever reads them, and a layout says it. What modules are
called, and whether some are one, is a property of the model.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field, StringConstraints, Tag

from quantrecipe.schema.base import (
    CLASS_NAME,
    NAME_MAPPING,
    Model,
    Name,
    NonEmpty,
    VersionOne,
    json_type,
)

NAMES_VERSION = 1

MappedName = Annotated[
    str,
    StringConstraints(pattern=NAME_MAPPING, max_length=256),
]
"""A module's dotted name; a segment that is ``*`` stands for any one segment."""

ClassName = Annotated[str, StringConstraints(pattern=CLASS_NAME, max_length=128)]
"""What a Python class is called, without its package."""

OneOrSeveral = Annotated[
    Annotated[MappedName, Tag("string")]
    | Annotated[Annotated[tuple[MappedName, ...], Field(min_length=2)], Tag("array")],
    Discriminator(json_type),
]
"""A name, or several in the order of their rows."""


class NameMapping(Model):
    """What modules of a source are called in a target.

    One name on both sides renames. Several in ``into`` split a module by rows, several in ``from``
    are merged into one; on one side there is always one name.
    """

    source: OneOrSeveral = Field(alias="from")
    """The name in a source of a module, or of what has tensors without being a module, as a norm.
    Several: their rows are put one after the other, in this order."""

    into: OneOrSeveral
    """The name in the target. Several: its rows are cut into as many equal parts, in this order.
    What the first ``*`` of ``from`` stands for goes to the first of each name, and so on."""

    @property
    def sources(self) -> tuple[str, ...]:
        """The names in a source; several, if they are merged."""
        return (self.source,) if isinstance(self.source, str) else self.source

    @property
    def targets(self) -> tuple[str, ...]:
        """The names in the target; several, if one is split."""
        return (self.into,) if isinstance(self.into, str) else self.into


Mappings = Annotated[tuple[NameMapping, ...], NonEmpty]
"""The first that fits a name counts; what has the new names already is left as it is."""


class Names(Model):
    """What the modules of a model are called elsewhere."""

    schema_uri: Annotated[str, StringConstraints(max_length=1024)] | None = Field(
        default=None, alias="$schema"
    )
    """For editors: this schema's URN or the relative path of a copy of it."""

    kind: Literal["names"]
    version: VersionOne
    name: Name
    """What these names are called."""

    description: str | None = None
    """Of which model, and who calls its modules so."""

    classes: Annotated[tuple[ClassName, ...], NonEmpty] | None = None
    """Classes whose modules are called as in the target: who runs a checkpoint that was not renamed
    finds these names by the class. Absent: none in particular."""

    names: Mappings
    """What is called otherwise in a target than in a source, or is one module of several there. The
    first entry that fits counts."""


NamesReference = Annotated[
    Annotated[Name, Tag("string")] | Annotated[Mappings, Tag("array")], Discriminator(json_type)
]
"""What known names are called, or names written out in place."""
