"""Converted checkpoints in diffusers: from_pretrained, save_pretrained, pipelines, compilers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from quantrecipe.converter import convert
from quantrecipe.loaders import QuantizedLinear, load_state_dict
from quantrecipe.schema.problems import InvalidInput
from tests.converter.making import Json, parsed, raw, recipe, weight_spec
from tests.converter.test_names import tiny_ideogram
from tests.loaders.converted import (
    TOKEN,
    assert_same,
    converted,
    fragment,
    library,
    set_fragment,
    written,
)

diffusers: Any = None
ours: Any = None

pytestmark = pytest.mark.xdist_group("diffusers")

PARTS = {"conditional": "transformer", "unconditional": "unconditional_transformer"}
FOLDERS = [*PARTS.values()]
FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True, scope="module")
def libraries() -> None:
    """Imported when a test runs: every process collects, and one of them runs these."""
    global diffusers, ours
    diffusers = library("diffusers")
    library("accelerate")
    ours = library("quantrecipe.loaders.diffusers")


@pytest.fixture(autouse=True)
def quiet(libraries: None) -> Iterator[None]:
    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
    yield
    diffusers.logging.set_verbosity_warning()


def ideogram(
    folder: Path, weight: Json | None = None, activation: Json | None = TOKEN, **target: Any
) -> Path:
    """Two small branches of Ideogram 4, from the original's names in FP8."""
    for number, name in enumerate(FOLDERS):
        model, path = tiny_ideogram(folder / "in" / name, diffusers), folder / "in" / name / FILE
        model.register_to_config(mrope_section=(2, 1, 1))  # of heads of 8
        model.save_config(path.parent)
        # The branches are not one network: the numbers of the second are those of another.
        tensors = {
            n: t * -1 if number and t.ndim == 1 else t for n, t in written(path.parent).items()
        }
        save_file({n: t if "scale" not in n else t.abs() for n, t in tensors.items()}, path)
    target["names"] = "ideogram4-diffusers"
    document = recipe(weight, source="fp8-scaled", target="quantrecipe", target_fields=target)
    if activation is not None:
        document["schemes"]["all"]["activation"] = activation
    document["source"]["parts"] = PARTS
    document["rules"] = [{"modules": ["layers.*.{attention,feed_forward}.**"], "scheme": "all"}]
    document["target"]["parts"] = {part: f"{name}/{FILE}" for part, name in PARTS.items()}
    return convert(parsed(document), folder / "in", folder / "out").out


def load(out: Path, name: str, **options: Any) -> Any:
    return diffusers.Ideogram4Transformer2DModel.from_pretrained(out, subfolder=name, **options)


def quantized(model: nn.Module) -> dict[str, QuantizedLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}


