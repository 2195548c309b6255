"""What strangers' files may do to the readers: give a value or one sentence, and nothing else.

No other exception, no hang, no memory blow-up (each reader gets 1 GiB beyond what is in use).
"""

import contextlib
import json
import resource
import struct
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pipeline.config.ds_config import read_ds_config
from pipeline.config.planning import plan_recipe
from pipeline.config.recipe import RECIPES, RecipeError, load_recipe
from pipeline.errors import UserError
from shard_tools.manifest import (
    INDEX,
    MANIFEST,
    NAMES,
    SAMPLE,
    ManifestError,
    Shard,
    _checksum,
    encode_index,
    read_manifest,
    write_manifest,
)
from shard_tools.members import TarError
from shard_tools.tar import ShardWriter, read_samples

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(12)
)
FEW = settings(
    max_examples=40, deadline=20_000, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from([-1, 0, 10**30, 1e308, "", "a/../b", "\x00", "auto", "../x"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@contextlib.contextmanager
def bounded_memory():
    """Address space that may grow by 1 GiB only."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def answers(read, error):
    """Call a reader; what it refuses must be one short sentence of its own error."""
    with bounded_memory():
        try:
            return read()
        except error as refused:
            text = str(refused)
            assert text
            assert "\n" not in text
            assert len(text) < 5000
            return None


def places(value, at=()):
    """Every key path in nested dictionaries and lists."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for key, child in inner:
        yield (*at, key)
        if isinstance(child, dict | list):
            yield from places(child, (*at, key))


def replaced(value, place, new, drop):
    """A deep copy with one place changed, or removed."""
    value = json.loads(json.dumps(value))
    target = value
    for key in place[:-1]:
        target = target[key]
    if drop:
        del target[place[-1]]
    else:
        target[place[-1]] = new
    return value


@st.composite
def changed(draw, original):
    """A valid document with one to three places changed to anything."""
    for _ in range(draw(st.integers(1, 3))):
        everywhere = list(places(original))
        if not everywhere:
            break
        place = draw(st.sampled_from(everywhere))
        original = replaced(original, place, draw(VALUES), draw(st.integers(0, 4)) == 0)
    return original


@FEW
@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
@example(b"[" * 2000)
@example(b"{a: " * 3000)
@example(BOMB.encode())
@example(b"name: x\nmeasure: {kind: reconstruction}\nseed: &a [*a]\n")
@example(f"name: x\nmeasure: {{kind: byol}}\n{BOMB}seed: *k\n".encode())
@example(b"base: recipe.yaml")
@example(b"base: [nowhere.yaml, /etc]")
@example(b"? [a, b]\n: c\n1: 2\n")
def test_any_bytes_as_a_recipe(tmp_path, data):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(data)
    answers(lambda: load_recipe(path), RecipeError)


RECIPE = load_recipe(RECIPES / "cmae.yaml").model_dump(mode="json", by_alias=True)


@FEW
@given(changed(RECIPE))
def test_any_values_in_a_recipe(tmp_path, values):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    answers(lambda: load_recipe(path), RecipeError)


@FEW
@given(st.text(max_size=30).map(lambda t: f"optimizer.{t}") | st.text(max_size=40))
@example("seed=[" + "[" * 5000)
@example("a" + ".a" * 5000 + "=1")
@example("=1")
def test_any_override(text):
    answers(lambda: load_recipe(RECIPES / "mae.yaml", [text]), RecipeError)


DS = json.loads((Path(__file__).parents[2] / "ds_configs/zero3.json").read_text())
DS |= {"watchdog_seconds": 10, "gradient_checkpointing": True, "compile": False}


@FEW
@given(changed(DS) | VALUES)
@example({"zero_optimization": {"stage": []}})
@example({"zero_optimization": []})
@example({"bf16": True})
@example({"watchdog_seconds": float("nan")})
@example({"train_micro_batch_size_per_gpu": [1]})
def test_any_values_in_a_ds_config(tmp_path, values):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(values))
    config = answers(lambda: read_ds_config(path), UserError)
    if config is not None:
        recipe = load_recipe(RECIPES / "mae.yaml")
        answers(lambda: plan_recipe(config, recipe, world=4), UserError)


@FEW
@given(st.binary(max_size=100))
@example(b"[" * 100_000)
@example(b'{"zero_optimization": ' * 5000)
@example(b"9" * 10_000)
def test_any_bytes_as_a_ds_config(tmp_path, data):
    path = tmp_path / "ds.json"
    path.write_bytes(data)
    answers(lambda: read_ds_config(path), UserError)


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    """A folder of one real shard, and its manifest as JSON."""
    folder = tmp_path_factory.mktemp("fuzz")
    with open(folder / "s.tar", "wb") as file:
        writer = ShardWriter(file.fileno())
        offsets = [writer.write(f"{i}", {"jpg": bytes(700), "cls": b"1"})["jpg"] for i in range(3)]
        digest = writer.close()
    size = (folder / "s.tar").stat().st_size
    rows = np.array([(o, 700, 1, 8, 8, 1, 0, 0) for o in offsets], SAMPLE)
    shards = [Shard("s.tar", 3, size, digest)]
    write_manifest(folder, shards=shards, index=rows, classes=["a", "b"], names=["x", "y", "z"])
    return folder, json.loads((folder / MANIFEST).read_text())


def read_all(folder):
    """Everything that a reader of shards looks at."""
    manifest = read_manifest(folder)
    return manifest.index, manifest.names, manifest.path(0) if manifest.shards else ""


@FEW
@given(data=st.data())
def test_any_values_in_a_manifest(shard, data):
    """Sealed again with a right checksum, as a crafted one would be."""
    folder, content = shard
    values = data.draw(changed(content))
    if isinstance(values, dict):
        values.pop("checksum", None)
        values["checksum"] = _checksum(values)
    before = (folder / MANIFEST).read_bytes()
    try:
        (folder / MANIFEST).write_text(json.dumps(values))
        answers(lambda: read_all(folder), ManifestError)
    finally:
        (folder / MANIFEST).write_bytes(before)


@FEW
@given(name=st.sampled_from([INDEX, NAMES]), data=st.data())
def test_any_bytes_in_an_index(shard, name, data):
    folder, _ = shard
    before = (folder / name).read_bytes()
    start = data.draw(st.integers(0, len(before)))
    patch = data.draw(st.binary(max_size=40))
    try:
        (folder / name).write_bytes(before[:start] + patch + before[start + len(patch) :])
        answers(lambda: read_all(folder), ManifestError)
    finally:
        (folder / name).write_bytes(before)


def test_an_index_that_announces_more_than_there_is(shard):
    folder, _ = shard
    before = (folder / INDEX).read_bytes()
    head = encode_index(np.zeros(0, SAMPLE))
    try:
        for count in (2**63, 2**40, 10**6):
            (folder / INDEX).write_bytes(head[:16] + struct.pack("<Q", count) + before[24:])
            assert answers(lambda: read_all(folder), ManifestError) is None
    finally:
        (folder / INDEX).write_bytes(before)


@FEW
@given(data=st.data())
def test_any_bytes_in_a_tar(shard, tmp_path, data):
    whole = (shard[0] / "s.tar").read_bytes()
    start = data.draw(st.integers(0, len(whole)))
    patch = data.draw(st.binary(max_size=64) | st.sampled_from([b"x", b"g", b"L", b"S", b"\x80"]))
    cut = data.draw(st.integers(0, len(whole)) | st.just(len(whole)))
    path = tmp_path / "t.tar"
    path.write_bytes((whole[:start] + patch + whole[start + len(patch) :])[:cut])
    answers(lambda: read_samples(path), TarError)
