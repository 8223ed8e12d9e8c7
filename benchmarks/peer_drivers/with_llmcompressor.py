"""INT8 per channel with llmcompressor: ``model_free_ptq``, which takes files without a model.

    python with_llmcompressor.py SOURCE_FOLDER OUT_FOLDER [--dequantizer]

It asks for ``model.safetensors``, so a folder beside the output has the source under that name.
``--dequantizer`` chains the one of its dequantizers that is made for scales of rows, and has that
folder's ``config.json`` describe the source in the words of compressed-tensors.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from compressed_tensors.entrypoints.convert import CompressedTensorsDequantizer
from llmcompressor import model_free_ptq

NO_LINEARS = ("re:.*norm.*", "embed_image_indicator")
SOURCE_FORMAT = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "ignore": list(NO_LINEARS),
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
        }
    },
}


def main(source: Path, out: Path, dequantize: bool) -> None:
    """Hand the folder over."""
    folder = renamed(source, out.with_name(f"{out.name}-source"), dequantize)
    converter = CompressedTensorsDequantizer(folder, NO_LINEARS) if dequantize else None
    model_free_ptq(folder, out, scheme="W8A8", ignore=NO_LINEARS, converter=converter)


def renamed(source: Path, folder: Path, describe: bool) -> Path:
    """The same file under another name, and a ``config.json`` that can say how it is stored."""
    folder.mkdir(parents=True)
    os.link(next(source.glob("*.safetensors")), folder / "model.safetensors")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if describe:
        config["quantization_config"] = SOURCE_FORMAT
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), "--dequantizer" in sys.argv[3:])
