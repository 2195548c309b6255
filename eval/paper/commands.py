"""From a row of the paper's tables to the commands that make it, at full scale or in miniature."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from eval.paper.job_runner import Command, python
from eval.paper.published import PaperRow
from eval.protocols import Protocol, Work, by_key, keys, option
from pipeline.config.planning import MOST_IMAGES
from pipeline.config.recipe import RECIPES, EncoderRecipe, Recipe, load_recipe
from pipeline.config.schema import IMAGENET_MEAN
from pipeline.data.order import steps_per_epoch
from pipeline.errors import UserError, naming
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
    relaxed: tuple[str, ...] = ()
    contrast: tuple[str, ...] = ()
    last: tuple[str, ...] = ()  # overrides after all others: --set
    options: dict[str, tuple[str, ...]] = field(default_factory=dict)
    tried: str = ""
    hours: float | None = None
    tune: dict[str, Any] = field(default_factory=dict)

    def command(self, script: str, *words: object) -> tuple[str, ...]:
        """A relaxmim script over all devices, or in one process."""
        alone = python(ROOT / script, *words)
        if self.launch == "python":
            return alone
        launcher = Path(alone[0]).with_name("deepspeed")
        return (str(launcher), *alone[1:])


def read_scale(name: str, train: str = "", val: str = "") -> Scale:
    """A scale of scales.yaml, on other shards where they are named."""
    with naming(SCALES, "cannot be read"):
        scales = yaml.safe_load(SCALES.read_text(encoding="utf-8"))
    if name not in scales:
        raise UserError(f"--scale {name}: {SCALES} knows {', '.join(scales)}")
    values = dict(scales[name])
    options = {p: tuple(map(from_root, values.pop(p, ()))) for p in ("pretrain", *keys())}
    values |= {k: tuple(v) for k, v in values.items() if isinstance(v, list)}
    values |= {k: v for k, v in (("train", train), ("val", val)) if v}
    try:
        return Scale(name, **values, options=options)
    except TypeError as error:
        raise UserError(f"{SCALES}, {name}: {error}") from error


def from_root(word: object) -> str:
    """A word of a command; a file of ds_configs/ is found from any folder."""
    text = str(word)
    return str(ROOT / text) if text.startswith("ds_configs/") else text


@dataclass(frozen=True)
class Workspace:
    """Where rows are made: the folder of their runs, the scale, the list of Tab. 5's classes,
    whether the demo's shards are to be built where they are missing, and the list of the images
    that have labels in few-shot finetuning ("" draws a tenth)."""

    output: Path
    scale: Scale
    classes: str = "imagenet100.txt"
    demo: bool = False
    few_labels: str = ""


def overrides(row: PaperRow, scale: Scale) -> list[str]:
    """The recipe's overrides of a row at a scale, without seed and data."""
    recipe = read_recipe(base_recipe(row), tuple(row.set))
    result = [*row.set, *scale.recipe]
    if recipe.measure.reconstructs:
        relaxed = scale.relaxed if recipe.views.second != "pixels" else ()
        result += [*scale.reconstruction, *relaxed]
    else:
        result += scale.contrast
    if scale.epochs is not None:
        epochs = scale.epochs * max(1.0, recipe.optimizer.epochs / 100)
        result.append(f"optimizer.epochs={epochs:g}")
    return [*result, *row.last, *scale.last]


@cache
def read_recipe(name: str, sets: tuple[str, ...]) -> Recipe:
    """A recipe with overrides, read once."""
    return load_recipe(RECIPES / f"{name}.yaml", sets)


def base_recipe(row: PaperRow) -> str:
    """The recipe file of a row without .yaml; with the stronger augmentation its `_strong` one."""
    name = row.recipe if row.recipe and row.recipe != "supervised" else BASELINE
    return f"{name}_strong" if row.strong else name


def run_name(row: PaperRow, seed: int) -> str:
    """The folder of a row's run, the seed last; rows of several tables that are the same run share
    it. A random row has its finetuning in its name: random-347-0-004-1 is finetuned for 347 % of
    the epochs, with a base_lr of 0.004."""
    if row.initial == "random" or row.recipe == "supervised":
        parts = ["random" if row.initial else "supervised", *row.finetune.values()]
        parts += [row.recipe] if row.initial and row.recipe else []
    else:
        parts = [base_recipe(row), *row.set, *row.last]
    parts += [] if row.images is None else [row.images, row.sampling]
    parts += [] if row.classes is None else [f"in{row.classes}"]
    if row.finetuned:
        tuned = [] if row.initial else row.finetune.values()  # a random row's are there already
        parts += ["finetuned", *tuned]
    text = "-".join(str(part) for part in parts)
    return "-".join("".join(c if c.isalnum() else " " for c in f"{text} {seed}").split())


# ------------------------------------------------------------------ data


def subset_job(workspace: Workspace, source: str, name: str, *words: object) -> Command:
    """A subset of shards as an index in OUTPUT/data."""
    dest = workspace.output / "data" / name
    command = python(ROOT / "shard_tools/subset.py", source, dest, *words)
    return Command(f"data {name}", command, dest / "manifest.json", for_others=True)


