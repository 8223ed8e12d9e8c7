"""What a layout writes into a ``config.json``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Final

from quantrecipe.schema.compressed_tensors import compressed_tensors_config
from quantrecipe.schema.foreign_configs import (
    bitsandbytes_config,
    int8_config,
    mixed_bitsandbytes,
    sdnq_config,
    torchao_config,
)
from quantrecipe.schema.layout import Layout
from quantrecipe.schema.quantization_config import ConfiguredModule, quantization_config

_WRITERS: Final[Mapping[str, Callable[[Iterable[ConfiguredModule]], dict[str, Any] | None]]] = (
    MappingProxyType(
        {
            "quantrecipe": quantization_config,
            "compressed-tensors": compressed_tensors_config,
            "bitsandbytes": bitsandbytes_config,
            "torchao": torchao_config,
            "sdnq": sdnq_config,
            "int8": int8_config,
        }
    )
)


def config_fragment(layout: Layout, modules: Iterable[ConfiguredModule]) -> dict[str, Any] | None:
    """The ``quantization_config`` of one part; ``None`` if none is written or all of it is plain.

    Args:
        layout: of the checkpoint.
        modules: of the part, plain ones too.
    """
    if layout.config is None:
        return None
    return _WRITERS[layout.config.quantization_config](modules)


def config_refusal(layout: Layout, formats: Iterable[str]) -> tuple[str, str] | None:
    """Why no ``quantization_config`` of a layout says these formats of one part, and what would.

    Args:
        layout: of the checkpoint.
        formats: of the quantized weights of the part.
    """
    if layout.config is not None and layout.config.quantization_config == "bitsandbytes":
        return mixed_bitsandbytes(formats)
    return None
