"""Run alone, as ``python -I using_loader.py JOBS``: uses emitted loaders without this package.

JOBS is a JSON list; each entry says what to load, and where results go (see ``Job``).
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


class Job(TypedDict):
    """One part of one checkpoint.

    ``linears`` are ``[out, in, has a bias]`` by name, ``others`` shape and dtype by name; the model
    is made of them on the meta device. Inputs lie in a safetensors file by module; those of
    quantized modules are used.
    """

    folder: str
    part: str | None
    linears: dict[str, tuple[int, int, bool]]
    others: dict[str, tuple[list[int], str]]
    inputs: str
    state: str
    outputs: str


class _NotInstalled:
    """Finds no quantrecipe, wherever it lies."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] == "quantrecipe":
            raise ModuleNotFoundError(name)


def loader_of(folder: Path) -> Any:
    """The loader that lies in a folder, as a module."""
    spec = importlib.util.spec_from_file_location("loader", folder / "safetensors_loader.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["loader"] = module
    spec.loader.exec_module(module)
    return module


def build(
    linears: dict[str, tuple[int, int, bool]], others: dict[str, tuple[list[int], str]]
) -> nn.Module:
    """A model of linears and loose tensors under dotted names."""
    root = nn.Module()

    def owner(name: str) -> tuple[nn.Module, str]:
        *path, leaf = name.split(".")
        module = root
        for segment in path:
            if segment not in module._modules:
                module.add_module(segment, nn.Module())
            module = module.get_submodule(segment)
        return module, leaf

    for name, (out_features, in_features, bias) in linears.items():
        parent, leaf = owner(name)
        parent.add_module(leaf, nn.Linear(in_features, out_features, bias))
    for name, (shape, dtype) in others.items():
        parent, leaf = owner(name)
        tensor = torch.empty(shape, dtype=getattr(torch, dtype))
        if tensor.is_floating_point():
            parent.register_parameter(leaf, nn.Parameter(tensor))
        else:
            parent.register_buffer(leaf, tensor)
    return root


def run(job: Job) -> None:
    """Both uses of a loader."""
    loader = loader_of(Path(job["folder"]))
    state = loader.state_dict(part=job["part"])
    save_file(state, job["state"])
    with torch.device("meta"):
        model = build(job["linears"], job["others"])
    assert loader.load(model, part=job["part"], dtype=None) is model
    quantized = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, loader.QuantizedLinear)
    }
    for name, tensor in model.state_dict().items():
        if name.rpartition(".")[0] not in quantized:
            assert torch.equal(tensor, state[name]), name
            assert tensor.dtype == state[name].dtype, name
    found: dict[str, Tensor] = {}
    for key, x in load_file(job["inputs"]).items():
        name = key.rpartition("/")[0]
        if name in quantized:
            found[key] = quantized[name](x).contiguous()
    save_file(found, job["outputs"])


def main() -> None:
    """Run every job."""
    sys.meta_path.insert(0, _NotInstalled())
    for job in json.loads(Path(sys.argv[1]).read_text("utf-8")):
        run(job)
    assert not [name for name in sys.modules if name.partition(".")[0] == "quantrecipe"]


if __name__ == "__main__":
    main()
