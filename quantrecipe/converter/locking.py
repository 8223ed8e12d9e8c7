"""From a plan carried out to its lock."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from quantrecipe import __version__
from quantrecipe.checkpoint.hub.repository import HubPath
from quantrecipe.converter.checking import ModuleResult
from quantrecipe.converter.engine import Worked
from quantrecipe.converter.factors import Factors
from quantrecipe.converter.protocol import Converter
from quantrecipe.schema.canonical import lock_digest
from quantrecipe.schema.location import Location
from quantrecipe.schema.lock import (
    Lock,
    LockedGroup,
    LockedModule,
    LockedOther,
    LockedTensor,
    OutputFile,
    Role,
    SourceFile,
    Tool,
)
from quantrecipe.schema.plan import Plan, PlannedModule, PlannedTensor

if TYPE_CHECKING:
    from typing import Any

Digests = Mapping[tuple[str, str], str]


def make_lock(
    plan: Plan,
    converter: Converter,
    results: tuple[ModuleResult, ...],
    factors: Factors,
    worked: Worked,
    sidecars: Mapping[str, bytes],
) -> Lock:
    """The lock of a plan that was carried out; a pure function of what it is given.

    Args:
        plan: what was to be done.
        converter: who did it.
        results: the modules, measured.
        factors: of every group that is smoothed.
        worked: what was written, with digests.
        sidecars: every other file that is written, by path, but for the lock.
    """
    digests = worked.tensors
    errors = {(result.part, result.name): result.error for result in results}
    unsigned = Lock(
        kind="lock",
        version=1,
        recipe=plan.recipe,
        recipe_sha256=plan.recipe_sha256,
        tool=Tool(name="quantrecipe", version=__version__),
        converter=Tool(name=converter.name, version=converter.version),
        source=tuple(
            SourceFile(
                part=part.name,
                path=file.relative,
                bytes=file.size,
                header_sha256=file.header_sha256,
                **_identity(file.path, worked),
            )
            for part in plan.parts
            for file in part.files
        ),
        outputs=worked.outputs,
        modules=tuple(
            _locked_module(module, digests, error=errors[module.part, module.name])
            for module in plan.modules
        ),
        others=tuple(
            LockedOther(
                part=other.part,
                name=other.name,
                tensor=_locked_tensor(other.output, "other", digests),
            )
            for other in plan.others
        ),
        sidecars=tuple(
            OutputFile(path=path, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
            for path, content in sorted(sidecars.items())
        ),
        sha256="0" * 64,
        **_locked_options(plan, factors),
    )
    return unsigned.model_copy(update={"sha256": lock_digest(unsigned.to_json_value())})


def _identity(path: Location, worked: Worked) -> dict[str, str]:
    sha256 = worked.sources[path]
    found = {} if sha256 is None else {"sha256": sha256}
    return found | ({"etag": path.file.etag} if isinstance(path, HubPath) else {})


def _locked_options(plan: Plan, factors: Factors) -> dict[str, Any]:
    groups = tuple(
        LockedGroup(part=group.part, modules=group.modules, alpha=group.alpha)
        for group in factors.groups
    )
    found: dict[str, Any] = {
        "names": plan.names,
        "repository": plan.repository,
        "smoothing_groups": groups,
    }
    return {key: value for key, value in found.items() if value}


def _locked_module(module: PlannedModule, digests: Digests, **measured: Any) -> LockedModule:
    optional: dict[str, Any] = {
        "activation": module.activation,
        "smoothing": module.smoothing,
        "rotation": module.rotation,
        "scheme": module.scheme,
        "reason": module.reason,
        **measured,
    }
    return LockedModule(
        part=module.part,
        name=module.name,
        shape=(module.source.out_features, module.source.in_features),
        disposition=module.disposition,
        transfer=module.transfer,
        weight=module.weight,
        tensors={
            role: _locked_tensor(tensor, role, digests) for role, tensor in module.outputs.items()
        },
        **{key: value for key, value in optional.items() if value is not None},
    )


def _locked_tensor(tensor: PlannedTensor, role: Role, digests: Digests) -> LockedTensor:
    return LockedTensor(
        name=tensor.name,
        dtype=tensor.dtype,
        shape=tensor.shape,
        file=tensor.file,
        offset=tensor.offset,
        bytes=tensor.nbytes,
        role=role,
        xxh3_128=digests[tensor.file, tensor.name],
    )
