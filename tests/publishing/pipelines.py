"""A small Ideogram 4 with all that belongs to it, as a repository of the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

TEMPLATE = (
    "{% for message in messages %}<user>{{ message['content'][0]['text'] }}{% endfor %}<assistant>"
)
HIDDEN, LAYERS = 16, 36


def tokenizer() -> Any:
    """One token for each character."""
    import transformers
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    characters = [chr(code) for code in range(32, 127)]
    words = {word: number for number, word in enumerate(["<pad>", "<unk>", *characters])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    kind = transformers.PreTrainedTokenizerFast
    return kind(tokenizer_object=made, pad_token="<pad>", unk_token="<unk>", chat_template=TEMPLATE)


def text_encoder() -> Any:
    """Qwen3-VL with as many layers as the pipeline looks at."""
    import transformers

    config = transformers.Qwen3VLConfig(
        text_config={
            "vocab_size": 128,
            "hidden_size": HIDDEN,
            "intermediate_size": 16,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "mrope_section": [2, 1, 1],
            },
        },
        vision_config={
            "depth": 1,
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_heads": 1,
            "out_hidden_size": HIDDEN,
            "num_position_embeddings": 4,
            "deepstack_visual_indexes": [0],
        },
    )
    return transformers.Qwen3VLModel(config)


def branch(diffusers: Any) -> Any:
    """A denoiser."""
    return diffusers.Ideogram4Transformer2DModel(
        in_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        intermediate_size=24,
        adaln_dim=8,
        llm_features_dim=13 * HIDDEN,
        mrope_section=(2, 1, 1),
    )


def vae(diffusers: Any) -> Any:
    """Images four times as wide as its latents, which have four channels."""
    return diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=16,
    )


@torch.no_grad()
def ideogram(folder: Path, diffusers: Any) -> Any:
    """The pipeline, saved into a folder, in float32."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        pipeline = diffusers.Ideogram4Pipeline(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
            vae=vae(diffusers),
            text_encoder=text_encoder(),
            tokenizer=tokenizer(),
            transformer=branch(diffusers),
            unconditional_transformer=branch(diffusers),
        )
        for module in (pipeline.transformer, pipeline.unconditional_transformer, pipeline.vae):
            _spread(module)
    pipeline.save_pretrained(folder)
    return pipeline


def _spread(model: nn.Module) -> None:
    """Numbers that let a prompt be seen in the image: biases and weights of any size."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        elif name.endswith("bias"):
            parameter.normal_(std=0.1)
