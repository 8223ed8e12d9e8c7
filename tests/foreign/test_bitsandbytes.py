"""Files of bitsandbytes are read, and bitsandbytes and transformers read ours."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from quantrecipe.converter import convert
from quantrecipe.loaders import load_state_dict, open_checkpoint
from quantrecipe.schema.foreign_configs import bitsandbytes_config
from quantrecipe.schema.problems import InvalidInput
from quantrecipe.schema.quantization_config import ConfiguredModule
from quantrecipe.schema.schemes import LlmInt8, PlainWeight
from tests.converter.making import Json, parsed
from tests.loaders.converted import converted, fragment, library
from tests.support.goldens import same, source
from tests.support.peer_models import (
    FILE,
    PROJECTIONS,
    assert_loaded,
    assert_read,
    expected,
    golden,
    kept,
    llama,
    small,
    written,
)

NF4: Json = {"format": "nf4", "granularity": "block", "block_size": 64}
SCHEMES: dict[str, Json] = {
    "nf4": NF4,
    "nf4-nested": NF4 | {"double_quantized": True},
    "int8": {"format": "llm_int8", "granularity": "channel"},
}
FOUR_BITS = ["nf4", "nf4-nested"]
MARKER = ".weight.quant_state.bitsandbytes__nf4"
schemes = pytest.mark.parametrize("name", list(SCHEMES))
four_bits = pytest.mark.parametrize("name", FOUR_BITS)
with_peers = pytest.mark.xdist_group("diffusers")


@pytest.fixture
def functional() -> Any:
    """What bitsandbytes computes with, imported when a test runs."""
    return library("bitsandbytes.functional")


@pytest.fixture
def transformers(functional: Any) -> Iterator[Any]:
    found = library("transformers")
    library("accelerate")
    found.logging.set_verbosity_error()
    found.logging.disable_progress_bar()
    yield found
    found.logging.set_verbosity_warning()


def theirs(name: str, folder: Path) -> tuple[Path, tuple[str, ...]]:
    """A golden checkpoint, and the module that is left out since its blocks run over row ends."""
    without = ("w2",) if name in FOUR_BITS else ()
    return golden(f"bitsandbytes-{name}", folder / "theirs", *without), without


# ---- what bitsandbytes wrote


@schemes
def test_files_of_bitsandbytes_mean_what_it_says(name: str, tmp_path: Path) -> None:
    folder, without = theirs(name, tmp_path)
    assert_read(folder, "bitsandbytes", expected(f"bitsandbytes-{name}", *without))


@four_bits
def test_blocks_that_go_on_in_the_next_row_are_refused(name: str, tmp_path: Path) -> None:
    folder = golden(f"bitsandbytes-{name}", tmp_path / "theirs")
    with pytest.raises(InvalidInput) as caught:
        open_checkpoint(folder, layout="bitsandbytes")
    (problem,) = caught.value.problems
    assert problem.kind == "blocks-over-rows"
    assert problem.tensor == "layers.0.feed_forward.w2.weight"


def test_llm_int8_is_one_product_after_the_other() -> None:
    """``code * SCB * (1 / 127)``, and not ``code * (SCB / 127)``, which is another number."""
    name = "bitsandbytes-int8"
    tensors = load_file(Path(__file__).parent / "golden" / f"{name}.safetensors")
    differing = 0
    for module, weight in expected(name).items():
        codes, row = tensors[f"{module}.weight"].float(), tensors[f"{module}.SCB"][:, None]
        assert same(codes * row * torch.tensor(1 / 127), weight)
        differing += int((codes * (row / 127) != weight).sum())
    assert differing > 0


@schemes
def test_what_is_kept_is_written_as_bitsandbytes_wrote_it(name: str, tmp_path: Path) -> None:
    folder, _ = theirs(name, tmp_path)
    ours = kept(folder, "bitsandbytes", tmp_path / "ours")
    before, after = load_file(folder / FILE), load_file(ours / FILE)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        if key.endswith(MARKER):
            # Ours has room for any offset: the rest is blanks.
            assert len(after[key]) == 192
            said, wrote = (bytes(each.tolist()) for each in (after[key], tensor))
            assert said.rstrip(b" ") == wrote
        else:
            assert same(after[key], tensor), key
    mine, config = fragment(ours), fragment(folder)
    # A tied head of a language model is left alone as well.
    assert mine.pop("llm_int8_skip_modules") == ["head", "lm_head"]
    assert config.pop("llm_int8_skip_modules") == ["head"]
    assert mine == config


# ---- what bitsandbytes reads


def state_of(functional: Any, tensors: dict[str, Tensor], module: str) -> Any:
    prefix = f"{module}.weight."
    parts = {key.removeprefix(f"{module}."): each for key, each in tensors.items()
             if key.startswith(prefix)}  # fmt: skip
    return functional.QuantState.from_dict(parts, torch.device("cpu"))


@with_peers
@four_bits
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_bitsandbytes_reads_the_weights_that_we_read(
    name: str, dtype: torch.dtype, functional: Any, tmp_path: Path
) -> None:
    out = written(tmp_path, "bitsandbytes", SCHEMES[name], "o", "w1", dtype=dtype)
    tensors, state = load_file(out / FILE), load_state_dict(out, dtype=dtype)
    for module in ("layers.0.attention.o", "layers.0.feed_forward.w1"):
        told = state_of(functional, tensors, module)
        assert told.dtype == dtype
        assert told.nested == (name == "nf4-nested")
        found = functional.dequantize_4bit(tensors[f"{module}.weight"], told)
        assert same(found, state[f"{module}.weight"]), module


@with_peers
@four_bits
def test_weights_get_the_codes_of_bitsandbytes(name: str, functional: Any, tmp_path: Path) -> None:
    """Its codes and absolute maxima; 8-bit codes of those only as its kernel for this CPU has."""
    out = written(tmp_path, "bitsandbytes", SCHEMES[name], "o", "w1")
    tensors, before = load_file(out / FILE), source()
    for module in ("layers.0.attention.o", "layers.0.feed_forward.w1"):
        codes, state = functional.quantize_4bit(
            before[f"{module}.weight"], blocksize=64, quant_type="nf4"
        )
        assert same(tensors[f"{module}.weight"], codes)
        assert same(tensors[f"{module}.weight.quant_map"], state.code)
        if name == "nf4":
            assert same(tensors[f"{module}.weight.absmax"], state.absmax)
            continue
        nested = functional.create_dynamic_map()
        assert same(tensors[f"{module}.weight.nested_quant_map"], nested)
        told = state_of(functional, tensors, module)
        absmax = functional.dequantize_blockwise(told.absmax, told.state2) + told.offset
        # Half of the widest step between neighbours, of the largest of 256.
        largest = (state.absmax - told.offset).abs().max()
        assert (absmax - state.absmax).abs().max() <= 0.0071 * largest


@with_peers
def test_llm_int8_gets_the_codes_of_bitsandbytes(functional: Any, tmp_path: Path) -> None:
    out = written(tmp_path, "bitsandbytes", SCHEMES["int8"], "o", "w1", "w2")
    tensors, state, before = load_file(out / FILE), load_state_dict(out), source()
    for module in expected("bitsandbytes-int8"):
        codes, row, _ = functional.int8_vectorwise_quant(before[f"{module}.weight"].half())
        mine, scb = tensors[f"{module}.weight"], tensors[f"{module}.SCB"]
        # It computes in float16, in which a row near 2^-60 is one of zeros.
        held = row > 0
        assert held.sum() >= len(row) - 3
        assert torch.equal(mine[held], codes[held])
        assert torch.equal(scb[held], row[held])
        found = functional.int8_vectorwise_dequant(mine, scb)
        assert same(found, state[f"{module}.weight"])


@with_peers
@schemes
@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied"])
def test_transformers_loads_and_computes(
    name: str, tied: bool, transformers: Any, functional: Any, tmp_path: Path
) -> None:
    plain = llama(tmp_path / "in", transformers, tie_word_embeddings=tied)
    out = converted(
        tmp_path / "in",
        tmp_path / "out",
        PROJECTIONS,
        SCHEMES[name],
        activation=None,
        layout="bitsandbytes",
        file=FILE,
    )
    load: Json = {"dtype": torch.bfloat16, "device_map": "cpu"}
    model = transformers.AutoModelForCausalLM.from_pretrained(out, **load)
    kind = "Linear8bitLt" if name == "int8" else "Linear4bit"
    assert type(model.model.layers[0].mlp.up_proj).__name__ == kind

    def dense(layer: Any) -> Tensor:
        weight = layer.weight
        if name == "int8":
            made: Tensor = functional.int8_vectorwise_dequant(weight.data, weight.SCB)
        else:
            made = functional.dequantize_4bit(weight.data, weight.quant_state)
        return made

    # LLM.int8() rounds activations to 8 bits as well.
    assert_loaded(model, plain, out, dense, 0.03)


@with_peers
@pytest.mark.parametrize("name", ["nf4-nested", "int8"])
def test_all_may_be_quantized(name: str, transformers: Any, tmp_path: Path) -> None:
    """Transformers leaves the head alone, unless it is told of nothing to leave alone."""
    llama(tmp_path / "in", transformers, tie_word_embeddings=False)
    out = converted(
        tmp_path / "in",
        tmp_path / "out",
        [*PROJECTIONS, "lm_head"],
        SCHEMES[name],
        activation=None,
        layout="bitsandbytes",
        file=FILE,
    )
    assert fragment(out)["llm_int8_skip_modules"] == ["model.embed_tokens"]
    load: Json = {"dtype": torch.bfloat16, "device_map": "cpu"}
    model = transformers.AutoModelForCausalLM.from_pretrained(out, **load)
    assert type(model.lm_head).__module__ == "bitsandbytes.nn.modules"


# ---- what the config says

SEGMENTS = st.sampled_from(["proj", "out_proj", "proj_out", "norm", "head", "0", "1"])
NAMES = st.lists(SEGMENTS, min_size=1, max_size=3).map(".".join)


@with_peers
@given(plain=st.sets(NAMES, max_size=4), quantized=st.sets(NAMES, min_size=1, max_size=4))
def test_transformers_leaves_the_plain_modules_alone_and_no_others(
    plain: set[str], quantized: set[str]
) -> None:
    """Its patterns match beginnings and ends; ours, exactly the modules that they are made of."""
    library("transformers")
    from transformers.quantizers.quantizers_utils import should_convert_module

    # A module with weights of its own has none below it.
    every = plain | quantized
    assume(not any(one.startswith(f"{other}.") for one in every for other in every))
    plain -= quantized
    modules = [
        ConfiguredModule(name, None, PlainWeight(format="bfloat16"), None, False) for name in plain
    ]
    spec = LlmInt8(format="llm_int8", granularity="channel")
    modules += [ConfiguredModule(name, "all", spec, None, False) for name in quantized]
    config = bitsandbytes_config(modules)
    assert config is not None
    patterns = config["llm_int8_skip_modules"]
    assert {name for name in every if should_convert_module(name, patterns)} == quantized
    # diffusers takes whole names and what stands before a dot: none that is quantized.
    for name in quantized:
        assert not any(f"{each}." in name or each == name for each in patterns)


def test_a_part_is_nf4_or_llm_int8(tmp_path: Path) -> None:
    document: Json = {
        "kind": "recipe",
        "version": 1,
        "name": "mixed",
        "source": {"layout": "plain"},
        "schemes": {"four": {"weight": NF4}, "eight": {"weight": SCHEMES["int8"]}},
        "rules": [
            {"modules": ["layers.**.o"], "scheme": "four"},
            {"modules": ["layers.**"], "scheme": "eight"},
        ],
        "target": {"layout": "bitsandbytes", "file": FILE},
    }
    folder = small(tmp_path / "in", "o", "w1")
    with pytest.raises(InvalidInput, match="has weights in llm_int8 and nf4") as caught:
        convert(parsed(document), folder, tmp_path / "out")
    assert [problem.kind for problem in caught.value.problems] == ["config-cannot-say"]
    assert not (tmp_path / "out").exists()