def inputs(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Two tokens of text and four of an image."""
    generator = torch.Generator().manual_seed(2)
    return {
        "hidden_states": torch.randn(1, 6, 4, generator=generator).to(dtype),
        "timestep": torch.tensor([0.3], dtype=dtype),
        "encoder_hidden_states": torch.randn(1, 6, 12, generator=generator).to(dtype),
        "position_ids": torch.arange(6)[None, :, None].expand(1, 6, 3),
        "segment_ids": torch.zeros(1, 6, dtype=torch.long),
        "indicator": torch.tensor([[3, 3, 2, 2, 2, 2]]),
    }


@torch.no_grad()
def predicted(model: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    result: Tensor = model(**inputs(dtype)).sample
    return result


def dequantized(out: Path, part: str) -> Any:
    """A plain model of the weights that a part stands for."""
    config = diffusers.Ideogram4Transformer2DModel.load_config(out, subfolder=PARTS[part])
    del config["quantization_config"]
    model = diffusers.Ideogram4Transformer2DModel.from_config(config)
    model.load_state_dict(load_state_dict(out, part=part, names="target"), strict=True)
    return model.eval()


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "weight",
    [
        weight_spec("int8"),
        weight_spec("int8", "tensor", "bfloat16"),
        weight_spec("float8_e4m3fn"),
        weight_spec("float8_e5m2", scale_dtype="float16"),
    ],
    ids=lambda weight: weight["format"],
)
def test_a_model_is_loaded_as_it_is_stored(
    tmp_path: Path, weight: Json, dtype: torch.dtype | None
) -> None:
    out = ideogram(tmp_path, weight, None)
    for name in FOLDERS:
        model = load(out, name, dtype=dtype)
        assert model.dtype == (dtype or torch.float32)
        assert set(quantized(model)) == set(fragment(out / name)["modules"]["all"]["names"])
        stored = written(out / name)
        for module_name, module in quantized(model).items():
            for role in ("weight", "weight_scale"):
                tensor, expected = module.get_parameter(role), stored[f"{module_name}.{role}"]
                assert tensor.dtype == expected.dtype
                assert tensor.shape == expected.shape
                assert torch.equal(tensor.float(), expected.float())
                assert not tensor.requires_grad
        plain = {
            n: p
            for n, p in model.named_parameters()
            if n.rpartition(".")[0] not in quantized(model)
        }
        assert {p.dtype for p in plain.values()} == {dtype or torch.float32}


@pytest.mark.parametrize(
    ("weight", "roles"),
    [
        (
            {
                "format": "nf4",
                "granularity": "block",
                "block_size": 64,
                "double_quantized": True,
            },
            {"weight_scale", "second_scale", "scale_offset"},
        ),
        ({"format": "mxfp8", "granularity": "group"}, {"weight_scale"}),
        ({"format": "mxfp4", "granularity": "group"}, {"weight_scale"}),
        ({"format": "nvfp4", "granularity": "group"}, {"weight_scale", "second_scale"}),
    ],
    ids=["nf4 twice", "mxfp8", "mxfp4", "nvfp4"],
)
def test_formats_with_scales_of_their_own(tmp_path: Path, weight: Json, roles: set[str]) -> None:
    torch.manual_seed(0)
    plain = diffusers.PriorTransformer(
        num_attention_heads=2,
        attention_head_dim=32,
        num_layers=1,
        embedding_dim=64,
        num_embeddings=4,
        additional_embeddings=4,
    ).eval()
    plain.save_pretrained(tmp_path / "in")
    modules = ["transformer_blocks.**.{to_q,to_k,to_v,to_out.0}"]
    out = converted(tmp_path / "in", tmp_path / "out", modules, weight, activation=None, file=FILE)
    model = diffusers.PriorTransformer.from_pretrained(out).eval()
    stored = written(out)
    assert len(quantized(model)) == 4
    for name, module in quantized(model).items():
        for role in {"weight", *roles}:
            tensor, expected = module.get_parameter(role), stored[f"{name}.{role}"]
            assert tensor.dtype == expected.dtype
            assert raw(tensor.detach()) == raw(expected)
    ours.set_kernel(model, "reference")
    plain.load_state_dict(load_state_dict(out))
    x = torch.randn(1, 64), 1, torch.randn(1, 64), torch.randn(1, 4, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(*x).predicted_image_embedding, plain(*x)[0])
    model.save_pretrained(tmp_path / "again")
    assert_same(out, tmp_path / "again")


@pytest.mark.parametrize("part", PARTS)
def test_it_computes_what_the_weights_stand_for(tmp_path: Path, part: str) -> None:
    out = ideogram(tmp_path, activation=None)
    model = load(out, PARTS[part])
    assert ours.set_kernel(model, "reference") == 14
    expected = predicted(dequantized(out, part))
    assert expected.abs().max() > 0
    torch.testing.assert_close(predicted(model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("part", PARTS)
def test_rounded_activations_cost_little(tmp_path: Path, part: str) -> None:
    out = ideogram(tmp_path)
    model = load(out, PARTS[part])
    ours.set_kernel(model, "reference")
    expected = predicted(dequantized(out, part))
    assert (predicted(model) - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("shard", [None, "3KB"])
def test_it_is_saved_as_it_was_loaded(tmp_path: Path, shard: str | None) -> None:
    sharded: Json = {} if shard is None else {"max_shard_size": shard}
    out = ideogram(tmp_path, **sharded)
    for part, name in PARTS.items():
        model = load(out, name, dtype=torch.bfloat16)
        again = tmp_path / "again" / name
        model.save_pretrained(again, **sharded)
        assert (len(list(again.glob("*.safetensors"))) > 1) == (shard is not None)
        assert_same(out / name, again)
        expected = load_state_dict(out, part=part, names="target")
        found = load_state_dict(again, layout="quantrecipe")
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected)
        reloaded = diffusers.Ideogram4Transformer2DModel.from_pretrained(again)
        assert torch.equal(predicted(reloaded), predicted(load(out, name)))


def test_a_pipeline_has_both_branches(tmp_path: Path) -> None:
    out = ideogram(tmp_path)
    branch = ["diffusers", "Ideogram4Transformer2DModel"]
    nothing = [None, None]
    index = {
        "_class_name": "Ideogram4Pipeline",
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": nothing,
        "tokenizer": nothing,
        "transformer": branch,
        "unconditional_transformer": branch,
        "vae": ["diffusers", "AutoencoderKLFlux2"],
    }
    (out / "model_index.json").write_text(json.dumps(index))
    diffusers.FlowMatchEulerDiscreteScheduler().save_pretrained(out / "scheduler")
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(4,) * 4, layers_per_block=1, latent_channels=1, norm_num_groups=1
    )
    vae.save_pretrained(out / "vae")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(
        out, text_encoder=None, tokenizer=None, dtype=torch.bfloat16
    )
    assert type(pipeline) is diffusers.Ideogram4Pipeline
    branches = [getattr(pipeline, name) for name in FOLDERS]
    assert [len(quantized(branch)) for branch in branches] == [14, 14]
    assert {branch.dtype for branch in branches} == {torch.bfloat16}
    results = [predicted(branch, torch.bfloat16) for branch in branches]
    assert all(result.isfinite().all() for result in results)
    assert not torch.equal(*results)
    pipeline.save_pretrained(tmp_path / "again")
    for name in FOLDERS:
        assert_same(out / name, tmp_path / "again" / name)


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, "auto"])
def test_a_device_map(tmp_path: Path, device_map: object) -> None:
    out = ideogram(tmp_path)
    model = load(out, "transformer", device_map=device_map, low_cpu_mem_usage=True)
    assert torch.equal(predicted(model), predicted(load(out, "transformer")))


def test_nothing_is_left_on_the_disk(tmp_path: Path) -> None:
    out = ideogram(tmp_path)
    with pytest.raises(InvalidInput, match="leaves on the disk"):
        load(out, "transformer", device_map={"": "disk"}, offload_folder=tmp_path / "offload")


def test_it_compiles_without_a_break(tmp_path: Path) -> None:
    out = ideogram(tmp_path)
    model = load(out, "transformer")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(predicted(compiled), predicted(model))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_are_trained_beside_codes(tmp_path: Path) -> None:
    peft = library("peft")
    out = ideogram(tmp_path)
    model = load(out, "transformer")
    before = predicted(model)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "w1"], init_lora_weights=False))
    adapted = predicted(model)
    assert not torch.equal(adapted, before)
    model(**inputs()).sample.square().sum().backward()
    with_grad = {n for n, p in model.named_parameters() if p.grad is not None}
    assert with_grad == {n for n, _ in model.named_parameters() if "lora_" in n}
    model.disable_adapters()
    assert torch.equal(predicted(model), before)


def test_mistakes_are_named(tmp_path: Path) -> None:
    out = ideogram(tmp_path)
    folder = out / "transformer"
    stored = fragment(folder)
    set_fragment(folder, stored | {"version": 2})
    with pytest.raises(InvalidInput, match="Update quantrecipe"):
        load(out, "transformer")
    names = ["layers.0.attention.to_qq", *stored["modules"]["all"]["names"]]
    set_fragment(folder, stored | {"modules": {"all": {"names": names, "smoothing": []}}})
    with pytest.raises(InvalidInput, match=r"Did you mean 'layers.0.attention.to_q'"):
        load(out, "transformer")
    set_fragment(folder, None)
    with pytest.raises(InvalidInput, match="there is no quantization_config in it"):
        load(out, "transformer", quantization_config=ours.QuantRecipeConfig())


@pytest.mark.parametrize(
    ("damage", "kind"),
    [
        (lambda tensors, name: tensors.pop(f"{name}.weight_scale"), "missing-tensor"),
        (
            lambda tensors, name: tensors.update({f"{name}.smoothing": torch.ones(16)}),
            "unexpected-tensor",
        ),
        (
            lambda tensors, name: tensors.update({f"{name}.weight": torch.ones(16, 16)}),
            "mistyped-tensor",
        ),
    ],
    ids=["missing", "unexpected", "mistyped"],
)
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, damage: Any, kind: str) -> None:
    out = ideogram(tmp_path)
    folder, name = out / "transformer", "layers.1.attention.to_k"
    tensors = written(folder)
    damage(tensors, name)
    save_file(tensors, folder / FILE, {"format": "pt"})
    with pytest.raises(InvalidInput, match=name) as caught:
        load(out, "transformer")
    assert [problem.kind for problem in caught.value.problems] == [kind]