def row_data(workspace: Workspace, row: PaperRow, part: str) -> tuple[str, list[Command]]:
    """(shards, jobs that make them) of a row's pretraining (`pretrain`), `train` or `val`."""
    source = workspace.scale.val if part == "val" else workspace.scale.train
    jobs: list[Command] = []
    if row.classes is not None and workspace.scale.name == "full":
        name, words = class_subset(row.classes, part, workspace.classes)
        jobs.append(subset_job(workspace, source, name, *words))
        source = str(jobs[0].makes.parent)
    if part != "pretrain" or row.images is None:
        return source, jobs
    name, words = few_subset(row, few_images(workspace, row))
    jobs.append(subset_job(workspace, source, name, *words))
    return str(jobs[-1].makes.parent), jobs


def class_subset(classes: int, part: str, names: str) -> tuple[str, list[str]]:
    """(name, options of subset.py) of the shards of some of ImageNet's classes."""
    return f"{'val' if part == 'val' else 'train'}-in{classes}", ["--classes", names]


def few_subset(row: PaperRow, count: int) -> tuple[str, list[str]]:
    """(name, options of subset.py) of a row's few images, `count` of them."""
    choose = "one-class" if row.sampling == "in-one-class" else row.sampling
    name = f"train-{row.images}" + ("" if choose == "random" else f"-{choose}")
    return name, ["--count", str(count), "--choose", choose]


