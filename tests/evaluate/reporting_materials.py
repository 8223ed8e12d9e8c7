"""What reports are made of, made up: locks of whole networks with random errors, and results."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from quantrecipe.evaluate.reporting.drawing import Drawing, Shape
from quantrecipe.schema.canonical import document_bytes, lock_digest
from quantrecipe.schema.lock import (
    LOCK_NAME,
    Lock,
    LockedModule,
    LockedOther,
    LockedTensor,
    OutputFile,
    Role,
    SourceFile,
    Tool,
    WeightError,
)
from quantrecipe.schema.plan import Plan, PlannedModule, PlannedTensor
from quantrecipe.schema.planning import make_plan
from quantrecipe.schema.recipe import Recipe
from quantrecipe.schema.registry import recipe_text
from quantrecipe.schema.statistics import STATISTICS_KEY
from quantrecipe.schema.tensors import OutputTensor
from tests.recipes.ideogram4_tensors import tensors as ideogram4_tensors
from tests.support.headers import linear, source
from tests.support.headers import recipe as small_recipe

Json = dict[str, Any]
BRANCHES = ("conditional", "unconditional")


def lock_of(plan: Plan, seed: int = 0) -> Lock:
    """A plan as if it had been carried out, with random errors: better ones in deeper layers."""
    rng = random.Random(seed)
    digest = f"{rng.getrandbits(256):064x}"
    unsigned = Lock(
        kind="lock",
        version=1,
        recipe=plan.recipe,
        recipe_sha256=plan.recipe_sha256,
        tool=Tool(name="quantrecipe", version="0.1.0"),
        converter=Tool(name="streaming", version="0.1.0"),
        source=tuple(
            SourceFile(
                part=part.name,
                path=file.relative,
                bytes=file.size,
                header_sha256=file.header_sha256,
            )
            for part in plan.parts
            for file in part.files
        ),
        outputs=tuple(
            OutputFile(path=file.path, bytes=file.size, sha256=digest) for file in plan.files
        ),
        modules=tuple(_module(module, rng) for module in plan.modules),
        others=tuple(
            LockedOther(part=other.part, name=other.name, tensor=_tensor(other.output, "other"))
            for other in plan.others
        ),
        sidecars=(OutputFile(path="recipe.json", bytes=1234, sha256=digest),),
        sha256="0" * 64,
    )
    return unsigned.model_copy(update={"sha256": lock_digest(unsigned.to_json_value())})


def _module(module: PlannedModule, rng: random.Random) -> LockedModule:
    optional: Json = {
        "activation": module.activation,
        "scheme": module.scheme,
        "reason": module.reason,
    }
    if module.disposition == "quantized":
        noise = rng.gauss(0, 1.2) - (8 if rng.random() < 0.02 else 0)
        optional["error"] = WeightError(
            sqnr_db=round(41 + noise, 2), max_error_in_scales=round(rng.uniform(0.49, 0.5), 4)
        )
    return LockedModule(
        part=module.part,
        name=module.name,
        shape=(module.source.out_features, module.source.in_features),
        disposition=module.disposition,
        transfer=module.transfer,
        weight=module.weight,
        tensors={role: _tensor(tensor, role) for role, tensor in module.outputs.items()},
        **{key: value for key, value in optional.items() if value is not None},
    )


def _tensor(tensor: PlannedTensor, role: Role) -> LockedTensor:
    return LockedTensor(
        name=tensor.name,
        dtype=tensor.dtype,
        shape=tensor.shape,
        file=tensor.file,
        offset=tensor.offset,
        bytes=tensor.nbytes,
        role=role,
        xxh3_128="0" * 32,
    )


def ideogram4_lock(seed: int = 0) -> Lock:
    """Both branches in full size: 211 modules each."""
    recipe = Recipe.model_validate_json(recipe_text("ideogram-4-int8-w8a8"))
    parts = [
        source(*ideogram4_tensors(fp8=True), name=branch, metadata={"format": "pt"})
        for branch in BRANCHES
    ]
    return lock_of(make_plan(recipe, parts), seed)


def lock_with(names: Iterable[str], protected: Sequence[Json] = (), **changes: Any) -> Lock:
    """A lock of one part with modules of these names, 8 by 8, all of them to INT8."""
    tensors: list[OutputTensor] = [linear(name, 8, 8) for name in names]
    recipe = small_recipe(protected=list(protected), **changes)
    return lock_of(make_plan(recipe, [source(*tensors)]))


def write_lock(folder: Path, lock: Lock) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LOCK_NAME).write_bytes(document_bytes(lock.to_json_value()))
    return folder


def write_json(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def ranking(lock: Lock, seed: int = 0, ladder: bool = True) -> Json:
    """What ``rank --json`` prints of the modules that a lock has quantized."""
    rng = random.Random(seed)
    modules: list[Json] = [
        {
            "part": module.part,
            "name": module.name,
            "scheme": module.scheme,
            "noise": (noise := 10 ** rng.uniform(-4.5, -2)),
            "basis": "tokens",
            "weight_noise": noise / 3,
            "predicted": None,
            "activation_share": None,
            "measured": noise,
            "tokens": 64,
            "spikiness": {"max_to_median": rng.uniform(3, 4000), "kurtosis": None},
            "worst_bin": {"start": 0.75, "stop": 1.0, "noise": noise * 2},
            "blind": False,
            "extra_bytes": module.shape[0] * module.shape[1],
            "sqnr_db": -10 * float(np.log10(noise)),
        }
        for module in lock.modules
        if module.disposition == "quantized"
    ]
    modules.sort(key=lambda module: -module["noise"])
    nbytes, noise_left = [0], [sum(module["noise"] for module in modules)]
    for module in modules:
        nbytes.append(nbytes[-1] + module["extra_bytes"])
        noise_left.append(max(0.0, noise_left[-1] - module["noise"]))
    chosen = modules[:3]
    rungs: list[Json] = [
        {
            "order": order,
            "protected": protected,
            "modules": protected,
            "extra_bytes": protected * 1000,
            "value": value / (1 + protected * (4 if order == "ranked" else 0.5)),
        }
        for order, value in (("ranked", 0.1), ("random", 0.1), ("reverse", 0.1))
        for protected in (0, 1, 2, 4, 8)
    ]
    return {
        "recipe": lock.recipe.name,
        "dtype": "bfloat16",
        "noise": noise_left[0],
        "modules": modules,
        "groups": [],
        "warnings": [],
        "curve": {
            "bytes": nbytes,
            "noise": noise_left,
            "protected": list(range(len(nbytes))),
            "knee": min(3, len(nbytes) - 1),
            "exact": True,
            "slack_bytes": 0,
        },
        "chosen": {
            "groups": [
                {"modules": [{"part": each["part"], "name": each["name"]}]} for each in chosen
            ],
            "extra_bytes": sum(each["extra_bytes"] for each in chosen),
            "noise": noise_left[min(3, len(nbytes) - 1)],
            "sqnr_db": 20.0,
        },
        "ladder": {"rungs": rungs, "knee": 2} if ladder else None,
        "out": None,
    }


def comparison(metric: str, variant: str, verdict: str, low: float, high: float) -> Json:
    """A comparison as evaluation files have it."""
    difference = (low + high) / 2
    return {
        "metric": metric,
        "variant": variant,
        "prompts": 270,
        "differing": 270,
        "seeds": 1,
        "mean": 30.0 + difference,
        "reference_mean": 30.0,
        "difference": difference,
        "standard_deviation": 1.0,
        "intervals": {"t": [low, high], "bca": None, "percentile": [low, high]},
        "difference_test": {"p": 0.01, "p_holm": 0.04},
        "equivalence_test": {
            "margin": 0.5,
            "p_below": 0.01,
            "p_above": 0.01,
            "p": 0.01,
            "p_holm": 0.02,
            "power": 0.9,
        },
        "sensitivity": {"detectable": 0.2},
        "verdict": verdict,
        "explanation": f"because of {verdict}",
    }


VERDICTS: Mapping[str, tuple[float, float]] = {
    "better": (0.6, 1.4),
    "worse": (-1.4, -0.6),
    "equivalent within margin": (-0.2, 0.3),
    "not shown": (-0.9, 0.8),
}


def evaluation(*comparisons: Json) -> Json:
    """An evaluation file with a comparison of every verdict by two metrics, or with these."""
    found = comparisons or tuple(
        comparison(metric, f"variant-{index}", verdict, *sorted(end * sign for end in interval))
        for metric, sign in (("psnr", 1), ("lpips", -1))
        for index, (verdict, interval) in enumerate(VERDICTS.items())
    )
    return {
        "kind": "evaluation",
        "version": 1,
        "recipe": {"name": "declared", "sha256": "ab" * 32},
        "reference": "bf16",
        "metrics": {
            "psnr": {"higher_is_better": True, "margin": 0.5},
            "lpips": {"higher_is_better": False, "margin": 0.5},
        },
        "confidence": 0.95,
        "resamples": 10000,
        "seed": 0,
        "software": {"quantrecipe": "0.1.0", "numpy": "2.0", "scipy": "1.17"},
        "inputs": [{"name": "scores.jsonl", "sha256": "cd" * 32, "scores": 1350}],
        "comparisons": list(found),
        "warnings": ["few prompts"],
    }


def write_statistics(
    path: Path, modules: Mapping[str, Sequence[str]], bins: int = 5, seed: int = 0
) -> Path:
    """A statistics file with input maxima alone; every third module has a spike."""
    rng = np.random.default_rng(seed)
    edges = np.linspace(0, 1, bins + 1).round(3).tolist()
    header = {
        "kind": "statistics",
        "version": 1,
        "model": "a/model",
        "samples": 90,
        "prompts_sha256": "ef" * 32,
        "timesteps": [{"start": low, "stop": high, "samples": 10} for low, high in pairwise(edges)],
        "modules": {part: list(names) for part, names in modules.items()},
    }
    tensors = {}
    for part, names in modules.items():
        for index, name in enumerate(names):
            maxima = rng.uniform(0.5, 3, (bins, 16)).astype(np.float32)
            if index % 3 == 0:
                maxima[:, 3] *= np.geomspace(20, 2000, bins)
            tensors[f"{part}/{name}/input_absmax"] = maxima
    save_file(tensors, path, {STATISTICS_KEY: json.dumps(header)})
    return path


def out_of_bounds(drawing: Drawing) -> list[Shape]:
    """Shapes that reach over the edge of their drawing by more than half a pixel."""
    found = []
    for shape in drawing.shapes:
        left, top, right, bottom = shape.box()
        inside = left >= -0.5 and top >= -0.5
        inside &= right <= drawing.width + 0.5 and bottom <= drawing.height + 0.5
        if not inside or not all(map(math.isfinite, shape.box())):
            found.append(shape)
    return found
