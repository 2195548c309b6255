"""Recipes: everything that changes a result, typed, frozen and checked before the first step.

A recipe is a YAML file. `base:` names one recipe or a list of them that it changes: files beside
it, or bundled ones by name (`mae`); `--set a.b=value` changes it further. How a run is executed
(ZeRO stage, precision, buckets) belongs to ds_configs/, never here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SerializeAsAny,
    ValidationError,
    model_validator,
)

from pipeline.config.measure_schema import (
    MEASURES,
    BYOLRecipe,
    DecoderRecipe,
    HeadsRecipe,
    InfoNCERecipe,
    MeasureRecipe,
    ReconstructionRecipe,
    measure_settings,
)
from pipeline.config.schema import (
    LARGEST_RATE,
    SHORT,
    DataRecipe,
    EMARecipe,
    EncoderRecipe,
    InitRecipe,
    JitterRecipe,
    MonitorRecipe,
    OptimizerRecipe,
    Positive,
    Section,
    ViewsRecipe,
)
from pipeline.config.suggest import bundled, choices, meant, meant_value
from pipeline.config.texts import flatten, read_yaml, write_yaml, yaml_problem
from pipeline.errors import UserError, not_there
from shard_tools.home import expand_home

__all__ = [
    "RECIPES", "BYOLRecipe", "DataRecipe", "DecoderRecipe", "EncoderRecipe", "HeadsRecipe",
    "InfoNCERecipe", "JitterRecipe", "Recipe", "RecipeError", "ReconstructionRecipe",
    "differences", "dump_recipe", "load_recipe", "parse_recipe",
]  # fmt: skip

RECIPES = Path(__file__).parents[1] / "recipes"


class RecipeError(UserError):
    """A recipe or an override that cannot be used; the message is one sentence."""


def folder_name(name: str) -> str:
    """A recipe's name, checked since its runs' folders have it too (ValueError)."""
    if name.strip(". ") == "" or "/" in name or not name.isprintable():
        raise ValueError("input should be a name for folders: not empty, and without /")
    return name


class Recipe(Section):
    """One pretraining run: min E M( f(T1(x)), f(T2(x)) )."""

    name: Annotated[str, AfterValidator(folder_name)]
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    batch_size: Positive = 1024
    encoder: EncoderRecipe = EncoderRecipe()
    views: ViewsRecipe = ViewsRecipe()
    measure: Annotated[SerializeAsAny[MeasureRecipe], BeforeValidator(measure_settings)]
    ema: EMARecipe = EMARecipe()
    optimizer: OptimizerRecipe = OptimizerRecipe()
    data: DataRecipe = DataRecipe()
    monitor: MonitorRecipe = MonitorRecipe()
    init: InitRecipe = InitRecipe()
    kernels: Literal["auto", "triton", "reference"] = "auto"

    @property
    def teacher(self) -> bool:
        """Whether the second view is encoded by an EMA teacher."""
        return self.measure.needs_teacher

    @property
    def lr(self) -> float:
        """The peak learning rate, base_lr * batch_size / 256."""
        return self.optimizer.base_lr * self.batch_size / 256

    @property
    def smaller_sides(self) -> list[int]:
        """The sizes of data.sizes below encoder.image_size, each once."""
        return sorted({side for _, side in self.data.sizes} - {self.encoder.image_size})

    @property
    def phases(self) -> list[tuple[float, Recipe]]:
        """(share of the steps, this recipe at that phase's constant image size) of data.sizes; one
        phase where there are none."""
        if not self.data.sizes:
            return [(1.0, self)]
        constant = {"data": self.data.model_copy(update={"sizes": ()})}
        options = {k: v for k, v in self.encoder.options.items() if k != "img_size"}
        found, before = [], 0.0
        for until, side in self.data.sizes:
            encoder = self.encoder.model_copy(update={"image_size": side, "options": options})
            phase = self.model_copy(update=constant | {"encoder": encoder})
            found.append((until - before, phase))
            before = until
        return found

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        full, patch = self.encoder.image_size, self.encoder.patch_size
        for _, side in self.data.sizes:
            if side > full:
                raise ValueError(f"data.sizes: {side} is larger than encoder.image_size {full}")
            if patch and side % patch:
                raise ValueError(f"data.sizes: {side} is not a multiple of the patch size {patch}")
        if self.data.sizes and self.data.sizes[-1][1] != full:
            raise ValueError(
                f"data.sizes: the last size is {self.data.sizes[-1][1]}, not encoder.image_size "
                f"{full}: end with [1, {full}]"
            )
        return self

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
        if self.optimizer.min_lr > self.lr:
            raise ValueError(
                f"optimizer.min_lr {self.optimizer.min_lr:g} is above the peak learning rate "
                f"{self.lr:g} (base_lr * batch_size / 256)"
            )
        first = self.lr / self.optimizer.layer_anneal
        if self.optimizer.layer_anneal < 1 and first > LARGEST_RATE:
            raise ValueError(
                f"optimizer.layer_anneal {self.optimizer.layer_anneal:g}: the embeddings' peak "
                f"learning rate would be {first:g}, must be at most {LARGEST_RATE:g}"
            )
        if self.views.mask_ratio == 0 and self.views.second == "complement":
            raise ValueError(
                "views.mask_ratio 0 leaves nothing for views.second: complement to show"
            )
        self._check_used()
        self.measure.check(self.encoder, self.views)
        return self

    def _check_used(self) -> None:
        """ValueError for a key that has a value and does nothing beside another."""
        views, usual = self.views, ViewsRecipe().second_mask_ratio
        if views.second != "independent" and views.second_mask_ratio != usual:
            raise ValueError(
                f"views.second_mask_ratio {views.second_mask_ratio:g} does nothing where "
                f"views.second is {views.second}: set that to independent, or leave the ratio out"
            )
        if self.init.ema and not self.init.weights:
            raise ValueError("init.ema does nothing without init.weights: give both or neither")


# To check a recipe before the manifest, with its own mean and std, has been read.
ANY_PIXELS = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


def run_recipe(run: str | Path) -> Recipe:
    """The recipe of a run's folder or of a checkpoint. RecipeError if it is neither."""
    check_run(run)
    return load_recipe(Path(run) / "recipe.yaml")


def check_run(run: str | Path) -> None:
    """RecipeError if a folder is not a run; it names a run inside, if there is one."""
    folder = Path(run)
    if not folder.exists():
        raise RecipeError(not_there(folder))
    if not (folder / "recipe.yaml").is_file():
        inside = sorted(str(path.parent) for path in folder.glob("*/recipe.yaml"))
        hint = f"; it holds runs, such as {inside[0]}" if inside else ""
        raise RecipeError(f"{folder} is not a run folder: it has no recipe.yaml{hint}")


def load_recipe(
    path: str | Path,
    overrides: list[str] | tuple[str, ...] = (),
    pixels: Mapping[str, Any] | None = None,
) -> Recipe:
    """Read a recipe, apply `a.b=value` overrides and check the result.

    path: a file, or the bare name of a bundled recipe (`mae`). pixels: the `mean` and `std` that
    `data.mean: manifest` and `data.std: manifest` stand for. RecipeError names file and key.
    """
    path = bundled(path, RECIPES, ".yaml")
    if not path.exists():
        raise RecipeError(f"{path}: cannot be read (no such file){choices(path, RECIPES, '.yaml')}")
    change: dict[str, Any] = {}
    for text in overrides:  # first with one another: their order is free
        change = _merge(change, read_override(text))
    values = _merge(_read(path, seen=()), change)
    _fill_in_pixels(values, pixels, str(path))
    return parse_recipe(values, str(path))


def _fill_in_pixels(values: dict[str, Any], pixels: Mapping[str, Any] | None, where: str) -> None:
    """Put the measured numbers where data.mean or data.std is `manifest`."""
    data = values.get("data")
    for name in ("mean", "std"):
        if not isinstance(data, dict) or data.get(name) != "manifest":
            continue
        if not pixels or name not in pixels:
            raise RecipeError(
                f"{where}: data.{name}: manifest stands for what make_shards measured on the "
                "training shards; no measurement is at hand here, so give three numbers"
            )
        data[name] = list(pixels[name])


def parse_recipe(values: dict[str, Any], where: str) -> Recipe:
    """Check a nested dictionary of recipe keys; `where` names its source in errors."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"{where}: {_sentence(error, values)}") from None


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML; load_recipe reads it back to an equal Recipe."""
    return write_yaml(recipe.model_dump(mode="json", by_alias=True))


def differences(a: Recipe, b: Recipe) -> list[str]:
    """Each key that changes results and differs, as `key: a != b`.

    a: of a checkpoint, b: of the run that resumes it. Where a started from matters only to a b that
    names another start.
    """
    ignored = ("name", "monitor", "kernels", "data.workers", *("init",) * (not b.init.weights))
    one, other = (r.model_dump(mode="json", by_alias=True) for r in (a, b))
    return differing(one, other, ignored)


def differing(a: dict[str, Any], b: dict[str, Any], ignored: tuple[str, ...] = ()) -> list[str]:
    """Each key that differs between two nested dictionaries, as `key: a != b`.

    ignored: how keys begin that may differ.
    """
    # An empty dictionary has no key to differ in.
    flat_a, flat_b = ({k: v for k, v in flatten(x).items() if v != {}} for x in (a, b))
    return [
        f"{key}: {flat_a.get(key)!r} != {flat_b.get(key)!r}"
        for key in sorted(flat_a.keys() | flat_b.keys())
        if not key.startswith(ignored) and flat_a.get(key) != flat_b.get(key)
    ]


def _read(path: Path, seen: tuple[str, ...]) -> dict[str, Any]:
    here = os.path.realpath(path)
    if here in seen:
        raise RecipeError(f"{path}: base files form a circle")
    try:
        values = read_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{path}: not a YAML text ({type(error).__name__})") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {yaml_problem(error)}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys, not {type(values).__name__}")
    bases = values.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not (isinstance(bases, list) and all(isinstance(b, str) for b in bases)):
        raise RecipeError(f"{path}: base: must be a file name or a list of file names")
    merged: dict[str, Any] = {}
    for base in bases:
        merged = _merge(merged, _read(_base_file(base, path), (*seen, here)))
    return _merge(merged, values)


