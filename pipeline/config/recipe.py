"""Recipes: everything that changes a result, typed, frozen and checked before the first step.

A recipe is a YAML file. `base:` names one file or a list of files in the same folder that it
changes; `--set a.b=value` changes it further. How a run is executed (ZeRO stage, precision,
buckets) belongs to ds_configs/, never here.
"""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from pipeline.config.schema import (
    BYOLRecipe,
    DataRecipe,
    DecoderRecipe,
    EMARecipe,
    EncoderRecipe,
    HeadsRecipe,
    InfoNCERecipe,
    JitterRecipe,
    MonitorRecipe,
    OptimizerRecipe,
    Positive,
    ReconstructionRecipe,
    Section,
    ViewsRecipe,
)
from pipeline.config.suggest import bundled, choices, meant, meant_value
from pipeline.errors import UserError

__all__ = [
    "RECIPES", "BYOLRecipe", "DataRecipe", "DecoderRecipe", "EncoderRecipe", "HeadsRecipe",
    "InfoNCERecipe", "JitterRecipe", "Recipe", "RecipeError", "ReconstructionRecipe",
    "dump_recipe", "first_difference", "load_recipe", "parse_recipe",
]  # fmt: skip

RECIPES = Path(__file__).parents[1] / "recipes"


# YAML aliases can make a value of a few bytes endless when written out.
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 80, 80


class RecipeError(UserError):
    """A recipe or an override that cannot be used; the message is one sentence."""


class Recipe(Section):
    """One pretraining run: min E M( f(T1(x)), f(T2(x)) )."""

    name: str
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    batch_size: Positive = 1024
    encoder: EncoderRecipe = EncoderRecipe()
    views: ViewsRecipe = ViewsRecipe()
    measure: Annotated[
        ReconstructionRecipe | InfoNCERecipe | BYOLRecipe, Field(discriminator="kind")
    ]
    ema: EMARecipe = EMARecipe()
    optimizer: OptimizerRecipe = OptimizerRecipe()
    data: DataRecipe = DataRecipe()
    monitor: MonitorRecipe = MonitorRecipe()
    kernels: Literal["auto", "triton", "reference"] = "auto"

    @property
    def teacher(self) -> bool:
        """Whether the second view is encoded by an EMA teacher (contrastive measures)."""
        return self.measure.kind != "reconstruction"

    @property
    def lr(self) -> float:
        """The peak learning rate, base_lr * batch_size / 256 (SPEC §4)."""
        return self.optimizer.base_lr * self.batch_size / 256

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.batch_size % self.data.partitions:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of data.partitions "
                f"{self.data.partitions}"
            )
        if self.optimizer.warmup_epochs >= self.optimizer.epochs:
            raise ValueError(
                f"optimizer.warmup_epochs {self.optimizer.warmup_epochs:g} is not shorter than "
                f"optimizer.epochs {self.optimizer.epochs:g}"
            )
        if self.views.mask_ratio == 0 and self.views.second == "complement":
            raise ValueError(
                "views.mask_ratio 0 leaves nothing for views.second: complement to show"
            )
        if isinstance(self.measure, ReconstructionRecipe):
            self._check_reconstruction()
        else:
            self._check_contrast(self.measure.tokens)
        return self

    def _check_reconstruction(self) -> None:
        if self.encoder.masked_tokens != "drop":
            raise ValueError("measure reconstruction needs encoder.masked_tokens: drop")
        if self.views.second == "crop":
            raise ValueError("measure reconstruction cannot compare two crops (views.second: crop)")
        if self.views.mask_ratio == 0 and self.views.second != "pixels":
            raise ValueError(
                "views.mask_ratio 0 leaves R-MAE no hidden patch to compare: set views.second to "
                "pixels"
            )

    def _check_contrast(self, tokens: str) -> None:
        if self.views.second == "pixels":
            raise ValueError(
                f"measure {self.measure.kind} compares two encoded views: set views.second to "
                "complement, independent, none or crop"
            )
        if not tokens.startswith("patch"):  # mean_patch is one token
            return
        if self.views.second == "crop":
            raise ValueError(
                "two crops (views.second: crop) share no patch position: set measure.tokens to "
                "cls or mean_patch"
            )
        if self.encoder.masked_tokens == "drop" and self.views.second == "complement":
            raise ValueError(
                "without mask tokens (encoder.masked_tokens: drop) complementary views share no "
                "patch position: set measure.tokens to mean_patch or cls, or views.second to "
                "independent"
            )


