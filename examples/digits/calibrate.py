"""What ``quantrecipe calibrate`` runs: both branches draw digits that the ablation does not.

``quantrecipe calibrate --recipe recipes/w8a8-smoothed.json --run calibrate:run --timesteps
0,0.25,0.5,0.75,1 --tokens 128 --out weights/statistics.safetensors`` in this folder.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from denoiser.data import PROMPTS
from denoiser.network import WEIGHTS, load_branch
from denoiser.sampler import Branches, trajectory

if TYPE_CHECKING:
    from quantrecipe.converter.calibration import Calibration

PROMPT_STEP = 3
SEED = 1000


def run(calibration: Calibration, weights: Path = WEIGHTS) -> None:
    """Draw, each branch watched under its name."""
    branches = Branches.load(partial(load_branch, weights=weights))
    prompts = PROMPTS[::PROMPT_STEP]
    with (
        calibration.observe(branches.conditional, "conditional"),
        calibration.observe(branches.unconditional, "unconditional"),
    ):
        trajectory(branches, prompts, seed=SEED)


def pulled(calibration: Calibration) -> None:
    """The same with what was pulled into the folder ``bf16`` of the working folder."""
    run(calibration, Path("bf16"))
