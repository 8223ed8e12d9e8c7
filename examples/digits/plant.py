"""Plant outliers into the branches that ``train.py`` wrote.

Which, and why they change nothing, says ``denoiser/outliers.py``.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from denoiser.classifier import FILE as CLASSIFIER_FILE
from denoiser.data import PROMPTS
from denoiser.fidelity import velocity_sqnr
from denoiser.network import FILE, PARTS, WEIGHTS, load_branch, save_branch
from denoiser.outliers import SPIKED, plant_mild, plant_spikes, spiked_module
from denoiser.sampler import Branches, trajectory

SEED = 3
FILES = (*(f"{folder}/{FILE}" for folder in PARTS.values()), CLASSIFIER_FILE)


def main() -> None:
    """Watch the branches draw, plant, write, and say what it changed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    weights: Path = parser.parse_args().weights
    file = weights / "training.json"
    record = json.loads(file.read_text(encoding="utf-8"))
    if "spikes" in record:
        sys.exit(f"{weights}: outliers are planted already; train again first")
    prompts = PROMPTS[::3]
    trained = Branches.load(lambda part: load_branch(part, weights))
    planted = copy.deepcopy(trained)
    with watched(trained) as inputs:
        reference = trajectory(trained, prompts, seed=SEED)

    record["spikes"] = {}
    for part in PARTS:
        network = planted.part(part)
        given = {name: torch.cat(seen) for name, seen in inputs[part].items()}
        spikes = plant_spikes(network, part, given)
        plant_mild(network)
        record["spikes"][part] = [spike.as_json() for spike in spikes]
        for spike in spikes:
            print(f"{part} {spike.module}: units {spike.copies}, {spike.factor:g} x {spike.unit}")
    sqnr = velocity_sqnr(planted, reference, prompts).mean()
    print(f"velocity, planted against trained: {sqnr:.1f} dB")
    record["planted_velocity_sqnr_db"] = round(float(sqnr), 1)
    for part, folder in PARTS.items():
        save_branch(planted.part(part), weights / folder)
    record["sha256"] = {path: digest(weights / path) for path in FILES}
    file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


@contextmanager
def watched(branches: Branches) -> Iterator[dict[str, dict[str, list[Tensor]]]]:
    """By part and module: the inputs ``[tokens, units]`` of every ``w2`` that shall get spikes."""
    inputs: dict[str, dict[str, list[Tensor]]] = {}
    handles = []
    for part, layers in SPIKED.items():
        inputs[part] = {spiked_module(layer): [] for layer in layers}
        for name, seen in inputs[part].items():
            module = branches.part(part).get_submodule(name)

            def keep(_: nn.Module, given: tuple[Tensor], seen: list[Tensor] = seen) -> None:
                seen.append(given[0].detach().flatten(0, -2))

            handles.append(module.register_forward_pre_hook(keep))
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
