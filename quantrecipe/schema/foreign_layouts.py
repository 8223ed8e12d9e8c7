"""Layouts that are known by sight and not read, and what shows a checkpoint to be in one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from quantrecipe.schema.json_text import parse_json
from quantrecipe.schema.layout_reading import NOT_READ
from quantrecipe.schema.markers import COMFYUI_KEY, parsed
from quantrecipe.schema.problems import Problem
from quantrecipe.schema.recognition import Reading
from quantrecipe.schema.tensors import TensorInfo

_Tensors = Mapping[str, TensorInfo]


@dataclass(frozen=True, slots=True)
class Seen:
    """What may show a layout."""

    tensors: _Tensors
    metadata: Mapping[str, str]
    quantization: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Foreign:
    """A layout that is recognised and not read.

    Attributes:
        name: what it is called here.
        written_by: whose it is, for people.
        suffixes: endings of tensor names that no other layout has.
        methods: ``quant_method`` of ``quantization_config`` in a ``config.json``.
        needs: for an ending, those that have to stand beside it after the same beginning.
        shows: what else shows it: gives the evidence, or ``None``.
        extends: the layout that reads some of its kind, and may say itself what it does not read.
    """

    name: str
    written_by: str
    suffixes: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    needs: tuple[tuple[str, tuple[str, ...]], ...] = ()
    shows: Callable[[Seen], str | None] | None = None
    extends: str | None = None


def _other_markers(seen: Seen) -> str | None:
    """Formats of ComfyUI that are not read (its ``ops.py``)."""
    found = set()
    for name, info in seen.tensors.items():
        said = parsed(info.content) if name.endswith(".comfy_quant") else ""
        if not isinstance(said, str) and said.get("format") in _COMFYUI_FORMATS:
            found.add(str(said["format"]))
    return f"markers that say {' and '.join(sorted(found))}" if found else None


_COMFYUI_FORMATS: Final = ("convrot_w4a4", "asym_w4a8_int8", "awq_w4a16")


def _two_levels_unmarked(seen: Seen) -> str | None:
    """nvfp4 by two scales, where nothing says that they are ComfyUI's."""
    count = sum(
        name.endswith(_SECOND)
        and f"{name.removesuffix(_SECOND)}.comfy_quant" not in seen.tensors
        and COMFYUI_KEY not in seen.metadata
        for name in seen.tensors
    )
    return f"{count} tensor(s) called *{_SECOND}, without a marker" if count else None


_SECOND: Final = ".weight_scale_2"


def _transforms(seen: Seen) -> str | None:
    said = seen.quantization.get("transform_config")
    return "a transform_config in config.json" if isinstance(said, dict) and said else None


def _asymmetric_int8(seen: Seen) -> str | None:
    ends = ".weight_zero_point"
    stems = [name.removesuffix(ends) for name in seen.tensors if name.endswith(ends)]
    weights = [seen.tensors.get(f"{stem}.weight") for stem in stems]
    count = sum(info is not None and info.dtype == "int8" for info in weights)
    return f"{count} int8 weight(s) with zero points" if count else None


def _sdnq_variant(seen: Seen) -> str | None:
    """What SDNQ stores otherwise: turned round for its own matrix product, or with zero points."""
    if seen.quantization.get("quant_method") == "sdnq" and seen.quantization.get("use_hadamard"):
        return "use_hadamard in config.json"
    turned = shifted = 0
    for name, scale in seen.tensors.items():
        stem = name.removesuffix(".scale")
        weight = seen.tensors.get(f"{stem}.weight") if stem != name else None
        if weight is None or not weight.dtype.startswith(("int", "uint", "float8")):
            continue
        shifted += f"{stem}.zero_point" in seen.tensors
        rows = weight.shape[:1]
        turned += rows != (1,) and len(weight.shape) == 2 and scale.shape == (1, weight.shape[1])
    if shifted:
        return f"{shifted} tensor(s) called *.zero_point beside a *.scale"
    return f"{turned} weight(s) stored [in, out], with scales of [1, out]" if turned else None


def _torchao_classes(seen: Seen) -> str | None:
    """Classes of torchao's tensors that are not read, by the metadata of the files."""
    found = set()
    for name, text in seen.metadata.items():
        if not name.endswith(".weight"):
            continue
        said = parse_json(text)
        kind = said.value.get("_type") if isinstance(said.value, dict) else None
        if isinstance(kind, str) and kind not in _TORCHAO_READ:
            found.add(kind)
    return f"weights of class {' and '.join(sorted(found))}" if found else None


