"""Proving folds on the model: random factors go in at both ends of an edge, and no output changes.

No header says what computes a module's input, and no reading of code does for every model. So every
place of every edge is tried: what it is folded into is divided by random factors, what reads it is
multiplied by them, and the smallest module around both is called again, with what it was called
with when the model ran. An edge that names the wrong weight or the wrong rows, or leaves a reader
out, shows in the outputs by far more than rounding does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.func import functional_call

from quantrecipe.schema.folds import FoldSite, find_sites, fold_digest, unfitting
from quantrecipe.schema.problems import InvalidInput, Problem
from quantrecipe.schema.recipe import Fold
from quantrecipe.schema.statistics import ProvenFold

EXACT: Final = 1e-9
"""The largest relative change that factors which are powers of two may make in float64: they round
nothing, so this allows for sums that are added up in another order."""

ORDINARY: Final = 1e-4
"""The largest that other factors may make: models compute some things in float32 whatever they are
given."""

VISIBLE: Final = 1e-6
"""The least that one end alone must make, or the outputs would prove nothing."""

_HINT: Final = (
    "Does it name what the input comes out of, with the right rows, and everything that reads it?"
)


def check_folds(
    model: nn.Module,
    folds: Sequence[Fold],
    run: Callable[[], object],
    *,
    part: str = "model",
    seed: int = 0,
) -> tuple[ProvenFold, ...]:
    """Prove every edge on the model, in every place where its names fit.

    Factors are random, for each channel another: powers of two, and others. The floating tensors of
    the call are replaced by random ones of the same mean and deviation. Everything is computed in
    float64, or, in a module that does not take that, in its own dtypes with powers of two alone.
    Neither weights nor anything else of the model is changed at any time.

    Args:
        model: one part, unquantized, its modules called as in the recipe; not in training mode, or
            dropout hides what there is to see.
        folds: the edges.
        run: calls the model as it is used; called once, and again for edges whose smallest common
            module was never called. Nothing may be measured meanwhile: modules are called more
            often than that.
        part: what the recipe calls the part.
        seed: of all that is random.

    Returns:
        What is to be stated in a statistics file, edge by edge.

    Raises:
        InvalidInput: with every edge that is wrong, or could not be proven; pointers are into the
            recipe.
    """
    tensors: dict[str, Tensor] = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    modules, others = _shapes(tensors)
    found = find_sites(folds, part, modules, others)
    problems = [*unfitting(folds, found.used), *found.reasons, *_not_plain(found.sites, tensors)]
    if problems:
        raise InvalidInput(problems)
    verdicts = _Trials(model, tensors, found.sites, seed).run(run)
    problems += _refused(folds, found.sites, verdicts)
    if problems:
        raise InvalidInput(problems)
    return tuple(
        ProvenFold(
            part=part,
            fold=fold,
            fold_sha256=fold_digest(fold),
            sites=sum(site.edge == edge for site in found.sites),
            relative_error=max(
                verdict.error
                for site, verdict in zip(found.sites, verdicts, strict=True)
                if site.edge == edge
            ),
        )
        for edge, fold in enumerate(folds)
    )


def _shapes(
    tensors: Mapping[str, Tensor],
) -> tuple[dict[str, tuple[int, int]], dict[str, tuple[int, ...]]]:
    """Modules and other tensors of a model, told apart as those of a checkpoint are."""
    modules: dict[str, tuple[int, int]] = {}
    for name, tensor in tensors.items():
        owner, _, own = name.rpartition(".")
        bias = tensors.get(f"{owner}.bias")
        rows = tuple(tensor.shape[:1])
        if own == "weight" and tensor.ndim == 2 and (bias is None or tuple(bias.shape) == rows):
            modules[owner] = tensor.shape[0], tensor.shape[1]
    mine = {f"{name}.{own}" for name in modules for own in ("weight", "bias")}
    others = {name: tuple(one.shape) for name, one in tensors.items() if name not in mine}
    return modules, others


def _not_plain(sites: Iterable[FoldSite], tensors: Mapping[str, Tensor]) -> Iterator[Problem]:
    for site in sites:
        for name in (*_divided(site, tensors), *_multiplied(site)):
            if not tensors[name].is_floating_point() or tensors[name].dtype.itemsize < 2:
                yield Problem(
                    "fold-unproven",
                    f"the model holds {name!r} as {tensors[name].dtype}",
                    "Prove folds on the model before it is quantized.",
                    pointer=f"/folds/{site.edge}",
                    tensor=name,
                )


def _divided(site: FoldSite, tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The tensors of a site that are divided."""
    if site.module is None:
        return site.vectors
    names = (f"{site.module}.weight", f"{site.module}.bias")
    return tuple(name for name in names if name in tensors)


