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
    pipeline: str, components: Mapping[str, Component], names: Sequence[NameMapping] = ()
) -> bytes:
    """The text of ``usage.py``, which makes an image with a pipeline of diffusers.

    Args:
        pipeline: its class.
        components: those that the checkpoint holds, by the names that the pipeline has for them.
        names: what those call modules that are stored under other names: each of one module, which
            may be cut into several.
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
    stored: list[Value] = []
    for mapping in names:
        (source,) = mapping.sources
        stored.append((source, tuple(mapping.targets)))
    values: dict[str, Value] = {
        "PIPELINE": pipeline,
        "COMPONENTS: dict[str, Component]": described,
        "NAMES: tuple[tuple[str, tuple[str, ...]], ...]": tuple(stored),
    }
    return filled(_template("usage_pipeline.py"), "pipeline", values).encode()


def _template(name: str) -> str:
    return files("quantrecipe.publishing").joinpath(name).read_text("utf-8")
