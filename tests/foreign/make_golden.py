"""Writes the files of ``golden/`` again: small checkpoints of the programs they are named after.

Needs the extras ``models`` and ``oracles``, and no GPU. Each program saves in its own way where it
has one (transformers for torchao and bitsandbytes, diffusers for SDNQ); ComfyUI is no package, so
its file is put together as its own saver does. ``README.md`` beside the files says what is in them.

    python tests/foreign/make_golden.py
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

GOLDEN = Path(__file__).resolve().parent / "golden"
OUT, WIDE, ODD, TALL = (
    "layers.0.attention.o",
    "layers.0.feed_forward.w1",
    "layers.0.feed_forward.w2",
    "layers.0.feed_forward.w3",
)
# ODD fills no group, TALL more than one tile of 128 rows by 4 blocks of 16 columns.
SHAPES = {OUT: (48, 64), WIDE: (16, 256), ODD: (50, 40), TALL: (129, 66)}
SMALL = (OUT, WIDE, ODD)
HEAD, NORM = "head", "layers.0.norm"
HEAD_SHAPE = (8, 32)

Json = dict[str, Any]
Tensors = dict[str, Tensor]


# ---- what is quantized


def weight(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """One bfloat16 weight with what tends to go wrong."""
    made = torch.randn(rows, columns, generator=generator) * 0.05
    made[1, 5] = 4.0  # far outside
    made[2, 3] = -3.0
    made[3, :32] = 0.0  # whole groups of zeros
    steps = torch.arange(columns) % 64
    made[4] = (steps + 0.5) * 2**-9  # halfway between the codes of int8, where a row has a scale
    made[4, 7] = 127 * 2**-9
    made[5] = (steps % 8 * 0.5 + 0.25) * 2**-5  # halfway between numbers of 4 bits
    made[5, ::16] = -6 * 2**-5
    made[6] *= 2.0**-60
    made[7] = made[7].abs()
    if columns < 256:
        made[8] = 0.0
    return made.bfloat16()


def sources() -> Tensors:
    generator = torch.Generator().manual_seed(20)
    made = {f"{name}.weight": weight(*shape, generator) for name, shape in SHAPES.items()}
    made[f"{OUT}.bias"] = torch.randn(SHAPES[OUT][0], generator=generator).bfloat16()
    made[f"{NORM}.weight"] = (1 + 0.1 * torch.randn(64, generator=generator)).bfloat16()
    made[f"{HEAD}.weight"] = torch.randn(HEAD_SHAPE, generator=generator).bfloat16()
    return made


SOURCE = sources()


def plain() -> Tensors:
    """What every checkpoint holds beside quantized weights."""
    return {key: SOURCE[key] for key in (f"{OUT}.bias", f"{NORM}.weight", f"{HEAD}.weight")}


def grow(root: nn.Module, shapes: dict[str, list[int]]) -> None:
    """Puts linear layers of the named shapes, the norm and the head below ``root``."""

    def put(name: str, module: nn.Module) -> None:
        *folders, last = name.split(".")
        at = root
        for folder in folders:
            if folder not in dict(at.named_children()):
                at.add_module(folder, nn.Module())
            at = at.get_submodule(folder)
        at.add_module(last, module)

    for name, (rows, columns) in shapes.items():
        put(name, nn.Linear(columns, rows, bias=name == OUT))
    put(NORM, nn.RMSNorm(64))
    put(HEAD, nn.Linear(HEAD_SHAPE[1], HEAD_SHAPE[0], bias=False))


def shapes_of(names: tuple[str, ...]) -> dict[str, list[int]]:
    return {name: list(SHAPES[name]) for name in names}


def filled(model: Any) -> Any:
    """``model`` with the source's numbers, in bfloat16."""
    model.to(torch.bfloat16).load_state_dict({key: SOURCE[key] for key in model.state_dict()})
    return model.requires_grad_(False)


# ---- what is written


