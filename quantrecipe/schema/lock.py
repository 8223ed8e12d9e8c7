"""The lock, version 1: the plan as it was carried out, with digests.

Two kinds of digest, for two questions. Files have their SHA-256, which is what hubs and signatures
go by, and nobody can make another file to match. Tensors have an XXH3 of 128 bits, as fast as
memory, so that a loader can afford to check what it loads: it finds damage, and is no proof against
somebody who means harm. The lock's own SHA-256 covers both.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from quantrecipe.schema.address import HubAddress
from quantrecipe.schema.base import (
    COMMIT,
    REPOSITORY,
    REVISION,
    Model,
    Name,
    NonEmpty,
    PartName,
    Sha256,
    SourcePath,
    VersionOne,
    Xxh3,
)
from quantrecipe.schema.names import Mappings
from quantrecipe.schema.recipe import Recipe
from quantrecipe.schema.schemes import DynamicActivation, Hadamard, SmoothQuant, Strength, Weight

LOCK_VERSION = 1
LOCK_NAME = "recipe.lock.json"
RECIPE_NAME = "recipe.json"
"""The copy of the recipe beside the lock."""

Role = Literal[
    "weight",
    "weight_scale",
    "weight_zero_point",
    "weight_shape",
    "second_scale",
    "scale_offset",
    "marker",
    "code_map",
    "scale_map",
    "zeros",
    "smoothing",
    "bias",
    "other",
]
Disposition = Literal["quantized", "protected", "passthrough"]
Transfer = Literal["lossless", "inverted", "cast", "quantized", "requantized", "dequantized"]
"""What becomes of a module's numbers. ``lossless``: a reader finds the same ones, bit for bit.
``inverted``: the same codes and scales, but the one scale that multiplies all of them is stored as
the number that it is divided by, or the other way round, which float32 rounds. ``cast``: plain
numbers in another dtype. ``quantized``, ``dequantized``: codes from plain numbers, or the other way
round. ``requantized``: codes from numbers that were codes of another kind."""


class Tool(Model):
    """A program and its version."""

    name: Annotated[str, NonEmpty]
    version: Annotated[str, NonEmpty]


class SourceFile(Model):
    """A file that was read."""

    part: PartName
    path: Annotated[str, NonEmpty]
    """Below the source's root, with ``/``."""

    bytes: Annotated[int, Field(ge=0)]
    header_sha256: Sha256
    """Digest of the safetensors header, its length field included."""

    sha256: Sha256 | None = None
    """Digest of the whole file, where it is known: computed from all of its bytes, or, where there
    is an ``etag``, what the Hub says of a file that was read by ranges, never as a whole."""

    etag: Annotated[str, NonEmpty] | None = None
    """Of a file that was read from a repository by ranges: what the Hub calls its content. That is
    the SHA-256 of a large file, and the ID of git's blob of any other."""


class SourceRepository(Model):
    """The repository that the source is in."""

    repo: Annotated[str, StringConstraints(pattern=REPOSITORY, max_length=200)]
    """``owner/name``."""

    revision: Annotated[str, StringConstraints(pattern=REVISION, max_length=200)] | None = None
    """What was asked for; absent: the main branch."""

    commit: Annotated[str, StringConstraints(pattern=COMMIT)]
    """The commit that all of it was read from."""

    folder: SourcePath | None = None
    """The folder of it, or file, that was the source's root; absent: all of it."""

    @classmethod
    def of(cls, address: HubAddress, commit: str) -> SourceRepository:
        """What an address stands for at a commit."""
        folder = {} if address.below == "." else {"folder": address.below}
        return cls(repo=address.repo, revision=address.revision, commit=commit, **folder)

    @property
    def address(self) -> HubAddress:
        """Where it is, by the commit that does not move."""
        return HubAddress(self.repo, self.commit, self.folder or ".")


class OutputFile(Model):
    """A file that was written."""

    path: Annotated[str, NonEmpty]
    """Below the output folder, with ``/``."""

    bytes: Annotated[int, Field(ge=0)]
    sha256: Sha256


