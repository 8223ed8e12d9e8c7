"""Small checkpoints in every layout, and carrying them over without a recipe."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from quantrecipe.cli.transcode import Asked, Inferred, infer
from quantrecipe.converter import Converter, Means, carry_out, convert, plan
from quantrecipe.converter.reference import ReferenceConverter
from quantrecipe.converter.streaming import StreamingConverter
from quantrecipe.schema.layout_writing import refusal
from quantrecipe.schema.plan import Plan
from quantrecipe.schema.registry import named_layout
from quantrecipe.schema.schemes import Hadamard
from tests.converter.making import Json, numbers, parsed, raw, save

ROTATED: Final = {"kind": "hadamard", "size": 16}
CONVERTERS: Final[Mapping[str, Converter]] = {
    "streaming": StreamingConverter(),
    "reference": ReferenceConverter(),
}
SHAPE: Final = (160, 128)
"""Two tiles of 128 rows, two blocks of 128 x 128 and of 256 scales of nf4; multiples of 32."""

FORMATS: Final[Mapping[str, Json]] = {
    "int8_tensor": {"format": "int8", "granularity": "tensor"},
    "int8_channel": {"format": "int8", "granularity": "channel"},
    "int8_group": {"format": "int8", "granularity": "group", "group_size": 32},
    "int8_rotated": {"format": "int8", "granularity": "channel"},
    "e4m3_tensor": {"format": "float8_e4m3fn", "granularity": "tensor"},
    "e4m3_channel": {"format": "float8_e4m3fn", "granularity": "channel"},
    "e4m3_block": {"format": "float8_e4m3fn", "granularity": "block", "block_size": [128, 128]},
    "e5m2_tensor": {"format": "float8_e5m2", "granularity": "tensor"},
    "e5m2_channel": {"format": "float8_e5m2", "granularity": "channel"},
    "int4": {"format": "int4", "granularity": "group", "group_size": 32},
    "int4_zeros": {
        "format": "int4", "granularity": "group", "group_size": 64, "symmetric": False,
        "scale_dtype": "bfloat16",
    },
    "nf4": {"format": "nf4", "granularity": "block", "block_size": 64},
    "nf4_double": {
        "format": "nf4", "granularity": "block", "block_size": 64, "double_quantized": True
    },
    "llm_int8": {"format": "llm_int8", "granularity": "channel"},
    "mxfp8": {"format": "mxfp8", "granularity": "group"},
    "mxfp4": {"format": "mxfp4", "granularity": "group"},
    "nvfp4": {"format": "nvfp4", "granularity": "group"},
    "q8_0": {"format": "q8_0", "granularity": "block"},
    "q4_0": {"format": "q4_0", "granularity": "block"},
}  # fmt: skip
"""Ways of storing a weight, by the name of the module that is stored so."""

ROW_WISE: Final = (
    "comfyui", "compressed-tensors", "int8-scaled", "quantrecipe", "sdnq", "torchao",
    "transformerlab", "vllm-omni",
)  # fmt: skip
"""Layouts that hold int8 with a scale for each row."""


def scheme_of(name: str) -> Json:
    rotation = {"rotation": ROTATED} if name.endswith("rotated") else {}
    return {"weight": FORMATS[name], **rotation}


def held_by(layout: str, names: Iterable[str] = FORMATS) -> list[str]:
    """The ways of storing that a layout holds."""
    document = {name: scheme_of(name) for name in names}
    schemes = parsed(recipe_for("plain", document, layout)).schemes
    found = []
    for name, scheme in schemes.items():
        rotation = Hadamard.model_validate(ROTATED) if scheme.rotation is not None else None
        if refusal(named_layout(layout), scheme.weight, rotation=rotation) is None:
            found.append(name)
    return found


def recipe_for(source: str, schemes: Json, target: str, suffix: str = "safetensors") -> Json:
    return {
        "kind": "recipe",
        "version": 1,
        "name": "made",
        "source": {"layout": source},
        "schemes": schemes,
        "rules": [{"modules": [f"layers.0.{name}"], "scheme": name} for name in schemes],
        "target": {"layout": target, "file": f"model.{suffix}"},
    }


def made(layout: str, folder: Path, names: Iterable[str] | None = None) -> Path:
    """A checkpoint in a layout, with a module in each way of storing, plain ones and a norm."""
    held = held_by(layout) if names is None else list(names)
    rng = np.random.default_rng(len(held))
    tensors: dict[str, Tensor] = {}
    for name in [*held, "plain"]:
        tensors[f"layers.0.{name}.weight"] = numbers(rng, *SHAPE).bfloat16()
        tensors[f"layers.0.{name}.bias"] = torch.from_numpy(rng.standard_normal(SHAPE[0])).half()
    tensors["norm.weight"] = torch.from_numpy(rng.standard_normal(8)).bfloat16()
    save(folder / "plain" / "model.safetensors", tensors)
    schemes = {name: scheme_of(name) for name in held}
    suffix = "gguf" if layout.startswith("gguf") else "safetensors"
    convert(
        parsed(recipe_for("plain", schemes, layout, suffix)), folder / "plain", folder / layout,
        jobs=1,
    )  # fmt: skip
    return folder / layout


def over(
    source: Path, layout: str, out: Path, *, converter: str = "streaming", **asked: Any
) -> Plan:
    """Carry a checkpoint over without a recipe."""
    inferred = inferred_for(source, layout, **asked)
    assert isinstance(inferred.root, Path)
    planned = plan(inferred.recipe, inferred.root, converter=converter)
    carry_out(planned, CONVERTERS[converter], out, Means(jobs=1))
    return planned


def inferred_for(source: Path, layout: str, **asked: Any) -> Inferred:
    return infer(source, layout, Asked(**asked))


def transfers(planned: Plan) -> dict[str, str]:
    """What becomes of the numbers of each module, by the last segment of its name."""
    return {module.name.rpartition(".")[2]: module.transfer for module in planned.modules}


def tensor_bytes(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of a checkpoint, bit for bit."""
    found: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
    for file in sorted(folder.rglob("*.safetensors")):
        for name, tensor in load_file(file).items():
            found[name] = str(tensor.dtype), tuple(tensor.shape), raw(tensor)
    return found


def read_json(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))