def write(
    name: str, tensors: Tensors, metadata: dict[str, str], expected: Tensors, config: Json | None
) -> None:
    path = GOLDEN / f"{name}.safetensors"
    save_file(tensors, path, metadata=metadata)
    settle(path)
    write_beside(name, expected, config)


def settle(path: Path) -> None:
    """Sorts the header's metadata, which ``save_file`` has in another order every time."""
    whole = path.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(end - 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + whole[end:])


def write_beside(name: str, expected: Tensors, config: Json | None) -> None:
    whole = {key: value.detach().contiguous() for key, value in expected.items()}
    save_file(whole, GOLDEN / f"{name}.expected.safetensors")
    if config is not None:
        fragment = {"quantization_config": config}
        text = json.dumps(fragment, indent=2, sort_keys=True) + "\n"
        (GOLDEN / f"{name}.config.json").write_text(text, encoding="utf-8")


def read(path: Path) -> tuple[Tensors, dict[str, str]]:
    with safe_open(path, "pt") as file:
        return load_file(path), file.metadata()


# ---- ComfyUI


def comfyui(
    name: str,
    kernels: str,
    kind: str,
    modules: dict[str, Json],
    *,
    marked: bool = True,
    headed: bool = True,
) -> Callable[[], None]:
    """Layers as ``comfy-kitchen`` quantizes and dequantizes them, marked as ComfyUI does.

    Args:
        name: of the file.
        kernels: its class of a layout.
        kind: ``format`` of the marker.
        modules: by name, what is passed on to the layout; ``"marker"`` adds to the marker.
        marked: write a marker tensor a layer.
        headed: write the header's list of layers.
    """

    def make() -> None:
        from comfy_kitchen.tensor import QuantizedTensor

        tensors, expected, layers = plain(), {}, {}
        for module, given in modules.items():
            arguments = dict(given)
            said = {"format": kind} | arguments.pop("marker", {})
            quantized = QuantizedTensor.from_float(
                SOURCE[f"{module}.weight"].float(), kernels, **arguments
            )
            tensors |= quantized.state_dict(f"{module}.weight")
            expected[module] = quantized.dequantize()
            layers[module] = said
            if marked:
                text = list(json.dumps(said).encode())
                tensors[f"{module}.comfy_quant"] = torch.tensor(text, dtype=torch.uint8)
        header = {"format": "pt"}
        if headed:
            listed = {"format_version": "1.0", "layers": layers}
            header["_quantization_metadata"] = json.dumps(listed)
        write(f"comfyui-{name}", tensors, header, expected, None)

    return make


def rotated(size: int) -> Json:
    """Arguments and marker of a rotated layer."""
    arguments = {"convrot": True, "convrot_groupsize": size}
    return arguments | {"per_channel": True, "marker": dict(arguments)}


# ---- compressed-tensors


def compressed_tensors(
    name: str, preset: str, names: tuple[str, ...], *, fp32: bool = False
) -> Callable[[], None]:
    """A model that ``ModelCompressor`` compressed, with scales by its own ``calculate_qparams``."""

    def make() -> None:
        from compressed_tensors import ModelCompressor
        from compressed_tensors.quantization import (
            QuantizationConfig,
            apply_quantization_config,
            preset_name_to_scheme,
        )
        from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

        model = nn.Module()
        grow(model, shapes_of(names))
        filled(model)
        if fp32:
            for module in names:
                model.get_submodule(module).float()
        scheme = preset_name_to_scheme(preset, ["Linear"])
        apply_quantization_config(
            model, QuantizationConfig(config_groups={"group_0": scheme}, ignore=[HEAD])
        )
        for module in names:
            layer: Any = model.get_submodule(module)
            low, high = extremes(layer.weight, scheme.weights)
            factor = None
            if hasattr(layer, "weight_global_scale"):
                factor = generate_gparam(low.min(), high.max())
                layer.weight_global_scale.data.copy_(factor)
            scale, zero_point = calculate_qparams(low, high, scheme.weights, global_scale=factor)
            layer.weight_scale.data.copy_(scale)
            layer.weight_zero_point.data.copy_(zero_point)
            for calibrated in ("input_global_scale", "input_scale"):
                if hasattr(layer, calibrated):
                    getattr(layer, calibrated).data.fill_(0.5)
        compressor = ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model)
        tensors = {key: value.clone() for key, value in model.state_dict().items()}
        with tempfile.TemporaryDirectory() as folder:
            compressor.update_config(folder)
            config = json.loads((Path(folder) / "config.json").read_text("utf-8"))
        compressor.decompress_model(model)
        dense: Tensors = model.state_dict()
        expected = {module: dense[f"{module}.weight"] for module in names}
        config = config["quantization_config"]
        write(f"compressed-tensors-{name}", tensors, {"format": "pt"}, expected, config)

    return make


