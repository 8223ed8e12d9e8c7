"""Every figure of a ranking, against the same from whole tensors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from quantrecipe.converter import convert, open_recipe, plan
from quantrecipe.converter.activations import as_quantized
from quantrecipe.converter.ranking import decibels, measuring, rank
from quantrecipe.converter.smoothing import smoothquant_factors
from quantrecipe.formats import dequantize, quantize
from quantrecipe.schema.dtypes import PlainDType
from quantrecipe.schema.problems import InvalidInput
from quantrecipe.schema.schemes import DynamicActivation, Scheme
from quantrecipe.testing.strategies import BLOCK_SIZE, GROUP_SIZE
from tests.converter.making import (
    KINDS,
    WEIGHTS,
    Json,
    Tensors,
    everything,
    parsed,
    recipe,
    save,
    weight_spec,
)
from tests.converter.ranking.planted import TOKEN, observed, save_observed

IN, OUT, TOKENS = 3 * GROUP_SIZE, 4 * BLOCK_SIZE[0] + 1, 40


SMOOTHING = {
    "kind": "smoothquant",
    "alpha": 0.5,
    "apply": "online",
    "statistics": "s.safetensors",
}


def tensors_of(kind: str, seed: int = 0) -> Tensors:
    built = KINDS[kind].build(np.random.default_rng(seed), OUT, IN)
    return {f"a.{name}": tensor for name, tensor in built.items()}


def scheme(weight: Json, **fields: Any) -> Json:
    return {"all": {"weight": weight, **fields}}


def powers(outputs: Tensor, wanted: Tensor) -> float:
    return float((outputs - wanted).square().sum() / wanted.square().sum())


@pytest.mark.parametrize(
    ("kind", "weight"),
    [
        ("float32", "int8-channel-float32"),
        ("bfloat16", "int8-tensor-float32"),
        ("bfloat16", "int8-group-float16"),
        ("float8_e4m3fn-[out]", "int8-channel-bfloat16"),
        ("float8_e4m3fn-block", "float8_e4m3fn-block-float32"),
        ("int8-[out,1]", "float8_e5m2-tensor-float32"),
    ],
)
@pytest.mark.parametrize("smoothed", [False, True])
def test_figures_are_those_of_whole_tensors(
    tmp_path: Path, kind: str, weight: str, smoothed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A block for every row, or row of blocks.
    monkeypatch.setattr(measuring, "DEFAULT_BLOCK_BYTES", 1)
    tensors = tensors_of(kind)
    source = save(tmp_path / "m.safetensors", tensors)
    x = torch.randn(TOKENS, IN, generator=torch.Generator().manual_seed(0))
    x *= torch.arange(1, IN + 1)
    statistics = save_observed(
        tmp_path / "s.safetensors", {("model", "a"): observed(x, [30, 10], keep=8)}
    )
    document = recipe(
        source=everything(),
        target=everything(),
        schemes=scheme(
            WEIGHTS[weight], activation=TOKEN, **({"smoothing": SMOOTHING} if smoothed else {})
        ),
    )
    monkeypatch.chdir(tmp_path)
    (found,) = rank(parsed(document), source, statistics=statistics, jobs=1).modules

    whole = KINDS[kind].meaning({name[2:]: tensor for name, tensor in tensors.items()}).float()
    factors = torch.ones(IN)
    if smoothed:
        factors = smoothquant_factors(x.abs().amax(0), whole.abs().amax(0), 0.5)
    spec = Scheme.model_validate({"weight": WEIGHTS[weight]}, strict=False).weight
    stored = quantize(whole * factors, spec)
    hat = dequantize(stored.codes, stored.scale, spec)
    assert found.weight_noise == pytest.approx(powers(hat.double(), (whole * factors).double()))
    kept = x[:: TOKENS // 8][:8]
    inputs = as_quantized(kept / factors, DynamicActivation.model_validate(TOKEN))
    outputs, wanted = inputs.double() @ hat.double().T, kept.double() @ whole.double().T
    assert found.measured == pytest.approx(powers(outputs, wanted), rel=1e-3)
    assert (found.noise, found.basis, found.tokens) == (found.measured, "tokens", 8)
    assert found.predicted is not None
    assert found.activation_share is not None
    assert 0 < found.activation_share < 1
    bins = [powers(outputs[at], wanted[at]) for at in (slice(0, 6), slice(6, 8))]
    worst = int(bins[1] > bins[0])
    assert found.worst_bin is not None
    assert (found.worst_bin.start, found.worst_bin.stop) == (worst, worst + 1)
    assert found.worst_bin.noise == pytest.approx(bins[worst], rel=1e-3)
    assert found.spikiness is not None
    assert found.spikiness.max_to_median == pytest.approx(
        float(x.abs().amax(0).max() / x.abs().amax(0).double().quantile(0.5))
    )


CLIPPED = weight_spec("int8") | {
    "quantizer": {"kind": "clip-search", "min_clip_ratio": 0.5, "statistics": "s.safetensors"}
}
INT4 = CLIPPED | weight_spec("int4", "group") | {"symmetric": False}


@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize(
    "weight",
    [weight_spec("int8"), CLIPPED, weight_spec("int4", "group"), INT4],
    ids=["absmax", "clip-search", "int4", "int4, zero points, clip-search"],
)
def test_a_weight_is_as_noisy_as_its_conversion_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weight: Json, smoothed: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    source = save(tmp_path / "m.safetensors", tensors_of("bfloat16"))
    x = torch.randn(TOKENS, IN, generator=torch.Generator().manual_seed(0)).sinh()
    save_observed(tmp_path / "s.safetensors", {("model", "a"): observed(x)})
    smoothing = {"smoothing": SMOOTHING} if smoothed else {}
    document = parsed(recipe(target=everything(), schemes=scheme(weight, **smoothing)))
    (found,) = rank(document, source, statistics="s.safetensors").modules
    (module,) = convert(document, source, "out").lock.modules
    assert module.error is not None
    assert decibels(found.weight_noise) == pytest.approx(module.error.sqnr_db, abs=0.006)


def test_a_rotated_weight_is_as_noisy_as_its_conversion_says(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 64, generator=generator)
    weight[:, 5] *= 50
    source = save(tmp_path / "m.safetensors", {"a.weight": weight})
    x = torch.randn(TOKENS, 64, generator=generator)
    statistics = save_observed(
        tmp_path / "s.safetensors", {("model", "a"): observed(x, keep=TOKENS)}
    )
    rotation = {"kind": "hadamard", "size": 16}
    schemes = scheme(weight_spec("int8"), activation=TOKEN, rotation=rotation)
    document = parsed(recipe(target="quantrecipe", schemes=schemes))
    (found,) = rank(document, source, statistics=statistics).modules
    (module,) = convert(document, source, tmp_path / "out").lock.modules
    assert module.error is not None
    assert decibels(found.weight_noise) == pytest.approx(module.error.sqnr_db, abs=0.006)
    assert found.measured is not None
    assert found.predicted == pytest.approx(found.measured, rel=0.3)


def test_one_of_several_statistics_files_has_to_be_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = save(tmp_path / "m.safetensors", tensors_of("bfloat16"))
    for name in ("s", "t"):
        save_observed(
            tmp_path / f"{name}.safetensors", {("model", "a"): observed(torch.ones(2, IN))}
        )
    smoothing = SMOOTHING | {"statistics": "t.safetensors"}
    document = parsed(recipe(target=everything(), schemes=scheme(CLIPPED, smoothing=smoothing)))
    with pytest.raises(InvalidInput, match="2 statistics files: s"):
        rank(document, source)
    assert rank(document, source, statistics="t.safetensors").modules[0].basis == "moments"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("weight", ["int8-channel-float32", "int8-group-float16"])
def test_extra_bytes_are_what_protecting_adds(
    tmp_path: Path, weight: str, dtype: PlainDType
) -> None:
    tensors = tensors_of("bfloat16") | {"a.bias": torch.ones(OUT)}
    source = save(tmp_path / "m.safetensors", tensors)
    document = recipe(source=everything(), target=everything(), schemes=scheme(WEIGHTS[weight]))
    (found,) = rank(parsed(document), source, dtype=dtype).modules
    entry = {"modules": ["a"], "dtype": dtype, "reason": "test"}
    protected = document | {"schemes": {}, "rules": [], "protected": [entry]}
    sizes = [plan(parsed(each), source).modules[0].nbytes for each in (document, protected)]
    assert found.extra_bytes == sizes[1] - sizes[0]


def two_parts(folder: Path) -> Json:
    for part in ("one", "two"):
        rng = np.random.default_rng(len(part))
        weights = {name: torch.from_numpy(rng.standard_normal((8, 8))) for name in "qkvo"}
        save(
            folder / f"{part}.safetensors",
            {f"{name}.weight": weight.float() for name, weight in weights.items()},
        )
    files = {part: f"{part}.safetensors" for part in ("one", "two")}
    return recipe(source="plain", target="transformerlab") | {
        "source": {"layout": "plain", "parts": files}
    }


def test_siblings_and_parts_are_tied_if_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    document = parsed(two_parts(tmp_path))
    x = torch.randn(5, 8)
    modules = {(part, name): observed(x) for part in ("one", "two") for name in "qkvo"}
    groups = {"one": ["qkv"], "two": ["qkv"]}
    statistics = save_observed(tmp_path / "s.safetensors", modules, groups)

    def found(
        *, tie_siblings: bool = True, tie_parts: bool = False
    ) -> set[tuple[tuple[str, str], ...]]:
        ranking = rank(
            document,
            tmp_path,
            statistics=statistics,
            tie_siblings=tie_siblings,
            tie_parts=tie_parts,
        )
        assert math.fsum(group.noise for group in ranking.groups) == pytest.approx(ranking.noise)
        return {group.modules for group in ranking.groups}

    one, two = (tuple((part, name) for name in "kqv") for part in ("one", "two"))
    assert found() == {one, two, (("one", "o"),), (("two", "o"),)}
    assert found(tie_parts=True) == {one + two, (("one", "o"), ("two", "o"))}
    assert found(tie_siblings=False) == {((part, name),) for part, name in modules}
    pairs = {(("one", name), ("two", name)) for name in "qkvo"}
    assert found(tie_siblings=False, tie_parts=True) == pairs
    # What the recipe says counts in the place of what was found.
    schemes = scheme(weight_spec("int8"), smoothing=SMOOTHING)
    document = parsed(two_parts(tmp_path) | {"schemes": schemes, "siblings": [["q", "o"]]})
    kept = {((part, name),) for part in ("one", "two") for name in "kv"}
    assert found() == kept | {tuple((part, name) for name in "oq") for part in ("one", "two")}


def test_what_was_not_measured_is_ranked_by_its_weight_and_says_so(tmp_path: Path) -> None:
    document = two_parts(tmp_path) | {
        "schemes": scheme(weight_spec("int8"), activation=TOKEN),
    }
    statistics = save_observed(
        tmp_path / "s.safetensors", {("one", name): observed(torch.randn(5, 8)) for name in "qk"}
    )
    ranking = rank(parsed(document), tmp_path, statistics=statistics)
    for module in ranking.modules:
        known = module.part == "one" and module.name in "qk"
        assert module.blind != known
        assert module.basis == ("moments" if known else "weight")
        assert (module.spikiness is not None) == known
        assert (module.noise == module.weight_noise) != known


def test_statistics_of_another_model_are_refused(tmp_path: Path) -> None:
    source = save(tmp_path / "m.safetensors", tensors_of("bfloat16"))
    statistics = save_observed(
        tmp_path / "s.safetensors", {("model", "a"): observed(torch.randn(5, IN + 1))}
    )
    with pytest.raises(InvalidInput) as refused:
        rank(parsed(recipe()), source, statistics=statistics)
    assert [problem.kind for problem in refused.value.problems] == ["statistics-mismatch"]


def test_a_recipe_that_quantizes_nothing_is_refused(tmp_path: Path) -> None:
    source = save(tmp_path / "m.safetensors", tensors_of("bfloat16"))
    with pytest.raises(InvalidInput, match="quantizes no module"):
        rank(open_recipe(parsed(recipe(schemes={}, rules=[]))), source)


def test_what_the_target_renames_has_the_inputs_of_its_source(tmp_path: Path) -> None:
    names = {"names": [{"from": "a", "into": ["q", "k"]}]}
    source = save(tmp_path / "m.safetensors", {"a.weight": torch.randn(8, IN)})
    statistics = save_observed(
        tmp_path / "s.safetensors", {("model", "a"): observed(torch.randn(5, IN))}
    )
    found = rank(
        parsed(recipe(target=everything(), target_fields=names)), source, statistics=statistics
    )
    assert [(each.name, each.basis) for each in sorted(found.modules, key=lambda m: m.name)] == [
        ("k", "moments"),
        ("q", "moments"),
    ]
