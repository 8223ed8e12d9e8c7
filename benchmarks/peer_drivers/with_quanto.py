"""INT8 per channel with optimum-quanto: ``quantize``, ``freeze``, ``save_file``.

python with_quanto.py SOURCE_FOLDER OUT_FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import module_tree
from optimum.quanto import freeze, qint8, quantization_map, quantize
from safetensors.torch import save_file


def main(source: Path, out: Path) -> None:
    """Read, quantize, write."""
    model = module_tree.load(next(source.glob("*.safetensors")))
    quantize(model, weights=qint8)
    freeze(model)
    out.mkdir(parents=True)
    save_file(model.state_dict(), out / "model.safetensors")
    (out / "quantization_map.json").write_text(json.dumps(quantization_map(model)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
