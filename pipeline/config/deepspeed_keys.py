"""What DeepSpeed takes in a section of its configuration, by its source, since it imports torch.

Its pydantic models are built again from their fields: names, types and bounds. Its validators are
left out, and what cannot be read for certain takes any value: nothing that DeepSpeed takes is
refused here. What it refuses for other reasons, it is asked itself (ds_config.read_ds_config).
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import enum
import re
import typing
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, create_model

from pipeline.config.installed import source
from pipeline.config.schema import SHORT
from pipeline.config.texts import is_number
from pipeline.errors import UserError

BASE = "DeepSpeedConfigModel"  # of its models, without fields of its own
BOUNDS = ("gt", "ge", "lt", "le", "alias")
_PLAIN = {kind.__name__: kind for kind in (bool, int, float, str, list, dict, Path)}


@cache
def model_of(module: str, name: str) -> Any:
    """A model of a module of deepspeed (`runtime/zero/config`), or Any where it is unclear."""
    body = ast.parse(source("deepspeed", f"{module}.py")).body
    node = next((n for n in body if isinstance(n, ast.ClassDef) and n.name == name), None)
    bases = [base.id for base in node.bases if isinstance(base, ast.Name)] if node else []
    if node is None or not node.bases or len(bases) < len(node.bases):
        return Any
    if bases[-1] == "Enum":
        members = {n.targets[0].id: ast.literal_eval(n.value)  # type: ignore[attr-defined]
                   for n in node.body if isinstance(n, ast.Assign)}  # fmt: skip
        return enum.Enum(name, members, type=_PLAIN.get(bases[0]))
    if bases != [BASE] or _converts(node):
        return Any
    names = _Names(module, body)
    fields: dict[str, Any] = {
        n.target.id: (names.type(n.annotation), Field(None, **_bounds(n.value)))
        for n in node.body
        if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
    }
    settings = ConfigDict(extra="forbid", populate_by_name=True, protected_namespaces=())
    return create_model(name, __config__=settings, **fields)


def _converts(node: ast.ClassDef) -> bool:
    """Whether the model takes more than its types: a validator changes what is given before."""
    return bool(re.search("mode='(before|wrap|plain)'|pre=True", ast.unparse(node)))


def _bounds(value: ast.expr | None) -> dict[str, Any]:
    """Those of a Field(…), and its alias."""
    given = value.keywords if isinstance(value, ast.Call) else []
    return {
        k.arg: k.value.value for k in given if k.arg in BOUNDS and isinstance(k.value, ast.Constant)
    }


class _Names(dict[str, Any]):
    """What the names in annotations of a module mean: plain types, typing's, and its models."""

    def __init__(self, module: str, body: list[ast.stmt]) -> None:
        super().__init__(_PLAIN)
        self.module = module
        self.of = {
            alias.asname or alias.name: _file(module, n)
            for n in body
            if isinstance(n, ast.ImportFrom)
            for alias in n.names
        }

    def __missing__(self, name: str) -> Any:
        if hasattr(typing, name):
            return getattr(typing, name)
        return model_of(self.of.get(name, self.module), name)

    def type(self, annotation: ast.expr) -> Any:
        """The type that an annotation names, Any where it is another expression."""
        try:
            return eval(ast.unparse(annotation), {"__builtins__": {}}, self)  # noqa: S307
        except (TypeError, AttributeError, NameError, SyntaxError):
            return Any


def _file(module: str, line: ast.ImportFrom) -> str:
    """The module of deepspeed that a line in one of its modules imports from."""
    name = (line.module or "").replace(".", "/")
    if not line.level:
        return name.removeprefix("deepspeed/")
    return "/".join([*module.split("/")[: -line.level], name])


def check_section(where: object, section: str, value: Any, model: Any) -> None:
    """UserError for the first key or value that a model does not take. where: the file."""
    try:
        TypeAdapter(model).validate_python(without_auto(value))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join([section, *map(str, first["loc"])])
        if first["type"] == "extra_forbidden":
            valid = ", ".join(sorted(_keys(model, first["loc"][:-1])))
            raise UserError(f"{where}: unknown key {key!r}; valid: {valid}") from None
        reason = first["msg"].removeprefix("Value error, ")
        if first["type"] in ("model_type", "model_attributes_type"):
            reason = "must be an object"
        given = SHORT.repr(first["input"])
        raise UserError(f"{where}: {key!r} {reason[0].lower()}{reason[1:]}, not {given}") from None


def without_auto(value: Any) -> Any:
    """DeepSpeed leaves keys out whose value is "auto"."""
    if not isinstance(value, dict):
        return value
    return {k: without_auto(v) for k, v in value.items() if v != "auto"}


def _keys(model: Any, path: tuple[int | str, ...]) -> set[str]:
    """The keys of the model at a path inside another, under both names where they have two."""
    for part in path:
        fields = model.model_fields.items()
        kind = next(field.annotation for name, field in fields if part in (name, field.alias))
        inner = [kind, *typing.get_args(kind)]
        model = next(k for k in inner if isinstance(k, type) and issubclass(k, BaseModel))
    return {n for key, f in model.model_fields.items() for n in (key, f.alias) if n}


def check_words(where: object, section: str, value: dict[str, Any], files: str) -> None:
    """UserError for a key that DeepSpeed's code for a section, which has no model, nowhere says,
    and for a value that is not of its default's type."""
    text = source("deepspeed", files)
    known, defaults = set(re.findall(r"""["'](\w+)["']""", text)), _defaults(text)
    for key, given in value.items():
        if known and key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ", which DeepSpeed does not know"
            raise UserError(f"{where}: unknown key '{section}.{key}'{hint}")
        takes, what = _LIKE.get(type(defaults.get(key, ...)), _LIKE[type(...)])
        if not takes(given):
            raise UserError(f"{where}: '{section}.{key}' must be {what}, not {given!r}")


def _defaults(text: str) -> dict[str, Any]:
    """The default of each key of a module of constants: X = "key", X_DEFAULT = 1."""
    found: dict[str, Any] = {}
    for line in ast.parse(text).body:
        if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name):
            with contextlib.suppress(ValueError):  # not a literal
                found[line.targets[0].id] = ast.literal_eval(line.value)
    named = {name: key for name, key in found.items() if isinstance(key, str)}
    return {k: found[f"{n}_DEFAULT"] for n, k in named.items() if f"{n}_DEFAULT" in found}


# By the type of a default: what a value must be.
_LIKE: dict[type, tuple[Callable[[Any], bool], str]] = {
    bool: (lambda v: isinstance(v, bool), "true or false"),
    int: (lambda v: is_number(v) and v == int(v), "a whole number"),
    float: (is_number, "a number"),
    type(None): (lambda v: v is None or isinstance(v, str), "a text or null"),
    type(...): (lambda v: True, ""),  # not known
}
