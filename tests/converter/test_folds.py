"""Smoothing that is folded: outputs as with online smoothing, and nothing for a loader to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from quantrecipe.converter import convert
from quantrecipe.converter.calibration import Calibration, check_folds
from quantrecipe.evaluate import verify
from quantrecipe.loaders import load_model
from quantrecipe.schema.folds import FOLDED_NAME
from quantrecipe.schema.problems import InvalidInput
from quantrecipe.schema.registry import named_layout
from quantrecipe.schema.statistics import STATISTICS_KEY
from quantrecipe.testing.strategies import BLOCK_SIZE
from tests.converter.folding_models import (
    DIFFUSERS_EDGES,
    EDGES,
    WIDTH,
    RMSNorm,
    Tiny,
    folds,
    ideogram4,
    runner,
    tiny_input,
)
from tests.converter.making import (
    Json,
    everything,
    parsed,
    recipe,
    result_of,
    save,
    weight_spec,
)

TOKEN = {"format": "int8", "granularity": "token", "dynamic": True}
ROTATION = {"kind": "hadamard", "size": 4}
WITH_ZEROS = {"symmetric": False}
SEARCH = {"kind": "clip-search", "min_clip_ratio": 0.5, "steps": 5}
BLOCKS = "layers.*.{attention,feed_forward}.*"


def calibrate(path: Path, model: nn.Module, run: Any, edges: list[Json]) -> Path:
    """A statistics file of what the linears of a model were handed, with its folds proven."""
    maxima: dict[str, Tensor] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):

            def see(_: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                found = args[0].detach().float().abs().flatten(0, -2).amax(0)
                maxima[name] = torch.maximum(maxima.get(name, found), found)

            handles.append(module.register_forward_pre_hook(see))
    run()
    for handle in handles:
        handle.remove()
    proven = check_folds(model, folds(edges), run)
    header = {
        "kind": "statistics",
        "version": 1,
        "model": "tiny",
        "samples": 1,
        "timesteps": [{"start": 0.0, "stop": 1.0, "samples": 1}],
        "modules": {"model": sorted(maxima)},
        "folds": [one.to_json_value() for one in proven],
    }
    tensors = {f"model/{name}/input_absmax": one[None] for name, one in maxima.items()}
    return save(path, tensors, {STATISTICS_KEY: json.dumps(header)})


def wanted(
    weight: Json | None = None,
    apply: str = "fold",
    activation: Json | None = None,
    power_of_two: bool = False,
    **fields: Any,
) -> Any:
    scheme: Json = {"weight": weight or weight_spec("int8")}
    scheme["smoothing"] = {
        "kind": "smoothquant",
        "alpha": 0.5,
        "apply": apply,
        "statistics": "s.safetensors",
        "power_of_two": power_of_two,
    }
    if activation is not None:
        scheme["activation"] = activation
    defaults: Json = {
        "target": everything(),
        "schemes": {"all": scheme},
        "rules": [{"modules": [BLOCKS], "scheme": "all"}],
        "folds": EDGES,
    }
    return recipe(**(defaults | fields))


def rotating() -> Json:
    """The layout that also says which modules are rotated, with small blocks."""
    layout = named_layout("quantrecipe").to_json_value()
    for held in layout["holds"].values():
        if "block_size" in held:
            held["block_size"] = list(BLOCK_SIZE)
    return layout | {"name": "rotating"}


class Folder:
    """A folder with the checkpoint of a model, and its statistics."""

    def __init__(self, path: Path, model: nn.Module, run: Any, edges: list[Json]) -> None:
        self.path = path
        self.source = save(path / "model.safetensors", dict(model.state_dict()))
        calibrate(path / "s.safetensors", model, run, edges)

    def convert(self, document: Json, out: str = "out", **options: Any) -> Path:
        file = self.path / f"{out}.json"
        file.write_text(json.dumps(document))
        convert(file, self.source, self.path / out, **options)
        return self.path / out


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tiny, Folder]:
    model = Tiny()
    folder = tmp_path_factory.mktemp("tiny")
    return model, Folder(folder, model, runner(model, tiny_input()), EDGES)


def named(spec: Json) -> str:
    """What a weight's spec is called in a test, and its files."""
    said = [key if key == "quantizer" else str(value) for key, value in spec.items()]
    return "-".join(said)


