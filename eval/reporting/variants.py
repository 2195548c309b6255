"""Which results are of one evaluation: those that differ by their settings are not averaged."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from eval.reporting.run_records import Group
from eval.reporting.tables import VARIANT, column_of, is_random, random_key
from pipeline.config.texts import flatten
from pipeline.errors import UserError

Result = dict[str, Any]

# Of the settings: what is another in every run of a method, and what names the run itself.
BY_SEED = ("seed", "subset_seed")
BY_PLACE = ("train", "val", "images", "subset")  # paths, which are others elsewhere
CONTENT = {"train": "train images", "val": "val images"}  # setting → what its path held
NO_SETTING = ("encoder", "random", "classifier", "workers", "precision", "also")


def with_variants(groups: Sequence[Group]) -> list[Group]:
    """The groups, with the key VARIANT in each result whose column has others of other settings:
    words for the settings in which they differ. UserError for two results of one run that differ in
    none."""
    columns: dict[str, list[tuple[Group, str, Result]]] = {}
    for group in groups:
        for run in group.runs:
            for result in run.results:
                if (column := column_of(result)) is not None:
                    run_key = random_key(result) if is_random(result) else str(run.folder)
                    columns.setdefault(column.name, []).append((group, run_key, result))
    words: dict[int, tuple[str, ...]] = {}
    for members in columns.values():
        keys = differing_keys(members)
        for _, _, result in members:
            told = settings_of(result)
            words[id(result)] = tuple(in_words(key, told.get(key)) for key in keys)
    return [marked(group, words) for group in groups]


def marked(group: Group, words: dict[int, tuple[str, ...]]) -> Group:
    """The group with its results' words."""
    runs = [
        replace(
            run,
            results=tuple(
                result | {VARIANT: words[id(result)]} if words.get(id(result)) else result
                for result in run.results
            ),
        )
        for run in group.runs
    ]
    return replace(group, runs=tuple(runs))


def differing_keys(members: Sequence[tuple[Group, str, Result]]) -> list[str]:
    """The settings in which results of one column differ where they would be averaged, or one be
    taken for the other: in a run, and in the runs of a method but for their seeds and folders; and
    of all methods whether they were evaluated on the same images."""
    found = set[str]()
    by_run: dict[str, list[Result]] = {}
    alike: dict[str, list[Result]] = {}  # of a method, or of one random encoder
    for group, run, result in members:
        if is_random(result):
            alike.setdefault(run, []).append(result)
        else:
            by_run.setdefault(run, []).append(result)
            alike.setdefault(group.label, []).append(result)
    for results in by_run.values():
        told = [settings_of(result) for result in results]
        named = {key for one in told for key in one} - {*CONTENT.values()}  # earlier ones say none
        keys = differ([dict.fromkeys(named) | one for one in told])
        if distinct(told, keys) < len(results):
            raise UserError(
                f"{' and '.join(sorted({str(r['file']) for r in results}))}: two results of one "
                "evaluation with the same settings; move one out of eval/"
            )
        found |= keys
    for results in alike.values():
        found |= differ(map(settings_of, results)) - {*BY_SEED, *BY_PLACE}
    every = [settings_of(result) for _, _, result in members]
    found |= differ(every) & {*CONTENT.values()}
    for path, content in CONTENT.items():
        if path in found and distinct(every, [path]) == distinct(every, [path, content]):
            found.discard(content)  # the path says it
    return sorted(found)


def distinct(settings: Sequence[dict[str, Any]], keys: Iterable[str]) -> int:
    """How many settings differ in these keys."""
    return len({json.dumps([one.get(key) for key in sorted(keys)]) for one in settings})


def differ(settings: Iterable[dict[str, Any]]) -> set[str]:
    """The keys in which settings differ; one that an earlier version did not record tells
    nothing."""
    values: dict[str, set[str]] = {}
    for one in settings:
        for key, value in one.items():
            values.setdefault(key, set()).add(json.dumps(value))
    return {key for key, found in values.items() if len(found) > 1}


def settings_of(result: Result) -> dict[str, Any]:
    """What a result hangs on beside the run: settings, content of the images, crop, precision and
    choice of weights."""
    flat = flatten(result.get("settings", {}))
    told = {key: value for key, value in flat.items() if key.split(".")[0] not in NO_SETTING}
    told |= {key: result[key] for key in ("resize", "precision") if key in result}
    if flat.get("classifier"):  # of the run's: finetune, finetune-10percent …
        told["classifier"] = Path(flat["classifier"]).name
    encoder = result.get("encoder", {})
    if "step" in encoder and not is_random(result):  # of the run when it was evaluated
        told["step"] = encoder["step"]
    content = result.get("content", {})
    told |= {about: content[name] for name, about in CONTENT.items() if name in content}
    options = encoder.get("options", {})
    told |= {"image size": options["img_size"]} if "img_size" in options else {}
    return told | {"weights": encoder["note"] if encoder.get("note") else "as trained"}


def in_words(key: str, value: Any) -> str:
    """A setting in a column's title."""
    if key == "weights":
        return str(value)
    return f"{key.replace('_', ' ')} {'not recorded' if value is None else value}"
