"""A part of a checkpoint held against a model: what goes where, or everything that does not fit."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from quantrecipe.formats.dtypes import TORCH_DTYPES
from quantrecipe.loaders.checkpoint import Checkpoint
from quantrecipe.loaders.linear import QuantizedLinear
from quantrecipe.loaders.naming import activations, local_names, plain_names
from quantrecipe.loaders.placement import Placement
from quantrecipe.loaders.replacing import PARAMETRIZED, STORED, not_replaceable
from quantrecipe.loaders.sites import Held, Model, Place, Site, dotted
from quantrecipe.loaders.transfer import PIECE, Wanted
from quantrecipe.schema.dtypes import BLOCK_DTYPES, is_plain
from quantrecipe.schema.layout_reading import StoredModule
from quantrecipe.schema.problems import InvalidInput, Problem, closest
from quantrecipe.schema.schemes import PlainWeight
from quantrecipe.schema.storage import WRITTEN_ANEW, padded
from quantrecipe.schema.tensors import TensorInfo

_COMPARED: Final = 50


@dataclass(slots=True)
class Load:
    """A tensor to be read, and where the model will hold it.

    Attributes:
        wanted: what is read, and where to.
        role: one of ``STORED`` of a quantized module, or ``other``.
        places: one or, where weights are tied, several.
        trainable: whether it will require gradients.
    """

    wanted: Wanted
    role: str
    places: list[Place]
    trainable: bool = False


@dataclass(frozen=True, slots=True)
class Swap:
    """A linear of the model and the quantized one that takes its place."""

    site: Site
    made: QuantizedLinear
    stored: StoredModule


@dataclass(slots=True)
class Match:
    """How a part fits a model, with nothing done yet.

    Attributes:
        swaps: linears that quantized ones take the place of.
        loads: every tensor that is read.
        moves: tensors of the model that are in no checkpoint, and where they belong.
        left_out: tensors that nothing computes with.
        problems: what does not fit.
    """

    swaps: list[Swap] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)
    moves: list[tuple[Held, torch.device]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def match(
    checkpoint: Checkpoint,
    part: str,
    model: Model,
    placement: Placement,
    *,
    dtype: torch.dtype | None,
    kernel: str,
) -> Match:
    """Decide from headers alone what becomes of every module and tensor.

    Only copies of what the model has once are read: they have to be equal; and tensors that say the
    same of every module: they have to.
    """
    return _Matching(checkpoint, part, model, placement, dtype, kernel).run()


class _Matching:
    def __init__(
        self,
        checkpoint: Checkpoint,
        part: str,
        model: Model,
        placement: Placement,
        dtype: torch.dtype | None,
        kernel: str,
    ) -> None:
        self.checkpoint = checkpoint
        self.part = part
        self.model = model
        self.placement = placement
        self.dtype = dtype
        self.kernel = kernel
        self.opened = checkpoint.parts[part]
        self.activations = activations(checkpoint, part)
        self.found = Match(problems=[*model.problems, *placement.problems])
        self.filled: set[Place] = set()
        self.offered: set[str] = set()
        self.extra: dict[str, Problem] = {}
        self.missing: dict[str, Problem] = {}

    def run(self) -> Match:
        if self.model.problems:  # what is inside cannot be judged
            return self.found
        quantized: dict[str, StoredModule] = {}
        plain: dict[str, TensorInfo] = {}
        source = self.checkpoint.source_layout or self.checkpoint.layout
        for name, stored in self.opened.modules.items():
            if "input_scale" in stored.tensors:
                self.found.left_out.append(stored.tensors["input_scale"].name)
            if not isinstance(stored.weight, PlainWeight):
                quantized[name] = stored
                continue
            for role, local in plain_names(source, stored).items():
                if role != "input_scale":
                    self._offer(plain, f"{name}.{local}", stored.tensors[role])
        for name, info in self.opened.others.items():
            self._offer(plain, name, info)
        self._quantized(quantized, plain)
        self._plain(plain)
        self._rest()
        self.found.problems += self._unmatched()
        self.found.problems += self.placement.unused([*self.model.by_name, *self.model.held])
        return self.found

    def _offer(self, plain: dict[str, TensorInfo], name: str, info: TensorInfo) -> None:
        if name in plain:
            self._problem(
                "doubly-owned", f"it and {plain[name].name!r} are both the model's {name!r}", info
            )
        plain[name] = info
        self.offered.add(name)

    # Quantized modules

    def _quantized(
        self, quantized: Mapping[str, StoredModule], plain: dict[str, TensorInfo]
    ) -> None:
        sites: dict[int, tuple[Site, list[StoredModule]]] = {}
        for name, stored in quantized.items():
            self.offered.update(f"{name}.{role}" for role in ("weight", "bias"))
            site = self.model.by_name.get(name)
            if site is None:
                weight = stored.tensors["weight"]
                self.extra[f"{name}.weight"] = Problem(
                    "unknown-module",
                    f"the model has no module {name!r}",
                    hint=self._near(name, self.model.by_name),
                    file=str(weight.file),
                    tensor=weight.name,
                )
                continue
            sites.setdefault(id(site), (site, []))[1].append(stored)
            if "bias" in stored.tensors:
                self._offer(plain, f"{name}.{_bias_name(site.module)}", stored.tensors["bias"])
        tied: dict[int, list[tuple[Site, list[StoredModule]]]] = {}
        for site, copies in sites.values():
            problem = _compiled(site, copies[0]) or _not_a_linear(site.module, copies[0])
            if problem is not None:
                hint = problem[2] or self._filled_up(site.module, copies[0])
                self._problem(*problem[:2], copies[0].tensors["weight"], hint)
                self._fill(self._inside(site))
                continue
            tied.setdefault(id(site.module.weight), []).append((site, copies))
        for group in tied.values():
            self._tied(group, plain)

    def _filled_up(self, module: nn.Module, stored: StoredModule) -> str | None:
        """Why a weight is larger than the model's, where its program fills weights up."""
        if isinstance(stored.weight, PlainWeight):
            return None
        holds = self.checkpoint.layout.holds.get(stored.weight.format)
        if holds is None or holds.multiples is None or not isinstance(module, nn.Linear):
            return None
        rows, columns = map(padded, (module.out_features, module.in_features), holds.multiples)
        # Rows that a bias shows to be filling are left out already.
        if stored.out_features not in (module.out_features, rows) or stored.in_features != columns:
            return None
        return (
            f"The program that wrote it fills weights up to multiples of {list(holds.multiples)}. "
            "Convert this module anew, in another layout or in a plain dtype."
        )

    def _inside(self, *sites: Site) -> list[Place]:
        modules = {id(module) for site in sites for module in site.module.modules()}
        return [
            place
            for held in self.model.tensors
            for place in held.places
            if id(place.module) in modules
        ]

    def _tied(
        self, group: list[tuple[Site, list[StoredModule]]], plain: Mapping[str, TensorInfo]
    ) -> None:
        """Linears with one weight: each becomes a quantized one, with one set of codes."""
        (first, (stored, *_)), *_ = group
        self._same([copy for _, copies in group for copy in copies])
        members = [site for site, _ in group]
        # Others that hold the same weight follow, where the checkpoint does not have it for them.
        for place in self._held(first.module, "weight").places:
            site = self.model.by_name[place.name.rpartition(".")[0]]
            if site in members or any(f"{name}.weight" in plain for name in site.names):
                continue
            if _not_a_linear(site.module, stored) is None:
                members.append(site)
        own = {id(site): copies[0] for site, copies in group}
        loads: dict[str, Load] = {}
        for site in members:
            self._swap(site, own.get(id(site), stored), loads)

    def _swap(self, site: Site, stored: StoredModule, loads: dict[str, Load]) -> None:
        module = site.module
        assert isinstance(module, nn.Linear)
        device = self._device(site.names[0], module.weight)
        made = self._made(module, stored)
        self._fill([place for place in self._inside(site) if not _is_bias(place)])
        if device is None or made is None:
            return
        self.found.swaps.append(Swap(site, made, stored))
        try:
            self.checkpoint.stored(stored.name, self.part).check_constants()
        except InvalidInput as refused:
            self.found.problems += refused.problems
        said = [role for role in stored.tensors if role in WRITTEN_ANEW]
        self.found.left_out += [stored.tensors[role].name for role in said]
        for role in STORED:
            if role not in stored.tensors:
                continue
            place = Place(made, made.names[role], dotted(site.names[0], made.names[role]), False)
            if role in loads:
                self._one_device(loads[role].wanted.device, device, place)
                loads[role].places.append(place)
            else:
                held = made._parameters[made.names[role]]
                assert held is not None
                wanted = Wanted(
                    stored.tensors[role], device, held.dtype, held.dtype, tuple(held.shape)
                )
                loads[role] = self._load(wanted, role, [place])

    def _made(self, module: nn.Linear, stored: StoredModule) -> QuantizedLinear | None:
        activation = self.activations.get(stored.name)
        assert not isinstance(stored.weight, PlainWeight)
        bias = stored.tensors.get("bias")
        made = QuantizedLinear(
            stored.in_features,
            stored.out_features,
            stored.weight,
            activation,
            smoothing="smoothing" in stored.tensors,
            rotation=stored.rotation,
            bias=module._parameters[_bias_name(module)] is not None,
            shapes=_shapes(stored),
            storage=stored.storage,
            scale_offset=stored.scale_offset,
            names=local_names(self.checkpoint.layout, self.part, stored),
            kernel=self.kernel,
            device="meta",
            dtype=None if bias is None else self._dtype(bias),
        )
        made.train(module.training)
        if not isinstance(module, QuantizedLinear):
            return made
        if _alike(module, made):
            return module
        self._problem(
            "other-format",
            f"the model has {module.extra_repr()} there, the checkpoint {made.extra_repr()}",
            stored.tensors["weight"],
            "Load into a model as it was built, with ordinary linears.",
        )
        return None

    def _same(self, copies: list[StoredModule]) -> None:
        """Modules that the model has once are stored once, or the same way every time."""
        first = copies[0]
        for other in copies[1:]:
            said = (other.rotation, other.storage, other.scale_offset)
            if said != (first.rotation, first.storage, first.scale_offset):
                self._differ(other.tensors["weight"], first.tensors["weight"])
            for role in STORED:
                info, same = other.tensors.get(role), first.tensors.get(role)
                if info is not None and same is not None:
                    self._equal(same, info)
                elif info is not None or same is not None:
                    self._differ(other.tensors["weight"], first.tensors["weight"])

    def _equal(self, first: TensorInfo, other: TensorInfo) -> None:
        if not _same_bytes(self.checkpoint, first, other):
            self._differ(other, first)

    def _differ(self, info: TensorInfo, first: TensorInfo) -> None:
        self._problem(
            "tied-differ",
            f"the model has it and {first.name!r} once, the checkpoint has two that differ",
            info,
            "Untie them in the model, or convert from a source in which they are the same.",
        )

    # Plain tensors

    def _plain(self, plain: Mapping[str, TensorInfo]) -> None:
        loads: dict[int, Load] = {}
        for name, info in plain.items():
            held = self.model.held.get(name)
            if held is None or not held.stored:
                self._unheld(name, held, info)
                continue
            if id(held) in loads:
                self._equal(loads[id(held)].wanted.info, info)
                continue
            places = [place for place in held.places if place not in self.filled]
            self._fill(held.places)
            device = self._device(name, held.tensor)
            if device is None or not places:
                continue
            if self._fits(name, held, places, info):
                for place in places:
                    self._one_device(device, self._device(place.name, held.tensor), place)
                wanted = Wanted(
                    info, device, self._dtype(info), TORCH_DTYPES[info.dtype], info.shape
                )
                load = self._load(wanted, "other", [self._now(place) for place in places])
                load.trainable = held.tensor.requires_grad and not any(
                    isinstance(place.module, QuantizedLinear) for place in load.places
                )
                loads[id(held)] = load

    def _unheld(self, name: str, held: Held | None, info: TensorInfo) -> None:
        site = self.model.by_name.get(name.rpartition(".")[0])
        if held is None and site is not None and is_parametrized(site.module):
            self._problem(
                "parametrized", f"the model computes {name!r} from others", info, PARAMETRIZED
            )
            self._fill(self._inside(site))
            return
        self.extra[name] = Problem(
            "extra-tensor",
            f"the model has no {name!r}"
            if held is None
            else f"the model keeps {name!r} out of checkpoints",
            hint=self._near(name, self.model.held) if held is None else None,
            file=str(info.file),
            tensor=info.name,
        )

    def _now(self, place: Place) -> Place:
        """The same place in the module that takes the place of its own, if one does."""
        for swap in self.found.swaps:
            if swap.site.module is place.module:
                return replace(place, module=swap.made, attribute=swap.made.names[place.attribute])
        return place

    def _fits(self, name: str, held: Held, places: list[Place], info: TensorInfo) -> bool:
        tensor = held.tensor
        held_quantized = [
            self.model.by_name[place.name.rpartition(".")[0]]
            for place in places
            if isinstance(place.module, QuantizedLinear) and not _is_bias(place)
        ]
        if held_quantized:
            self._fill(self._inside(*held_quantized))
            self._problem(
                "other-format",
                f"the model's {name!r} is that of a quantized linear, but it is stored plain",
                info,
                "Load into a model as it was built, with ordinary linears.",
            )
        elif info.shape != tuple(tensor.shape):
            self._problem(
                "misshaped-tensor",
                f"is {list(info.shape)}, the model's {name!r} is {list(tensor.shape)}",
                info,
            )
        elif info.dtype not in TORCH_DTYPES:
            self._problem("unsupported-dtype", f"torch has no dtype for {info.dtype}", info)
        elif TORCH_DTYPES[info.dtype] != tensor.dtype and not (
            is_plain(info.dtype) and tensor.is_floating_point()
        ):
            self._problem(
                "mistyped-tensor",
                f"is {info.dtype}, the model's {name!r} is {str(tensor.dtype)[6:]}",
                info,
            )
        else:
            return True
        return False

    # What is left

    def _rest(self) -> None:
        for held in self.model.tensors:
            places = [place for place in held.places if place not in self.filled]
            if not places:
                continue
            name = places[0].name
            if held.stored:
                self.missing[name] = _missing(name, self._near(name, self.offered))
                continue
            if held.tensor.is_meta:
                self.found.problems.append(_without_values(places[0]))
                continue
            device = self._device(name, held.tensor)
            if device is not None and device not in (held.tensor.device, torch.device("meta")):
                self.found.moves.append((held, device))

    def _unmatched(self) -> Iterator[Problem]:
        """What only one side has; where a prefix explains it, that is said once."""
        prefixed = _prefix(self.offered, self.missing, self.extra)
        if prefixed is not None:
            problem, explained = prefixed
            yield problem
            for name in explained:
                self.missing.pop(name, None)
                self.extra.pop(name, None)
        yield from self.extra.values()
        yield from self.missing.values()

    # Shared

    def _fill(self, places: list[Place]) -> None:
        self.filled.update(places)

    def _held(self, module: nn.Module, role: str) -> Held:
        local = module.names[role] if isinstance(module, QuantizedLinear) else role
        tensor = module._parameters[local]
        return next(held for held in self.model.tensors if held.tensor is tensor)

    def _load(self, wanted: Wanted, role: str, places: list[Place]) -> Load:
        load = Load(wanted, role, places)
        self.found.loads.append(load)
        return load

    def _dtype(self, info: TensorInfo) -> torch.dtype:
        plain = self.dtype is not None and is_plain(info.dtype)
        return self.dtype if plain and self.dtype is not None else TORCH_DTYPES[info.dtype]

    def _device(self, name: str, tensor: Tensor) -> torch.device | None:
        device = self.placement.of(name, tensor)
        if device is None and not self.placement.problems:
            self.found.problems.append(
                Problem(
                    "no-device",
                    "the device map has no entry for it",
                    hint='Add one, or "" for all that has none.',
                    tensor=name,
                )
            )
        return device

    def _one_device(self, wanted: torch.device, device: torch.device | None, place: Place) -> None:
        if device is not None and device != wanted:
            self.found.problems.append(
                Problem(
                    "tied-apart",
                    f"is one tensor under several names, but goes to {wanted} and {device}",
                    hint="Give both modules the same device.",
                    tensor=place.name,
                )
            )

    def _near(self, name: str, known: Collection[str]) -> str | None:
        if len(self.extra) + len(self.missing) > _COMPARED:
            return None  # comparing names takes long, and a prefix explains most
        near = closest(name, known)
        return None if near is None else f"Did you mean {near!r}?"

    def _problem(self, kind: str, message: str, info: TensorInfo, hint: str | None = None) -> None:
        self.found.problems.append(
            Problem(kind, message, hint=hint, file=str(info.file), tensor=info.name)
        )