def load_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a recipe, apply `a.b=value` overrides and check the result.

    path: a file, or the bare name of a bundled recipe (`mae`). RecipeError names file and key.
    """
    path = bundled(path, RECIPES, ".yaml")
    if not path.exists():
        raise RecipeError(f"{path}: no such recipe{choices(path, RECIPES, '.yaml')}")
    values = _read(path, seen=())
    for text in overrides:
        _override(values, text)
    return parse_recipe(values, str(path))


def parse_recipe(values: dict[str, Any], where: str) -> Recipe:
    """Check a nested dictionary of recipe keys; `where` names its source in errors."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"{where}: {_sentence(error)}") from None


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML; load_recipe reads it back to an equal Recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json", by_alias=True), sort_keys=False)


def first_difference(a: Recipe, b: Recipe) -> str | None:
    """The first key that changes results and differs, as `key: a != b`; None where none does."""
    ignored = ("name", "monitor", "kernels", "data.workers")
    flat_a, flat_b = (_flatten(r.model_dump(mode="json", by_alias=True)) for r in (a, b))
    for key in sorted(flat_a.keys() | flat_b.keys()):
        if key.startswith(ignored):
            continue
        if flat_a.get(key) != flat_b.get(key):
            return f"{key}: {flat_a.get(key)!r} != {flat_b.get(key)!r}"
    return None


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path in seen:
        raise RecipeError(f"{path}: base files form a circle")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{path}: not a YAML text ({type(error).__name__})") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys, not {type(values).__name__}")
    bases = values.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not (isinstance(bases, list) and all(isinstance(b, str) for b in bases)):
        raise RecipeError(f"{path}: base: must be a file name or a list of file names")
    merged: dict[str, Any] = {}
    for base in bases:
        merged = _merge(merged, _read(path.parent / base, (*seen, path)))
    return _merge(merged, values)


def _merge(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """`change` over `base`, key by key; another `kind` replaces a section as a whole."""
    if "kind" in change and change["kind"] != base.get("kind"):
        return dict(change)
    merged = dict(base)
    for key, value in change.items():
        old = merged.get(key)
        both = isinstance(old, dict) and isinstance(value, dict)
        merged[key] = _merge(old, value) if both else value  # type: ignore[arg-type]
    return merged


def _override(values: dict[str, Any], text: str) -> None:
    key, equals, raw = text.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {text[:80]!r}: write it as key.subkey=value")
    try:
        change: Any = yaml.safe_load(raw)
        for part in reversed(key.split(".")):
            change = {part: change}
        merged = _merge(values, change)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise RecipeError(f"--set {text[:80]!r}: the value is not valid YAML") from None
    values.clear()
    values.update(merged)


def _sentence(error: ValidationError) -> str:
    """The first problem of a pydantic error as one clear sentence."""
    first = error.errors(include_url=False)[0]
    kinds = {"reconstruction", "infonce", "byol"}
    place = [str(part) for part in first["loc"] if str(part) not in kinds]
    key = ".".join(place)
    if first["type"] == "extra_forbidden":
        valid = ", ".join(_valid_keys([str(part) for part in first["loc"]][:-1]))
        return f"unknown key {key!r}{meant(key, Recipe)}; valid keys here: {valid}"
    if first["type"] == "missing":
        return f"key {key!r} is missing"
    if first["type"] == "union_tag_not_found":
        return f"key '{key}.kind' is missing; valid: reconstruction, infonce, byol"
    if first["type"] == "union_tag_invalid":
        return f"key '{key}.kind': {first['ctx']['tag']!r} is none of reconstruction, infonce, byol"
    message = first["msg"].removeprefix("Value error, ")
    if not key:
        return message
    message = message[0].lower() + message[1:]
    given = first["input"]
    return f"key {key!r}: {message}, got {_SHORT.repr(given)}{meant_value(key, given)}"


def _valid_keys(place: list[str]) -> list[str]:
    """The keys of the recipe section at `place` (union members are named by their kind)."""
    section: Any = Recipe
    measures = {
        "reconstruction": ReconstructionRecipe,
        "infonce": InfoNCERecipe,
        "byol": BYOLRecipe,
    }
    for part in place:
        if part in measures:
            section = measures[part]
        elif part != "measure":
            section = section.model_fields[part].annotation
    return [field.alias or name for name, field in section.model_fields.items()]
