"""Files of SDNQ are read, and SDNQ, by itself and in transformers, reads ours."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from quantrecipe.converter import convert
from quantrecipe.loaders import load_state_dict, open_checkpoint
from quantrecipe.schema.foreign_configs import sdnq_config
from quantrecipe.schema.problems import InvalidInput
from quantrecipe.schema.quantization_config import ConfiguredModule
from quantrecipe.schema.schemes import Int8Channel, PlainWeight
from tests.converter.making import Json, parsed
from tests.loaders.converted import converted, fragment, library
from tests.support.goldens import same
from tests.support.peer_models import (
    FILE,
    PROJECTIONS,
    assert_loaded,
    assert_read,
    expected,
    golden,
    kept,
    llama,
    metadata,
    small,
    spoilt,
    written,
)

ROWS: Json = {"format": "int8", "granularity": "channel"}
GROUPS: Json = {"format": "int8", "granularity": "group", "group_size": 32}
HALF: Json = ROWS | {"scale_dtype": "bfloat16"}
SCHEMES = {"rows": ROWS, "groups": GROUPS, "half": HALF}
GOLDENS = ["int8", "int8-groups"]
OUT, WIDE, ODD = "layers.0.attention.o", "layers.0.feed_forward.w1", "layers.0.feed_forward.w2"
with_peers = pytest.mark.xdist_group("diffusers")


@pytest.fixture
def sdnq() -> Iterator[Any]:
    """SDNQ, imported when a test runs; what it compiles is run as it is."""
    library("diffusers")
    library("accelerate")
    found = library("sdnq")
    library("sdnq.loader")
    library("sdnq.dequantizer")
    with torch.compiler.set_stance("force_eager"):
        yield found


@pytest.fixture
def transformers(sdnq: Any) -> Iterator[Any]:
    found = library("transformers")
    found.logging.set_verbosity_error()
    found.logging.disable_progress_bar()
    yield found
    found.logging.set_verbosity_warning()


# ---- what SDNQ wrote


@pytest.mark.parametrize("name", GOLDENS)
def test_files_of_sdnq_mean_what_it_says(name: str, tmp_path: Path) -> None:
    folder = golden(f"sdnq-{name}", tmp_path / "theirs")
    assert_read(folder, "sdnq", expected(f"sdnq-{name}"))


@pytest.mark.parametrize("name", GOLDENS)
def test_what_is_kept_is_written_as_sdnq_wrote_it(name: str, tmp_path: Path) -> None:
    theirs = golden(f"sdnq-{name}", tmp_path / "theirs")
    ours = kept(theirs, "sdnq", tmp_path / "ours")
    before, after = load_file(theirs / FILE), load_file(ours / FILE)
    assert before.keys() == after.keys()
    assert all(same(before[key], after[key]) for key in before)
    # What SDNQ writes of norms says nothing that its reader asks for.
    settings = fragment(theirs)
    settings["modules_to_not_convert"] = ["head.weight", "lm_head"]
    if name == "int8-groups":
        # In its rule w2 has no groups either, since 32 does not divide 40; here it is said.
        settings["group_size"] = -1
        settings["modules_quant_config"] = {
            f"{module}.weight": {"group_size": 32} for module in (WIDE, OUT)
        }
    mine = fragment(ours)
    assert {key: settings[key] for key in mine} == mine


def test_transposed_codes_are_refused(tmp_path: Path) -> None:
    folder = golden("sdnq-int8-matmul", tmp_path / "theirs")
    with pytest.raises(InvalidInput) as caught:
        open_checkpoint(folder, layout="sdnq")
    (problem,) = caught.value.problems
    assert problem.kind == "transposed-weight"
    assert problem.tensor == f"{OUT}.weight"
    assert_read(
        golden("sdnq-int8-matmul", tmp_path / "rest", "o"),
        "sdnq",
        {name: each for name, each in expected("sdnq-int8-matmul").items() if name != OUT},
    )


def test_transposed_codes_of_a_square_weight_are_refused(tmp_path: Path) -> None:
    """Their shape does not show it; the shape of their scales does."""
    (tmp_path / "in").mkdir()
    tensors = {"a.weight": torch.ones(32, 32, dtype=torch.int8), "a.scale": torch.ones(1, 32)}
    save_file(tensors, tmp_path / "in" / FILE)
    with pytest.raises(InvalidInput, match=r"stored as \[in, out\]"):
        open_checkpoint(tmp_path / "in", layout="sdnq")


@pytest.mark.parametrize("part", ["svd_up", "zero_point", "scale_2"])
def test_tensors_that_change_a_weight_are_refused(part: str, tmp_path: Path) -> None:
    folder = golden("sdnq-int8", tmp_path / "theirs")
    tensors = load_file(folder / FILE) | {f"{OUT}.{part}": torch.ones(48, 8)}
    save_file(tensors, folder / FILE, metadata(folder))
    with pytest.raises(InvalidInput, match=f"changes what the weight of '{OUT}'"):
        open_checkpoint(folder, layout="sdnq")


def test_rotated_codes_are_refused(tmp_path: Path) -> None:
    """Only the config says that they are."""
    folder = spoilt(golden("sdnq-int8", tmp_path / "theirs"), use_hadamard=True)
    with pytest.raises(InvalidInput, match="use_hadamard, which are not read"):
        open_checkpoint(folder, layout="sdnq")
    with pytest.raises(InvalidInput, match="use_hadamard, which are not read"):
        kept(folder, "sdnq", tmp_path / "ours")


# ---- what SDNQ reads


def model_kind() -> Any:
    """A model of diffusers: the linear layers of the golden checkpoints and one more."""
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.models.modeling_utils import ModelMixin

    from tests.foreign.make_golden import SHAPES, SMALL, grow

    class SmallModel(ModelMixin, ConfigMixin):  # type: ignore[misc]
        @register_to_config  # type: ignore[untyped-decorator]
        def __init__(self) -> None:
            super().__init__()
            grow(self, {name: list(SHAPES[name]) for name in SMALL})

    return SmallModel


def loaded(out: Path) -> tuple[Any, dict[str, Tensor]]:
    """A model that SDNQ loaded, and its state, dequantized by SDNQ."""
    from sdnq.dequantizer import dequantize_sdnq_model
    from sdnq.loader import load_sdnq_model

    kind = model_kind()
    model = load_sdnq_model(str(out), model_cls=kind, dtype=torch.float32)
    state: dict[str, Tensor] = dequantize_sdnq_model(
        load_sdnq_model(str(out), model_cls=kind, dtype=torch.float32)
    ).state_dict()
    return model, state


def assert_loads(out: Path) -> None:
    """SDNQ holds the weights that we read, and computes with them."""
    model, found = loaded(out)
    wanted = load_state_dict(out)
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert torch.equal(found[key].float(), tensor.float()), key
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(2))
    computed = model.get_submodule(OUT)(x)
    exact = nn.functional.linear(x, wanted[f"{OUT}.weight"], wanted[f"{OUT}.bias"].float())
    torch.testing.assert_close(computed.float(), exact)


@with_peers
@pytest.mark.parametrize("name", list(SCHEMES))
def test_sdnq_reads_the_weights_that_we_read(name: str, sdnq: Any, tmp_path: Path) -> None:
    """Whole or in part: what stays plain does so there."""
    folder = small(tmp_path / "in", "o", "w1", "w2", dtype=torch.float32)
    for modules in (["o", "w1"], ["o"]):
        out = converted(
            folder,
            tmp_path / "-".join(modules),
            [f"layers.**.{module}" for module in modules],
            SCHEMES[name],
            activation=None,
            layout="sdnq",
            file=FILE,
        )
        assert_loads(out)


@with_peers
def test_groups_of_several_sizes_are_told_apart(sdnq: Any, tmp_path: Path) -> None:
    """Also rows that the size of other weights' groups would divide."""
    document: Json = {
        "kind": "recipe",
        "version": 1,
        "name": "mixed",
        "source": {"layout": "plain"},
        "schemes": {
            "rows": {"weight": ROWS},
            "eight": {"weight": GROUPS | {"group_size": 8}},
            "many": {"weight": GROUPS | {"group_size": 64}},
        },
        "rules": [
            {"modules": [OUT], "scheme": "rows"},
            {"modules": [WIDE], "scheme": "many"},
            {"modules": [ODD], "scheme": "eight"},
        ],
        "target": {"layout": "sdnq", "file": FILE},
    }
    folder = small(tmp_path / "in", "o", "w1", "w2", dtype=torch.float32)
    out = convert(parsed(document), folder, tmp_path / "out").out
    settings = fragment(out)
    assert settings["group_size"] == -1
    assert settings["modules_quant_config"] == {
        f"{WIDE}.weight": {"group_size": 64},
        f"{ODD}.weight": {"group_size": 8},
    }
    assert_loads(out)