_TORCHAO_READ: Final = ("Tensor", "Int8Tensor", "Float8Tensor", "NVFP4Tensor")

FOREIGN: Final[tuple[Foreign, ...]] = (
    Foreign(
        "pre-quant-scale",
        "ModelOpt or ComfyUI, nvfp4 with smoothing factors",
        suffixes=(".pre_quant_scale",),
        extends="comfyui",
    ),
    Foreign("comfyui-other", "ComfyUI, a format that is not read", shows=_other_markers),
    Foreign(
        "compressed-tensors-actorder",
        "compressed-tensors, columns in another order",
        suffixes=(".weight_g_idx",),
        extends="compressed-tensors",
    ),
    Foreign(
        "compressed-tensors-sparse", "compressed-tensors, sparse weights", suffixes=(".bitmask",)
    ),
    Foreign(
        "compressed-tensors-transforms",
        "compressed-tensors, weights that were rotated",
        shows=_transforms,
    ),
    Foreign(
        "compressed-tensors-asymmetric",
        "compressed-tensors, int8 with zero points",
        shows=_asymmetric_int8,
    ),
    Foreign(
        "bitsandbytes-fp4",
        "bitsandbytes, FP4",
        suffixes=(".quant_state.bitsandbytes__fp4",),
        needs=((".weight.quant_state.bitsandbytes__fp4", (".weight", ".weight.absmax")),),
    ),
    Foreign(
        "torchao-other",
        "torchao, tensors of a class that is not read",
        methods=("torchao",),
        needs=(("._weight_qdata", ("._weight_scale",)),),
        shows=_torchao_classes,
        extends="torchao",
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
        methods=("modelopt",),
        needs=((_SECOND, (".weight", ".weight_scale")),),
        shows=_two_levels_unmarked,
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
    Foreign(
        "sdnq-other",
        "SDNQ, a way of storing that is not read",
        suffixes=(".svd_up", ".svd_down"),
        methods=("sdnq",),
        shows=_sdnq_variant,
        extends="sdnq",
    ),
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
    metadata: Mapping[str, str],
    quantization: Mapping[str, Any] | None,
) -> Sighting | None:
    """The foreign layout that shows in tensors or metadata, else in a ``config.json``.

    What a ``quant_method`` says alone is no proof: most methods have tensors that are read.

    Args:
        tensors: by name.
        metadata: of the files.
        quantization: ``quantization_config`` of the ``config.json`` beside them.
    """
    seen = Seen(tensors, metadata, quantization or {})
    for layout in FOREIGN:
        for suffix in layout.suffixes:
            count = sum(name.endswith(suffix) for name in tensors)
            if count:
                return Sighting(layout, f"{count} tensor(s) called *{suffix}")
        evidence = layout.shows(seen) if layout.shows is not None else None
        if evidence is not None:
            return Sighting(layout, evidence)
    method = seen.quantization.get("quant_method")
    for layout in FOREIGN:
        if method in layout.methods:
            return Sighting(layout, f"quant_method {method!r} in config.json", by_config=True)
    return None


def is_read(sighting: Sighting, reading: Reading) -> bool:
    """Whether the layout that is extended there has nothing to say but what it does not read."""
    kinds = {problem.kind for problem in reading.problems}
    return reading.layout.name == sighting.layout.extends and bool(kinds) and kinds <= NOT_READ


def foreign_problems(
    sighting: Sighting, tensors: Mapping[str, TensorInfo], quantization: Mapping[str, Any] | None
) -> Iterator[Problem]:
    """What can be said of a layout that is not read: tensors that lack what belongs to them.

    Args:
        sighting: the layout.
        tensors: by name.
        quantization: ``quantization_config`` of the ``config.json`` beside them.
    """
    layout = sighting.layout
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
    if layout.name == "nvfp4" and (quantization or {}).get("quant_method") != "modelopt":
        yield from _unmarked(tensors)


def _unmarked(tensors: Mapping[str, TensorInfo]) -> Iterator[Problem]:
    """nvfp4 that neither a marker nor a config speaks of: no reader takes it for what it is."""
    for name, info in tensors.items():
        stem = name.removesuffix(_SECOND)
        if stem == name or f"{stem}.weight" not in tensors:
            continue
        yield Problem(
            "missing-marker",
            f"{stem!r} has scales of two levels, as nvfp4 has, and neither a marker "
            f"{stem + '.comfy_quant'!r} nor metadata nor a config.json says so",
            hint="ComfyUI takes its codes for plain numbers and drops its scales; ModelOpt's "
            "readers ask for their config. Get the file that its program wrote.",
            file=str(info.file),
            tensor=f"{stem}.weight",
        )
