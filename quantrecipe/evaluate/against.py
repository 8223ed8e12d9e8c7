"""A converted checkpoint against its source: every bound proven from the bytes of both."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import torch

from quantrecipe.checkpoint import file_sha256, open_parts
from quantrecipe.evaluate.copies import check_carried, check_cast, check_copy, check_vector
from quantrecipe.evaluate.folds import read_folded
from quantrecipe.evaluate.parallel import on_all_cores
from quantrecipe.evaluate.proofs import Measured, prove_bound
from quantrecipe.evaluate.records import ModuleError, Progress
from quantrecipe.formats.folding import FoldedFactors
from quantrecipe.formats.proof import COMPILED_PAYS_FROM_BYTES
from quantrecipe.loaders import Checkpoint, open_checkpoint
from quantrecipe.loaders.checkpoint import OpenPart
from quantrecipe.schema.layout_reading import StoredModule
from quantrecipe.schema.location import Location
from quantrecipe.schema.lock import Lock, LockedModule, LockedOther, WeightError
from quantrecipe.schema.merging import row_by_row
from quantrecipe.schema.plan_readback import same_codes
from quantrecipe.schema.problems import InvalidInput, Problem
from quantrecipe.schema.schemes import AnyScaledWeight, PlainWeight, ScaledWeight
from quantrecipe.schema.tensors import SourcePart, TensorInfo

# The lock holds two decimals of a decibel, and another's converter may add in another order.
_DECIBELS: Final = 0.005 + 2e-5
_NOT_LOCKED: Final = "the source has it, and the lock does not"


@dataclass(frozen=True, slots=True)
class Proof:
    """What holding a checkpoint against its source found.

    Attributes:
        problems: everything that does not hold.
        of_numbers: those that checking the checkpoint by itself cannot have found.
        measured: every quantized module, the worst first.
    """

    problems: tuple[Problem, ...]
    of_numbers: tuple[Problem, ...] = ()
    measured: tuple[ModuleError, ...] = ()


def prove(path: Path, source: Path, lock: Lock, *, block_bytes: int, progress: Progress) -> Proof:
    """Hold every number of a converted checkpoint to its source.

    Args:
        path: the converted checkpoint.
        source: the root of what it was made from.
        lock: of the checkpoint.
        block_bytes: about how many bytes of float32 numbers to hold at a time.
        progress: told of the source bytes of each module.
    """
    recipe = lock.recipe
    try:
        parts = open_parts(source, recipe.source.parts)
        other = tuple(_other_source(source, lock, parts))
        if other:
            return Proof(other, other)
        original = open_checkpoint(
            source,
            layout=recipe.source.layout,
            parts=recipe.source.parts,
            names=lock.names or (),
        )
    except InvalidInput as error:
        return Proof(error.problems, error.problems)
    original.parts = dict(_as_planned(original, lock))
    with original:
        try:
            converted = open_checkpoint(path)
        except InvalidInput as error:
            return Proof(error.problems)
        with converted:
            try:
                folds = read_folded(path, lock)
            except InvalidInput as error:
                return Proof(error.problems)
            work = _Against(lock, original, converted, folds, block_bytes, progress)
            work.run()
    problems = tuple(work.problems)
    return Proof(problems, problems, tuple(sorted(work.measured, key=worst_first)))


def worst_first(module: ModuleError) -> tuple[float, str, str]:
    """The order of modules by SQNR; those without any error come last."""
    sqnr = math.inf if module.sqnr_db is None else module.sqnr_db
    return (-math.inf if math.isnan(sqnr) else sqnr), module.part, module.name


def _as_planned(original: Checkpoint, lock: Lock) -> Iterator[tuple[str, OpenPart]]:
    """The source as its plan has it: one scale of all rows for each of them, where it says so."""
    locked = {(module.part, module.name): module.weight for module in lock.modules}
    for part, opened in original.parts.items():
        modules = {
            name: row_by_row(module, locked.get((part, name), module.weight))
            for name, module in opened.modules.items()
        }
        yield part, replace(opened, modules=modules)


def _other_source(root: Path, lock: Lock, parts: tuple[SourcePart, ...]) -> Iterator[Problem]:
    """Whether these are the files that the lock says were read; they may have been moved."""
    there = {(part.name, file.relative): file for part in parts for file in part.files}
    locked = {(file.part, file.path): file for file in lock.source}
    hint = "Name the source that it was converted from."

    def other(message: str, file: Location) -> Problem:
        return Problem("another-source", f"it is another source: {message}", hint, file=str(file))

    for key, file in locked.items():
        found = there.get(key)
        if found is None:
            yield other(f"part {key[0]!r} was read from {key[1]!r}", root)
        elif found.header_sha256 != file.header_sha256:
            yield other("its header is not the one that was read", found.path)
        elif found.size != file.bytes:
            yield other(f"it has {found.size:,} bytes, not {file.bytes:,}", found.path)
        elif file.sha256 is not None and file_sha256(found.path) != file.sha256:
            yield other("its bytes are not those that were read", found.path)
    for key in there.keys() - locked.keys():
        yield other(f"{key[1]!r} of part {key[0]!r} was not read", there[key].path)


@dataclass(slots=True)
class _Against:
    lock: Lock
    source: Checkpoint
    output: Checkpoint
    folds: FoldedFactors
    block_bytes: int
    progress: Progress
    problems: list[Problem] = field(default_factory=list)
    measured: list[ModuleError] = field(default_factory=list)
    compiled: bool = False

    def run(self) -> None:
        known = {(module.part, module.name) for module in self.lock.modules}
        others = {(other.part, other.name) for other in self.lock.others}
        for part, contents in self.source.parts.items():
            for name, stored in contents.modules.items():
                if (part, name) not in known:
                    self._note("missing-module", _NOT_LOCKED, stored.tensors["weight"])
            for name, info in contents.others.items():
                if (part, name) not in others:
                    self._note("missing-tensor", _NOT_LOCKED, info)
        self.compiled = self._to_prove() >= COMPILED_PAYS_FROM_BYTES
        for locked, done in zip(
            self.lock.modules, on_all_cores(self._apart, self.lock.modules), strict=True
        ):
            self._take_in(locked, done)
        for other in self.lock.others:
            self._take_in(other, self._apart(other))

    def _to_prove(self) -> int:
        """Bytes of source weights of which every bound is to be proven."""
        quantized = {(m.part, m.name) for m in self.lock.modules if m.disposition == "quantized"}
        return sum(
            stored.tensors["weight"].nbytes
            for part, contents in self.source.parts.items()
            for name, stored in contents.modules.items()
            if (part, name) in quantized
        )

    def _apart(self, locked: LockedModule | LockedOther) -> _Against:
        """One module or other tensor by itself, so that the order of work shows nowhere."""
        work = replace(self, problems=[], measured=[])
        try:
            if isinstance(locked, LockedModule):
                work._module(locked)
            else:
                work._other(locked)
        except InvalidInput as error:
            work.problems += error.problems
        return work

    def _take_in(self, locked: LockedModule | LockedOther, done: _Against) -> None:
        self.problems += done.problems
        self.measured += done.measured
        contents = self.source.parts.get(locked.part)
        if contents is not None and locked.name in contents.modules:
            self.progress(contents.modules[locked.name].nbytes, locked.name)
        elif contents is not None and locked.name in contents.others:
            self.progress(contents.others[locked.name].nbytes, locked.name)

    def _other(self, locked: LockedOther) -> None:
        source = self.source.part(locked.part).others.get(locked.name)
        target = self.output.part(locked.part).others.get(locked.name)
        if target is None:
            return  # a lock that names it otherwise than its layout does has been told of
        if source is None:
            self._note("extra-tensor", "the source has no such tensor", target)
            return
        self._carried(locked, source, target)

    def _module(self, locked: LockedModule) -> None:
        source = self.source.part(locked.part).modules.get(locked.name)
        output = self.output.module(locked.name, locked.part)
        if source is None:
            self._note("extra-module", "the source has no such module", output.tensors["weight"])
            return
        if (source.out_features, source.in_features) != (output.out_features, output.in_features):
            message = (
                f"is [{output.out_features}, {output.in_features}], and "
                f"[{source.out_features}, {source.in_features}] in the source"
            )
            self._note("misshaped-tensor", message, output.tensors["weight"])
            return
        if locked.transfer in ("quantized", "requantized") and isinstance(
            output.weight, ScaledWeight
        ):
            self._quantized(locked, output.weight, output.tensors["weight"])
        else:
            self._kept(locked, source, output)
        if "bias" in source.tensors or "bias" in output.tensors:
            self._bias(locked, source, output)

    def _quantized(self, locked: LockedModule, weight: AnyScaledWeight, info: TensorInfo) -> None:
        said = locked.weight
        quantizer = said.quantizer if isinstance(said, ScaledWeight) else weight.quantizer
        found = prove_bound(
            self.source,
            self.output,
            locked.name,
            locked.part,
            self.block_bytes,
            quantizer,
            self.folds,
            prefer_compiled=self.compiled,
        )
        self.problems += found.problems
        self._factors(locked)
        self.measured.append(
            ModuleError(
                locked.part,
                locked.name,
                weight,
                found.sqnr_db,
                found.max_error_in_scales,
                found.of_bound,
            )
        )
        if locked.error is not None:
            for message in _differences(locked.error, found):
                self._note("error-differs", message, info)

    def _factors(self, locked: LockedModule) -> None:
        """Inputs are divided by the factors as stored: they are positive, and as round as said."""
        info = self.output.module(locked.name, locked.part).tensors.get("smoothing")
        if info is None:
            return
        factors = self.output.tensor(info)
        wrong = ~(factors > 0)
        what = "is not positive"
        if locked.smoothing is not None and locked.smoothing.power_of_two:
            wrong |= torch.frexp(factors).mantissa != 0.5
            what = "is no power of two"
        if bool(wrong.any()):
            index = int(wrong.nonzero()[0])
            message = f"the factor {float(factors[index])!r} at index {index} {what}"
            self._note("bad-factor", message, info)

    def _kept(self, locked: LockedModule, source: StoredModule, output: StoredModule) -> None:
        shape = source.out_features, source.in_features
        info = output.tensors["weight"]
        if locked.disposition == "passthrough" and not self._right_dtype(source, output):
            message = f"is {output.weight.format}, and {source.weight.format} in the source"
            self._note("mistyped-tensor", message, info)
        elif isinstance(output.weight, PlainWeight):
            self.problems += check_cast(
                self.source, self.output, locked.name, locked.part, self.block_bytes, self.folds
            )
        elif same_codes(source.weight, output.weight, shape):
            self.problems += check_carried(
                self.source, self.output, locked.name, locked.part, self.block_bytes
            )
        else:
            self._note("mistyped-tensor", "its codes are not stored as in the source", info)

    def _right_dtype(self, source: StoredModule, output: StoredModule) -> bool:
        wanted = self.lock.recipe.target.passthrough_dtype
        if isinstance(source.weight, PlainWeight) or wanted == "keep":
            shape = source.out_features, source.in_features
            return same_codes(source.weight, output.weight, shape)
        return output.weight.format == wanted

    def _bias(self, locked: LockedModule, source: StoredModule, output: StoredModule) -> None:
        if "bias" not in source.tensors or "bias" not in output.tensors:
            where = "output" if "bias" in source.tensors else "source"
            self._note(
                "missing-tensor", f"the {where} has no bias for it", output.tensors["weight"]
            )
            return
        self._carried(locked, source.tensors["bias"], output.tensors["bias"])

    def _carried(
        self, locked: LockedModule | LockedOther, source: TensorInfo, target: TensorInfo
    ) -> None:
        """A vector or another tensor: divided by what is folded into it, else a copy."""
        rows = source.shape[0] if source.shape else 1
        divisors = self.folds.divisors(locked.part, locked.name, rows)
        if divisors is None and source.dtype == target.dtype:
            self._copied(source, target)
        else:
            self.problems += check_vector(self.source, source, self.output, target, divisors)

    def _copied(self, source: TensorInfo, target: TensorInfo) -> None:
        self.problems += check_copy(self.source, source, self.output, target, self.block_bytes)

    def _note(self, kind: str, message: str, info: TensorInfo) -> None:
        self.problems.append(Problem(kind, message, file=str(info.file), tensor=info.name))


def _differences(locked: WeightError, found: Measured) -> Iterator[str]:
    """Where the lock says another error than there is."""
    said, is_now = locked.sqnr_db, found.sqnr_db
    if said is None or is_now is None:
        if said is not is_now:
            yield f"its SQNR is {_decibels(is_now)}, and the lock says {_decibels(said)}"
    elif not abs(said - is_now) <= _DECIBELS:
        yield f"its SQNR is {_decibels(is_now)}, and the lock says {_decibels(said)}"
    if round(found.max_error_in_scales, 6) != locked.max_error_in_scales:
        yield (
            f"its largest error is {found.max_error_in_scales:.6f} scales, and the lock says "
            f"{locked.max_error_in_scales}"
        )


def _decibels(value: float | None) -> str:
    return "exact" if value is None else f"{value:.3f} dB"