class LockedTensor(Model):
    """A tensor that was written."""

    name: str
    dtype: str
    """As recipes name it."""

    shape: tuple[Annotated[int, Field(ge=0)], ...]
    file: Annotated[str, NonEmpty]
    offset: Annotated[int, Field(ge=0)]
    """Of its first byte, from the start of the file."""

    bytes: Annotated[int, Field(ge=0)]
    role: Role
    xxh3_128: Xxh3
    """XXH3 of its bytes, 128 bits, seed 0, in the canonical order of digits: it shows damage."""


class WeightError(Model):
    """How far a stored weight is from its source, measured while writing it."""

    sqnr_db: float | None
    """Signal to quantization noise in decibels, two decimals; ``None``: no error at all."""

    max_error_in_scales: Annotated[float, Field(ge=0.0)]
    """The largest absolute error divided by the scale of its group, or by the largest number of its
    group where scales lie in records with the codes."""


class LockedModule(Model):
    """A module as it was stored."""

    part: PartName
    name: str
    """Its dotted name in the source, or what ``target.names`` make of that."""

    shape: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]]
    """Out and in features."""

    disposition: Disposition
    transfer: Transfer
    """What became of the numbers that the source holds."""

    weight: Weight
    """How its weight is stored."""

    activation: DynamicActivation | None = None
    smoothing: SmoothQuant | None = None
    rotation: Hadamard | None = None
    scheme: Name | None = None
    reason: str | None = None
    tensors: dict[Role, LockedTensor]
    """What it consists of, by role."""

    error: WeightError | None = None
    """Absent where nothing was rounded."""


class LockedGroup(Model):
    """Modules that share their smoothing factors."""

    part: PartName
    modules: Annotated[tuple[str, ...], NonEmpty]
    """Their names, sorted; one, if it has no siblings that are smoothed."""

    alpha: Strength
    """The alpha that their factors were computed with: the recipe's, or the one that was chosen."""


class LockedOther(Model):
    """A tensor that belongs to no module."""

    part: PartName
    name: str
    """Its name in the source, or what ``target.names`` make of that."""

    tensor: LockedTensor


class Lock(Model):
    """The plan as it was carried out; what a loader and an auditor trust."""

    kind: Literal["lock"]
    version: VersionOne
    recipe: Recipe
    """The recipe, whole."""

    recipe_sha256: Sha256
    """Digest of the recipe's canonical form (RFC 8785)."""

    names: Mappings | None = None
    """The entries that ``target.names`` of the recipe stood for; absent where it has none."""

    tool: Tool
    converter: Tool
    repository: SourceRepository | None = None
    """Where the source was read from; absent: from this machine."""

    source: tuple[SourceFile, ...]
    outputs: tuple[OutputFile, ...]
    modules: tuple[LockedModule, ...]
    others: tuple[LockedOther, ...]
    smoothing_groups: Annotated[tuple[LockedGroup, ...], NonEmpty] | None = None
    """Every smoothed module, in one group each; absent where nothing is smoothed."""

    sidecars: tuple[OutputFile, ...]
    """Every other file that was written, but for this one: recipe, index of shards, configuration,
    tokenizer. In the order of their paths."""

    sha256: Sha256
    """Digest of the canonical form (RFC 8785) of this lock without this field."""

    def tensors(self) -> Iterator[tuple[str, LockedTensor]]:
        """Every tensor that it vouches for, each with its JSON pointer."""
        for index, module in enumerate(self.modules):
            for role, tensor in module.tensors.items():
                yield f"/modules/{index}/tensors/{role}", tensor
        for index, other in enumerate(self.others):
            yield f"/others/{index}/tensor", other.tensor


__all__ = [
    "LOCK_NAME",
    "LOCK_VERSION",
    "RECIPE_NAME",
    "Disposition",
    "Lock",
    "LockedGroup",
    "LockedModule",
    "LockedOther",
    "LockedTensor",
    "OutputFile",
    "Role",
    "SourceFile",
    "SourceRepository",
    "Tool",
    "WeightError",
]
