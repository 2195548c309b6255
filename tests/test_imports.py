"""Who may import whom: the rooms of the house, read from every import statement."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("pipeline", "shard_tools", "eval")

# room → rooms of ours that it may import. `recipe` is a leaf of plain settings that all may read.
ALLOWED = {
    "pipeline.kernels": set(),
    "shard_tools.manifest": set(),
    "pipeline.sections": set(),
    "pipeline.recipe": {"sections"},
    "pipeline.similarity": {"kernels"},
    "pipeline.strong": set(),
    "pipeline.views": {"kernels", "recipe"},
    "pipeline.encoder": {"kernels", "recipe"},
    "pipeline.decoder": {"views", "encoder", "kernels", "recipe"},
    "pipeline.measures": {"views", "encoder", "decoder", "kernels", "recipe"},
    "pipeline.objective": {"views", "encoder", "measures", "recipe"},
    "pipeline.interop": {"objective", "measures", "encoder"},
    "pipeline.ranks": set(),
    "pipeline.engine": {"recipe", "ranks"},
    "pipeline.whole": {"engine", "ranks"},
    "pipeline.files": {"ranks", "shard_tools.manifest"},
    "pipeline.order": set(),
    "pipeline.decode": set(),
    "pipeline.cache": {"shard_tools.manifest"},
    "pipeline.reader": {"order", "decode", "cache", "shard_tools.manifest"},
    "pipeline.data": {"order", "decode", "cache", "reader", "shard_tools.manifest"},
}
EVAL_MAY = {
    "similarity",
    "encoder",
    "data",
    "order",
    "recipe",
    "views",
    "kernels",
    "engine",
    "ranks",
    "whole",
    "files",
    "strong",
    "reconstruction",  # PSNR and picture grids need the decoder, which an exported encoder lacks
}


def modules():
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            yield name, path


def imports_of(path):
    """Every module that a file imports, at any depth, as full names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room(name):
    return ".".join(name.split(".")[:2])


def ours(path):
    """Rooms of ours that a file imports (pipeline.kernels.x counts as pipeline.kernels)."""
    known = {room(name) for name, _ in modules()}
    return {room(i) for i in imports_of(path) if room(i) in known and "." in i}


@pytest.mark.parametrize(
    ("name", "path"), list(modules()), ids=lambda v: v if isinstance(v, str) else ""
)
def test_imports_follow_the_directions(name, path):
    used = ours(path) - {room(name)}
    package = name.split(".")[0]
    if room(name) in ALLOWED:
        allowed = {a if "." in a else f"pipeline.{a}" for a in ALLOWED[room(name)]}
        assert used <= allowed, f"{name} may not import {used - allowed}"
    elif package == "shard_tools":
        assert all(u.startswith("shard_tools.") for u in used), used
    elif package == "eval":
        # few-shot evaluation draws its subsets with the same tool as `shard_tools/subset.py`
        allowed = {f"pipeline.{a}" for a in EVAL_MAY}
        allowed |= {"shard_tools.manifest", "shard_tools.subset"}
        foreign = {u for u in used if not u.startswith("eval.")}
        assert foreign <= allowed, f"{name} may not import {foreign - allowed}"
    else:
        assert not any(u.startswith("eval.") for u in used), f"{name} imports eval"
    if room(name) != "pipeline.engine":
        assert not any(i.split(".")[0] == "deepspeed" for i in imports_of(path)), name
    if name != "pipeline.pretrain":
        assert "pipeline.pretrain" not in used, "nobody imports the command line"


@pytest.mark.parametrize(
    ("name", "path"), list(modules()), ids=lambda v: v if isinstance(v, str) else ""
)
def test_triton_is_imported_only_where_kernels_choose_it(name, path):
    """At module level triton may appear only in the *_triton files that `kernels` loads late."""
    top = [
        n for n in ast.parse(path.read_text()).body if isinstance(n, ast.Import | ast.ImportFrom)
    ]
    for node in top:
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
        if any(n.split(".")[0] == "triton" for n in names):
            assert name.startswith("pipeline.kernels"), name
            assert "triton" in name or name.endswith("_kernels"), name
