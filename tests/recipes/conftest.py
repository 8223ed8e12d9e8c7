"""What the tests of the built-in recipes share: Ideogram 4's tensor table and real module trees."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import pytest

from quantrecipe.schema.tensors import OutputTensor


@dataclass(frozen=True)
class Tree:
    """A model on the meta device, as a recipe sees it."""

    linears: dict[str, tuple[int, int]]
    embeddings: frozenset[str]
    shapes: dict[str, tuple[int, ...]]
    parameters: int

    def tensors(self) -> list[OutputTensor]:
        return [OutputTensor(name, "bfloat16", shape) for name, shape in self.shapes.items()]


@pytest.fixture(scope="session")
def ideogram4() -> ModuleType:
    return importlib.import_module("tests.recipes.ideogram4_tensors")


@pytest.fixture(scope="session")
def tree() -> Callable[[str], Tree]:
    """Builds the model of that name; skips the test where its library is not installed."""
    return cache(_tree)


def _tree(name: str) -> Tree:
    library, build = MODELS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those libraries' own deprecations
        package = pytest.importorskip(library)
        import torch

        with torch.device("meta"):
            return _describe(build(package))


def _describe(model: Any) -> Tree:
    from torch import nn

    modules = dict(model.named_modules())
    return Tree(
        linears={
            name: (module.out_features, module.in_features)
            for name, module in modules.items()
            if isinstance(module, nn.Linear)
        },
        embeddings=frozenset(n for n, m in modules.items() if isinstance(m, nn.Embedding)),
        shapes={name: tuple(tensor.shape) for name, tensor in model.state_dict().items()},
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )


def _bert(transformers: Any) -> Any:
    return transformers.BertModel(transformers.BertConfig())


def _t5(transformers: Any) -> Any:
    return transformers.T5ForConditionalGeneration(transformers.T5Config(num_layers=2))


def _mixtral(transformers: Any) -> Any:
    config = transformers.MixtralConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_local_experts=2
    )
    return transformers.MixtralForCausalLM(config)


# The published configurations; where that is the class's default, nothing is said.
MODELS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "ideogram-4": ("diffusers", lambda library: library.Ideogram4Transformer2DModel()),
    "flux-1-dev": ("diffusers", lambda lib: lib.FluxTransformer2DModel(guidance_embeds=True)),
    "qwen-image": ("diffusers", lambda library: library.QwenImageTransformer2DModel()),
    "bert": ("transformers", _bert),
    "t5": ("transformers", _t5),
    "mixtral": ("transformers", _mixtral),
}
