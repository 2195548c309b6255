"""YAML and JSON that people write, without guesses: a key twice is an error, 1:30 is not 90, and
1e-5 is a number."""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

import yaml
from yaml.constructor import ConstructorError

_INT = "tag:yaml.org,2002:int"
_FLOAT = "tag:yaml.org,2002:float"


class _Loader(yaml.SafeLoader):
    """SafeLoader but for what YAML 1.2 changed (1:30 was 90, 010 was 8, 1e-5 was a text) and for
    keys that are there twice, of which it would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    said = f"key {key.value!r} is there twice"
                    raise ConstructorError(None, None, said, key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_INT, _FLOAT)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_NUMBERS = re.compile(
    r"[-+]?(\d[\d_]*\.[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?$|[-+]?\d[\d_]*[eE][-+]?\d+$"
    r"|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
)
_Loader.add_implicit_resolver(_FLOAT, _NUMBERS, list("-+0123456789."))
_Loader.add_implicit_resolver(
    _INT,
    re.compile(r"[-+]?(0|[1-9][\d_]*|0b[01_]+|0x[\da-fA-F_]+)$"),
    list("-+0123456789"),
)


def read_yaml(text: str) -> Any:
    """The one document of a YAML text. yaml.YAMLError, ValueError (an impossible date) or
    RecursionError where it is none."""
    return yaml.load(text, _Loader)  # noqa: S506


def yaml_problem(error: Exception) -> str:
    """Where and what an error of `read_yaml` is, on one line."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return where + " ".join(str(problem or error).split())


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes a text which _Loader would take for a number."""


_Dumper.add_implicit_resolver(_FLOAT, _NUMBERS, list("-+0123456789."))


def write_yaml(value: Any) -> str:
    """A YAML text that `read_yaml` reads as the same value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)


def read_json(text: str) -> Any:
    """A JSON text. ValueError where it is none, names a key twice, or holds NaN or Infinity, which
    are no JSON."""
    return json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant)


def is_number(value: object) -> bool:
    """Whether a value of YAML or JSON is a number; to Python true and false are numbers too."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} → {"a.b": 1}; a dictionary without keys is a value."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {key!r} is there twice")
        found[key] = value
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")
