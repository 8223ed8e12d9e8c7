"""A module that several are the rows of.

Rows lie one after the other, so the tensors of the whole are those of its pieces, read one after
the other: a tensor that lies in several places. Nothing of it is computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, Final, NamedTuple

from quantrecipe.schema.layout_reading import StoredModule
from quantrecipe.schema.schemes import AnyWeight, Float8Channel, Int8Channel, ScaledWeight
from quantrecipe.schema.slicing import IN_ROWS, rows_of
from quantrecipe.schema.storage import WRITTEN_ANEW, padded
from quantrecipe.schema.tensors import TensorInfo

_BY_CHANNEL: Final[Mapping[str, type[Int8Channel] | type[Float8Channel]]] = {
    "int8": Int8Channel,
    "float8_e4m3fn": Float8Channel,
    "float8_e5m2": Float8Channel,
}
"""What a weight becomes whose pieces have one scale each."""

_IGNORED: Final = WRITTEN_ANEW | {"input_scale"}
"""Roles that nothing is converted from: a plan warns of one, and the others are of a piece."""

_ANEW: Final = (
    "Convert without target.names first, with one scheme or one plain dtype for all of them, and "
    "merge what comes out."
)
_ORIGIN: Final = "Convert from the checkpoint that it was made from."


class Refusal(NamedTuple):
    """Why modules cannot be one, and what would work."""

    reason: str
    hint: str


def merge(name: str, pieces: Sequence[StoredModule]) -> StoredModule | Refusal:
    """The module that has the rows of ``pieces``, in their order.

    Nothing but headers is read, so what only numbers would show is refused.

    Args:
        name: what it is called.
        pieces: two or more.

    Returns:
        The module, or why there is none. Where a piece has one scale for all of it, each row has
        that scale.
    """
    pieces = [by_channel(piece) for piece in pieces]
    first, *others = pieces
    refusals = chain(
        (_apart(first, other) for other in others),
        (_indivisible(piece) for piece in pieces),
        # The last may end within a block or a number, as any module may.
        (_ragged(piece) for piece in pieces[:-1]),
    )
    refused = next((each for each in refusals if each is not None), None)
    if refused is not None:
        return refused
    return replace(
        first,
        name=name,
        out_features=sum(piece.out_features for piece in pieces),
        tensors=dict(_joined(pieces)),
        renamed_from=tuple(piece.name for piece in pieces),
    )


def _apart(first: StoredModule, other: StoredModule) -> Refusal | None:
    """What two pieces differ in that their rows must have in common."""
    names = f"{first.name!r} and {other.name!r}"
    if first.in_features != other.in_features:
        reason = f"{names} have {first.in_features} and {other.in_features} input features"
        return Refusal(reason, "Rows of one module have one input; leave these apart.")
    if first.weight != other.weight:
        how = "; ".join(_differ(first, other))
        return Refusal(f"{names} are stored differently ({how})", _ANEW)
    if first.storage != other.storage:
        return Refusal(f"codes or scales of {names} lie in different ways", _ANEW)
    if first.rotation != other.rotation:
        return Refusal(f"{names} are not rotated alike", _ORIGIN)
    mine, its = first.tensors.get("bias"), other.tensors.get("bias")
    if (mine is None) != (its is None):
        owner, without = (first, other) if its is None else (other, first)
        reason = f"{owner.name!r} has a bias and {without.name!r} has none"
        return Refusal(reason, "Leave them apart, or give the other a bias of zeros.")
    if mine is not None and its is not None and mine.dtype != its.dtype:
        reason = f"the biases of {names} are {mine.dtype} and {its.dtype}"
        return Refusal(reason, "Leave them apart, or store both biases alike.")
    return None


def _differ(*pieces: StoredModule) -> Iterator[str]:
    """How the weights of two pieces are stored, each in what the other does not say."""
    said = [_fields(piece.weight) for piece in pieces]
    both = [key for key in said[0] if said[0][key] == said[1].get(key)]
    for mine in said:
        only = {key: value for key, value in mine.items() if key not in both}
        yield ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in only.items())


def _fields(weight: AnyWeight) -> dict[str, Any]:
    return weight.model_dump(mode="json", exclude={"quantizer"})


def _indivisible(piece: StoredModule) -> Refusal | None:
    """Why a piece cannot become rows of anything: what it has is of all of it."""
    if "smoothing" in piece.tensors:
        reason = (
            f"{piece.name!r} is stored with smoothing factors, and headers do not say whether all "
            "pieces have the same"
        )
        return Refusal(reason, _ORIGIN)
    for role in sorted(piece.tensors.keys() - IN_ROWS - _IGNORED):
        what = role.replace("_", " ")
        reason = f"{piece.name!r} has {what}, of all its rows together"
        return Refusal(reason, _ANEW)
    if not isinstance(piece.weight, ScaledWeight):
        return None
    if piece.weight.granularity == "tensor":
        fmt = piece.weight.format
        reason = f"{fmt} has no scales by channel, and each piece has one for all of it"
        return Refusal(reason, _ANEW)
    scale = piece.tensors.get("weight_scale")
    if scale is not None and rows_of(scale, _rows(piece, "weight_scale")) is None:
        return Refusal(f"the scales of {piece.name!r} are not stored row by row", _ANEW)
    return None


def _ragged(piece: StoredModule) -> Refusal | None:
    """Why rows cannot follow those of a piece without a seam."""
    rows, weight = piece.out_features, piece.weight
    if not isinstance(weight, ScaledWeight):
        return None
    height = weight.group_shape(rows, piece.in_features)[0]
    packing, tile = (
        piece.stored("weight_zero_point").packing,
        piece.stored("weight_scale").rows_together,
    )
    ends = f"the {rows} rows of {piece.name!r} end inside"
    if rows % height:
        return Refusal(f"{ends} a block of {height} rows that share a scale", _ANEW)
    if rows % tile:
        return Refusal(f"{ends} tiles of {tile} rows of scales", _ANEW)
    if packing is not None and rows % packing.codes:
        return Refusal(f"{ends} a number that holds {packing.codes} zero points", _ANEW)
    return None


def by_channel(piece: StoredModule) -> StoredModule:
    """A module of which each row has the scale that all of it has; any other as it is."""
    weight, rows = piece.weight, piece.out_features
    model = _BY_CHANNEL.get(weight.format)
    if not isinstance(weight, ScaledWeight) or weight.granularity != "tensor" or model is None:
        return piece
    scale = piece.tensors["weight_scale"]
    repeated = replace(scale, shape=(rows, 1), nbytes=rows * scale.nbytes, times=rows)
    said = weight.model_dump(exclude_unset=True) | {"granularity": "channel"}
    return replace(
        piece,
        weight=model.model_validate(said),
        tensors={**piece.tensors, "weight_scale": repeated},
    )


def row_by_row(module: StoredModule, weight: AnyWeight) -> StoredModule:
    """A module as ``by_channel`` has it, if it is to be stored in that format; else as it is."""
    by_row = by_channel(module)
    if not isinstance(weight, ScaledWeight) or not isinstance(by_row.weight, ScaledWeight):
        return module
    wanted, there = ((each.format, each.granularity) for each in (weight, by_row.weight))
    return by_row if wanted == there else module


def _joined(pieces: Sequence[StoredModule]) -> Iterator[tuple[str, TensorInfo]]:
    """The tensors of the whole, by role."""
    for role in dict.fromkeys(role for piece in pieces for role in piece.tensors):
        if role in WRITTEN_ANEW:
            continue
        having = [piece for piece in pieces if role in piece.tensors]
        infos = [piece.tensors[role] for piece in having]
        if role not in IN_ROWS:
            yield role, _in_a_row(infos, (sum(info.nbytes for info in infos),))
            continue
        rows = [_rows(piece, role) for piece in having]
        shape = rows_of(infos[0], rows[0])
        assert shape is not None
        yield role, _in_a_row(infos, shape(sum(rows)))


def _rows(piece: StoredModule, role: str) -> int:
    """The rows that a tensor of a piece has in its file."""
    if role == "weight_scale":
        assert isinstance(piece.weight, ScaledWeight)
        grid_rows = piece.weight.scale_grid(piece.out_features, piece.in_features)[0]
        return padded(grid_rows, piece.stored(role).rows_together)
    return piece.out_features if role == "weight" else piece.tensors[role].shape[0]


def _in_a_row(infos: Sequence[TensorInfo], shape: tuple[int, ...]) -> TensorInfo:
    first = infos[0]
    return TensorInfo(
        name=" + ".join(info.name for info in infos),
        dtype=first.dtype,
        shape=shape,
        file=first.file,
        offset=first.offset,
        nbytes=sum(info.nbytes for info in infos),
        pieces=tuple(infos),
    )
