"""Models of libraries, converted for their ``from_pretrained``."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from quantrecipe.converter import convert
from tests.converter.making import Json, parsed, raw, weight_spec

TOKEN = {"format": "int8", "granularity": "token", "dynamic": True}


def library(name: str) -> Any:
    """A library, without its own deprecations; its tests are skipped where it is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)


def converted(
    source: Path,
    out: Path,
    modules: list[str],
    weight: Json | None = None,
    *,
    activation: Json | None = TOKEN,
    layout: str = "quantrecipe",
    **target: Any,
) -> Path:
    """``source`` in a layout, with the ``modules`` quantized."""
    scheme: Json = {"weight": weight if weight is not None else weight_spec("int8")}
    if activation is not None:
        scheme["activation"] = activation
    document = {
        "kind": "recipe",
        "version": 1,
        "name": "small",
        "source": {"layout": "plain"},
        "schemes": {"all": scheme},
        "rules": [{"modules": modules, "scheme": "all"}],
        "target": {"layout": layout, **target},
    }
    return convert(parsed(document), source, out).out


def written(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder, over all of its files."""
    return {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def fragment(folder: Path) -> Json:
    """The ``quantization_config`` of a folder."""
    found: Json = json.loads((folder / "config.json").read_text("utf-8"))["quantization_config"]
    return found


def set_fragment(folder: Path, value: Json | None) -> None:
    """Replace the ``quantization_config`` of a folder, or take it out."""
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8")) | {"quantization_config": value}
    if value is None:
        del config["quantization_config"]
    path.write_text(json.dumps(config), "utf-8")


def assert_same(first: Path, second: Path) -> None:
    """Both folders hold the same tensors, byte for byte, and the same ``quantization_config``."""
    ours, theirs = written(first), written(second)
    assert {n: (t.dtype, t.shape, raw(t)) for n, t in ours.items()} == {
        n: (t.dtype, t.shape, raw(t)) for n, t in theirs.items()
    }
    assert fragment(first) == fragment(second)