def few_images(workspace: Workspace, row: PaperRow) -> int:
    """How many images a row of few is made of: the paper's, or as many as smaller data offer."""
    manifest = read_manifest(workspace.scale.train)
    samples, classes = manifest.samples, len(manifest.classes)
    most = {"one-per-class": classes, "in-one-class": samples // classes // 2}
    return min(row.images or samples, most.get(row.sampling, samples // 4))


# ------------------------------------------------------------------ jobs of a row


def pretrain_job(workspace: Workspace, row: PaperRow, seed: int) -> list[Command]:
    """What pretrains a row's encoder, with its data; nothing for a random one."""
    if row.finetuned:
        return finetuned_jobs(workspace, row, seed)
    if row.initial == "random" or row.recipe is None:
        return []
    if row.recipe == "supervised":
        return supervised_jobs(workspace, row, seed)
    data, jobs = row_data(workspace, row, "pretrain")
    samples = read_manifest(workspace.scale.train).samples
    sets = [*overrides(row, workspace.scale), f"seed={seed}"]
    sets += [] if row.images is None else [f"data.samples_per_epoch={samples}"]
    path, recipe = RECIPES / f"{base_recipe(row)}.yaml", row_recipe(workspace, row)
    drawn = recipe.data.samples_per_epoch or samples
    steps = steps_per_epoch(drawn, recipe.batch_size, recipe.data.partitions)
    total = round(recipe.optimizer.epochs * steps)
    run = workspace.output / run_name(row, seed)
    words = ["--recipe", path, "--data", data, "--output", run]
    words += [word for text in sets for word in ("--set", text)]
    words += workspace.scale.options.get("pretrain", ())
    images = total * recipe.batch_size
    job = Command(
        f"{run.name} pretrain",
        workspace.scale.command("pipeline/pretrain.py", *words),
        run / "encoder" / "encoder.json",
        tuple(j.name for j in jobs),
        step=total,
        images=images,
        for_others=True,
        count=lambda: images * pretrain_flops(recipe),
    )
    return [*jobs, job]


def supervised_jobs(workspace: Workspace, row: PaperRow, seed: int) -> list[Command]:
    """Finetuning from scratch on the row's images; then its classifier's encoder as a run.

    On all images that is the finetuning of the random row, which is shared.
    """
    data, jobs = row_data(workspace, row, "pretrain")
    run = workspace.output / run_name(row, seed)
    scratch = replace(row, recipe=None, initial="random")
    result = workspace.output / run_name(scratch, seed) / "eval" / "finetune.json"
    words, val = random_words(workspace, scratch, seed), workspace.scale.val
    if row.images:  # the draws of the other rows' pretraining
        samples = read_manifest(workspace.scale.train).samples
        words += ["--samples-per-epoch", str(samples)]
    train = eval_job(workspace, scratch, seed, "finetune", words, result, data, val, jobs)
    return [*jobs, *exported(run, train)]


def finetuned_jobs(workspace: Workspace, row: PaperRow, seed: int) -> list[Command]:
    """The finetuning of a row, with what it needs; then its classifier's encoder as a run."""
    jobs = row_jobs(workspace, replace(row, finetuned=False), seed, ["finetune"])
    return [*jobs[:-1], *exported(workspace.output / run_name(row, seed), jobs[-1])]


def exported(run: Path, train: Command) -> list[Command]:
    """A finetuning, and what makes a run of its classifier's encoder."""
    folder = train.makes.with_suffix("")
    export = python(ROOT / "pipeline/export.py", folder, "--format", "run", run)
    made, name = run / "encoder" / "encoder.json", f"{run.name} pretrain"
    return [
        replace(train, weights=folder / "classifier.json"),
        Command(name, export, made, (train.name,), for_others=True),
    ]


def random_words(workspace: Workspace, row: PaperRow, seed: int) -> list[str]:
    """The words that name a random encoder of the row's architecture."""
    from pipeline.method.checks import vit_options

    encoder = row_recipe(workspace, row).encoder
    keywords, data = vit_options(encoder), row_recipe(workspace, row).data
    if data.mean != IMAGENET_MEAN:  # of other images than those that timm's architecture expects
        keywords["pretrained_cfg_overlay"] = {"mean": list(data.mean), "std": list(data.std)}
    options = yaml.safe_dump(keywords, default_flow_style=True, width=10**6).strip()
    return ["--encoder", "random", "--arch", encoder.arch, "--options", options]


def row_recipe(workspace: Workspace, row: PaperRow) -> Recipe:
    """The recipe of a row at the scale (of a random one: MAE's)."""
    return read_recipe(base_recipe(row), tuple(overrides(row, workspace.scale)))


def eval_job(
    workspace: Workspace, row: PaperRow, seed: int, protocol: str, encoder: Sequence[object],
    result: Path, train: str, val: str, needs: Sequence[Command],
) -> Command:  # fmt: skip
    """One evaluation of an encoder, its result file and its cost."""
    scale, how = workspace.scale, by_key(protocol)
    words = ["--val", val, "--seed", seed, "--output", result]
    words += ["--train", train] if how.train else []
    words += [*scale.options.get(protocol, ()), *encoder]
    if how.script == "finetune" and "epochs" in row.finetune:
        epochs = float(option([*map(str, words)], "--epochs", 100)) * row.finetune["epochs"] / 100
        words += ["--epochs", f"{epochs:g}"]
    if how.script == "finetune" and "base_lr" in row.finetune:
        words += ["--base-lr", f"{row.finetune['base_lr']:g}"]
    chosen = how.words(seed)
    if how.fraction < 1 and workspace.few_labels:
        chosen = ["--subset", workspace.few_labels]
    samples, held_out = (read_manifest(shards).samples for shards in (scale.train, scale.val))
    work = tuple(map(str, [*words, *how.words(seed)]))
    images, count = cost(how, row_recipe(workspace, row), samples, held_out, work)
    name = f"{run_name(row, seed)} {protocol}"
    command = scale.command(f"eval/{how.script}.py", *words, *chosen)
    return Command(name, command, result, tuple(j.name for j in needs), 0, images, count=count)


def row_jobs(
    workspace: Workspace, row: PaperRow, seed: int, protocols: Sequence[str]
) -> list[Command]:
    """All jobs of a row and seed: data, pretraining, one evaluation per protocol.

    The result of a protocol is OUTPUT/<run_name>/eval/<protocol>.json.
    """
    jobs = pretrain_job(workspace, row, seed)
    train, more = row_data(workspace, row, "train")
    val, again = row_data(workspace, row, "val")
    run = workspace.output / run_name(row, seed)
    encoder: list[object] = ["--encoder", run]
    if row.initial == "random" and not row.finetuned:
        encoder = list(random_words(workspace, row, seed))
    jobs += [*more, *again]
    evals = []
    for protocol in protocols:
        words = list(encoder)
        if (row.finetuned or row.recipe == "supervised") and protocol == "linprobe":
            # The feature that it was trained with; it has no other.
            words += ["--feature", "mean_patch", "--also"]
        result = run / "eval" / f"{protocol}.json"
        evals.append(eval_job(workspace, row, seed, protocol, words, result, train, val, jobs))
    return [*jobs, *evals]


# ------------------------------------------------------------------ cost
# Rows differ in epochs and data more often than in what a step computes: each dry run is made once.


def cost(
    how: Protocol, recipe: Recipe, train: int, val: int, words: tuple[str, ...]
) -> tuple[int, Callable[[], float]]:
    """Images that a protocol sees, and what counts its FLOPs."""

    def flops() -> float:
        return how.cost(Work(forward_flops(recipe.encoder), train, val, words))[1]

    return how.cost(Work(0.0, train, val, words))[0], flops


def forward_flops(encoder: EncoderRecipe) -> float:
    """Forward pass of one full image through an encoder."""
    return _forward_flops(encoder.model_dump_json())


@cache
def _forward_flops(encoder: str) -> float:
    from pipeline.cost import dry_run  # torch and timm: seconds

    return dry_run.encoder_flops(EncoderRecipe.model_validate_json(encoder))


def pretrain_flops(recipe: Recipe) -> float:
    """Training on one image, forward and backward of every branch, by estimate's dry run of the
    recipe's own step on a micro-batch, whose images share what is computed once and are each
    other's negatives. Under data.sizes the mean over the run."""
    parts, images = {"encoder", "views", "measure"}, min(recipe.batch_size, MOST_IMAGES)
    return sum(
        share * _step_flops(phase.model_dump_json(include=parts), images) / images
        for share, phase in recipe.phases
    )


@cache
def _step_flops(parts: str, images: int) -> float:
    recipe = Recipe.model_validate({"name": "parts"} | json.loads(parts))
    from pipeline.cost.dry_run import dry_run

    return dry_run(recipe, images, "fp32").flops
