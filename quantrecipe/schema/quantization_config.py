"""The ``quantization_config`` of a ``config.json``: what a loader has to know of every module.

Frameworks read it before they look at a single tensor, on a model without weights. Together with
the model's own shapes it says all of them: a module that is named here has ``weight`` in the
format of its scheme, ``weight_scale`` of the grid of scales (``[]`` for a tensor, ``[out, 1]`` for
channels, ``[out, groups]``, ``[row_blocks, column_blocks]``), and ``smoothing``, float32 ``[in]``,
by which activations are divided, where it is listed for that. Activations are rotated after that
where its scheme says so. Every other module is plain.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Annotated, Any, Final, Literal, Protocol

from pydantic import ValidationError

from quantrecipe.schema.base import Model, Name, NonEmpty, VersionOne
from quantrecipe.schema.messages import is_echo, problem_of
from quantrecipe.schema.parsed import capped, describe, join
from quantrecipe.schema.problems import InvalidInput, Problem
from quantrecipe.schema.schemes import (
    AnyQuantizedWeight,
    AnyWeight,
    DynamicActivation,
    Hadamard,
    ScaledWeight,
)

CONFIG_NAME: Final = "config.json"
CONFIG_KEY: Final = "quantization_config"


class ConfigScheme(Model):
    """How a module is stored and computed."""

    weight: AnyQuantizedWeight
    """How weights are stored, as in a recipe."""

    activation: DynamicActivation | None = None
    """How activations are quantized at run time, as in a recipe; absent: they are not."""

    rotation: Hadamard | None = None
    """How weights were rotated and activations have to be, as in a recipe; absent: not at all."""


class ConfigModules(Model):
    """The modules of one scheme."""

    names: Annotated[tuple[Annotated[str, NonEmpty], ...], NonEmpty]
    """Their dotted names, sorted."""

    smoothing: tuple[Annotated[str, NonEmpty], ...]
    """Those of them that have smoothing factors."""


class QuantizationConfig(Model):
    """Which modules of a checkpoint are stored as codes and scales, and how."""

    quant_method: Literal["quantrecipe"]
    """Who reads it."""

    version: VersionOne
    """The version of this object."""

    schemes: Annotated[dict[Name, ConfigScheme], NonEmpty]
    """Schemes by the names that the recipe gives them. What a source held quantized already and was
    kept so has a scheme called ``kept-`` and its format."""

    modules: Annotated[dict[Name, ConfigModules], NonEmpty]
    """For each of them, its modules. Every other module is plain."""


class Stored(Protocol):
    """A module of a plan or a lock."""

    @property
    def name(self) -> str:
        """Its dotted name."""

    @property
    def scheme(self) -> str | None:
        """The scheme's name."""

    @property
    def weight(self) -> AnyWeight:
        """How its weight is stored."""

    @property
    def activation(self) -> DynamicActivation | None:
        """How its activations are quantized."""

    @property
    def rotation(self) -> Hadamard | None:
        """How its weight was rotated."""


@dataclass(frozen=True, slots=True)
class ConfiguredModule:
    """A module as it is stored.

    Attributes:
        name: its dotted name.
        scheme: the scheme's name; ``None`` if it is kept as the source has it.
        weight: how its weight is stored.
        activation: how its activations are quantized.
        smoothed: whether smoothing factors are stored with it.
        rotation: how its weight was rotated.
    """

    name: str
    scheme: str | None
    weight: AnyWeight
    activation: DynamicActivation | None
    smoothed: bool
    rotation: Hadamard | None = None

    @classmethod
    def of(cls, module: Stored, roles: Collection[str]) -> ConfiguredModule:
        """A module of a plan or a lock, with the roles of the tensors that it is stored as."""
        return cls(
            name=module.name,
            scheme=module.scheme,
            weight=module.weight,
            activation=module.activation,
            smoothed="smoothing" in roles,
            rotation=module.rotation,
        )