def extremes(numbers: Tensor, spec: Any) -> tuple[Tensor, Tensor]:
    """The least and the greatest number of each scale's share."""
    if spec.strategy == "channel":
        return numbers.amin(1, keepdim=True), numbers.amax(1, keepdim=True)
    if spec.strategy == "tensor":
        return numbers.min().view(1), numbers.max().view(1)
    height, width = spec.block_structure or (1, spec.group_size)
    rows, columns = numbers.shape
    whole = nn.functional.pad(numbers, (0, -columns % width, 0, -rows % height))
    blocks = whole.view(whole.shape[0] // height, height, whole.shape[1] // width, width)
    return blocks.amin((1, 3)), blocks.amax((1, 3))


# ---- by transformers: torchao, bitsandbytes


def transformers_model() -> Any:
    """Its class of a model that is any few linear layers."""
    from transformers import PretrainedConfig, PreTrainedModel

    class SmallConfig(PretrainedConfig):  # type: ignore[misc]
        model_type = "small"

        def __init__(self, shapes: dict[str, list[int]] | None = None, **rest: Any) -> None:
            super().__init__(**rest)
            self.shapes = shapes or {}

    class SmallModel(PreTrainedModel):  # type: ignore[misc]
        config_class = SmallConfig

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            grow(self, config.shapes)
            self.post_init()

        def get_input_embeddings(self) -> None:
            """It has none, which transformers would take for an omission."""

        def _init_weights(self, module: nn.Module) -> None:
            """Every number is read from a file."""

    return SmallModel


def by_transformers(
    name: str, names: tuple[str, ...], settings: Callable[[], Any], dense: Callable[[Any], Tensor]
) -> Callable[[], None]:
    """A model that transformers quantized on loading and saved.

    Args:
        name: of the file.
        names: the modules that are quantized.
        settings: makes the ``quantization_config``.
        dense: a quantized layer's weight, dequantized.
    """

    def make() -> None:
        kind = transformers_model()
        with tempfile.TemporaryDirectory() as folder:
            given, saved = Path(folder) / "given", Path(folder) / "saved"
            config = kind.config_class(shapes=shapes_of(names), dtype="bfloat16")
            filled(kind(config)).save_pretrained(given)
            load: Json = {"dtype": torch.bfloat16, "device_map": "cpu"}
            kind.from_pretrained(given, quantization_config=settings(), **load).save_pretrained(
                saved
            )
            tensors, metadata = read(saved / "model.safetensors")
            again = kind.from_pretrained(saved, **load)
            expected = {module: dense(again.get_submodule(module)) for module in names}
            text = (saved / "config.json").read_text("utf-8")
        write(name, tensors, metadata, expected, json.loads(text)["quantization_config"])

    return make


def torchao(name: str, names: tuple[str, ...], where: str, kind: str) -> Callable[[], None]:
    def settings() -> Any:
        from importlib import import_module

        from transformers import TorchAoConfig

        config = getattr(import_module(where), kind)
        return TorchAoConfig(config(), modules_to_not_convert=[HEAD])

    def dense(layer: Any) -> Tensor:
        made: Tensor = layer.weight.dequantize()
        return made

    return by_transformers(f"torchao-{name}", names, settings, dense)


def bitsandbytes(name: str, how: Json) -> Callable[[], None]:
    def settings() -> Any:
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(**how, llm_int8_skip_modules=[HEAD])

    def dense(layer: Any) -> Tensor:
        from bitsandbytes import functional

        made: Tensor
        if "load_in_8bit" in how:
            state = layer.state_dict()
            made = functional.int8_vectorwise_dequant(state["weight"], state["SCB"])
        else:
            made = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        return made

    return by_transformers(f"bitsandbytes-{name}", SMALL, settings, dense)


# ---- SDNQ, by diffusers


def sdnq(name: str, **how: Any) -> Callable[[], None]:
    def make() -> None:
        from diffusers.configuration_utils import ConfigMixin, register_to_config
        from diffusers.models.modeling_utils import ModelMixin
        from sdnq import SDNQConfig
        from sdnq.dequantizer import dequantize_sdnq_model
        from sdnq.loader import load_sdnq_model, save_sdnq_model

        class SmallModel(ModelMixin, ConfigMixin):  # type: ignore[misc]
            @register_to_config  # type: ignore[untyped-decorator]
            def __init__(self, shapes: dict[str, list[int]]) -> None:
                super().__init__()
                grow(self, shapes)

        # Its own list of names to skip is a set, whose order differs from run to run.
        settings = SDNQConfig(
            weights_dtype="int8",
            minimum_allowed_numel=0,
            minimum_allowed_channel_size=0,
            add_skip_keys=False,
            modules_to_not_convert=[HEAD],
            **how,
        )
        with tempfile.TemporaryDirectory() as folder:
            given, saved = Path(folder) / "given", Path(folder) / "saved"
            filled(SmallModel(shapes=shapes_of(SMALL))).save_pretrained(given)
            model = SmallModel.from_pretrained(
                given, quantization_config=settings, torch_dtype=torch.bfloat16
            )
            save_sdnq_model(model, str(saved))
            tensors, metadata = read(saved / "diffusion_pytorch_model.safetensors")
            config = json.loads((saved / "quantization_config.json").read_text("utf-8"))
            again = load_sdnq_model(str(saved), model_cls=SmallModel, dtype=torch.float32)
            dense: Tensors = dequantize_sdnq_model(again).state_dict()
        expected = {module: dense[f"{module}.weight"] for module in SMALL}
        write(f"sdnq-{name}", tensors, metadata, expected, config)

    return make


# ---- GGUF


def gguf(name: str, kinds: dict[str, str]) -> Callable[[], None]:
    """A file of gguf's own writer.

    Args:
        name: of the file.
        kinds: the ggml type of each module's weight.
    """

    def make() -> None:
        from gguf import GGMLQuantizationType, GGUFWriter, quants

        path = GOLDEN / f"gguf-{name}.gguf"
        writer = GGUFWriter(path, "small")
        writer.add_name("golden")
        writer.add_quantization_version(2)
        expected = {}
        for module, kind in (kinds | {HEAD: "BF16"}).items():
            numbers = SOURCE[f"{module}.weight"].float().numpy()
            given = GGMLQuantizationType[kind]
            data = quants.quantize(numbers, given)
            writer.add_tensor(f"{module}.weight", data, raw_dtype=given)
            expected[module] = torch.from_numpy(np.array(quants.dequantize(data, given)))
        for key in (f"{OUT}.bias", f"{NORM}.weight"):
            writer.add_tensor(key, SOURCE[key].float().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        write_beside(f"gguf-{name}", expected, None)

    return make


# ---- all of them

AO, MX = "torchao.quantization", "torchao.prototype.mx_formats"
GROUPED = (OUT, WIDE)
NF4: Json = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_compute_dtype": torch.bfloat16,
}
NESTED = NF4 | {"bnb_4bit_use_double_quant": True}
ROWS: Json = {"per_channel": True}
ROTATED = {OUT: rotated(64), WIDE: rotated(256), ODD: ROWS}
E4M3: Json = {"dtype": torch.float8_e4m3fn}
E5M2: Json = {"dtype": torch.float8_e5m2}


def comfyui_files() -> Iterator[Callable[[], None]]:
    int8, fp8 = "TensorWiseINT8Layout", "TensorCoreFP8Layout"
    each = dict.fromkeys
    yield comfyui("int8-tensor", int8, "int8_tensorwise", each(SMALL, {}))
    yield comfyui("int8-row", int8, "int8_tensorwise", each(SMALL, ROWS))
    yield comfyui("int8-convrot", int8, "int8_tensorwise", ROTATED, headed=False)
    yield comfyui("fp8-e4m3", fp8, "float8_e4m3fn", each(SMALL, E4M3))
    yield comfyui("fp8-e5m2", fp8, "float8_e5m2", each(SMALL, E5M2), marked=False)
    yield comfyui("nvfp4", "TensorCoreNVFP4Layout", "nvfp4", each((OUT, TALL), {}))
    yield comfyui("mxfp8", "TensorCoreMXFP8Layout", "mxfp8", each(SMALL, {}))


def compressed_tensors_files() -> Iterator[Callable[[], None]]:
    yield compressed_tensors("int8", "W8A8", SMALL)
    yield compressed_tensors("int8-float32-scale", "W8A8", SMALL, fp32=True)
    yield compressed_tensors("fp8-channel", "FP8_DYNAMIC", SMALL)
    yield compressed_tensors("fp8-tensor", "FP8", SMALL)
    yield compressed_tensors("fp8-block", "FP8_BLOCK", (WIDE, TALL))
    yield compressed_tensors("int4", "W4A16", (WIDE,))
    yield compressed_tensors("int4-zeros", "W4A16_ASYM", (WIDE,))
    yield compressed_tensors("nvfp4", "NVFP4A16", GROUPED)
    yield compressed_tensors("nvfp4-activations", "NVFP4", GROUPED)
    yield compressed_tensors("mxfp4", "MXFP4A16", GROUPED)
    yield compressed_tensors("mxfp8", "MXFP8", GROUPED)


def other_files() -> Iterator[Callable[[], None]]:
    yield torchao("int8-w8a8", SMALL, AO, "Int8DynamicActivationInt8WeightConfig")
    yield torchao("int8-weight-only", SMALL, AO, "Int8WeightOnlyConfig")
    # A row of zeros becomes NaN: WIDE has none.
    yield torchao("fp8-weight-only", (WIDE,), AO, "Float8WeightOnlyConfig")
    yield torchao("nvfp4-weight-only", GROUPED, MX, "NVFP4WeightOnlyConfig")
    yield bitsandbytes("nf4", NF4)
    yield bitsandbytes("nf4-nested", NESTED)
    yield bitsandbytes("int8", {"load_in_8bit": True})
    yield sdnq("int8", group_size=-1)
    yield sdnq("int8-groups", group_size=32)
    yield sdnq("int8-matmul", use_quantized_matmul=True)
    yield gguf("q8_0", {OUT: "Q8_0", WIDE: "Q8_0", ODD: "F16"})
    yield gguf("q4", {OUT: "Q4_0", WIDE: "Q4_1", ODD: "BF16"})
    yield gguf("q5", {OUT: "Q5_0", WIDE: "Q5_1", ODD: "F32"})
    yield gguf("mxfp4", {OUT: "MXFP4", WIDE: "MXFP4"})


def main() -> None:
    save_file(SOURCE, GOLDEN / "source.safetensors")
    for make in (*comfyui_files(), *compressed_tensors_files(), *other_files()):
        make()


if __name__ == "__main__":
    main()
