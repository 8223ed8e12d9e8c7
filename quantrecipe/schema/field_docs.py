"""The docstrings below the fields of a model, for the published schemas.

The models could collect them while they are defined, but then every command would read and parse
their source before it does anything.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from itertools import pairwise

from quantrecipe.schema.base import Model


def field_docs(model: type[Model]) -> dict[str, str]:
    """What is said of each field of a model, under the name the field has in a document."""
    said: dict[str, str] = {}
    for cls in reversed(model.__mro__):
        if issubclass(cls, Model) and cls is not Model:
            said.update(_said_in(cls))
    fields = model.model_fields
    return {fields[name].alias or name: text for name, text in said.items() if name in fields}


def _said_in(cls: type[Model]) -> Iterator[tuple[str, str]]:
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    for field, below in pairwise(definition.body):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
            and isinstance(below.value.value, str)
        ):
            yield field.target.id, inspect.cleandoc(below.value.value)