def test_one_group_a_row_is_refused(tmp_path: Path) -> None:
    """SDNQ would expect the shapes of rows."""
    with pytest.raises(InvalidInput, match="one group, and readers of layout 'sdnq'"):
        written(tmp_path, "sdnq", GROUPS | {"group_size": 64}, "o")


def test_weights_get_the_codes_of_sdnq(tmp_path: Path) -> None:
    """Where a row or group has a number: for zeros its scale is 0, and ours 1."""
    for name, spec in (("int8", ROWS), ("int8-groups", GROUPS)):
        out = written(tmp_path / name, "sdnq", spec, "o", "w1")
        theirs = load_file(golden(f"sdnq-{name}", tmp_path / f"their-{name}") / FILE)
        ours = load_file(out / FILE)
        for module in (OUT, WIDE):
            assert same(ours[f"{module}.weight"], theirs[f"{module}.weight"])
            scale = theirs[f"{module}.scale"]
            assert torch.equal(ours[f"{module}.scale"], scale.where(scale != 0, 1))


@with_peers
@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied"])
@pytest.mark.parametrize("name", ["rows", "groups"])
def test_transformers_loads_and_computes(
    name: str, tied: bool, transformers: Any, tmp_path: Path
) -> None:
    plain = llama(tmp_path / "in", transformers, tie_word_embeddings=tied)
    out = converted(
        tmp_path / "in",
        tmp_path / "out",
        PROJECTIONS,
        SCHEMES[name],
        activation=None,
        layout="sdnq",
        file=FILE,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "SDNQLinear"

    def dense(layer: Any) -> Tensor:
        made: Tensor = layer.sdnq_dequantizer(
            layer.weight,
            layer.scale,
            layer.scale_2,
            layer.scale_zero_point,
            layer.zero_point,
        )
        return made

    assert_loaded(model, plain, out, dense, 0.01)


@with_peers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_diffusers_loads(dtype: torch.dtype, sdnq: Any, tmp_path: Path) -> None:
    """The weights that we read; in bfloat16, with scales that it rounds to that before it begins.

    ``load_sdnq_model`` does not, and has our numbers.
    """
    diffusers = library("diffusers")
    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
    source = small(tmp_path / "in", "o", "w1", "w2", dtype=dtype)
    out = converted(
        source,
        tmp_path / "out",
        ["layers.**.o", "layers.**.w1"],
        ROWS,
        activation=None,
        layout="sdnq",
        file="diffusion_pytorch_model.safetensors",
    )
    model = model_kind().from_pretrained(out, torch_dtype=dtype)
    stored = load_file(out / "diffusion_pytorch_model.safetensors")
    with open_checkpoint(out) as checkpoint:
        for module in (OUT, WIDE):
            layer = model.get_submodule(module)
            found = layer.sdnq_dequantizer(layer.weight, layer.scale, None, None, None)
            wanted = checkpoint.weight(module, dtype=dtype)
            if dtype == torch.bfloat16:
                scale = stored[f"{module}.scale"].to(dtype).float()
                rounded = (stored[f"{module}.weight"].float() * scale).to(dtype)
                assert not same(rounded, wanted)
                wanted = rounded
            assert same(found, wanted), module


# ---- what the config says

SEGMENTS = st.sampled_from(["proj", "out_proj", "proj_out", "norm", "0", "1"])
NAMES = st.lists(SEGMENTS, min_size=1, max_size=3).map(".".join)


@with_peers
@given(plain=st.sets(NAMES, max_size=4), quantized=st.sets(NAMES, min_size=1, max_size=4))
def test_sdnq_leaves_the_plain_modules_alone_and_no_others(
    plain: set[str], quantized: set[str]
) -> None:
    library("sdnq")
    from sdnq.utils import check_param_name_in

    plain -= quantized
    modules = [
        ConfiguredModule(name, None, PlainWeight(format="bfloat16"), None, False) for name in plain
    ]
    spec = Int8Channel(format="int8", granularity="channel")
    modules += [ConfiguredModule(name, "all", spec, None, False) for name in quantized]
    config = sdnq_config(modules)
    assert config is not None
    names = config["modules_to_not_convert"]
    left = {each for each in plain | quantized if check_param_name_in(f"{each}.weight", names)}
    assert left == plain