def _multiplied(site: FoldSite) -> tuple[str, ...]:
    return tuple(f"{name}.weight" for name in site.modules)


@dataclass(frozen=True, slots=True)
class _Verdict:
    """What a trial said.

    Attributes:
        error: the largest relative change of an output.
        fault: why nothing is proven, or ``None``.
    """

    error: float = 0.0
    fault: str | None = None


def _refused(
    folds: Sequence[Fold], sites: Sequence[FoldSite], verdicts: Sequence[_Verdict]
) -> Iterator[Problem]:
    for edge in range(len(folds)):
        mine = [pair for pair in zip(sites, verdicts, strict=True) if pair[0].edge == edge]
        wrong = [pair for pair in mine if pair[1].fault is not None]
        if wrong:
            site, verdict = max(wrong, key=lambda pair: pair[1].error)
            places = f" ({len(wrong):,} of {len(mine):,} places)" if len(mine) > 1 else ""
            yield Problem(
                "fold-unproven",
                f"folding {', '.join(site.modules)} into {site.into}: {verdict.fault}{places}",
                _HINT,
                pointer=f"/folds/{edge}",
                tensor=site.into,
            )


@dataclass(slots=True)
class _Trial:
    """One site, with the modules to try it in: the smallest first, the whole model last."""

    site: FoldSite
    around: list[str]
    verdict: _Verdict | None = None
    outside: bool = False