def loaded(out: Path, layers: int = 2) -> nn.Module:
    model = Tiny(layers, seed=99)
    load_model(model, out, kernel="reference")
    return model


ROTATED = {
    "readers": ["layers.*.attention.o", "layers.*.feed_forward.{w1,w2}"],
    "upstream": ["layers.*.attention.qkv", "layers.*.feed_forward.w3"],
    "most": ["layers.*.attention.*", "layers.*.feed_forward.{w2,w3}"],
}
"""Modules of ``Tiny`` that are rotated: those that read, those that are folded into, or both."""


@pytest.mark.parametrize(
    ("spec", "rotated"),
    [
        (weight_spec("int8", "tensor"), "none"),
        (weight_spec("int8", "channel"), "none"),
        (weight_spec("int8", "channel"), "readers"),
        (weight_spec("int8", "channel"), "upstream"),
        (weight_spec("int8", "channel"), "most"),
        (weight_spec("int8", "group"), "upstream"),
        (weight_spec("int8", "channel", "bfloat16"), "most"),
        (weight_spec("float8_e4m3fn", "channel"), "readers"),
        (weight_spec("float8_e5m2", "block"), "most"),
        (weight_spec("int4", "group"), "none"),
        (weight_spec("int4", "group", "bfloat16") | WITH_ZEROS, "none"),
        (weight_spec("int4", "group") | WITH_ZEROS | {"quantizer": SEARCH}, "most"),
    ],
    ids=lambda of: of if isinstance(of, str) else named(of),
)
def test_converters_agree_and_every_number_is_proven_from_the_source(
    tiny: tuple[Tiny, Folder], spec: Json, rotated: str
) -> None:
    _, folder = tiny
    protected = [
        {"modules": ["layers.0.feed_forward.w1"], "dtype": "float16", "reason": "on purpose"},
        {"modules": ["layers.1.attention.qkv"], "dtype": "bfloat16", "reason": "on purpose"},
    ]
    document = wanted(spec, protected=protected)
    if rotated != "none":
        document["target"]["layout"] = rotating()
        document["rules"].insert(0, {"modules": ROTATED[rotated], "scheme": "rotated"})
        document["schemes"]["rotated"] = document["schemes"]["all"] | {"rotation": ROTATION}
    name = f"{named(spec)}-{rotated}"
    out = folder.convert(document, name, block_bytes=500)
    assert result_of(out) == result_of(folder.convert(document, f"r{name}", converter="reference"))
    assert verify(out, against=folder.source, block_bytes=300).problems == ()
    assert set(load_file(out / FOLDED_NAME)) == {
        f"model/layers.{layer}.{into}"
        for layer in (0, 1)
        for into in (
            *((f"attention_norm1.weight[0:{WIDTH}]",) if layer == 0 else ()),
            f"attention.qkv[{2 * WIDTH}:{3 * WIDTH}]",
            f"ffn_norm1[0:{WIDTH}]",
            "feed_forward.w3[0:24]",
        )
    }