def _shapes(stored: StoredModule) -> dict[str, tuple[int, ...]]:
    """What shapes its tensors have, by role, but for records: headers count their numbers."""
    skipped = {"weight"} if stored.tensors["weight"].dtype in BLOCK_DTYPES else set()
    return {role: info.shape for role, info in stored.tensors.items() if role not in skipped}


def _bias_name(module: nn.Module) -> str:
    return module.names["bias"] if isinstance(module, QuantizedLinear) else "bias"


def _is_bias(place: Place) -> bool:
    return place.attribute == _bias_name(place.module)


def _compiled(site: Site, stored: StoredModule) -> tuple[str, str, str | None] | None:
    if any(attribute == "_orig_mod" for _, attribute in site.owners):
        return (
            "closed-wrapper",
            f"the model's {stored.name!r} is compiled by itself, and would not be replaced there",
            "Load first, then compile.",
        )
    return None


def _not_a_linear(module: nn.Module, stored: StoredModule) -> tuple[str, str, str | None] | None:
    """Why the module that is stored cannot take the place of a module: kind, message and hint."""
    if not isinstance(module, QuantizedLinear):
        refusal = not_replaceable(module, stored.name)
        if refusal is not None:
            return refusal
    assert isinstance(module, nn.Linear)
    return _other_shape(module, stored)


