"""INT8 per channel with torchao: ``quantize_``, saved through its safetensors support.

python with_torchao.py SOURCE_FOLDER OUT_FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import module_tree
from safetensors.torch import save_file
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
from torchao.quantization import Int8WeightOnlyConfig, quantize_


def main(source: Path, out: Path) -> None:
    """Read, quantize, write."""
    model = module_tree.load(next(source.glob("*.safetensors")))
    quantize_(model, Int8WeightOnlyConfig())
    tensors, metadata = flatten_tensor_state_dict(model.state_dict())
    out.mkdir(parents=True)
    save_file(tensors, out / "model.safetensors", metadata=metadata)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
