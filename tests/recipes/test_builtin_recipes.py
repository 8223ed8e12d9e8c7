"""The built-in recipes, against the real module trees and through the planner."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from quantrecipe.schema.patterns import Patterns, check_pattern
from quantrecipe.schema.placement import encode_header
from quantrecipe.schema.plan import Plan
from quantrecipe.schema.planning import make_plan
from quantrecipe.schema.problems import InvalidInput
from quantrecipe.schema.recipe import Recipe
from quantrecipe.schema.registry import recipe_names, recipe_text, resolve_layout
from quantrecipe.schema.tensors import OutputTensor, SourceFileInfo, SourcePart, TensorInfo

FOLDER = Path(__file__).parents[2] / "quantrecipe" / "recipes"
STEMS = sorted(path.stem for path in FOLDER.glob("*.json"))
IDEOGRAM = (
    "ideogram-4-fp8",
    "ideogram-4-int8-w8a8",
    "ideogram-4-int8-w8a8-published",
    "ideogram-4-int8-convrot-comfyui",
    "ideogram-4-fp8-comfyui",
    "ideogram-4-nf4-bitsandbytes",
    "ideogram-4-gguf-q8_0",
    "ideogram-4-gguf-q4_k",
)
BRANCHES = ("conditional", "unconditional")


def built_in(name: str) -> Recipe:
    return Recipe.model_validate_json(recipe_text(name))


def entries(recipe: Recipe) -> list[Any]:
    return [*recipe.protected, *recipe.rules]


def taken(recipe: Recipe, modules: Mapping[str, Iterable[str]]) -> dict[tuple[str, str], Any]:
    """The entry that takes each (part, module), by the patterns alone."""
    compiled = [(entry, Patterns.compile(entry.modules)) for entry in entries(recipe)]
    found: dict[tuple[str, str], Any] = {}
    for part, names in modules.items():
        for name in names:
            for entry, patterns in compiled:
                here = entry.parts is None or part in entry.parts
                if here and patterns.matches(name) is not None:
                    found[part, name] = entry
                    break
    return found


def source(part: str, tensors: Iterable[OutputTensor]) -> SourcePart:
    """A source of these tensors, as its headers would describe it."""
    path = Path(part) / "model.safetensors"
    infos: dict[str, TensorInfo] = {}
    offset = 0
    for tensor in tensors:
        infos[tensor.name] = TensorInfo(
            tensor.name, tensor.dtype, tensor.shape, path, offset, tensor.nbytes
        )
        offset += tensor.nbytes
    file = SourceFileInfo(path, path.as_posix(), offset, 0, "0" * 64, {"format": "pt"}, infos)
    return SourcePart(part, Path(part), (file,), infos)


def plan_of(recipe: Recipe, tensors: Mapping[str, Iterable[OutputTensor]]) -> Plan:
    return make_plan(
        recipe,
        [source(part, of_part) for part, of_part in tensors.items()],
        {"statistics.safetensors": Path("statistics.safetensors")},
    )


def ideogram_plan(name: str, ideogram4: ModuleType) -> Plan:
    fp8, recipe = name != "ideogram-4-fp8", built_in(name)
    return plan_of(recipe, {part: list(ideogram4.tensors(fp8)) for part in recipe.source.parts})


# -- every recipe ---------------------------------------------------------------------------------


def test_the_folder_holds_the_recipes_and_nothing_else() -> None:
    assert {path.suffix for path in FOLDER.iterdir() if path.is_file()} == {".json"}
    assert set(STEMS) <= set(recipe_names())
    assert set(IDEOGRAM) | {"int8-all-linears"} <= set(STEMS)


@pytest.mark.parametrize("stem", STEMS)
def test_a_recipe_is_valid_and_named_as_its_file(stem: str) -> None:
    recipe = built_in(stem)
    assert recipe.name == stem
    assert recipe.description
    assert len(recipe.description) > 80
    assert recipe.to_json_value() == json.loads(recipe_text(stem))
    resolve_layout(recipe.source.layout)
    resolve_layout(recipe.target.layout)


@pytest.mark.parametrize("stem", STEMS)
def test_a_recipe_says_how_many_modules_each_entry_takes(stem: str) -> None:
    recipe = built_in(stem)
    assert set(recipe.schemes) == {rule.scheme for rule in recipe.rules}
    for entry in entries(recipe):
        assert [check_pattern(text) for text in entry.modules] == [None] * len(entry.modules)
        assert entry.count is not None
        assert isinstance(entry.count, int) or stem == "int8-all-linears"


# -- against real module trees --------------------------------------------------------------------


def assert_partition(recipe: Recipe, linears: Mapping[str, Iterable[str]]) -> None:
    """Every linear is taken by one entry, every pattern takes some, every count holds."""
    found = taken(recipe, linears)
    assert found.keys() == {(part, name) for part, names in linears.items() for name in names}
    counts = Counter(id(entry) for entry in found.values())
    assert [counts[id(entry)] for entry in entries(recipe)] == [e.count for e in entries(recipe)]


@pytest.mark.xdist_group("diffusers")
@pytest.mark.parametrize("model", ["flux-1-dev", "qwen-image"])
def test_a_dit_recipe_takes_exactly_the_linears(model: str, tree: Callable[[str], Any]) -> None:
    recipe = built_in(f"{model}-int8-w8a8")
    built = tree(model)
    assert_partition(recipe, {"transformer": built.linears})
    others = {name.removesuffix(".weight") for name in built.shapes} - set(built.linears)
    assert not taken(recipe, {"transformer": others})


@pytest.mark.xdist_group("diffusers")
@pytest.mark.parametrize("model", ["flux-1-dev", "qwen-image"])
def test_a_dit_recipe_makes_a_plan(model: str, tree: Callable[[str], Any]) -> None:
    recipe, built = built_in(f"{model}-int8-w8a8"), tree(model)
    plan = plan_of(recipe, {"transformer": built.tensors()})
    assert {module.name for module in plan.modules} == set(built.linears)
    quantized = [m for m in plan.modules if m.disposition == "quantized"]
    assert len(quantized) == sum(rule.count for rule in recipe.rules if isinstance(rule.count, int))
    blocks = {m.name for m in plan.modules if "blocks." in m.name and ".attn." in m.name}
    assert blocks <= {m.name for m in quantized}
    assert {module.disposition for module in plan.modules} == {"quantized", "protected"}
    (file,) = plan.files
    assert file.path == "transformer/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("name", IDEOGRAM)
def test_an_ideogram_recipe_takes_what_it_says(name: str, ideogram4: ModuleType) -> None:
    recipe = built_in(name)
    linears = [linear.name for linear in ideogram4.linears()]
    assert_partition(recipe, dict.fromkeys(recipe.source.parts, linears))
    others = [other.removesuffix(".weight") for other in ideogram4.other_shapes()]
    assert not taken(recipe, dict.fromkeys(recipe.source.parts, others))


def test_the_published_recipe_protects_17_w2_in_each_branch(ideogram4: ModuleType) -> None:
    for name in IDEOGRAM[1:3]:
        plan = ideogram_plan(name, ideogram4)
        for part in BRANCHES:
            protected = [m for m in plan.modules if m.part == part and m.disposition == "protected"]
            w2 = [m for m in protected if m.name.endswith("feed_forward.w2")]
            assert len(w2) == 17
            assert all("STARTING POINT" in (module.reason or "") for module in w2)
            assert (len(w2) == len(protected)) == name.endswith("published")
        assert "starting point" in (built_in(name).description or "")


def test_the_published_recipe_smooths_everything_it_quantizes(ideogram4: ModuleType) -> None:
    plan = ideogram_plan("ideogram-4-int8-w8a8-published", ideogram4)
    quantized = [module for module in plan.modules if module.disposition == "quantized"]
    assert len(quantized) == 2 * (211 - 17)
    for module in quantized:
        assert module.smoothing is not None
        assert (module.smoothing.alpha, module.smoothing.apply) == (0.5, "online")
        assert module.outputs["weight"].name == f"{module.part}.{module.name}.wq"
        assert module.outputs["weight_scale"].shape == (module.source.out_features,)
        assert module.outputs["smoothing"].shape == (module.source.in_features,)
    (file,) = plan.files
    assert file.path == "ideogram4-int8-w8a8.safetensors"
    # Published as 20.4 GB; with 17 protected in all it would be a gigabyte less.
    assert file.size / 1e9 == pytest.approx(20.4, abs=0.15)


def test_the_recommended_recipe_keeps_conditioning_in_bf16(ideogram4: ModuleType) -> None:
    plan = ideogram_plan("ideogram-4-int8-w8a8", ideogram4)
    quantized = {m.name for m in plan.modules if m.disposition == "quantized"}
    assert all(".attention." in name or ".feed_forward." in name for name in quantized)
    assert len(quantized) == 34 * 4 + 17
    assert all(m.smoothing is None and "smoothing" not in m.outputs for m in plan.modules)
    kept = [m for m in plan.modules if m.disposition == "protected"]
    assert {m.outputs["weight"].dtype for m in kept} == {"bfloat16"}


def test_the_fp8_recipe_writes_the_published_base(ideogram4: ModuleType) -> None:
    plan = ideogram_plan("ideogram-4-fp8", ideogram4)
    published = {tensor.name: tensor for tensor in ideogram4.tensors(fp8=True)}
    assert [file.path for file in plan.files] == [
        "transformer/diffusion_pytorch_model.safetensors",
        "unconditional_transformer/diffusion_pytorch_model.safetensors",
    ]
    for file in plan.files:
        assert dict(file.tensors) == published


@pytest.mark.xdist_group("diffusers")
def test_the_diffusers_recipe_writes_the_diffusers_model(
    ideogram4: ModuleType, tree: Callable[[str], Any]
) -> None:
    built, name = tree("ideogram-4"), "ideogram-4-int8-w8a8-diffusers"
    plan = ideogram_plan(name, ideogram4)
    assert_partition(built_in(name), dict.fromkeys(BRANCHES, built.linears))
    for part in BRANCHES:
        modules = {module.name: module for module in plan.modules if module.part == part}
        assert modules.keys() == built.linears.keys() | {"embed_image_indicator"}
        written: dict[str, tuple[int, ...]] = {}
        for module in modules.values():
            written |= {tensor.name: tensor.shape for tensor in module.outputs.values()}
        written |= {o.output.name: o.output.shape for o in plan.others if o.part == part}
        scales = {f"{n}.weight_scale" for n, m in modules.items() if m.disposition == "quantized"}
        assert {n: shape for n, shape in written.items() if n not in scales} == built.shapes
        assert scales <= written.keys()
        assert len(scales) == 34 * 4 + 34 * 3 - 17
    assert [file.path for file in plan.files] == [
        "transformer/diffusion_pytorch_model.safetensors",
        "unconditional_transformer/diffusion_pytorch_model.safetensors",
    ]


def test_the_diffusers_recipe_is_the_recommended_one(ideogram4: ModuleType) -> None:
    plan = ideogram_plan("ideogram-4-int8-w8a8", ideogram4)
    split = ideogram_plan("ideogram-4-int8-w8a8-diffusers", ideogram4)
    wanted = {(m.part, m.name): (m.weight, m.activation, m.reason) for m in plan.modules}
    for module in split.modules:
        (original,) = module.source.renamed_from or (module.name,)
        told = module.weight, module.activation, module.reason
        assert told == wanted[module.part, original]
    assert split.source_bytes == plan.source_bytes
    assert split.output_bytes == pytest.approx(plan.output_bytes, rel=1e-4)


COMFYUI_INT8_BYTES = 9_583_465_712
"""Of the published ideogram4_int8_convrot.safetensors."""


def bytes_with(tensors: Iterable[OutputTensor], metadata: Mapping[str, str]) -> int:
    """The size of a safetensors file of these tensors whose metadata is this."""
    held = list(tensors)
    return len(encode_header(held, metadata)) + sum(tensor.nbytes for tensor in held)


def test_the_comfyui_int8_recipe_writes_the_published_file(ideogram4: ModuleType) -> None:
    plan = ideogram_plan("ideogram-4-int8-convrot-comfyui", ideogram4)
    for file in plan.files:
        assert len(file.tensors) == 866
        # The published size leaves no room for metadata other than this.
        assert bytes_with(file.tensors.values(), {"format": "pt"}) == COMFYUI_INT8_BYTES
        assert file.size == COMFYUI_INT8_BYTES + len(file.header) - 90_768
        markers = [tensor for name, tensor in file.tensors.items() if name.endswith("comfy_quant")]
        assert {(tensor.dtype, tensor.shape) for tensor in markers} == {("uint8", (72,))}
    quantized = [module for module in plan.modules if module.disposition == "quantized"]
    assert len(quantized) == 2 * 204
    for module in quantized:
        assert module.outputs["weight_scale"].shape == (module.source.out_features, 1)
        assert module.marker == {
            "format": "int8_tensorwise",
            "convrot": True,
            "convrot_groupsize": 256,
        }
    kept = [module for module in plan.modules if module.disposition == "protected"]
    assert len(kept) == 2 * 7
    assert {module.outputs["weight"].dtype for module in kept} == {"bfloat16"}


def test_the_comfyui_fp8_recipe_has_one_scale_for_a_weight(ideogram4: ModuleType) -> None:
    plan = ideogram_plan("ideogram-4-fp8-comfyui", ideogram4)
    quantized = [module for module in plan.modules if module.disposition == "quantized"]
    assert len(quantized) == 2 * 204
    assert {module.outputs["weight_scale"].shape for module in quantized} == {()}
    linears = sum(
        linear.out_features * linear.in_features
        for linear in ideogram4.linears()
        if linear.name.startswith("layers.")
    )
    scales_and_markers = 204 * (4 + 27)
    for file in plan.files:
        # A byte for each number of the layers' linears, and two for all others.
        data = 2 * ideogram4.BRANCH_PARAMETERS - linears + scales_and_markers
        assert file.size - len(file.header) == data


def test_the_nf4_recipe_has_blocks_of_64(ideogram4: ModuleType) -> None:
    plan = ideogram_plan("ideogram-4-nf4-bitsandbytes", ideogram4)
    quantized = [module for module in plan.modules if module.disposition == "quantized"]
    assert len(quantized) == 2 * 211
    for module in quantized:
        numbers = module.source.out_features * module.source.in_features
        assert module.outputs["weight"].shape == (numbers // 2, 1)
        assert module.outputs["weight_scale"].shape == (numbers // 64,)
        assert "second_scale" not in module.outputs
    linears = sum(each.out_features * each.in_features for each in ideogram4.linears())
    others = 2 * (ideogram4.BRANCH_PARAMETERS - linears)
    for file in plan.files:
        markers = sum(
            tensor.nbytes for name, tensor in file.tensors.items() if "weight.quant" in name
        )
        assert file.size - len(file.header) == linears // 2 + linears // 16 + others + markers


@pytest.mark.parametrize(("which", "published"), [("q8_0", 19.72), ("q4_k", 10.44)])
def test_the_gguf_recipes_have_the_published_size(
    which: str, published: float, ideogram4: ModuleType
) -> None:
    plan = ideogram_plan(f"ideogram-4-gguf-{which}", ideogram4)
    (file,) = plan.files
    assert file.path == f"ideogram4-{which}.gguf"
    assert {name.partition(".")[0] for name in file.tensors} == {"cond", "uncond"}
    quantized = [module for module in plan.modules if module.disposition == "quantized"]
    assert len(quantized) == 422
    other = {m.name: m.weight.format for m in quantized if m.weight.format != which}
    assert other == ({} if which == "q8_0" else {"input_proj": "q8_0"})
    # Published with biases and norms in F16: two bytes less for each of their numbers.
    wide = sum(t.nbytes for t in file.tensors.values() if t.dtype == "float32")
    assert (file.size - wide // 2) / 1e9 == pytest.approx(published, abs=0.005)
    assert wide // 2 == 5_390_848


# -- the table itself -----------------------------------------------------------------------------


def test_the_ideogram_table_gives_the_published_size(ideogram4: ModuleType) -> None:
    tensors = list(ideogram4.tensors(fp8=True))
    assert len(tensors) == len({tensor.name for tensor in tensors}) == 669
    header = encode_header(tensors, {"format": "pt"})
    assert len(header) + sum(t.nbytes for t in tensors) == ideogram4.FP8_FILE_BYTES


@pytest.mark.xdist_group("diffusers")
def test_the_ideogram_table_is_the_diffusers_model(
    ideogram4: ModuleType, tree: Callable[[str], Any]
) -> None:
    built = tree("ideogram-4")
    linears = list(ideogram4.linears())
    assert len(linears) == 211
    split = {
        name: (linear.out_features // len(linear.split), linear.in_features)
        for linear in linears
        for name in linear.split
    }
    assert len(split) == 279
    assert split == built.linears
    biases = {name for linear in linears if linear.bias for name in linear.split}
    assert biases == {name for name in split if f"{name}.bias" in built.shapes}
    others = {
        name: shape
        for name, shape in built.shapes.items()
        if name.rpartition(".")[0] not in built.linears
    }
    assert others == ideogram4.other_shapes()
    plain = sum(tensor.nbytes // 2 for tensor in ideogram4.tensors(fp8=False))
    assert plain == built.parameters == ideogram4.BRANCH_PARAMETERS


# -- the generic recipe ---------------------------------------------------------------------------


def test_the_generic_recipe_takes_the_linears_of_bert(tree: Callable[[str], Any]) -> None:
    built = tree("bert")
    plan = plan_of(built_in("int8-all-linears"), {"model": built.tensors()})
    by = {
        kind: {m.name for m in plan.modules if m.disposition == kind}
        for kind in ("quantized", "protected", "passthrough")
    }
    assert by == {
        "quantized": set(built.linears),
        "protected": set(built.embeddings),
        "passthrough": set(),
    }


@pytest.mark.parametrize(
    ("model", "kept"), [("t5", {"lm_head"}), ("mixtral", {"lm_head", "model.layers.0.mlp.gate"})]
)
def test_the_generic_recipe_keeps_heads_and_routers(
    model: str, kept: set[str], tree: Callable[[str], Any]
) -> None:
    built = tree(model)
    plan = plan_of(built_in("int8-all-linears"), {"model": built.tensors()})
    quantized = {module.name for module in plan.modules if module.disposition == "quantized"}
    assert quantized == set(built.linears) - kept
    protected = {module.name for module in plan.modules if module.disposition == "protected"}
    assert protected == set(built.embeddings) | kept


@pytest.mark.parametrize(
    "name",
    [
        "embeddings.word_embeddings",
        "embeddings.position_embeddings",
        "model.embed_tokens",
        "transformer.wte",
        "transformer.wpe",
        "shared",
        "model.tok_embeddings",
        "pos_embed",
        "class_embedding",
        "embed_image_indicator",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
        "lm_head",
        "time_embedding.linear_1",
        "down_blocks.0.resnets.0.time_emb_proj",
        "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_1",
        "model.layers.0.block_sparse_moe.gate",
        "encoder.block.1.layer.1.mlp.router.classifier",
    ],
)
def test_the_generic_recipe_protects_by_name(name: str) -> None:
    recipe = built_in("int8-all-linears")
    assert taken(recipe, {"model": [name]})["model", name] in recipe.protected


@pytest.mark.parametrize(
    "name", ["encoder.layer.0.attention.self.query", "mlp.gate_proj", "pooler.dense", "to_out.0"]
)
def test_the_generic_recipe_quantizes_the_rest(name: str) -> None:
    recipe = built_in("int8-all-linears")
    assert taken(recipe, {"model": [name]})["model", name] in recipe.rules


def test_a_model_of_another_size_is_refused(ideogram4: ModuleType) -> None:
    recipe = built_in("ideogram-4-int8-w8a8")
    shorter = [t for t in ideogram4.tensors(fp8=True) if not t.name.startswith("layers.33.")]
    with pytest.raises(InvalidInput) as caught:
        plan_of(recipe, dict.fromkeys(BRANCHES, shorter))
    assert {problem.kind for problem in caught.value.problems} == {"count"}
