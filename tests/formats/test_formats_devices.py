"""What would make the bits of another device differ, looked for in the operations themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from quantrecipe.formats import get_format, quantize
from quantrecipe.formats.blocks import SourceBlock, TargetBlock
from quantrecipe.formats.plain_transform import PlainTransform
from quantrecipe.schema.schemes import PlainWeight, ScaledWeight


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Collects operations that a GPU computes otherwise, or that would not run there."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in ("div", "div_") and not isinstance(args[1], Tensor):
            # CUDA multiplies by the reciprocal.
            self.found.append(f"{func} by the number {args[1]}")
        if name in ("reciprocal", "rsqrt", "sum", "cumsum", "mean", "linalg_vector_norm", "mm"):
            self.found.append(f"{func}, whose order or rounding is the device's own")
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.device.type == "meta":
            self.found.append(f"{func} made where nobody said")
        return result


def watched(work: Callable[[], object]) -> list[str]:
    watch = Watch()
    with watch, torch.device("meta"):
        work()
    return watch.found


def test_the_watch_sees() -> None:
    numbers = torch.ones(3)
    assert len(watched(lambda: numbers / 3)) == 1
    assert len(watched(lambda: numbers.div_(3.0))) == 1
    assert len(watched(lambda: numbers.sum())) == 1
    assert len(watched(lambda: torch.zeros(3))) == 1
    assert watched(lambda: numbers / numbers.new_full((), 3.0)) == []


@pytest.mark.parametrize("source", ["float64", "bfloat16", "int8", "float8_e4m3fn", "float8_e5m2"])
def test_the_plain_path_has_none_of_it(source: str, kit: Any) -> None:
    weight = torch.randn(7, 2000, generator=torch.Generator().manual_seed(1))
    plain = source in ("float64", "bfloat16")
    spec: Any = PlainWeight(format=source) if plain else kit.spec(source)  # type: ignore[arg-type]
    given = quantize(weight, spec)
    factors = torch.rand(2000, generator=torch.Generator().manual_seed(2)) + 0.5
    for target in kit.specs():
        transform = PlainTransform(spec, target)
        codes = torch.empty(weight.shape, dtype=get_format(target).code_dtype)
        scales = quantize(weight, target).scale
        assert scales is not None
        block, maxima = SourceBlock(given.codes, given.scale, factors=factors), torch.zeros(2000)
        assert watched(partial(transform, block, TargetBlock(codes, scales))) == []
        assert watched(partial(transform.absmax, block)) == []
        assert watched(partial(transform.column_absmax, block, maxima)) == []


def test_bounds_have_none_of_it(kit: Any) -> None:
    weight = torch.randn(7, 20, generator=torch.Generator().manual_seed(1))
    for spec in kit.specs():
        assert isinstance(spec, ScaledWeight)
        stored = quantize(weight, spec)
        assert stored.scale is not None
        bound = partial(get_format(spec).bound, weight, stored.codes, stored.scale, spec)
        assert watched(bound) == []
