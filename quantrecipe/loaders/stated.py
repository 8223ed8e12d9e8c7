"""What a checkpoint says of its modules that neither names nor shapes show."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from quantrecipe.loaders.identity import Identity
from quantrecipe.schema.layout_reading import PartContents
from quantrecipe.schema.problems import Problem
from quantrecipe.schema.provenance import configured_rotations, embedded_recipe, schemes_of
from quantrecipe.schema.schemes import Hadamard
from quantrecipe.schema.tensors import SourcePart


def with_rotations(
    identity: Identity, parts: Iterable[SourcePart], contents: Mapping[str, PartContents]
) -> dict[str, PartContents]:
    """Parts whose modules say how they are rotated.

    The lock says it; else the rules of the recipe do; else, where the caller says what the
    checkpoint is, the ``config.json`` beside each part.

    Raises:
        InvalidInput: a ``quantization_config`` is broken.
    """
    rotations: dict[tuple[str, str], Hadamard | None] = {}
    if identity.lock is not None:
        rotations = {(each.part, each.name): each.rotation for each in identity.lock.modules}
    elif identity.recipe is not None:
        modules = {part: found.modules for part, found in contents.items()}
        schemes = schemes_of(identity.recipe, modules)
        rotations = {key: scheme.rotation for key, scheme in schemes.items()}
    else:
        for part in parts:
            said = configured_rotations(identity.layout, part)
            rotations |= {(part.name, name): rotation for name, rotation in said.items()}
    return {
        part: replace(
            found,
            modules={
                name: replace(module, rotation=rotations.get((part, name)) or module.rotation)
                for name, module in found.modules.items()
            },
        )
        for part, found in contents.items()
    }


def unsaid_rotations(
    identity: Identity, parts: Iterable[SourcePart], contents: Mapping[str, PartContents]
) -> Iterator[Problem]:
    """Files whose metadata says that they are rotated, opened as if they said nothing."""
    if identity.recipe is not None:
        return
    for part in parts:
        if any(module.rotation is not None for module in contents[part.name].modules.values()):
            continue
        for file in part.files:
            recipe = embedded_recipe(file.metadata, str(file.path))
            if recipe is not None and any(each.rotation for each in recipe.schemes.values()):
                yield Problem(
                    "rotated-source",
                    "its metadata says that it is stored rotated, and with layout= nothing says "
                    "which modules are",
                    hint="Leave layout= out: the file says what it is.",
                    file=str(file.path),
                )
