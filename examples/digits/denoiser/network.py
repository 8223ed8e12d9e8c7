"""The network: diffusers' own ``Ideogram4Transformer2DModel``, small, and what it is fed.

Two networks of the same shape and of separate weights, as the real pipeline has them: the
conditional one sees ``[text][image]``, the unconditional one the image alone, with zeros where the
text features would be.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import Ideogram4Transformer2DModel
from diffusers.models.transformers.transformer_ideogram4 import (
    IMAGE_POSITION_OFFSET,
    LLM_TOKEN_INDICATOR,
    OUTPUT_IMAGE_INDICATOR,
)
from safetensors.torch import load_file
from torch import Tensor, nn

from denoiser.data import CHANNELS, GRID, IMAGE_TOKENS, TEXT_FEATURES, TEXT_TOKENS

HERE = Path(__file__).resolve().parent
WEIGHTS = HERE.parent / "weights"
PARTS = {"conditional": "transformer", "unconditional": "unconditional_transformer"}
FILE = "diffusion_pytorch_model.safetensors"

CONFIG: dict[str, Any] = {
    "in_channels": CHANNELS,
    "num_layers": 8,
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "adaln_dim": 32,
    "llm_features_dim": TEXT_FEATURES,
    "rope_theta": 10_000,
    "mrope_section": (6, 5, 5),
}


def new_network() -> nn.Module:
    """An untrained network in float32, initialised from torch's global generator."""
    network: nn.Module = Ideogram4Transformer2DModel(**CONFIG)
    return network


def load_branch(part: str, weights: Path = WEIGHTS) -> nn.Module:
    """A trained branch: bfloat16 numbers, computed with in float32."""
    network = new_network()
    network.load_state_dict(load_file(weights / PARTS[part] / FILE))
    return network.train(False)


def save_branch(network: nn.Module, folder: Path) -> None:
    """Write a branch as diffusers does, in bfloat16, with its ``config.json``."""
    network.bfloat16().save_pretrained(folder)  # type: ignore[operator]


def conditional_velocity(
    network: nn.Module, latents: Tensor, times: Tensor, features: Tensor
) -> Tensor:
    """The velocity with text: latents ``[N, 16, 4]``, times ``[N]``, features ``[N, 4, F]``."""
    count = len(latents)
    latents = torch.cat([latents.new_zeros(count, TEXT_TOKENS, CHANNELS), latents], 1)
    blank = features.new_zeros(count, IMAGE_TOKENS, TEXT_FEATURES)
    features = torch.cat([features, blank], 1)
    return _velocity(network, latents, times, features, TEXT_TOKENS)


def unconditional_velocity(network: nn.Module, latents: Tensor, times: Tensor) -> Tensor:
    """The velocity without text: latents ``[N, 16, 4]``, times ``[N]``."""
    features = latents.new_zeros(len(latents), IMAGE_TOKENS, TEXT_FEATURES)
    return _velocity(network, latents, times, features, 0)


def _velocity(
    network: nn.Module, latents: Tensor, times: Tensor, features: Tensor, text_tokens: int
) -> Tensor:
    positions, indicator = _packing(text_tokens, latents.device)
    output: Tensor = network(
        hidden_states=latents,
        timestep=times,
        encoder_hidden_states=features,
        position_ids=positions.expand(len(latents), -1, -1),
        segment_ids=torch.ones_like(indicator).expand(len(latents), -1),
        indicator=indicator.expand(len(latents), -1),
        return_dict=False,
    )[0]
    return output[:, text_tokens:]


def _packing(text_tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions ``[1, L, 3]`` and roles ``[1, L]`` of text and image tokens, as the pipeline's."""
    text = torch.arange(text_tokens, device=device)[:, None].expand(-1, 3)
    place = torch.arange(IMAGE_TOKENS, device=device)
    axes = [torch.zeros_like(place), place // GRID, place % GRID]
    image = torch.stack(axes, 1) + IMAGE_POSITION_OFFSET
    roles = torch.full((text_tokens + IMAGE_TOKENS,), OUTPUT_IMAGE_INDICATOR, device=device)
    roles[:text_tokens] = LLM_TOKEN_INDICATOR
    return torch.cat([text, image])[None], roles[None]