@pytest.mark.parametrize(
    "spec",
    [
        weight_spec("int8", "channel"),
        weight_spec("int8", "group"),
        weight_spec("int4", "group") | WITH_ZEROS,
    ],
    ids=lambda spec: named(spec),
)
def test_codes_are_those_of_no_folding_and_scales_are_divided(
    tiny: tuple[Tiny, Folder], spec: Json
) -> None:
    _, folder = tiny
    # Only o is smoothed: what it is folded into stays as it would be, but for its scales.
    rules = [
        {"modules": ["layers.*.attention.o"], "scheme": "all"},
        {"modules": ["layers.*.attention.qkv"], "scheme": "plain"},
    ]
    document = wanted(spec, rules=rules)
    document["schemes"]["plain"] = {"weight": spec}
    out = load_file(folder.convert(document, f"codes-{named(spec)}") / "model.safetensors")
    document["rules"] = rules[1:]
    del document["schemes"]["all"], document["folds"]
    without = load_file(folder.convert(document, f"none-{named(spec)}") / "model.safetensors")
    factors = load_file(folder.path / f"codes-{named(spec)}" / FOLDED_NAME)
    for layer in (0, 1):
        at = f"layers.{layer}.attention.qkv"
        rows = slice(2 * WIDTH, 3 * WIDTH)
        for kept in ("weight", "weight_zero_point"):
            if f"{at}.{kept}" in without:
                assert torch.equal(out[f"{at}.{kept}"], without[f"{at}.{kept}"])
        before, after = without[f"{at}.weight_scale"], out[f"{at}.weight_scale"].clone()
        divisors = factors[f"model/{at}[32:48]"]
        spread = divisors.view(-1, *[1] * (before.ndim - 1))
        assert torch.equal(after[rows], before[rows] / spread)
        after[rows] = before[rows]
        assert torch.equal(after, before)
        bias = without[f"{at}.bias"]
        assert torch.equal(out[f"{at}.bias"][rows], bias[rows] / divisors)
        assert torch.equal(out[f"{at}.bias"][: rows.start], bias[: rows.start])


@given(seed=st.integers(0, 2**16))
@settings(max_examples=2)
def test_powers_of_two_fold_without_any_rounding(seed: int) -> None:
    """Online and folded differ in nothing but who divides."""
    model, x = Tiny(layers=1, seed=seed), tiny_input(seed)
    with TemporaryDirectory() as folder:
        made = Folder(Path(folder), model, runner(model, x), EDGES)
        outputs = []
        for apply in ("online", "fold"):
            out = made.convert(wanted(apply=apply, power_of_two=True), apply)
            outputs.append(runner(loaded(out, 1), x)())
        codes = [load_file(made.path / out / "model.safetensors") for out in ("online", "fold")]
    one, other = outputs
    assert isinstance(one, Tensor)
    assert isinstance(other, Tensor)
    # Sums are added up in one order, and every product is the same times a power of two.
    assert torch.equal(one, other)
    for name, tensor in codes[0].items():
        if tensor.dtype == torch.int8:
            assert torch.equal(tensor, codes[1][name])


@pytest.mark.parametrize("rotated", [False, True])
def test_folded_and_online_smoothing_give_the_same_within_the_bound_of_w8a8(
    tiny: tuple[Tiny, Folder], rotated: bool
) -> None:
    model, folder = tiny
    x = tiny_input()
    original = runner(model, x)()
    errors = {}
    results = {}
    for apply in ("online", "fold"):
        document = wanted(apply=apply, activation=TOKEN)
        if rotated:
            document["target"]["layout"] = rotating()
            document["schemes"]["all"]["rotation"] = ROTATION
        out = folder.convert(document, f"w8a8-{apply}-{rotated}")
        results[apply] = runner(loaded(out), x)()
        errors[apply] = float((results[apply] - original).abs().max())
    size = float(original.abs().max())
    assert max(errors.values()) < 0.03 * size
    assert float((results["fold"] - results["online"]).abs().max()) <= sum(errors.values())
    # A checkpoint that folds stores nothing for a loader to smooth with.
    assert not any("smooth" in name for name in load_file(out / "model.safetensors"))


def test_a_fold_that_was_not_proven_is_refused(tmp_path: Path) -> None:
    model = Tiny()
    made = Folder(tmp_path, model, runner(model, tiny_input()), EDGES[:3])
    with pytest.raises(InvalidInput) as caught:
        made.convert(wanted())
    (problem,) = caught.value.problems
    assert (problem.kind, problem.pointer) == ("fold-unproven", "/folds/3")
    assert "calibrate" in (problem.hint or "")
    assert not (tmp_path / "out").exists()


