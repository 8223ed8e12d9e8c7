"""How a published checkpoint is run: which script lies beside it, and what that needs."""

from __future__ import annotations

import ast
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

from quantrecipe.checkpoint.hub.components import Pipeline, pipeline_files, read_pipeline
from quantrecipe.publishing.base import OpenedBase
from quantrecipe.publishing.facts import Needed, Usage
from quantrecipe.publishing.publication import content_of
from quantrecipe.publishing.scripts import (
    Component,
    Network,
    models_script,
    pipeline_script,
)
from quantrecipe.schema.lock import Lock
from quantrecipe.schema.names import NameMapping
from quantrecipe.schema.problems import InvalidInput, Problem
from quantrecipe.schema.quantization_config import CONFIG_NAME
from quantrecipe.schema.registry import NAMES, named_names
from quantrecipe.schema.renaming import new_names

_ALWAYS: Final = ("torch", "safetensors")
_LIBRARIES: Final = ("diffusers", "transformers")
_CALL: Final = "python usage.py"
_LARGEST_SCRIPT: Final = 1 << 20


def own_usage(script: Path) -> Usage:
    """A script of the user's own in place of a generated one.

    What it says of itself is in its docstring: the first line, and the first example of a call,
    ``python usage.py …``.

    Raises:
        InvalidInput: it is no Python.
        SourceError: the system could not read it.
    """
    content = content_of(script)
    try:
        if len(content) > _LARGEST_SCRIPT:
            raise ValueError("it is larger than 1 MiB")
        tree = ast.parse(content, script.name)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        message = f"is no Python: {error}"
        raise InvalidInput(Problem("bad-script", message, file=str(script))) from error
    said = (ast.get_docstring(tree) or "").splitlines()
    imported = _imported(tree)
    calls = (line.strip() for line in said if line.strip().startswith(_CALL))
    return Usage(
        content,
        _packages((name for name in _LIBRARIES if name in imported), standalone=True),
        next(calls, f"{_CALL} --help"),
        said[0] if said else "It says how it is called.",
    )