def _other_shape(module: nn.Linear, stored: StoredModule) -> tuple[str, str, str | None] | None:
    shape = stored.out_features, stored.in_features
    wanted = (
        (module.out_features, module.in_features)
        if isinstance(module, QuantizedLinear)
        else tuple(module.weight.shape)
    )
    if shape != wanted:
        message = f"is {list(shape)}, the model's {stored.name!r} is {list(wanted)}"
        return "misshaped-tensor", message, None
    return None


def _alike(old: QuantizedLinear, new: QuantizedLinear) -> bool:
    return (
        old.weight_format == new.weight_format
        and old.activation == new.activation
        and old.names == new.names
        and old.storage == new.storage
        and old.offset == new.offset
        and all(_same_shape(old, new, role) for role in STORED)
        and old.rotation == new.rotation
    )


def _same_shape(old: QuantizedLinear, new: QuantizedLinear, role: str) -> bool:
    mine, other = (each._parameters[each.names[role]] for each in (old, new))
    if mine is None or other is None:
        return mine is other
    return mine.shape == other.shape


def _missing(name: str, hint: str | None) -> Problem:
    return Problem("missing-tensor", "the checkpoint does not have it", hint=hint, tensor=name)


def _without_values(place: Place) -> Problem:
    if place.buffer:
        return Problem(
            "buffer-without-values",
            "a buffer on the meta device that is in no checkpoint (it is not persistent)",
            hint="Build the model with its buffers in memory (quantrecipe.loaders.without_weights; "
            'a plain `with torch.device("meta")` leaves them without values), or compute it and '
            "set it.",
            tensor=place.name,
        )
    return Problem(
        "adapter-without-values",
        "an adapter's parameter on the meta device, which is in no checkpoint",
        hint="Load into the model first, then add the adapter.",
        tensor=place.name,
    )


