"""From a row of the paper's tables to the commands that make it, at full scale or in miniature."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml

from eval.paper.job_runner import Job, python
from eval.paper.published import PaperRow
from eval.protocols import Work, by_key, keys
from pipeline.config.recipe import RECIPES, Recipe, load_recipe
from pipeline.data.order import steps_per_epoch
from pipeline.errors import UserError
from pipeline.method.vit import build_vit, vit_options
from shard_tools.manifest import read_manifest

ROOT = Path(__file__).resolve().parents[2]
SCALES = Path(__file__).with_name("scales.yaml")
BASELINE = "mae"  # the recipe whose architecture a random encoder has


@dataclass(frozen=True)
class Scale:
    """How large the rows are made: see scales.yaml."""

    name: str
    launch: str
    train: str
    val: str
    epochs: float | None = None
    recipe: tuple[str, ...] = ()
    reconstruction: tuple[str, ...] = ()
    contrast: tuple[str, ...] = ()
    last: tuple[str, ...] = ()  # overrides after all others: --set
    options: dict[str, tuple[str, ...]] = field(default_factory=dict)
    tried: str = ""

    def command(self, script: str, *words: object) -> tuple[str, ...]:
        """A script of ours over all devices, or in one process."""
        alone = python(ROOT / script, *words)
        if self.launch == "python":
            return alone
        launcher = Path(alone[0]).with_name("deepspeed")
        return (str(launcher), *alone[1:])


def read_scale(name: str, train: str = "", val: str = "", path: Path = SCALES) -> Scale:
    """A scale of scales.yaml, on other shards where they are named."""
    scales = yaml.safe_load(path.read_text(encoding="utf-8"))
    if name not in scales:
        raise UserError(f"--scale {name}: {path} knows {', '.join(scales)}")
    values = dict(scales[name])
    options = {p: tuple(map(from_root, values.pop(p, ()))) for p in ("pretrain", *keys())}
    values |= {k: tuple(v) for k, v in values.items() if isinstance(v, list)}
    values |= {k: v for k, v in (("train", train), ("val", val)) if v}
    try:
        return Scale(name, **values, options=options)
    except TypeError as error:
        raise UserError(f"{path}, {name}: {error}") from error


def from_root(word: object) -> str:
    """A word of a command; a file of ds_configs/ is found from any folder."""
    text = str(word)
    return str(ROOT / text) if text.startswith("ds_configs/") else text


@dataclass(frozen=True)
class Place:
    """Where rows are made: the folder of their runs, the scale, the list of Tab. 5's classes."""

    output: Path
    scale: Scale
    classes: str = "imagenet100.txt"


def overrides(row: PaperRow, scale: Scale) -> list[str]:
    """The recipe's overrides of a row at a scale, without seed and data."""
    recipe = read_recipe(base_recipe(row), tuple(row.set))
    kind = "reconstruction" if recipe.measure.reconstructs else "contrast"
    result = [*row.set, *scale.recipe, *getattr(scale, kind)]
    if scale.epochs is not None:
        epochs = scale.epochs * max(1.0, recipe.optimizer.epochs / 100)
        result.append(f"optimizer.epochs={epochs:g}")
    return [*result, *scale.last]


@cache
def read_recipe(name: str, sets: tuple[str, ...]) -> Recipe:
    """A recipe with overrides, read once."""
    return load_recipe(RECIPES / f"{name}.yaml", sets)


def base_recipe(row: PaperRow) -> str:
    """The recipe file of a row without .yaml; with the stronger augmentation its `_strong` one."""
    name = row.recipe if row.recipe and row.recipe != "supervised" else BASELINE
    return f"{name}_strong" if row.strong else name


def run_name(row: PaperRow, seed: int) -> str:
    """The folder of a row's run; rows of several tables that are the same run share it."""
    if row.initial == "random" or row.recipe == "supervised":
        parts = ["random" if row.initial else "supervised", *row.finetune.values()]
        parts += [row.recipe] if row.initial and row.recipe else []
    else:
        parts = [base_recipe(row), *row.set]
    parts += [] if row.images is None else [row.images, row.sampling]
    parts += [] if row.classes is None else [f"in{row.classes}"]
    text = "-".join(str(part) for part in parts)
    return "-".join("".join(c if c.isalnum() else " " for c in f"{text} {seed}").split())


# ------------------------------------------------------------------ data


