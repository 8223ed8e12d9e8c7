"""Everything that was measured of the parts of a model, to be merged and saved."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Final, get_args

from torch import Tensor

from quantrecipe.converter.calibration.files import open_statistics, write_statistics
from quantrecipe.converter.calibration.module import ModuleStatistics
from quantrecipe.converter.calibration.siblings import Siblings
from quantrecipe.converter.calibration.sums import ModuleSums
from quantrecipe.schema.problems import InvalidInput, Problem
from quantrecipe.schema.statistics import Measure, ProvenFold, Statistics, TimestepBin

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_MEASURES: Final[tuple[Measure, ...]] = get_args(Measure)
_DIGESTS: Final = 1 << 256


@dataclass(slots=True, eq=False)
class Measured:
    """A module that is measured.

    Attributes:
        sums: of its inputs.
        weight_absmax: float32 ``[I]`` on the CPU; ``None`` for codes.
    """

    sums: ModuleSums
    weight_absmax: Tensor | None


@dataclass(slots=True, eq=False)
class MeasuredPart:
    """A part that is measured.

    Attributes:
        modules: by name.
        siblings: which of them were handed the same.
        passes: forward passes in each bin.
    """

    modules: dict[str, Measured]
    siblings: Siblings
    passes: list[int]

    def called(self) -> set[str]:
        """The modules that were called."""
        return {name for name, module in self.modules.items() if module.sums.called}

    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Siblings, in groups."""
        return self.siblings.groups({name: self._content(name) for name in self.called()})

    def _content(self, name: str) -> Hashable:
        # Where memory has no versions (in inference mode), it may have been written to in between.
        sums = self.modules[name].sums.sums
        return tuple(each.cpu().numpy().tobytes() for each in (sums.absmax, sums.histogram))


