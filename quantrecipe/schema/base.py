"""The base of every model in this room, and the constrained strings they share."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints
from pydantic_core import PydanticCustomError

# Neither "." nor "..", without separators, a drive's colon or control characters.
_SEGMENT = r"\.?[^./\\:\x00-\x1f\x7f][^/\\:\x00-\x1f\x7f]*"
_FILE_SEGMENT = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
_TEXT = r"[^{}\x00-\x1f\x7f]*"
_MODULE_SEGMENT = r"(\*|[^.*{}\x00-\x1f\x7f]+)"

NAME: Final = r"^[a-z0-9]+([._-][a-z0-9]+)*$"
LABEL: Final = r"^[A-Za-z0-9]+([._-][A-Za-z0-9]+)*$"
PART_NAME: Final = r"^[a-z][a-z0-9_]*$"
SHA256: Final = r"^[0-9a-f]{64}$"
XXH3_128: Final = r"^[0-9a-f]{32}$"
REVERSE_DNS: Final = r"^[a-z][a-z0-9-]*(\.[a-z0-9][a-z0-9-]*)+$"
SOURCE_PATH: Final = rf"^(\.|{_SEGMENT}(/{_SEGMENT})*)$"
TARGET_FILE: Final = rf"^({_FILE_SEGMENT}/)*[A-Za-z0-9_][A-Za-z0-9_.-]*\.(safetensors|gguf)$"
REPOSITORY: Final = r"^[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*$"
REVISION: Final = r"^[A-Za-z0-9][A-Za-z0-9._/-]*$"
COMMIT: Final = r"^[0-9a-f]{40}$"
BYTE_SIZE: Final = r"^[1-9][0-9]{0,11}(B|KB|MB|GB|TB)$"
MODULE_TEMPLATE: Final = rf"^({_TEXT}\{{part\}})?{_TEXT}\{{module\}}{_TEXT}$"
OTHER_TEMPLATE: Final = rf"^({_TEXT}\{{part\}})?{_TEXT}\{{tensor\}}{_TEXT}$"
CLASS_NAME: Final = r"^[A-Za-z_][A-Za-z0-9_]*$"
NAME_MAPPING: Final = rf"^{_MODULE_SEGMENT}(\.{_MODULE_SEGMENT})*$"

PATTERN_MEANINGS: Final[Mapping[str, str]] = MappingProxyType(
    {
        NAME: "lower-case letters and digits, with single '.', '_' or '-' between them",
        LABEL: "letters and digits, with single '.', '_' or '-' between them",
        PART_NAME: "a lower-case letter, then lower-case letters, digits and '_'",
        SHA256: "64 lower-case hexadecimal digits",
        XXH3_128: "32 lower-case hexadecimal digits",
        REVERSE_DNS: "a reversed domain name of its owner, as in 'com.example.feature'",
        SOURCE_PATH: "'.', or a relative path with '/' between segments and no '..'",
        TARGET_FILE: "a relative path of letters, digits, '_', '-' and '.', ending in "
        ".safetensors or .gguf",
        REPOSITORY: "owner/name, of letters, digits, '.', '_' and '-'",
        REVISION: "a commit, tag or branch: letters, digits, '.', '_', '-' and '/'",
        COMMIT: "the SHA of a commit, 40 hex digits",
        BYTE_SIZE: "a whole number and B, KB, MB, GB or TB, as in '5GB'",
        MODULE_TEMPLATE: "text with {module} in it once, and {part} before that or not at all",
        OTHER_TEMPLATE: "text with {tensor} in it once, and {part} before that or not at all",
        CLASS_NAME: "the name of a Python class",
        NAME_MAPPING: "a dotted name, in which a segment may be '*' as a whole",
    }
)
"""What each pattern asks for, in words that follow ``expected``."""


class Model(BaseModel):
    """Frozen, strict, closed: an unknown field is an error, a boolean is not an integer."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        populate_by_name=False,
        allow_inf_nan=False,
        defer_build=True,
    )

    def to_json_value(self) -> dict[str, Any]:
        """The document as plain JSON values, without the fields that were left out of it."""
        value: dict[str, Any] = self.model_dump(mode="json", by_alias=True, exclude_unset=True)
        return value


def exactly(kind: type, expected: str) -> BeforeValidator:
    """For literals: Python holds ``True == 1``; JSON does not."""

    def check(value: Any) -> Any:
        if type(value) is not kind:
            message = "Input should be {expected}"
            raise PydanticCustomError("literal_error", message, {"expected": expected})
        return value

    return BeforeValidator(check)


def json_type(value: Any) -> str | None:
    """The discriminator of unions that are told apart by JSON type alone."""
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        return "string"
    if isinstance(value, int):
        return "integer"
    if isinstance(value, list | tuple):
        return "array"
    return "object" if isinstance(value, dict | Model) else None


VersionOne = Annotated[Literal[1], exactly(int, "1")]
Yes = Annotated[Literal[True], exactly(bool, "true")]


Name = Annotated[str, StringConstraints(pattern=NAME, min_length=1, max_length=128)]
PartName = Annotated[str, StringConstraints(pattern=PART_NAME, min_length=1, max_length=64)]
ModulePattern = Annotated[str, StringConstraints(min_length=1, max_length=1024)]
Sha256 = Annotated[str, StringConstraints(pattern=SHA256)]
Xxh3 = Annotated[str, StringConstraints(pattern=XXH3_128)]
ReverseDns = Annotated[
    str,
    StringConstraints(pattern=REVERSE_DNS, max_length=128),
]
SourcePath = Annotated[str, StringConstraints(pattern=SOURCE_PATH, max_length=1024)]
"""A file, folder or glob below a root: relative, without ``..``, with ``/`` between segments."""

TargetFile = Annotated[
    str,
    StringConstraints(pattern=TARGET_FILE, max_length=255),
]
"""A safetensors file below the output folder."""

NonEmpty = Field(min_length=1)