class _Trials:
    def __init__(
        self, model: nn.Module, tensors: Mapping[str, Tensor], sites: Sequence[FoldSite], seed: int
    ) -> None:
        self.model = model
        self.tensors = tensors
        self.seed = seed
        self.trials = [_Trial(site, list(self._around(site))) for site in sites]
        self.replaying = False
        self.within: dict[str, int] = {}

    def run(self, run: Callable[[], object]) -> list[_Verdict]:
        """Try every site, in larger modules where smaller ones are not called by themselves."""
        while waiting := [trial for trial in self.trials if trial.verdict is None]:
            self.within = dict.fromkeys((trial.around[0] for trial in waiting), 0)
            with ExitStack() as stack:
                for handle in self._hooks(waiting):
                    stack.callback(handle.remove)
                run()
            for trial in waiting:
                if trial.verdict is not None and not trial.outside:
                    continue
                trial.verdict, trial.outside = None, False
                trial.around.pop(0)
                if not trial.around:
                    trial.verdict = _Verdict(fault="no module around both was called")
        return [trial.verdict for trial in self.trials if trial.verdict is not None]

    def _around(self, site: FoldSite) -> Iterator[str]:
        names = [*_divided(site, self.tensors), *_multiplied(site)]
        shared = [name.split(".")[:-1] for name in names]
        depth = 0
        while all(len(one) > depth for one in shared) and len({one[depth] for one in shared}) == 1:
            depth += 1
        touched = {id(self.tensors[name]) for name in names}
        tied = [name for name, one in self.tensors.items() if id(one) in touched]
        for length in range(depth, -1, -1):
            prefix = shared[0][:length]
            module = self.model.get_submodule(".".join(prefix))
            callable_ = type(module).forward is not nn.Module.forward or "forward" in vars(module)
            if callable_ and all(name.split(".")[:length] == prefix for name in tied):
                yield ".".join(prefix)

    def _hooks(self, trials: Sequence[_Trial]) -> Iterator[Any]:
        """Hooks that try sites when the module around them is called for the first time."""
        by_module: dict[str, list[_Trial]] = {}
        for trial in trials:
            by_module.setdefault(trial.around[0], []).append(trial)
        for name, mine in by_module.items():
            module = self.model.get_submodule(name)
            yield module.register_forward_pre_hook(self._before(name, mine), with_kwargs=True)
            yield module.register_forward_hook(self._after(name), always_call=True)
            for trial in mine:
                for part in self._parts(trial.site):
                    yield part.register_forward_pre_hook(self._seen(name, trial))

    def _parts(self, site: FoldSite) -> Iterator[nn.Module]:
        names = [*_divided(site, self.tensors), *_multiplied(site)]
        for owner in dict.fromkeys(name.rpartition(".")[0] for name in names):
            yield self.model.get_submodule(owner)

    def _before(self, name: str, trials: Sequence[_Trial]) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.replaying:
                return
            self.within[name] += 1
            if all(trial.verdict is not None for trial in trials):
                return
            self.replaying = True
            try:
                self._try(name, module, trials, args, kwargs)
            finally:
                self.replaying = False

        return hook

    def _after(self, name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            if not self.replaying:
                self.within[name] -= 1

        return hook

    def _seen(self, name: str, trial: _Trial) -> Callable[..., None]:
        def hook(*_: object) -> None:
            # The module around it is not all that its weights have a part in.
            trial.outside |= not self.replaying and self.within[name] == 0

        return hook

    def _try(
        self,
        name: str,
        module: nn.Module,
        trials: Sequence[_Trial],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """Every site of one module, with one call of it."""
        bench = _Bench.set_up(module, args, kwargs, self.seed)
        for trial in trials:
            if isinstance(bench, str):
                trial.verdict = _Verdict(fault=bench)
            else:
                trial.verdict = _Site(bench, trial.site, name, self.tensors, self.seed).verdict()


@dataclass(frozen=True, slots=True)
class _Site:
    """A site, on the bench of the module around it."""

    bench: _Bench
    site: FoldSite
    around: str
    tensors: Mapping[str, Tensor]
    seed: int

    def verdict(self) -> _Verdict:
        bench, readers = self.bench, _multiplied(self.site)
        generator = torch.Generator().manual_seed(self.seed)
        size = self.site.stop - self.site.start
        exponents = torch.tensor([-2.0, -1.0, 1.0, 2.0], dtype=torch.float64)
        exact = exponents[torch.randint(4, (size,), generator=generator)].exp2()
        uneven = torch.rand(size, generator=generator, dtype=torch.float64).mul(4).sub(2).exp2()
        worst = 0.0
        for factors, allowed in ((exact, bench.exact), (uneven, bench.ordinary)):
            if allowed is None:
                continue
            error = self._change(factors, readers, divide=True)
            worst = max(worst, error)
            if not error <= allowed:
                return _Verdict(
                    error,
                    f"outputs of {self.around or 'the model'} change by {error:.3g} of their "
                    f"magnitude, and {allowed:.0e} is allowed",
                )
        for ends, what in (
            (((), True), f"what {self.site.into} gives"),
            *((((reader,), False), f"what {reader} reads") for reader in readers),
        ):
            change = self._change(exact, ends[0], divide=ends[1])
            if not change > bench.visible:
                return _Verdict(
                    change,
                    f"outputs of {self.around or 'the model'} do not show {what} (they change by "
                    f"{change:.3g} without it), so that nothing is proven",
                )
        return _Verdict(worst)

    def _change(self, factors: Tensor, readers: Sequence[str], *, divide: bool) -> float:
        """How much outputs change when some readers are multiplied, and the source divided."""
        changed: dict[str, Tensor] = {}
        for name in readers:
            here, values = self._value(name, changed)
            changed[here] = values * factors.to(values)
        for name in _divided(self.site, self.tensors) if divide else ():
            here, values = self._value(name, changed)
            rows = values[self.site.start : self.site.stop]
            divisors = factors.to(values).view(-1, *[1] * (rows.ndim - 1))
            changed[here] = values.clone()
            changed[here][self.site.start : self.site.stop] = rows / divisors
        return self.bench.change(changed)

    def _value(self, name: str, changed: Mapping[str, Tensor]) -> tuple[str, Tensor]:
        """A tensor's name and value on the bench, where what is tied has one name."""
        here = self.bench.names[id(self.tensors[name])]
        return here, changed.get(here, self.bench.values[here])


@dataclass(frozen=True, slots=True)
class _Bench:
    """A module that can be called again and again with the same, but for some of its tensors.

    Attributes:
        module: as it stands in the model.
        args, kwargs: what it is called with.
        values: its tensors, in the dtype that is computed in.
        names: the name in ``values`` of each tensor of the model, by its ``id``.
        outputs: what it gives.
        exact, ordinary, visible: what changes are allowed, and which can be seen.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    values: dict[str, Tensor]
    names: dict[int, str]
    seed: int
    outputs: tuple[Tensor, ...] = ()
    exact: float = EXACT
    ordinary: float | None = ORDINARY
    visible: float = VISIBLE

    @classmethod
    def set_up(
        cls, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], seed: int
    ) -> _Bench | str:
        """With random inputs in float64, or whatever else of them the module takes; or why not."""
        own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        names = {id(tensor): name for name, tensor in own.items()}
        detached = {name: tensor.detach() for name, tensor in own.items()}
        double = {name: _to_double(tensor) for name, tensor in detached.items()}
        generator = torch.Generator().manual_seed(seed)

        def randomised(tensor: Tensor) -> Tensor:
            return _randomised(tensor, generator)

        fault = "it gives no tensor"
        for values, prepare in ((double, randomised), (double, _to_double), (detached, _own)):
            bench = cls(module, _each(args, prepare), _each(kwargs, prepare), values, names, seed)
            if values is detached:
                eps = _coarsest(detached.values())
                bench = replace(bench, exact=eps, ordinary=None, visible=16 * eps)
            try:
                outputs = bench.call({})
            except Exception as error:  # noqa: BLE001 - an arbitrary model may raise anything
                fault = f"{type(module).__name__} could not be called again: {error}"
                continue
            if outputs and all(bool(output.isfinite().all()) for output in outputs):
                return replace(bench, outputs=outputs)
            if outputs:
                fault = f"{type(module).__name__} gives numbers that are not finite"
        return fault

    def call(self, changed: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """The outputs, in float64, with some tensors changed."""
        devices = {t.device.index for t in self.values.values() if t.device.type == "cuda"}
        with torch.no_grad(), torch.random.fork_rng(sorted(devices)):
            torch.manual_seed(self.seed)
            found = functional_call(
                self.module,
                {**self.values, **changed},
                _each(self.args, _own),
                _each(self.kwargs, _own),
            )
        outputs: list[Tensor] = []

        def collect(tensor: Tensor) -> Tensor:
            outputs.append(tensor)
            return tensor

        _each(found, collect)
        return tuple(one.double() for one in outputs if one.is_floating_point() and one.numel())

    def change(self, changed: Mapping[str, Tensor]) -> float:
        """The largest change of an output, over the largest magnitude of that output."""
        worst = 0.0
        for before, after in zip(self.outputs, self.call(changed), strict=True):
            size = float(before.abs().max())
            error = float((after - before).abs().max())
            worst = max(worst, error / size if size else float(error > 0))
        return worst


def _coarsest(tensors: Iterable[Tensor]) -> float:
    """The largest machine epsilon of their dtypes."""
    return max((torch.finfo(t.dtype).eps for t in tensors if t.is_floating_point()), default=EXACT)


def copied(value: Any) -> Any:
    """A copy of what a model is called with: tensors, nested containers, and what can be copied."""
    return _each(value, _own)


def _own(tensor: Tensor) -> Tensor:
    return tensor.clone()


def _to_double(tensor: Tensor) -> Tensor:
    return tensor.detach().double() if tensor.is_floating_point() else tensor.clone()


def _randomised(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Random numbers of the same mean and deviation; what is not finite (a mask) stays."""
    values = _to_double(tensor)
    if not tensor.is_floating_point() or not values.numel():
        return values
    finite = values.isfinite()
    known = values[finite] if bool(finite.any()) else values.new_zeros(1)
    mean, deviation = known.mean(), known.std(correction=0)
    if not float(deviation):
        deviation = mean.abs() / 8 if float(mean) else torch.ones_like(mean)
    noise = torch.randn(values.shape, generator=generator, dtype=torch.float64)
    return torch.where(finite, noise.to(values) * deviation + mean, values)


def _each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A copy of nested containers in which every tensor is changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_each(one, change) for one in value))
    if type(value) in (list, tuple):
        return type(value)(_each(one, change) for one in value)
    if isinstance(value, Mapping):
        made = {key: _each(one, change) for key, one in value.items()}
        return made if type(value) is dict or is_dataclass(value) else _rebuilt(value, made)
    if is_dataclass(value) and not isinstance(value, type):
        made = {one.name: _each(getattr(value, one.name), change) for one in fields(value)}
        return _rebuilt(value, made)
    return copy.deepcopy(value)


def _rebuilt(value: Any, made: dict[str, Any]) -> Any:
    """A container of the same kind, or the plain one where its class makes no other."""
    try:
        return type(value)(**made)
    except (TypeError, ValueError):
        return made