@dataclass(slots=True, eq=False)
class Measurements:
    """What was measured: of one or more parts, in the same timestep bins.

    Attributes:
        model: what ran, as the header of a file says it.
        bins: ``(start, stop)`` of each, ascending.
        reservoir: the most tokens that are kept of a module; 0: none are.
        parts: by name.
        folds: the edges of a recipe that were proven on the model.
    """

    model: str
    bins: tuple[tuple[float, float], ...]
    reservoir: int = 0
    parts: dict[str, MeasuredPart] = field(default_factory=dict)
    folds: tuple[ProvenFold, ...] = ()
    _samples: int = 0
    _prompts: int = 0
    _digest: int = 0

    def sample(self, count: int = 1) -> None:
        """Say that so many inputs were run. Without a word, every forward pass counts as one."""
        self._samples += count

    def prompt(self, content: str | bytes) -> None:
        """Say that an input was run, and what it was: it goes into the digest of the prompts.

        The digest is there if every input was told so. It does not depend on their order.
        """
        raw = content.encode() if isinstance(content, str) else content
        self._samples += 1
        self._prompts += 1
        self._digest += int.from_bytes(hashlib.sha256(raw).digest(), "big")

    @property
    def samples(self) -> int:
        """Inputs that were run."""
        return self._samples or max((sum(part.passes) for part in self.parts.values()), default=0)

    @property
    def prompts_sha256(self) -> str | None:
        """The digest of the prompts, if every input was told by ``prompt``."""
        return f"{self._digest % _DIGESTS:064x}" if 0 < self._prompts == self._samples else None

    @property
    def uncalled(self) -> tuple[tuple[str, str], ...]:
        """Modules that were never called, as ``(part, name)``."""
        return tuple(
            (part, name)
            for part, measured in self.parts.items()
            for name in measured.modules
            if not measured.modules[name].sums.called
        )

    def header(self) -> Statistics:
        """The header of a statistics file."""
        weights = [
            module.weight_absmax for part in self.parts.values() for module in part.modules.values()
        ]
        plain = any(weight is not None for weight in weights)
        passes = [
            sum(counts) for counts in zip(*(p.passes for p in self.parts.values()), strict=True)
        ]
        return Statistics(
            kind="statistics",
            version=1,
            model=self.model,
            samples=max(1, self.samples),
            prompts_sha256=self.prompts_sha256,
            timesteps=tuple(
                TimestepBin(start=start, stop=stop, samples=count)
                for (start, stop), count in zip(self.bins, passes, strict=True)
            ),
            modules={name: tuple(part.modules) for name, part in self.parts.items()},
            folds=self.folds,
            siblings={
                name: groups for name, part in self.parts.items() if (groups := part.groups())
            },
            holds=tuple(each for each in _MEASURES if plain or each != "weight_absmax"),
            reservoir=self.reservoir,
        )

    def statistics(self) -> Iterator[tuple[tuple[str, str], ModuleStatistics]]:
        """What was measured of every module, by ``(part, name)``, on the CPU."""
        for part, measured in self.parts.items():
            for name, module in measured.modules.items():
                yield (part, name), module.sums.statistics(module.weight_absmax)

    def save(
        self, path: Path | str, *, allow_uncalled: bool = False, force: bool = False
    ) -> Statistics:
        """Write a statistics file; it appears whole, or not at all.

        Args:
            path: the file.
            allow_uncalled: modules that were never called are in it, without tokens.
            force: replace a file that is there.

        Returns:
            Its header.

        Raises:
            InvalidInput: a module was never called, or was handed a NaN or an infinity; with a
                problem for each. Or nothing was observed.
            OutputError: the file cannot be written, or is there.
        """
        problems = [] if allow_uncalled else [_never_called(*each) for each in self.uncalled]
        for name, part in self.parts.items():
            for module in part.modules:
                problems += self._non_finite(name, module)
        if not self.parts:
            problems.append(
                Problem(
                    "nothing-measured",
                    "no part of a model was observed",
                    hint="Run the model within `with calibration.observe(model, part):`.",
                )
            )
        if problems:
            raise InvalidInput(problems)
        header = self.header()
        write_statistics(path, header, dict(self.statistics()), force=force)
        return header

    def _non_finite(self, part: str, name: str) -> list[Problem]:
        """A problem for each bin in which a module was handed a NaN or an infinity."""
        absmax = self.parts[part].modules[name].sums.sums.absmax
        spoilt = (~absmax.isfinite()).any(1).nonzero()[:, 0].tolist()
        return [non_finite_input(part, name, self.bins[at]) for at in spoilt]

    def merge(self, other: Measurements) -> None:
        """Take in what was measured elsewhere, of the same modules of the same model.

        Any number of measurements give the same maxima, counts and kept tokens in any order, and
        the same moments to rounding.

        Raises:
            InvalidInput: they are of another model, of other parts or modules, or in other bins;
                with a problem for each difference. Nothing is changed then.
        """
        check_alike(summary_of(self), summary_of(other))
        self._same_weights(other)
        self._samples = self.samples + other.samples
        self._prompts += other._prompts
        self._digest += other._digest
        self.folds = joined_folds((self.folds, other.folds))
        for name, theirs in other.parts.items():
            part = self.parts[name]
            part.siblings.refine(theirs.siblings.classes)
            part.passes = [a + b for a, b in zip(part.passes, theirs.passes, strict=True)]
            for module, measured in theirs.modules.items():
                part.modules[module].sums.add(measured.sums)

    def _same_weights(self, other: Measurements) -> None:
        for name, part in self.parts.items():
            for module, measured in part.modules.items():
                mine, its = measured.weight_absmax, other.parts[name].modules[module].weight_absmax
                if mine is not None and its is not None and not mine.equal(its):
                    message = f"{module!r} of part {name!r} had other weights"
                    raise InvalidInput(
                        Problem("cannot-merge", message, "Only runs of one model can be merged.")
                    )

    def all_reduce(self, group: ProcessGroup | None = None) -> None:
        """Merge what all processes of ``torch.distributed`` measured; each has all of it then.

        To be called once, by all of them, at the end.

        Args:
            group: the processes; all by default.

        Raises:
            InvalidInput: as for ``merge``, in every process.
        """
        from quantrecipe.converter.calibration.distributed import all_reduce

        all_reduce(self, group)


def joined_folds(every: Iterable[Iterable[ProvenFold]]) -> tuple[ProvenFold, ...]:
    """What several runs proved: each edge of a part once, where it was proven in most places.

    Of as many places, with the largest error that was seen.
    """
    found: dict[tuple[str, str], ProvenFold] = {}
    for one in chain.from_iterable(every):
        key = one.part, one.fold_sha256
        known = found.setdefault(key, one)
        found[key] = max(known, one, key=lambda each: (each.sites, each.relative_error))
    return tuple(found[key] for key in sorted(found))


@dataclass(frozen=True, slots=True)
class Summary:
    """What has to be the same for two measurements to be merged."""

    model: str
    bins: tuple[tuple[float, float], ...]
    reservoir: int
    modules: dict[str, dict[str, int]]


def summary_of(of: Measurements) -> Summary:
    """What has to be the same of another's."""
    modules = {
        part: {name: module.sums.sums.channels for name, module in measured.modules.items()}
        for part, measured in of.parts.items()
    }
    return Summary(of.model, of.bins, of.reservoir, modules)


