"""The programs that are published beside the weights; they need nothing of this package.

Each is a module of this room, or of the converter's, in which a block of data is filled in. Those
modules are checked and tested as such, and never imported here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Final, Literal

from quantrecipe.converter.templates import Value, filled
from quantrecipe.publishing.facts import Needed
from quantrecipe.schema.names import NameMapping

DOWNLOAD_NAME: Final = "download_deps.py"
USAGE_NAME: Final = "usage.py"


@dataclass(frozen=True, slots=True)
class Component:
    """A component of a pipeline that the checkpoint holds quantized.

    Attributes:
        part: of the checkpoint.
        class_name: its class.
        config: the path of its ``config.json``.
        config_from: below which folder that is: the published one, or that of the dependencies.
        library: which package its class is in, ``diffusers`` or ``transformers``.
    """

    part: str
    class_name: str
    config: str
    config_from: Literal["here", "dependencies"] = "here"
    library: str = "diffusers"


@dataclass(frozen=True, slots=True)
class Network:
    """A network that a library has a class for.

    Attributes:
        library: ``diffusers`` or ``transformers``.
        class_name: its class.
        config: the folder of its ``config.json``, below the published one.
    """

    library: str
    class_name: str
    config: str


def download_script(needed: Needed) -> bytes:
    """The text of ``download_deps.py``, which fetches what is needed besides."""
    sizes: dict[Value, Value] = dict(sorted(needed.files.items()))
    values: dict[str, Value] = {
        "REPOSITORY": needed.repo,
        "COMMIT": needed.commit,
        "GATED": needed.gated,
        "FILES: dict[str, int]": sizes,
    }
    return filled(_template("download_deps.py"), "repository", values).encode()


def pipeline_script(
    pipeline: str,
    components: Mapping[str, Component],
    names: Sequence[NameMapping] = (),
    *,
    standalone: bool = True,
) -> bytes:
    """The text of ``usage.py``, which makes an image with a pipeline of diffusers.

    Args:
        pipeline: its class.
        components: those that the checkpoint holds, by the names that the pipeline has for them.
        names: what those call modules that are stored under other names: each of one module, which
            may be cut into several.
        standalone: whether ``safetensors_loader.py`` can load the checkpoint.
    """
    described: dict[Value, Value] = {
        name: {
            "part": each.part,
            "library": each.library,
            "class_name": each.class_name,
            "config": each.config,
            "config_from": each.config_from,
        }
        for name, each in components.items()
    }
    values: dict[str, Value] = {
        "PIPELINE": pipeline,
        "COMPONENTS: dict[str, Component]": described,
        **_loading(names, standalone),
    }
    return filled(_template("usage_pipeline.py"), "pipeline", values).encode()


def models_script(
    networks: Mapping[str, Network | None],
    names: Sequence[NameMapping] = (),
    *,
    standalone: bool = True,
) -> bytes:
    """The text of ``usage.py``, which loads the networks of a checkpoint, each by itself.

    Args:
        networks: by the names of the parts; ``None``: no class is known.
        names: as in ``pipeline_script``.
        standalone: likewise.
    """
    parts: dict[Value, Value] = {
        part: None
        if each is None
        else {"library": each.library, "class_name": each.class_name, "config": each.config}
        for part, each in networks.items()
    }
    values: dict[str, Value] = {
        "PARTS: dict[str, Model | None]": parts,
        **_loading(names, standalone),
    }
    return filled(_template("usage_models.py"), "networks", values).encode()


def _loading(names: Sequence[NameMapping], standalone: bool) -> dict[str, Value]:
    stored: list[Value] = []
    for mapping in names:
        (source,) = mapping.sources
        stored.append((source, tuple(mapping.targets)))
    return {
        "NAMES: tuple[tuple[str, tuple[str, ...]], ...]": tuple(stored),
        "NEEDS_QUANTRECIPE": not standalone,
    }


def _template(name: str) -> str:
    return files("quantrecipe.publishing").joinpath(name).read_text("utf-8")
