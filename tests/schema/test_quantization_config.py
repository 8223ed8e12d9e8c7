"""The ``quantization_config`` of a part: every module that is not plain, once, under its scheme."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from pydantic import TypeAdapter

from quantrecipe.schema.published import published_text
from quantrecipe.schema.quantization_config import (
    ConfiguredModule,
    QuantizationConfig,
    config_path,
    quantization_config,
)
from quantrecipe.schema.schemes import AnyWeight, DynamicActivation, ScaledWeight, Weight

WEIGHTS: list[AnyWeight] = [
    TypeAdapter(Weight).validate_python(spec)
    for spec in (
        {"format": "int8", "granularity": "channel"},
        {"format": "int8", "granularity": "channel", "scale_dtype": "float16"},
        {"format": "int8", "granularity": "group", "group_size": 8},
        {"format": "float8_e4m3fn", "granularity": "block", "block_size": (128, 128)},
        {"format": "bfloat16"},
    )
]
ACTIVATION = DynamicActivation(format="int8", granularity="token", dynamic=True)
# A recipe may call a scheme what a kept format would be called.
NAMES = ["kept-int8-channel", "a", "b", "c", "d"]


@st.composite
def modules(draw: st.DrawFn) -> list[ConfiguredModule]:
    found = []
    for name in draw(st.lists(st.text("abc.", min_size=1, max_size=5), unique=True)):
        index = draw(st.sampled_from([None, 0, 1, 2, 3, 4]))
        weight = WEIGHTS[index] if index is not None else draw(st.sampled_from(WEIGHTS))
        found.append(
            ConfiguredModule(
                name=name,
                scheme=NAMES[index] if index is not None else None,
                weight=weight,
                activation=ACTIVATION if index == 0 else None,
                smoothed=index is not None and draw(st.booleans()),
            )
        )
    return found


VALIDATOR = Draft202012Validator(json.loads(published_text("quantization_config")))


@given(modules=modules(), data=st.data())
def test_every_module_is_told_as_it_is_stored(
    modules: list[ConfiguredModule], data: st.DataObject
) -> None:
    written = quantization_config(modules)
    assert written == quantization_config(data.draw(st.permutations(modules)))
    scaled = {module.name: module for module in modules if isinstance(module.weight, ScaledWeight)}
    if not scaled:
        assert written is None
        return
    VALIDATOR.validate(written)
    read = QuantizationConfig.model_validate_json(json.dumps(written))
    assert read.schemes.keys() == read.modules.keys()
    told: dict[str, Any] = {}
    for scheme, mine in read.modules.items():
        assert list(mine.names) == sorted(mine.names)
        for name in mine.names:
            assert name not in told
            told[name] = read.schemes[scheme], name in mine.smoothing, scheme
    assert told.keys() == scaled.keys()
    for name, module in scaled.items():
        scheme, smoothed, called = told[name]
        assert (scheme.weight, scheme.activation) == (module.weight, module.activation)
        assert smoothed == module.smoothed
        assert module.scheme in (None, called)


def test_it_reads_like_this() -> None:
    made = quantization_config(
        [
            ConfiguredModule("b", "w8a8", WEIGHTS[0], ACTIVATION, smoothed=True),
            ConfiguredModule("a", "w8a8", WEIGHTS[0], ACTIVATION, smoothed=False),
            ConfiguredModule("c", None, WEIGHTS[3], None, smoothed=False),
            ConfiguredModule("d", None, WEIGHTS[4], None, smoothed=False),
        ]
    )
    assert made == {
        "quant_method": "quantrecipe",
        "version": 1,
        "schemes": {
            "kept-float8_e4m3fn-block": {
                "weight": {
                    "format": "float8_e4m3fn",
                    "granularity": "block",
                    "scale_dtype": "float32",
                    "quantizer": {"kind": "absmax"},
                    "block_size": [128, 128],
                }
            },
            "w8a8": {
                "weight": {
                    "format": "int8",
                    "granularity": "channel",
                    "scale_dtype": "float32",
                    "quantizer": {"kind": "absmax"},
                    "symmetric": True,
                },
                "activation": {
                    "format": "int8",
                    "granularity": "token",
                    "dynamic": True,
                    "symmetric": True,
                },
            },
        },
        "modules": {
            "kept-float8_e4m3fn-block": {"names": ["c"], "smoothing": []},
            "w8a8": {"names": ["a", "b"], "smoothing": ["b"]},
        },
    }


def test_it_lies_beside_the_tensors() -> None:
    assert config_path("model.safetensors") == "config.json"
    assert config_path("transformer/model.safetensors") == "transformer/config.json"