def check_alike(first: Summary, *others: Summary) -> None:
    """Refuse what cannot be merged.

    Raises:
        InvalidInput: with a problem for each difference to the first.
    """
    problems = [
        Problem("cannot-merge", message, "Only runs of one model in the same bins can be merged.")
        for other in others
        for message in _differences(first, other)
    ]
    if problems:
        raise InvalidInput(problems)


def _differences(first: Summary, other: Summary) -> Iterator[str]:
    if first.model != other.model:
        yield f"the models differ: {first.model!r} and {other.model!r}"
    if first.bins != other.bins:
        yield f"the timestep bins differ: {_said(first.bins)} and {_said(other.bins)}"
    if first.reservoir != other.reservoir:
        yield f"they keep {first.reservoir} and {other.reservoir} tokens of a module"
    for part in sorted(first.modules.keys() ^ other.modules.keys()):
        yield f"only one of them has part {part!r}"
    for part in sorted(first.modules.keys() & other.modules.keys()):
        mine, its = first.modules[part], other.modules[part]
        for name in sorted(mine.keys() ^ its.keys()):
            yield f"only one of them has {name!r} of part {part!r}"
        for name in sorted(mine.keys() & its.keys()):
            if mine[name] != its[name]:
                yield f"{name!r} of part {part!r} has {mine[name]} and {its[name]} input features"


def _said(bins: Iterable[tuple[float, float]]) -> str:
    return ", ".join(f"{start:g} to {stop:g}" for start, stop in bins)


def _never_called(part: str, name: str) -> Problem:
    return Problem(
        "never-called",
        f"{name!r} of part {part!r} was never called, so nothing is known of its input",
        hint="Run what uses it, do not observe it, or allow it.",
        tensor=name,
    )


def non_finite_input(part: str, name: str, of_bin: tuple[float, float]) -> Problem:
    """A module was handed what is no number."""
    return Problem(
        "non-finite-input",
        f"{name!r} of part {part!r} was handed a NaN or an infinity, in the timestep bin from "
        f"{_said([of_bin])}",
        hint="Find out where it comes from: often float16 that overflows, or a broken checkpoint.",
        tensor=name,
    )


def load_measurements(path: Path | str) -> Measurements:
    """What a statistics file says, to be merged with others.

    Raises:
        InvalidInput: it is no statistics file, or does not hold all that is measured.
        SourceError: it cannot be read.
    """
    with open_statistics(path) as file:
        header = file.header
        missing = set(_MEASURES) - {"weight_absmax"} - set(header.holds or ("input_absmax",))
        if missing:
            raise InvalidInput(
                Problem(
                    "cannot-merge",
                    f"it does not say that it holds {', '.join(sorted(missing))}",
                    hint="Files that were written by hand cannot be merged: measure again.",
                    file=str(file.path),
                )
            )
        bins = tuple((each.start, each.stop) for each in header.timesteps)
        found = Measurements(header.model, bins, header.reservoir)
        passes = [each.samples for each in header.timesteps]
        for part, names in header.modules.items():
            modules = {}
            for name in names:
                measured = file.module(part, name)
                sums = ModuleSums.from_statistics(measured, header.reservoir)
                modules[name] = Measured(sums, measured.weight_absmax)
            called = [name for name, module in modules.items() if module.sums.called]
            siblings = Siblings.from_groups(names, header.siblings.get(part, ()), called)
            found.parts[part] = MeasuredPart(modules, siblings, passes)
            passes = [0] * len(bins)
        found.folds = header.folds
        found._samples = header.samples
        if header.prompts_sha256 is not None:
            found._prompts = header.samples
            found._digest = int(header.prompts_sha256, 16)
        return found


def merge_statistics(
    paths: Iterable[Path | str], out: Path | str, *, force: bool = False
) -> Measurements:
    """Merge statistics files of the same modules of one model, in the same bins.

    Args:
        paths: the files, one or more.
        out: the file to write.
        force: replace a file that is there.

    Returns:
        What was written.

    Raises:
        InvalidInput: one is no statistics file, or they cannot be merged.
        SourceError: one cannot be read.
        OutputError: ``out`` cannot be written, or is there.
    """
    files = [Path(path) for path in paths]
    if not files:
        raise ValueError("no files to merge")
    merged = load_measurements(files[0])
    for file in files[1:]:
        try:
            merged.merge(load_measurements(file))
        except InvalidInput as error:
            raise InvalidInput(
                replace(problem, file=problem.file or str(file)) for problem in error.problems
            ) from error
    merged.save(out, allow_uncalled=True, force=force)
    return merged