def _base_file(name: str, of: Path) -> Path:
    """The file that `base: name` of the recipe `of` means: one beside it, else a bundled one.
    RecipeError where there is neither."""
    path = of.parent / expand_home(name)
    known = RECIPES / f"{name.removesuffix('.yaml')}.yaml"
    if not path.is_file() and Path(name).parts == (name,) and known.is_file():
        return known
    if not path.exists():
        found = choices(name, RECIPES, ".yaml")
        raise RecipeError(f"{of}: base: {path}: cannot be read (no such file){found}")
    return path


def _merge(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """`change` over `base`, key by key; another kind of measure, whose keys are its own, replaces
    the section as a whole."""
    merged = dict(base)
    for key, value in change.items():
        old = merged.get(key)
        both = isinstance(old, dict) and isinstance(value, dict)
        if both and key == "measure":
            kind = old.get("kind", value.get("kind"))  # type: ignore[union-attr]
            both = value.get("kind", kind) == kind
        merged[key] = _merge(old, value) if both else value  # type: ignore[arg-type]
    return merged


def read_override(text: str) -> dict[str, Any]:
    """What `key.subkey=value` changes, nested as a recipe is. RecipeError where it is none."""
    key, equals, raw = text.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {text[:80]!r}: write it as key.subkey=value")
    try:
        change: Any = read_yaml(raw)
        for part in reversed(key.split(".")):
            change = {part: change}
        return dict(change)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problem = getattr(error, "problem", None)  # the line and column would be of the value alone
        why = f" ({problem})" if problem else ""
        raise RecipeError(f"--set {text[:80]!r}: the value is not valid YAML{why}") from None


# What pydantic calls by the names of Python.
_EXPECTED = {
    "tuple_type": "input should be a list, such as [a, b]",
    "model_type": "input should be a mapping of keys",
    "dict_type": "input should be a mapping of keys",
}


def _sentence(error: ValidationError, values: dict[str, Any]) -> str:
    """The first problem of a pydantic error as one clear sentence."""
    first = error.errors(include_url=False)[0]
    path = [str(part) for part in first["loc"]]
    key = ".".join(path)
    if first["type"] == "measure_kind":
        return first["msg"]
    if first["type"] == "extra_forbidden":
        valid = ", ".join(_valid_keys(path[:-1], values))
        suggestion = meant(key, Recipe, {"measure": MEASURES})
        return f"unknown key {key!r}{suggestion}; valid keys here: {valid}"
    if first["type"] == "missing":
        return f"key {key!r} is missing"
    message = _EXPECTED.get(first["type"], first["msg"]).removeprefix("Value error, ")
    if not key:
        return message
    message = message[0].lower() + message[1:]
    given = first["input"]
    return f"key {key!r}: {message}, got {SHORT.repr(given)}{meant_value(key, given)}"


def _valid_keys(path: list[str], values: dict[str, Any]) -> list[str]:
    """The keys of the recipe section at `path`; those of the measure are those of its kind."""
    section: Any = Recipe
    for part in path:
        if section is Recipe and part == "measure":
            section = MEASURES[values["measure"]["kind"]]
        else:
            section = section.model_fields[part].annotation
    return [field.alias or name for name, field in section.model_fields.items()]
