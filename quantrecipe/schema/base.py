"""The base of every model in this room, and the constrained strings they share."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints
from pydantic_core import PydanticCustomError

# A path segment that is neither "." nor ".." and holds no separator, drive colon or control character.
_SEGMENT = r"\.?[^./\\:\x00-\x1f\x7f][^/\\:\x00-\x1f\x7f]*"
_FILE_SEGMENT = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"


class Model(BaseModel):
    """Frozen, strict, closed: an unknown field is an error, a boolean is not an integer."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        populate_by_name=False,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    def to_json_value(self) -> dict[str, Any]:
        """The document as plain JSON values, without the fields that were left out of it."""
        value: dict[str, Any] = self.model_dump(mode="json", by_alias=True, exclude_unset=True)
        return value


def _exactly(kind: type, expected: str) -> BeforeValidator:
    """Python holds ``True == 1``; JSON does not."""

    def check(value: Any) -> Any:
        if type(value) is not kind:
            raise PydanticCustomError("literal_error", f"Input should be {expected}")
        return value

    return BeforeValidator(check)


VersionOne = Annotated[Literal[1], _exactly(int, "1")]
Yes = Annotated[Literal[True], _exactly(bool, "true")]


Name = Annotated[
    str, StringConstraints(pattern=r"^[a-z0-9]+([._-][a-z0-9]+)*$", min_length=1, max_length=128)
]
PartName = Annotated[
    str, StringConstraints(pattern=r"^[a-z][a-z0-9_]*$", min_length=1, max_length=64)
]
ModulePattern = Annotated[str, StringConstraints(min_length=1, max_length=1024)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
ReverseDns = Annotated[
    str,
    StringConstraints(pattern=r"^[a-z][a-z0-9-]*(\.[a-z0-9][a-z0-9-]*)+$", max_length=128),
]
SourcePath = Annotated[
    str, StringConstraints(pattern=rf"^(\.|{_SEGMENT}(/{_SEGMENT})*)$", max_length=1024)
]
"""A file, folder or glob below a root: relative, without ``..``, with ``/`` between segments."""

TargetFile = Annotated[
    str,
    StringConstraints(
        pattern=rf"^({_FILE_SEGMENT}/)*[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors$", max_length=255
    ),
]
"""A safetensors file below the output folder."""

NonEmpty = Field(min_length=1)