def subset_job(place: Place, source: str, name: str, *words: object) -> Job:
    """A subset of shards as an index in OUTPUT/data."""
    dest = place.output / "data" / name
    command = python(ROOT / "shard_tools/subset.py", source, dest, *words)
    return Job(f"data {name}", command, dest / "manifest.json")


def row_data(place: Place, row: PaperRow, part: str) -> tuple[str, list[Job]]:
    """(shards, jobs that make them) of a row's pretraining (`pretrain`), `train` or `val`."""
    source = place.scale.val if part == "val" else place.scale.train
    jobs: list[Job] = []
    if row.classes is not None and place.scale.name == "full":
        name = f"{'val' if part == 'val' else 'train'}-in{row.classes}"
        jobs.append(subset_job(place, source, name, "--classes", place.classes))
        source = str(jobs[0].makes.parent)
    if part != "pretrain" or row.images is None:
        return source, jobs
    count = few_images(place, row)
    choose = "one-class" if row.sampling == "in-one-class" else row.sampling
    name = f"train-{row.images}" + ("" if choose == "random" else f"-{choose}")
    jobs.append(subset_job(place, source, name, "--count", count, "--choose", choose))
    return str(jobs[-1].makes.parent), jobs


def few_images(place: Place, row: PaperRow) -> int:
    """How many images a row of few is made of: the paper's, or as many as smaller data offer."""
    manifest = read_manifest(place.scale.train)
    samples, classes = manifest.samples, len(manifest.classes)
    most = {"one-per-class": classes, "in-one-class": samples // classes // 2}
    return min(row.images or samples, most.get(row.sampling, samples // 4))


# ------------------------------------------------------------------ jobs of a row


def pretrain_job(place: Place, row: PaperRow, seed: int) -> list[Job]:
    """What pretrains a row's encoder, with its data; nothing for a random one."""
    if row.initial == "random" or row.recipe is None:
        return []
    if row.recipe == "supervised":
        return supervised_jobs(place, row, seed)
    data, jobs = row_data(place, row, "pretrain")
    samples = read_manifest(place.scale.train).samples
    sets = [*overrides(row, place.scale), f"seed={seed}"]
    sets += [] if row.images is None else [f"data.samples_per_epoch={samples}"]
    path, recipe = RECIPES / f"{base_recipe(row)}.yaml", row_recipe(place, row)
    drawn = recipe.data.samples_per_epoch or samples
    steps = steps_per_epoch(drawn, recipe.batch_size, recipe.data.partitions)
    total = round(recipe.optimizer.epochs * steps)
    run = place.output / run_name(row, seed)
    words = ["--recipe", path, "--data", data, "--output", run]
    words += [word for text in sets for word in ("--set", text)]
    words += place.scale.options.get("pretrain", ())
    images = total * recipe.batch_size
    job = Job(
        f"{run.name} pretrain",
        place.scale.command("pipeline/pretrain.py", *words),
        run / "encoder" / "encoder.json",
        tuple(j.name for j in jobs),
        step=total,
        images=images,
        flops=images * pretrain_flops(recipe),
    )
    return [*jobs, job]


def supervised_jobs(place: Place, row: PaperRow, seed: int) -> list[Job]:
    """Finetuning from scratch on the row's images; then its classifier's encoder as a run.

    On all images that is the finetuning of the random row, which is shared.
    """
    data, jobs = row_data(place, row, "pretrain")
    run = place.output / run_name(row, seed)
    scratch = replace(row, recipe=None, initial="random")
    result = place.output / run_name(scratch, seed) / "eval" / "finetune.json"
    words, val = random_words(place, scratch, seed), place.scale.val
    batch = 1 << few_images(place, row).bit_length() - 1
    if row.images and batch < int(option(place.scale.options["finetune"], "--batch-size", 1024)):
        words += ["--batch-size", str(batch)]
    train = eval_job(place, scratch, seed, "finetune", words, result, data, val, jobs)
    export = python(ROOT / "pipeline/export.py", result.with_suffix(""), "--format", "run", run)
    made = run / "encoder" / "encoder.json"
    return [*jobs, train, Job(f"{run.name} pretrain", export, made, (train.name,))]


def random_words(place: Place, row: PaperRow, seed: int) -> list[str]:
    """The words that name a random encoder of the row's architecture."""
    encoder = row_recipe(place, row).encoder
    options = yaml.safe_dump(vit_options(encoder), default_flow_style=True, width=10**6).strip()
    return ["--encoder", "random", "--arch", encoder.arch, "--options", options]


def row_recipe(place: Place, row: PaperRow) -> Recipe:
    """The recipe of a row at the scale (of a random one: MAE's)."""
    return read_recipe(base_recipe(row), tuple(overrides(row, place.scale)))


def eval_job(
    place: Place, row: PaperRow, seed: int, protocol: str, encoder: Sequence[object],
    result: Path, train: str, val: str, needs: Sequence[Job],
) -> Job:  # fmt: skip
    """One evaluation of an encoder, its result file and its cost."""
    scale, how = place.scale, by_key(protocol)
    words = ["--val", val, "--seed", seed, "--output", result]
    words += ["--train", train] if how.train else []
    words += [*scale.options.get(protocol, ()), *encoder]
    if how.script == "finetune" and row.finetune:
        epochs = float(option(words, "--epochs", 100)) * row.finetune.get("epochs", 100) / 100
        words += ["--epochs", f"{epochs:g}"]
    words += how.words(seed)
    forward = encoder_flops(row_recipe(place, row))
    samples, held_out = (read_manifest(shards).samples for shards in (scale.train, scale.val))
    images, flops = how.cost(Work(forward, samples, held_out, tuple(map(str, words))))
    name = f"{run_name(row, seed)} {protocol}"
    command = scale.command(f"eval/{how.script}.py", *words)
    return Job(name, command, result, tuple(j.name for j in needs), 0, images, flops)


def option(words: Sequence[object], name: str, default: Any) -> Any:
    """The value after the last `name` on a command line."""
    places = [number for number, word in enumerate(words) if word == name]
    return words[places[-1] + 1] if places else default


def row_jobs(place: Place, row: PaperRow, seed: int, protocols: Sequence[str]) -> list[Job]:
    """All jobs of a row and seed: data, pretraining, one evaluation per protocol.

    The result of a protocol is OUTPUT/<run_name>/eval/<protocol>.json.
    """
    jobs = pretrain_job(place, row, seed)
    train, more = row_data(place, row, "train")
    val, again = row_data(place, row, "val")
    run = place.output / run_name(row, seed)
    encoder: list[object] = ["--encoder", run]
    if row.initial == "random":
        encoder = list(random_words(place, row, seed))
    jobs += [*more, *again]
    evals = []
    for protocol in protocols:
        words = list(encoder)
        if row.recipe == "supervised" and protocol == "linprobe":
            words += ["--feature", "mean_patch"]  # the feature that it was trained with
        result = run / "eval" / f"{protocol}.json"
        evals.append(eval_job(place, row, seed, protocol, words, result, train, val, jobs))
    return [*jobs, *evals]


# ------------------------------------------------------------------ cost


def blocks_flops(tokens: int, width: int, depth: int) -> float:
    """Forward pass of transformer blocks, MLP ratio 4: 24 n d² + 4 n² d per block."""
    return depth * (24.0 * tokens * width**2 + 4.0 * tokens**2 * width)


def shape_of(recipe: Recipe) -> tuple[int, int, int]:
    """(patches, width, depth) of a recipe's encoder."""
    return _shape(recipe.encoder.arch, json.dumps(vit_options(recipe.encoder)))


@cache
def _shape(arch: str, options: str) -> tuple[int, int, int]:
    with torch.device("meta"):
        vit = build_vit(arch, json.loads(options))
    return vit.patch_embed.num_patches, vit.embed_dim, len(vit.blocks)


def encoder_flops(recipe: Recipe) -> float:
    """Forward pass of one whole image."""
    patches, width, depth = shape_of(recipe)
    return blocks_flops(patches + 1, width, depth)


def pretrain_flops(recipe: Recipe) -> float:
    """Training on one image: forward and backward (three forward passes) of every branch."""
    patches, width, depth = shape_of(recipe)
    first = int(patches * (1 - recipe.views.mask_ratio))
    second = {
        "pixels": 0,
        "complement": patches - first,
        "independent": int(patches * (1 - recipe.views.second_mask_ratio)),
    }.get(recipe.views.second, patches)
    if recipe.encoder.masked_tokens == "replace":
        first, second = patches, patches if second else 0
    total = 3 * blocks_flops(first + 1, width, depth)
    if recipe.measure.reconstructs:
        decoder = recipe.measure.decoder
        total += 3 * blocks_flops(second + 1, width, depth) if second else 0.0
        branches = 2 if second else 1
        return total + 3 * branches * blocks_flops(patches + 1, decoder.width, decoder.depth)
    total += blocks_flops(second + 1, width, depth)  # the teacher needs no backward pass
    return total * (2 if recipe.measure.symmetric else 1)
