"""Layouts that are known by sight and not read yet, and what shows a checkpoint to be in one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from quantrecipe.schema.problems import Problem
from quantrecipe.schema.tensors import TensorInfo


@dataclass(frozen=True, slots=True)
class Foreign:
    """A layout that is recognised and not read.

    Attributes:
        name: what it is called here.
        written_by: whose it is, for people.
        suffixes: endings of tensor names that no other layout has.
        metadata: keys of the safetensors metadata that no other layout has.
        methods: ``quant_method`` of ``quantization_config`` in a ``config.json``.
        needs: for an ending, those that have to stand beside it after the same beginning.
    """

    name: str
    written_by: str
    suffixes: tuple[str, ...] = ()
    metadata: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    needs: tuple[tuple[str, tuple[str, ...]], ...] = ()


FOREIGN: Final[tuple[Foreign, ...]] = (
    Foreign(
        "comfyui",
        "ComfyUI, with comfy_quant markers",
        suffixes=(".comfy_quant",),
        metadata=("_quantization_metadata",),
        needs=((".comfy_quant", (".weight",)),),
    ),
    Foreign(
        "compressed-tensors",
        "compressed-tensors (llm-compressor, vLLM)",
        suffixes=(".weight_packed", ".weight_global_scale"),
        methods=("compressed-tensors",),
        needs=((".weight_packed", (".weight_scale",)),),
    ),
    Foreign(
        "bitsandbytes-nf4",
        "bitsandbytes, 4 bits",
        suffixes=(
            ".quant_state.bitsandbytes__nf4",
            ".quant_state.bitsandbytes__fp4",
            ".weight.quant_map",
        ),
        methods=("bitsandbytes_4bit",),
        needs=(
            (".weight.quant_state.bitsandbytes__nf4", (".weight", ".weight.absmax")),
            (".weight.quant_state.bitsandbytes__fp4", (".weight", ".weight.absmax")),
            (".weight.absmax", (".weight.quant_map",)),
        ),
    ),
    Foreign(
        "bitsandbytes-int8",
        "bitsandbytes, LLM.int8()",
        suffixes=(".SCB",),
        methods=("bitsandbytes", "bitsandbytes_8bit"),
        needs=((".SCB", (".weight",)),),
    ),
    Foreign(
        "torchao",
        "torchao tensor subclasses",
        suffixes=("._weight_qdata",),
        methods=("torchao",),
        needs=(("._weight_qdata", ("._weight_scale",)),),
    ),
    Foreign(
        "quanto",
        "optimum-quanto",
        suffixes=(".weight._data",),
        methods=("quanto",),
        needs=((".weight._data", (".weight._scale",)),),
    ),
    Foreign(
        "fp8-block-inverse",
        "fp8 with weight_scale_inv (DeepSeek, fine-grained fp8)",
        suffixes=(".weight_scale_inv",),
        methods=("fp8", "fbgemm_fp8"),
        needs=((".weight_scale_inv", (".weight",)),),
    ),
    Foreign(
        "nvfp4",
        "NVIDIA ModelOpt, nvfp4",
        suffixes=(".weight_scale_2",),
        methods=("modelopt",),
        needs=((".weight_scale_2", (".weight", ".weight_scale")),),
    ),
    Foreign(
        "nunchaku",
        "Nunchaku, SVDQuant",
        suffixes=(".wscales", ".wtscale"),
        needs=((".wscales", (".qweight",)),),
    ),
    Foreign(
        "gptq",
        "GPTQ or AWQ",
        suffixes=(".qzeros", ".g_idx"),
        methods=("gptq", "awq"),
        needs=((".qweight", (".scales",)),),
    ),
    Foreign("sdnq", "SDNQ", suffixes=(".svd_up", ".svd_down"), methods=("sdnq",)),
)
"""In the order in which they are looked for."""


@dataclass(frozen=True, slots=True)
class Sighting:
    """A foreign layout, and what it was known by."""

    layout: Foreign
    evidence: str
    by_config: bool = False


def sight(
    tensors: Mapping[str, TensorInfo],
    metadata: Iterable[str],
    quantization: Mapping[str, Any] | None,
) -> Sighting | None:
    """The foreign layout that shows in tensor names or metadata, else in a ``config.json``.

    What a ``config.json`` says alone is no proof: int8 of compressed-tensors has the tensors of a
    layout that is read.

    Args:
        tensors: by name.
        metadata: keys of the safetensors metadata.
        quantization: ``quantization_config`` of the ``config.json`` beside them.
    """
    keys = set(metadata)
    for layout in FOREIGN:
        for suffix in layout.suffixes:
            named = [name for name in tensors if name.endswith(suffix)]
            if named:
                return Sighting(layout, f"{len(named)} tensor(s) called *{suffix}")
        for key in layout.metadata:
            if key in keys:
                return Sighting(layout, f"the metadata key {key}")
    method = quantization.get("quant_method") if quantization is not None else None
    if quantization is not None and method == "bitsandbytes":
        method = "bitsandbytes_4bit" if quantization.get("load_in_4bit") else method
    for layout in FOREIGN:
        if method in layout.methods:
            return Sighting(layout, f"quant_method {method!r} in config.json", by_config=True)
    return None


def foreign_problems(
    layout: Foreign, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]
) -> Iterator[Problem]:
    """What can be said of a layout that is not read: tensors that lack what belongs to them."""
    for name, info in tensors.items():
        for suffix, others in layout.needs:
            if not name.endswith(suffix):
                continue
            stem = name.removesuffix(suffix)
            missing = [stem + other for other in others if stem + other not in tensors]
            if missing:
                yield Problem(
                    "missing-companion",
                    f"{layout.name} stores {' and '.join(map(repr, missing))} beside it, and "
                    f"{'they are' if len(missing) > 1 else 'it is'} not there",
                    hint="Without it the numbers cannot be read; get the whole checkpoint.",
                    file=str(info.file),
                    tensor=name,
                )
    if layout.name == "comfyui":
        yield from _unmarked(tensors, metadata)


def _unmarked(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> Iterator[Problem]:
    """ComfyUI takes a weight without a marker for a plain one, and drops its scales."""
    if "_quantization_metadata" in metadata:
        return
    for name, info in tensors.items():
        stem = name.removesuffix(".weight")
        if stem == name or info.dtype not in ("int8", "float8_e4m3fn", "float8_e5m2"):
            continue
        if len(info.shape) == 2 and f"{stem}.comfy_quant" not in tensors:
            yield Problem(
                "missing-marker",
                f"{info.dtype} weight without its marker {stem + '.comfy_quant'!r}",
                hint="ComfyUI loads such a weight as plain numbers and drops its scale.",
                file=str(info.file),
                tensor=name,
            )
