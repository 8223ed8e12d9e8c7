"""Facts of small checkpoints that were really converted, and evaluations that were really made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quantrecipe.converter import convert
from quantrecipe.evaluate.reporting.fields import Source
from quantrecipe.evaluate.reporting.timed import Row, Timed
from quantrecipe.evaluate.scores.comparing import compare
from quantrecipe.evaluate.scores.reading import read_scores
from quantrecipe.publishing.facts import Base, Facts, License, Needed, Result, Usage
from quantrecipe.schema.address import HubAddress
from quantrecipe.schema.evaluated import JudgedRecipe
from quantrecipe.schema.evaluation import Evaluation
from quantrecipe.schema.lock import Lock, SourceRepository
from quantrecipe.schema.validation import load_lock
from tests.converter.making import numbers, recipe, save, save_statistics

Json = dict[str, Any]
COMMIT = "1" * 40
LICENSE = License("other", "some-terms", "LICENSE.md")
READ_FROM = SourceRepository.of(HubAddress("owner/base", "v1", "small"), COMMIT)
BASE = Base(
    repo="owner/base",
    commit=COMMIT,
    license=LICENSE,
    page="https://hub.example/owner/base",
    pipeline_tag="text-to-image",
    library_name="diffusers",
    languages=("en", "no"),
    tags=(
        "diffusers",
        "FP8",
        "8-bit",
        "art",
        "region:us",
        "base_model:finetune:a/b",
        "int8",
        "art",
    ),
    gated="auto",
    gate={"extra_gated_prompt": "Be kind: yes\n---\n", "extra_gated_fields": {"Name": "text"}},
)
USAGE = Usage(
    script=b"",
    packages=("quantrecipe", "torch>=2.5"),
    command="python usage.py --prompt 'a sign'",
    summary="Draws an image.",
    needed=Needed("owner/base", COMMIT, True, {"vae/model.safetensors": 1_234_567, "a.json": 3}),
)
INT8 = {"format": "int8", "granularity": "channel"}
TOKENS = {"format": "int8", "granularity": "token", "dynamic": True}
METRICS: Mapping[str, Json] = {
    "psnr": {"higher_is_better": True, "margin": 0.5},
    "mine": {"higher_is_better": False},
}


def converted(folder: Path, target: str, **fields: Any) -> Lock:
    """Two parts with three layers each and a head, converted; ``fields`` are the recipe's."""
    rng = np.random.default_rng(0)
    for part in ("one", "two"):
        tensors = {}
        for layer in range(3):
            tensors[f"layers.{layer}.up.weight"] = numbers(rng, 16, 64).bfloat16()
            tensors[f"layers.{layer}.up.bias"] = torch.zeros(16).bfloat16()
            tensors[f"layers.{layer}.down.weight"] = numbers(rng, 64, 16).bfloat16()
        tensors["head.weight"] = numbers(rng, 8, 64).bfloat16()
        tensors["norm.weight"] = torch.ones(64).bfloat16()
        path = save(folder / "source" / part / "model.safetensors", tensors, {"format": "pt"})
        (path.parent / "config.json").write_text("{}")
    names = [f"layers.{layer}.{kind}" for layer in range(3) for kind in ("up", "down")]
    maxima = {name: torch.ones(1, 16 if name.endswith("down") else 64) for name in names}
    save_statistics(folder / "statistics.safetensors", "one", maxima)
    path = folder / "recipe.json"
    parts = {part: f"{part}/model.safetensors" for part in ("one", "two")}
    document = recipe(**{"target": target, "target_fields": {"parts": parts}, **fields})
    document["source"]["parts"] = {"one": "one", "two": "two"}
    path.write_text(json.dumps(document))
    convert(path, folder / "source", folder / "out")
    return load_lock(folder / "out" / "recipe.lock.json")


def protected_recipe() -> Json:
    """INT8 by channel, W8A8, a layer of each part protected, the head passed through."""
    return {
        "schemes": {"w8a8": {"weight": INT8, "activation": TOKENS}},
        "rules": [{"modules": ["layers.**"], "scheme": "w8a8"}],
        "protected": [
            {
                "modules": ["layers.{0,2}.down"],
                "parts": ["one"],
                "dtype": "bfloat16",
                "reason": "a",
            },
            {"modules": ["layers.1.*"], "parts": ["two"], "dtype": "float32", "reason": "spikes"},
        ],
        "evaluation": {"reference": "ref", "metrics": METRICS, "confidence": 0.9},
        "bounds": {"min_weight_sqnr_db": 10},
    }


def smoothed_recipe() -> Json:
    """NF4 in one part, INT8 with smoothing and rotation in the other."""
    smoothing = {
        "kind": "smoothquant",
        "alpha": 0.5,
        "apply": "online",
        "statistics": "statistics.safetensors",
    }
    smooth = {"weight": INT8, "activation": TOKENS, "smoothing": smoothing}
    return {
        "schemes": {
            "smooth": {**smooth, "rotation": {"kind": "hadamard", "size": 16}},
            "small": {"weight": {"format": "nf4", "granularity": "block", "block_size": 64}},
        },
        "rules": [
            {"modules": ["layers.**"], "parts": ["one"], "scheme": "smooth"},
            {"modules": ["layers.*.up", "head"], "parts": ["two"], "scheme": "small"},
        ],
    }


def scored(folder: Path, recipe_of: Lock | None = None) -> Result:
    """Scores written and compared as ``evaluate compare`` does; with no recipe, no margins."""
    rng = np.random.default_rng(1)
    reference = rng.normal(30, 2, 40)
    variants = {"ref": reference, "int8": reference + rng.normal(0, 0.1, 40)}
    variants["rival"] = reference - 3 + rng.normal(0, 0.1, 40)
    folder.joinpath("scores").mkdir(parents=True, exist_ok=True)
    paths = [folder / "scores" / name for name in ("mine.jsonl", "psnr.jsonl")]
    for path in paths:
        rows = [
            {
                "variant": v,
                "metric": path.stem,
                "prompt": f"p{at}",
                "seed": 0,
                "value": float(value),
            }
            for v, values in variants.items()
            for at, value in enumerate(values)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores, inputs = read_scores(paths)
    more: Json = {}
    if recipe_of is not None and recipe_of.recipe.evaluation is not None:
        evaluation = recipe_of.recipe.evaluation
        digest = recipe_of.recipe_sha256
        more = {"recipe": JudgedRecipe(name=recipe_of.recipe.name, sha256=digest)}
    else:
        plain: Mapping[str, Json] = {
            name: {"higher_is_better": metric["higher_is_better"]}
            for name, metric in sorted(METRICS.items())
        }
        fields = {"reference": "ref", "metrics": plain, "confidence": 0.9}
        evaluation = Evaluation.model_validate(fields)
    found = compare(scores, evaluation, inputs=inputs, resamples=200, seed=3, **more)
    digest = hashlib.sha256(b"").hexdigest()
    here = tuple(f"scores/{path.name}" for path in paths)
    return Result(found, "int8", "evaluation.json", digest, here)


TIMED = Timed(
    Source("speed.json", "d" * 64),
    (
        Row((("device", "CPU"),), (("seconds", 1.5),)),
        Row((("device", "GPU"),), (("seconds", 0.25), ("images/s", 4.0))),
    ),
)


def facts_of(lock: Lock, folder: Path, **changes: Any) -> Facts:
    """What there may be of a checkpoint, without results."""
    read = lock.model_copy(update={"repository": READ_FROM})
    return replace(Facts(read, folder, BASE, LICENSE, USAGE, timed=TIMED), **changes)