def test_a_fold_that_was_proven_in_fewer_places_is_refused(tmp_path: Path) -> None:
    model = Tiny()
    made = Folder(tmp_path, model, runner(model, tiny_input()), EDGES)
    file = tmp_path / "s.safetensors"
    with safe_open(file, "pt") as opened:
        header = json.loads(opened.metadata()[STATISTICS_KEY])
    header["folds"][0]["sites"] = 1
    save(file, load_file(file), {STATISTICS_KEY: json.dumps(header)})
    with pytest.raises(InvalidInput) as caught:
        made.convert(wanted())
    (problem,) = caught.value.problems
    assert problem.message == "proven in 1 places of part 'model', and used in 2"


def test_what_is_edited_is_found(tiny: tuple[Tiny, Folder]) -> None:
    _, folder = tiny
    out = folder.convert(wanted(), "edited")
    file = out / "model.safetensors"
    for name in (
        "layers.0.attention_norm1.weight",
        "layers.0.ffn_norm1.bias",
        "layers.0.attention.qkv.bias",
        "layers.0.attention.qkv.weight_scale",
        "layers.0.feed_forward.w3.weight_scale",
    ):
        tensors = load_file(file)
        before = tensors[name].clone()
        tensors[name].view(-1)[-1] *= 1 + 2**-20
        assert not torch.equal(before, tensors[name])
        edited = folder.path / "edited-copy"
        found = tampered(out, edited, tensors)
        assert found, name


@pytest.mark.parametrize("quantizer", [{"kind": "absmax"}, SEARCH], ids=["absmax", "clip-search"])
def test_zero_points_of_divided_scales_are_proven(
    tiny: tuple[Tiny, Folder], quantizer: Json
) -> None:
    _, folder = tiny
    spec = weight_spec("int4", "group") | WITH_ZEROS | {"quantizer": quantizer}
    out = folder.convert(wanted(spec), f"zeros-{quantizer['kind']}")
    for name in ("layers.0.attention.qkv", "layers.0.feed_forward.w3"):
        tensors = load_file(out / "model.safetensors")
        tensors[f"{name}.weight_zero_point"].view(-1)[-1] ^= 3
        assert "zero-point-differs" in tampered(out, folder.path / "zeros-copy", tensors), name