def _imported(tree: ast.Module) -> set[str]:
    """The packages that a script imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    return {name.partition(".")[0] for name in names}


def find_usage(lock: Lock, folder: Path, pipeline: OpenedBase | None, *, standalone: bool) -> Usage:
    """What runs a checkpoint: the pipeline that its parts belong to, or else each part by itself.

    Args:
        lock: of the checkpoint.
        folder: where it lies, with the configurations of its parts.
        pipeline: the repository of the pipeline, if there may be one.
        standalone: whether the loader beside the checkpoint can read it; else it takes this
            package, which does not rename modules.

    Raises:
        InvalidInput: a configuration is malformed, or nothing could load modules of these names.
        HubError: the repository cannot be read.
    """
    configs = {part: _config(lock, folder, part) for part in lock.recipe.source.parts}
    if pipeline is not None:
        found = read_pipeline(pipeline.root)
        if found is not None:
            components = _components(lock, found, configs)
            if components:
                return _of_pipeline(lock, pipeline, found, components, standalone)
    return _of_models(lock, configs, standalone)


@dataclass(frozen=True, slots=True)
class _Config:
    """The ``config.json`` of a part: its path in the repository, and what it says."""

    path: str
    values: Mapping[str, Any]

    @property
    def network(self) -> Network | None:
        """The class that it is of; ``None`` where it names none."""
        folder = str(PurePosixPath(self.path).parent)
        kind = self.values.get("_class_name")
        if isinstance(kind, str) and kind.isidentifier():
            return Network("diffusers", kind, folder)
        kinds = self.values.get("architectures")
        if isinstance(kinds, list) and kinds and str(kinds[0]).isidentifier():
            return Network("transformers", str(kinds[0]), folder)
        return None


def _config(lock: Lock, folder: Path, part: str) -> _Config | None:
    beside = PurePosixPath(lock.recipe.target.file_of(part)).parent
    written = {file.path for file in lock.sidecars}
    for path in (str(beside / part / CONFIG_NAME), str(beside / CONFIG_NAME)):
        if path not in written:
            continue
        file = folder / path
        try:
            values = json.loads(file.read_bytes())
        except (OSError, ValueError, RecursionError):
            values = None
        if isinstance(values, dict):
            return _Config(path, values)
        raise InvalidInput(
            Problem("bad-config", "is no JSON object", "Convert again.", file=str(file))
        )
    return None


def _components(
    lock: Lock, pipeline: Pipeline, configs: Mapping[str, _Config | None]
) -> dict[str, Component]:
    """The components of a pipeline that parts of the checkpoint are; none, if one part is not."""
    found: dict[str, Component] = {}
    root = PurePosixPath("." if lock.repository is None else lock.repository.folder or ".")
    for part, location in lock.recipe.source.parts.items():
        name = str(root / location)
        if name not in pipeline.components:
            return {}
        library, kind = pipeline.components[name]
        config = configs[part]
        if library not in _LIBRARIES:
            return {}
        found[name] = (
            Component(part, kind, f"{name}/{CONFIG_NAME}", "dependencies", library)
            if config is None
            else Component(part, kind, config.path, library=library)
        )
    return found


def _of_pipeline(
    lock: Lock,
    opened: OpenedBase,
    pipeline: Pipeline,
    components: Mapping[str, Component],
    standalone: bool,
) -> Usage:
    base = opened.base
    names = _loadable(lock, {each.class_name for each in components.values()}, standalone)
    needed = Needed(
        repo=base.repo,
        commit=opened.commit,
        gated=base.gated is not None,
        files=pipeline_files(opened.root, components.keys()),
    )
    text = any(library == "transformers" for library, _ in pipeline.components.values())
    return Usage(
        script=pipeline_script(pipeline.class_name, components, names, standalone=standalone),
        packages=_packages(["diffusers", *(["transformers"] if text else [])], standalone),
        command='python usage.py "a lighthouse in the fog, oil on canvas" --out image.png',
        summary=f"It assembles {pipeline.class_name} with the networks of this repository in the "
        "place of its own, and writes an image.",
        needed=needed,
        example=(
            "import torch",
            "from usage import assemble",
            "",
            'pipeline = assemble(torch.device("cuda"))',
            'image = pipeline("a lighthouse in the fog, oil on canvas").images[0]',
        ),
    )


def _of_models(lock: Lock, configs: Mapping[str, _Config | None], standalone: bool) -> Usage:
    networks = {part: None if each is None else each.network for part, each in configs.items()}
    known = [network for network in networks.values() if network is not None]
    names = _loadable(lock, {network.class_name for network in known}, standalone)
    packages = _packages((network.library for network in known), standalone)
    script = models_script(networks, names, standalone=standalone)
    if not known:
        command, summary = (
            "python usage.py --model my_package:MyModel",
            "It loads the weights into a network of a class of yours.",
        )
    elif "transformers" in packages:
        command = 'python usage.py "The lighthouse" "A tower with a lamp"'
        summary = "It loads the network; a language model goes on with texts, an encoder compares."
    else:
        command, summary = "python usage.py", "It loads every network, and says what it takes."
    calls = (
        f'{part if len(networks) > 1 else "model"} = load_part("{part}", device="cuda")'
        for part, network in networks.items()
        if network is not None
    )
    example = ("from usage import load_part", "", *calls) if known else ()
    return Usage(script, packages, command, summary, example=example)


def _packages(libraries: Iterable[str], standalone: bool) -> tuple[str, ...]:
    needed = [*_ALWAYS, *libraries, *([] if standalone else ["quantrecipe"])]
    return tuple(dict.fromkeys(needed))


def _loadable(lock: Lock, classes: Collection[str], standalone: bool) -> tuple[NameMapping, ...]:
    names = renamed(lock, classes)
    if names and not standalone:
        raise InvalidInput(
            Problem(
                "no-usage",
                f"{', '.join(sorted(classes))} has other names for {names[0].sources[0]!r}, and "
                "nothing that reads these formats renames modules while loading",
                "Convert with target.names, or give a script of your own with --usage.",
            )
        )
    return names


def renamed(lock: Lock, classes: Collection[str]) -> tuple[NameMapping, ...]:
    """What classes call modules of a checkpoint that have other names there.

    By the known names whose ``classes`` have one of them; nothing, where no module goes by another
    name.
    """
    for name in NAMES:
        document = named_names(name)
        if not set(classes) & set(document.classes or ()):
            continue
        entries = [each for each in document.names if len(each.sources) == 1]
        if any(new_names(module.name, entries) for module in lock.modules):
            return tuple(entries)
    return ()
