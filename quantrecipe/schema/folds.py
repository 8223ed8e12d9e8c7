"""Where smoothing is folded into: the edges of a recipe's ``folds``, found in a checkpoint.

A site is one place where an edge holds: in one layer, say. There the columns of everything that
reads an input are multiplied by factors, and the rows that compute that input are divided by them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from quantrecipe.schema.canonical import digest
from quantrecipe.schema.problems import Problem, Reasons
from quantrecipe.schema.renaming import captured, filled

if TYPE_CHECKING:
    from quantrecipe.schema.recipe import Fold

FOLDED_NAME: Final = "folded-smoothing.st"
"""The file of the factors that were folded: safetensors in all but its suffix, so that whoever
gathers ``*.safetensors`` does not take them for weights. Nothing but ``verify`` reads it."""


@dataclass(frozen=True, slots=True)
class FoldSite:
    """One place where an edge holds.

    Attributes:
        edge: the edge's place in ``folds``.
        part: whose.
        modules: what reads the input, in the order of their names.
        into: what the input comes out of, by its name.
        module: ``into``, if it is a module; its bias goes along.
        vectors: the tensors of no module that ``into`` is otherwise.
        start, stop: its rows that are the input.
    """

    edge: int
    part: str
    modules: tuple[str, ...]
    into: str
    module: str | None
    vectors: tuple[str, ...]
    start: int
    stop: int

    @property
    def key(self) -> str:
        """What the factors are called in the file of those that were folded."""
        return f"{self.part}/{self.into}[{self.start}:{self.stop}]"

    @property
    def divided(self) -> tuple[str, ...]:
        """The module or tensors that are divided."""
        return self.vectors if self.module is None else (self.module,)


@dataclass(frozen=True, slots=True)
class FoldSites:
    """The sites of a part.

    Attributes:
        sites: those that hold what they have to.
        reasons: why others do not, each once.
        covered: every module that an edge takes.
        used: for each edge and pattern of it, whether it takes a module.
    """

    sites: tuple[FoldSite, ...]
    reasons: Reasons
    covered: frozenset[str]
    used: frozenset[tuple[int, int]]


def fold_digest(fold: Fold) -> str:
    """What a proof of an edge names it by: the digest of the edge as it was written."""
    return digest(fold.to_json_value())


def find_sites(
    folds: Sequence[Fold],
    part: str,
    modules: Mapping[str, tuple[int, int]],
    others: Mapping[str, tuple[int, ...]],
    folding: Collection[str] | None = None,
) -> FoldSites:
    """The sites of every edge in one part.

    Args:
        folds: the edges.
        part: its name.
        modules: out and in features of each module.
        others: shapes of the tensors that belong to none.
        folding: the modules whose smoothing is folded; a site without one of them does nothing, and
            is left out. ``None``: all.
    """
    finder = _Finder(part, modules, others)
    sites: list[FoldSite] = []
    covered: set[str] = set()
    used: set[tuple[int, int]] = set()
    for edge, fold in enumerate(folds):
        groups: dict[tuple[str, ...], list[str]] = {}
        for place, pattern in enumerate(fold.modules):
            wanted = pattern.split(".")
            for name in modules:
                stars = captured(wanted, name.split("."))
                if stars is not None:
                    groups.setdefault(tuple(stars), []).append(name)
                    used.add((edge, place))
        for values, names in groups.items():
            covered.update(names)
            if folding is None or not set(names).isdisjoint(folding):
                into = filled(fold.into, values)
                sites += finder.site(edge, fold, tuple(sorted(set(names))), into)
    finder.check_overlaps(sites)
    ordered = sorted(sites, key=lambda site: (site.into, site.start))
    return FoldSites(tuple(ordered), finder.reasons, frozenset(covered), frozenset(used))


def unfitting(folds: Sequence[Fold], used: Collection[tuple[int, int]]) -> Iterator[Problem]:
    """The names of edges that no module has.

    Args:
        folds: the edges.
        used: edge and place of those that some module has, in whatever part.
    """
    for edge, fold in enumerate(folds):
        for place, pattern in enumerate(fold.modules):
            if (edge, place) not in used:
                yield Problem(
                    "takes-nothing",
                    f"no module fits {pattern!r}",
                    "An edge names modules as rules do: as the target layout calls them. A '*' is "
                    "a whole segment.",
                    pointer=f"/folds/{edge}/modules/{place}",
                )


@dataclass(frozen=True, slots=True)
class _Finder:
    part: str
    modules: Mapping[str, tuple[int, int]]
    others: Mapping[str, tuple[int, ...]]
    reasons: Reasons = field(default_factory=Reasons)

    def site(
        self, edge: int, fold: Fold, consumers: tuple[str, ...], into: str
    ) -> Iterator[FoldSite]:
        """The site of some consumers, or nothing and a reason."""
        pointer = f"/folds/{edge}"
        vectors: tuple[str, ...] = ()
        if into in self.modules:
            rows = self.modules[into][0]
        else:
            vectors = self._vectors(into)
            if not vectors:
                self._refuse(f"{pointer}/into", *self._missing(into), into)
                return
            rows = self.others[vectors[0]][0]
        start, stop = fold.rows if fold.rows is not None else (0, rows)
        where = f"{pointer}/{'into' if fold.rows is None else 'rows'}"
        if stop > rows:
            self._refuse(where, f"it has {rows} rows", "Name rows that it has.", into)
            return
        for name in consumers:
            columns = self.modules[name][1]
            if columns != stop - start:
                message = (
                    f"{stop - start} rows are folded into, and what reads them has {columns} "
                    "input features"
                )
                self._refuse(where, message, "Name the rows that are its input.", name)
                return
        module = None if vectors else into
        yield FoldSite(edge, self.part, consumers, into, module, vectors, start, stop)

    def check_overlaps(self, sites: list[FoldSite]) -> None:
        """What is multiplied or divided twice."""
        readers: dict[str, FoldSite] = {}
        rows: dict[str, list[FoldSite]] = {}
        hint = "List all that read one input in the 'modules' of one edge."
        for site in sites:
            pointer = f"/folds/{site.edge}"
            for name in site.modules:
                other = readers.setdefault(name, site)
                if other is not site:
                    message = f"/folds/{other.edge} takes it already"
                    self._refuse(f"{pointer}/modules", message, hint, name)
            for name in site.divided:
                for other in rows.setdefault(name, []):
                    if other.start < site.stop and site.start < other.stop:
                        message = f"/folds/{other.edge} folds into the same rows"
                        self._refuse(f"{pointer}/into", message, hint, name)
                rows[name].append(site)

    def _vectors(self, into: str) -> tuple[str, ...]:
        """``into`` itself, or the weight and bias of what is called so; of one length."""
        names = (into,) if into in self.others else (f"{into}.weight", f"{into}.bias")
        shapes = [self.others[name] for name in names if name in self.others]
        whole = names[0] in self.others and len(set(shapes)) == 1 and len(shapes[0]) == 1
        return tuple(name for name in names if name in self.others) if whole else ()

    def _missing(self, into: str) -> tuple[str, str]:
        shape = self.others.get(into)
        if shape is not None:
            return (
                f"it has shape {list(shape)}, and only a vector or a module can be folded into",
                "Name what computes the input.",
            )
        owner = into.rpartition(".")[0]
        if owner in self.modules:
            return "it belongs to a module", "Name the module, without '.weight'."
        return (
            f"part {self.part!r} has no module, vector or norm of that name",
            "Name a module, a vector, or what has a vector 'weight'.",
        )

    def _refuse(self, pointer: str, message: str, hint: str, tensor: str) -> None:
        self.reasons.add(Problem("fold-refused", message, hint, pointer=pointer), tensor)