class Wide(nn.Module):
    """Two linears of 64 input features after a norm."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(2)
            self.norm = RMSNorm(64)
            self.up = nn.Linear(64, 64)
            self.down = nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.up(self.norm(x)))
        return out


def test_rows_of_nf4_are_divided_before_they_are_stored(tmp_path: Path) -> None:
    """Its scales may be 0, and then no division of them says anything."""
    model = Wide()
    model.up.weight.data[3] = 0
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(0))
    edges: list[Json] = [
        {"modules": ["up"], "into": "norm.weight"},
        {"modules": ["down"], "into": "up"},
    ]
    folder = Folder(tmp_path, model, runner(model, x), edges)
    spec = {"format": "nf4", "granularity": "block", "block_size": 64}
    rules = [{"modules": ["**"], "scheme": "all"}]
    document = wanted(spec, folds=edges, rules=rules, target="quantrecipe")
    out = folder.convert(document, block_bytes=512)
    again = folder.convert(document, "again", converter="reference")
    assert result_of(out) == result_of(again)
    found = verify(out, against=folder.source)
    assert found.problems == ()
    assert {module.name for module in found.measured} == {"up", "down"}
    other = Wide()
    load_model(other, out, kernel="reference")
    wrong = runner(other, x)() - runner(model, x)()
    assert 0 < float(wrong.square().sum()) < 0.05 * float(runner(model, x)().square().sum())


def tampered(out: Path, copy: Path, tensors: Mapping[str, Tensor]) -> list[str]:
    """What ``verify`` says of the numbers of a checkpoint with other tensors."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(out, copy)
    header_and_data = (copy / "model.safetensors").read_bytes()
    length = 8 + int.from_bytes(header_and_data[:8], "little")
    header = json.loads(header_and_data[8:length])
    data = bytearray(header_and_data)
    for name, entry in header.items():
        if name != "__metadata__":
            start, stop = entry["data_offsets"]
            raw = tensors[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            data[length + start : length + stop] = raw
    (copy / "model.safetensors").write_bytes(data)
    source = out.parent / "model.safetensors"
    kinds = {problem.kind for problem in verify(copy, against=source).problems}
    told = {"scale-differs", "zero-point-differs", "not-divided", "not-the-cast", "not-a-copy"}
    return sorted(kinds & told)


@pytest.mark.xdist_group("diffusers")
def test_the_edges_of_ideogram_4_on_its_own_model(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    model, inputs = ideogram4()
    run = runner(model, **inputs)
    folder = Folder(tmp_path, model, run, DIFFUSERS_EDGES)
    document = wanted(activation=TOKEN, folds=DIFFUSERS_EDGES, target="quantrecipe")
    out = folder.convert(document)
    assert verify(out, against=folder.source).problems == ()
    other, _ = ideogram4()
    load_model(other, out, kernel="reference")
    original, folded = (runner(one, **inputs, return_dict=False)()[0] for one in (model, other))
    error = float((folded - original).abs().max())
    assert error < 0.05 * float(original.abs().max())
    assert parsed(document).folds == tuple(folds(DIFFUSERS_EDGES))


def test_a_calibration_proves_what_the_recipe_folds(tmp_path: Path) -> None:
    model, x = Tiny(), tiny_input()
    alone = Calibration(parsed(wanted()))
    with alone.observe(model):
        runner(model, x)()
    document = wanted()
    document["source"]["parts"] = {"model": "a.safetensors", "other": "b.safetensors"}
    calibration = Calibration(parsed(document))
    # What is called to prove one is not measured as the other's.
    with calibration.observe(model), calibration.observe(model, "other"):
        runner(model, x)()
    assert {one.part for one in calibration.measurements.folds} == {"model", "other"}
    assert calibration.unproven() == ()
    of = dict(calibration.measurements.statistics())
    for (_, name), expected in alone.measurements.statistics():
        for part in ("model", "other"):
            assert torch.equal(of[part, name].input_absmax, expected.input_absmax)
            assert of[part, name].tokens == expected.tokens
    alone.measurements.save(tmp_path / "s.safetensors")
    source = save(tmp_path / "model.safetensors", dict(model.state_dict()))
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(wanted()))
    convert(file, source, tmp_path / "out")
    assert verify(tmp_path / "out", against=source).problems == ()


class Stubborn(Tiny):
    """Cannot be called a second time."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 2:
            raise RuntimeError("it is over")
        return super().forward(x)


def test_a_calibration_says_which_folds_are_not_proven() -> None:
    def observed(model: nn.Module, run: Any, **fields: Any) -> Calibration:
        calibration = Calibration(parsed(wanted(**fields)))
        with calibration.observe(model):
            run()
        return calibration

    def said(calibration: Calibration) -> list[tuple[str | None, str]]:
        assert {one.kind for one in calibration.unproven()} <= {"fold-unproven"}
        return [(one.pointer, one.message) for one in calibration.unproven()]

    model, x = Tiny(), tiny_input()
    run = runner(model, x)
    calibration = observed(model, runner(model.block(), x))
    message = "it was not proven on part 'model'"
    assert said(calibration) == [(f"/folds/{edge}", message) for edge in range(4)]
    calibration.prove_folds(model, run)
    assert said(calibration) == []
    wrong = [*EDGES[:3], EDGES[3] | {"into": "layers.*.feed_forward.w1"}]
    ((pointer, message),) = said(observed(model, run, folds=wrong))
    assert pointer == "/folds/3"
    assert "outputs of layers.1.feed_forward change by" in message
    stubborn = Stubborn()
    calibration = observed(stubborn, runner(stubborn, x))
    assert said(calibration) == [("/folds", "part 'model' could not be called again: it is over")]
    calibration.prove_folds(stubborn, runner(stubborn, x))
    assert said(calibration) == []
    # Nothing is to be folded.
    online = wanted(apply="online")
    del online["folds"]
    calibration = Calibration(parsed(online))
    with calibration.observe(stubborn):
        runner(stubborn, x)()
    assert stubborn.calls == 4
    assert calibration.unproven() == ()
