"""INT8 per channel with convert-to-quant, by the arguments that its documentation gives.

python with_convert_to_quant.py SOURCE_FOLDER OUT_FOLDER [--low-memory]
"""

from __future__ import annotations

import sys
from pathlib import Path

from convert_to_quant.convert_to_quant import main

ARGUMENTS = [
    "--int8",
    "--scaling_mode",
    "row",
    "--simple",
    "--comfy_quant",
    "--save-quant-metadata",
]
LOOKUP_TABLES = "embed_image_indicator"


def convert(source: Path, out: Path, more: list[str]) -> None:
    """Run its command line in this process."""
    out.mkdir(parents=True)
    files = ["-i", str(next(source.glob("*.safetensors"))), "-o", str(out / "model.safetensors")]
    sys.argv = ["ctq", *files, *ARGUMENTS, "--exclude-layers", LOOKUP_TABLES, *more]
    main()


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
