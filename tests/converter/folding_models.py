"""Small real models to fold smoothing in: a block of a transformer, and Ideogram 4's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from quantrecipe.schema.recipe import Fold

WIDTH, HIDDEN, HEADS = 16, 24, 2

EDGES: list[dict[str, Any]] = [
    {"modules": ["layers.*.attention.qkv"], "into": "layers.*.attention_norm1.weight"},
    {
        "modules": ["layers.*.attention.o"],
        "into": "layers.*.attention.qkv",
        "rows": [2 * WIDTH, 3 * WIDTH],
    },
    {
        "modules": ["layers.*.feed_forward.w1", "layers.*.feed_forward.w3"],
        "into": "layers.*.ffn_norm1",
    },
    {"modules": ["layers.*.feed_forward.w2"], "into": "layers.*.feed_forward.w3"},
]
"""The edges of ``Tiny``: those of Ideogram 4 as its own checkpoints name it."""

DIFFUSERS_EDGES: list[dict[str, Any]] = [
    {
        "modules": [f"layers.*.attention.to_{which}" for which in "qkv"],
        "into": "layers.*.attention_norm1.weight",
    },
    {"modules": ["layers.*.attention.to_out.0"], "into": "layers.*.attention.to_v"},
    {
        "modules": ["layers.*.feed_forward.w1", "layers.*.feed_forward.w3"],
        "into": "layers.*.ffn_norm1.weight",
    },
    {"modules": ["layers.*.feed_forward.w2"], "into": "layers.*.feed_forward.w3"},
]
"""The edges of Ideogram 4 as diffusers names it."""


def folds(edges: list[dict[str, Any]]) -> list[Fold]:
    return [Fold.model_validate_json(json.dumps(edge)) for edge in edges]


class RMSNorm(nn.Module):
    """As models have it: in float32, whatever it is given."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width).uniform_(0.5, 2))

    def forward(self, x: Tensor) -> Tensor:
        normed = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)
        return normed.to(x.dtype) * self.weight


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.o = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (HEADS, -1)).transpose(-3, -2)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.o(mixed.transpose(-3, -2).flatten(-2))
        return out


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.w2 = nn.Linear(HIDDEN, WIDTH, bias=False)
        self.w3 = nn.Linear(WIDTH, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w2(functional.silu(self.w1(x)) * self.w3(x))
        return out


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_norm1 = RMSNorm(WIDTH)
        self.attention = Attention()
        self.ffn_norm1 = nn.LayerNorm(WIDTH)
        nn.init.normal_(self.ffn_norm1.bias)
        self.feed_forward = FeedForward()

    def forward(self, x: Tensor, *, gate: float = 1.0) -> Tensor:
        x = x + gate * self.attention(self.attention_norm1(x))
        out: Tensor = x + gate * self.feed_forward(self.ffn_norm1(x))
        return out


class Tiny(nn.Module):
    """Blocks of RMSNorm, attention, LayerNorm and SwiGLU between two linears."""

    def __init__(self, layers: int = 2, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.proj_in = nn.Linear(WIDTH, WIDTH)
            self.layers = nn.ModuleList(Block() for _ in range(layers))
            self.proj_out = nn.Linear(WIDTH, WIDTH)

    def block(self, layer: int = 0) -> Block:
        found = self.layers[layer]
        assert isinstance(found, Block)
        return found

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj_in(x)
        for layer in self.layers:
            x = layer(x, gate=0.5)
        out: Tensor = self.proj_out(x)
        return out


def tiny_input(seed: int = 1) -> Tensor:
    """Two samples of five tokens, with channels of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 5, WIDTH, generator=generator)
    return x * torch.linspace(-2, 2, WIDTH).exp()


def runner(model: nn.Module, *args: Any, **kwargs: Any) -> Callable[[], Any]:
    """Calls ``model`` with these."""

    def run() -> Any:
        with torch.no_grad():
            return model(*args, **kwargs)

    return run


def ideogram4(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, Any]]:
    """A tiny Ideogram 4 of diffusers with weights that all count, and what to call it with."""
    import diffusers

    kind: Any = diffusers.Ideogram4Transformer2DModel
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = kind(
            in_channels=8,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            intermediate_size=24,
            adaln_dim=6,
            llm_features_dim=10,
            mrope_section=(2, 1, 1),
        ).eval()
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
        tokens = 7
        inputs = {
            "hidden_states": torch.randn(1, tokens, 8).to(dtype),
            "timestep": torch.tensor([0.3]).to(dtype),
            "encoder_hidden_states": torch.randn(1, tokens, 10).to(dtype),
            "position_ids": torch.arange(tokens).view(1, -1, 1).repeat(1, 1, 3),
            "segment_ids": torch.ones(1, tokens, dtype=torch.int64),
            "indicator": torch.tensor([[3, 3, 2, 2, 2, 2, 2]]),
        }
    return model.to(dtype), inputs
