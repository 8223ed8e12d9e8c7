"""Use an installed quantrecipe from a folder that is not its source tree.

Everything a wheel can forget is touched: console scripts, entry points, package data, the typing
marker. Needs nothing that the package does not need itself.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch

import quantrecipe
from quantrecipe.loaders import load_state_dict

OUT_FEATURES, IN_FEATURES = 24, 40
RECIPE = {
    "kind": "recipe",
    "version": 1,
    "name": "smoke-int8",
    "source": {"layout": "plain", "parts": {"model": "model.safetensors"}},
    "schemes": {"int8": {"weight": {"format": "int8", "granularity": "channel"}}},
    "rules": [{"modules": ["layers.*.linear"], "scheme": "int8", "count": 2}],
    "target": {"layout": "int8-scaled"},
}


def main() -> None:
    """Run everything once, in the current folder."""
    check_installation()
    weights = write_source(Path("source") / "model.safetensors")
    Path("recipe.json").write_text(json.dumps(RECIPE, indent=2), encoding="utf-8")

    command("quantrecipe", "--help")
    command("quantrecipe", "--version")
    command("quantrecipe", "validate", "recipe.json")
    for listing in ("recipes", "layouts", "formats"):
        command("quantrecipe", listing)
    command("convert", "--recipe", "recipe.json", "source", "--out", "out")
    command("quantrecipe", "inspect", "out")
    check_result(weights)
    command("quantrecipe", "publish", "out", "--license", "apache-2.0")
    for name in ("README.md", "usage.py", "safetensors_loader.py"):
        if not Path("out", name).is_file():
            sys.exit(f"publish did not write {name}")
    command("quantrecipe", "verify", "out")
    print("smoke test: fine")


def check_installation() -> None:
    """The package is the installed one, and whole."""
    package = Path(str(files("quantrecipe")))
    if "site-packages" not in package.parts:
        sys.exit(f"not the installed package: {package}")
    for pattern in (
        "py.typed",
        "schema/v1/*.json",
        "layouts/*.json",
        "names/*.json",
        "recipes/*.json",
    ):
        if not any(package.glob(pattern)):
            sys.exit(f"the wheel lacks {pattern}")
    print(f"quantrecipe {quantrecipe.__version__} in {package}")


def write_source(path: Path) -> dict[str, np.ndarray]:
    """Write a float32 checkpoint of two linears and a norm, by hand."""
    random = np.random.default_rng(0)
    weights = {
        "layers.0.linear.weight": random.standard_normal((OUT_FEATURES, IN_FEATURES)),
        "layers.1.linear.weight": random.standard_normal((OUT_FEATURES, IN_FEATURES)) * 1e-3,
        "norm.weight": random.standard_normal(IN_FEATURES),
    }
    arrays = {name: values.astype(np.float32) for name, values in weights.items()}
    header = {}
    position = 0
    for name, values in arrays.items():
        end = position + values.nbytes
        header[name] = {"dtype": "F32", "shape": values.shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir()
    payload = b"".join(values.tobytes() for values in arrays.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + payload)
    return arrays


def command(name: str, *arguments: str) -> None:
    """Run a console script of this environment; end if it fails."""
    print(f"$ {name} {' '.join(arguments)}", flush=True)
    program = Path(sys.executable).with_name(name)
    subprocess.run([program, *arguments], check=True, stdin=subprocess.DEVNULL)


def check_result(weights: dict[str, np.ndarray]) -> None:
    """What was converted comes back within half a scale; the rest as it was."""
    state = load_state_dict("out", names="source", dtype=torch.float32)
    if state.keys() != weights.keys():
        sys.exit(f"loaded {sorted(state)}")
    for name, before in weights.items():
        after = state[name].numpy()
        scale = np.abs(before).max(axis=-1, keepdims=True) / 127
        bound = 0.501 * scale if name.startswith("layers.") else np.zeros_like(before)
        if not (np.abs(after - before) <= bound).all():
            sys.exit(f"{name} came back changed")
        if name.startswith("layers.") and (after == before).all():
            sys.exit(f"{name} was never rounded")


if __name__ == "__main__":
    main()