def quantization_config(modules: Iterable[ConfiguredModule]) -> dict[str, Any] | None:
    """The ``quantization_config`` of one part as JSON values; ``None`` if all of it is plain.

    Args:
        modules: of the part, in any order; plain ones are looked past.
    """
    found = by_scheme(modules)
    if not found:
        return None
    config = QuantizationConfig(
        quant_method="quantrecipe",
        version=1,
        schemes={
            name: ConfigScheme.model_validate(
                {
                    "weight": mine[0].weight,
                    "activation": mine[0].activation,
                    "rotation": mine[0].rotation,
                }
            )
            for name, mine in sorted(found.items())
        },
        modules={
            name: ConfigModules(
                names=tuple(module.name for module in mine),
                smoothing=tuple(module.name for module in mine if module.smoothed),
            )
            for name, mine in sorted(found.items())
        },
    )
    # Whole: a reader needs no defaults but those that it is told.
    return config.model_dump(mode="json", by_alias=True, exclude_none=True)


def by_scheme(modules: Iterable[ConfiguredModule]) -> dict[str, list[ConfiguredModule]]:
    """The quantized ones of these modules, sorted, by the name of their scheme."""
    found: dict[str, list[ConfiguredModule]] = {}
    for module in sorted(modules, key=lambda module: (module.scheme is None, module.name)):
        if isinstance(module.weight, ScaledWeight):
            found.setdefault(module.scheme or _kept(module.weight, found), []).append(module)
    return found


def parse_quantization_config(value: Any) -> QuantizationConfig:
    """The model of what a ``config.json`` has under ``quantization_config``.

    Args:
        value: a JSON value.

    Raises:
        InvalidInput: with everything that is wrong with it.
    """
    version = value.get("version") if isinstance(value, dict) else None
    if type(version) is int and version > 1:
        raise InvalidInput(
            Problem(
                "newer-version",
                f"this is version {version} of a {CONFIG_KEY}; the newest known here is 1",
                "Update quantrecipe.",
                file=CONFIG_NAME,
                pointer=f"/{CONFIG_KEY}/version",
            )
        )
    if not isinstance(value, dict):
        raise _refusal(Problem("wrong-type", f"expected an object, found {describe(value)}"))
    try:
        return QuantizationConfig.model_validate_json(json.dumps(value))
    except ValidationError as error:
        errors = error.errors(include_url=False)
        found = (problem_of(CONFIG_KEY, value, each) for each in errors if not is_echo(each))
        raise _refusal(*capped(found, "errors of structure")) from None


def configured_modules(config: QuantizationConfig) -> dict[str, ConfiguredModule]:
    """Every module that a ``quantization_config`` names, by its name.

    Raises:
        InvalidInput: what it says of its modules contradicts itself.
    """
    problems = list(_contradictions(config))
    if problems:
        raise _refusal(*problems)
    return {
        name: ConfiguredModule(
            name, scheme, stored.weight, stored.activation, name in smoothed, stored.rotation
        )
        for scheme, modules in config.modules.items()
        for stored, smoothed in [(config.schemes[scheme], frozenset(modules.smoothing))]
        for name in modules.names
    }


def _contradictions(config: QuantizationConfig) -> Iterator[Problem]:
    scheme_of: dict[str, str] = {}
    for scheme, modules in config.modules.items():
        where = join(("modules", scheme))
        if scheme not in config.schemes:
            yield Problem("unknown-scheme", f"there is no scheme {scheme!r}", pointer=where)
        for name in modules.names:
            other = scheme_of.setdefault(name, scheme)
            if other != scheme:
                message = f"is named under the schemes {other!r} and {scheme!r}"
                yield Problem("overlap", message, pointer=where, tensor=name)
        for name in sorted(set(modules.smoothing) - set(modules.names)):
            message = f"has smoothing, but is not among the names of {scheme!r}"
            yield Problem("unknown-module", message, pointer=where, tensor=name)


def _refusal(*problems: Problem) -> InvalidInput:
    return InvalidInput(
        replace(each, file=CONFIG_NAME, pointer=f"/{CONFIG_KEY}{each.pointer or ''}")
        for each in problems
    )


def config_path(file: str) -> str:
    """Where the ``config.json`` of a part lies whose tensors go into ``file``."""
    return str(PurePosixPath(file).parent / CONFIG_NAME)


def _kept(weight: ScaledWeight, found: Mapping[str, list[ConfiguredModule]]) -> str:
    """The name of a scheme for what is kept as the source has it; one for each way of storing."""
    plain = f"kept-{weight.format}-{weight.granularity}"
    name, number = plain, 1
    while name in found and (found[name][0].scheme is not None or found[name][0].weight != weight):
        number += 1
        name = f"{plain}-{number}"
    return name