def _same_bytes(checkpoint: Checkpoint, first: TensorInfo, other: TensorInfo) -> bool:
    if (first.dtype, first.nbytes) != (other.dtype, other.nbytes):
        return False
    for start in range(0, first.nbytes, PIECE):
        size = min(PIECE, first.nbytes - start)
        pieces = bytearray(size), bytearray(size)
        for info, piece in zip((first, other), pieces, strict=True):
            checkpoint.read_into(info, start, piece)
        if pieces[0] != pieces[1]:
            return False
    return True


def _prefix(
    offered: set[str], missing: Mapping[str, Problem], extra: Mapping[str, Problem]
) -> tuple[Problem, list[str]] | None:
    """The prefix that one side has and the other has not, if it explains most of what differs."""
    for name in islice(extra, _COMPARED):
        for wanted in missing:
            if wanted.endswith(f".{name}"):
                prefix = wanted[: -len(name)]
                explained = [each for each in missing if each.removeprefix(prefix) in offered]
                found = [each for each in extra if prefix + each in missing]
                side = "model's names begin", "checkpoint's"
                hint = f"Load into the module {prefix[:-1]!r} of the model."
            elif name.endswith(f".{wanted}"):
                prefix = name[: -len(wanted)]
                explained = [each for each in missing if prefix + each in offered]
                found = [each for each in extra if each.startswith(prefix)]
                side = "checkpoint's names begin", "model's"
                hint = f"Load into a model that has it as its module {prefix[:-1]!r}."
            else:
                continue
            if 2 * len(found) >= len(extra):
                message = (
                    f"the {side[0]} with {prefix!r}, the {side[1]} do not "
                    f"({len(explained):,} tensors, {explained[0]!r} for one)"
                )
                return Problem("other-prefix", message, hint=hint), [*explained, *found]
    return None
