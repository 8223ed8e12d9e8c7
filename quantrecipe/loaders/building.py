"""Building a model that is about to be loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def without_weights() -> Iterator[None]:
    """Within it, modules are made with parameters on the meta device, which take no memory.

    Buffers are real, unlike those of ``torch.device("meta")``: what no checkpoint holds (a table of
    rotary embeddings, say) stays as the module made it.
    """
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
