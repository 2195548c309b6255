"""Who may import whom: rooms (folders, and files at a package's top), read from every import."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("pipeline", "shard_tools", "eval")


def modules():
    """(dotted name, path) of every relaxmim module."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            yield name, path


NAMES = dict(modules())
each_module = pytest.mark.parametrize("name", list(NAMES))


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


def ours(name):
    """relaxmim modules that a module imports; a package only where nothing below it is named."""
    found = imports_of(NAMES[name]) & NAMES.keys()
    return {m for m in found if not any(o.startswith(f"{m}.") for o in found)} - {name}


def circle(graph):
    """A circle in a graph {node: nodes}, or None."""
    done, path = set(), []

    def visit(node):
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return None
        path.append(node)
        for other in sorted(graph.get(node, ())):
            if found := visit(other):
                return found
        path.pop()
        done.add(node)
        return None

    return next((found for node in graph if (found := visit(node))), None)


# From the ground up: a room imports only rooms that stand before it (of one line, no other).
FLOORS = (
    (
        "pipeline.errors",
        "pipeline.gpu_errors",
        "pipeline.help_text",
        "pipeline.interrupts",
        "pipeline.late",
        "pipeline.processor",
        "shard_tools.cores",
        "shard_tools.texts",
    ),
    ("pipeline.loading", "shard_tools.home"),
    (
        "shard_tools.atomic",
        "shard_tools.cli",
        "shard_tools.members",
        "pipeline.command",
        "pipeline.distributed",
        "pipeline.progress",
    ),
    ("pipeline.rendezvous",),
    ("shard_tools.tar", "shard_tools.image_file", "shard_tools.index_file", "shard_tools.remote"),
    ("shard_tools.index_cache", "shard_tools.shard_table"),
    ("shard_tools.manifest", "shard_tools.workers", "pipeline.kernels", "pipeline.config"),
    ("shard_tools.shuffle_quality",),
    ("shard_tools.class_list",),
    ("shard_tools.sharding", "pipeline.data", "pipeline.method"),
    ("pipeline.weights",),
    ("pipeline.runtime", "pipeline"),
    ("pipeline.cost",),
)
# The same inside eval, whose commands stand on all of them.
EVAL = ("eval.protocols", "eval.reporting", "eval.shared", "eval.paper", "eval.studies")

GROUND = {"pipeline.errors", "pipeline.help_text"}  # what shard_tools has of the pipeline


def room(name):
    """The folder of a module below its package, or the module itself at a package's top."""
    parts = name.split(".")
    inside = len(parts) > 1 and (ROOT / parts[0] / parts[1]).is_dir()
    return ".".join(parts[:2]) if inside else name


def test_rooms_stand_on_those_below():
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    for name in NAMES:
        here = room(name)
        for other in {room(m) for m in ours(name)} - {here}:
            if here in floor:
                assert floor.get(other, len(FLOORS)) < floor[here], f"{name} imports {other}"


def test_rooms_of_eval_stand_on_those_below():
    for name in NAMES:
        here = room(name)
        if here in EVAL:
            used = {room(m) for m in ours(name) if m.startswith("eval.")} - {here}
            assert used <= {*EVAL[: EVAL.index(here)]}, f"{name} imports {used}"


def test_no_circle_between_rooms_or_modules():
    modules = {name: ours(name) for name in NAMES}
    rooms = {}
    for name, used in modules.items():
        rooms.setdefault(room(name), set()).update({room(m) for m in used} - {room(name)})
    assert circle(rooms) is None
    assert circle(modules) is None


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None


@each_module
def test_imports_follow_the_directions(name):
    package = name.split(".")[0]
    used = {m.split(".")[0] for m in ours(name)}
    assert "eval" not in used or package == "eval", f"{name} imports eval"
    if package == "shard_tools":
        assert {m for m in ours(name) if m.startswith("pipeline")} <= GROUND, name
    if name != "pipeline.pretrain":
        assert "pipeline.pretrain" not in ours(name), "nobody imports the command line"


@each_module
def test_triton_is_imported_only_where_kernels_choose_it(name):
    """At module level triton may appear only in the kernel files that `kernels` loads late."""
    for node in ast.parse(NAMES[name].read_text()).body:
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
        if any(n.split(".")[0] == "triton" for n in names):
            assert name.startswith("pipeline.kernels"), name
            assert name.endswith("triton"), name


@each_module
def test_deepspeed_is_imported_with_the_engine_alone(name):
    """Elsewhere only inside a function, so that features of an encoder need no deepspeed."""
    if name == "pipeline.runtime.engine":
        return
    for node in ast.parse(NAMES[name].read_text()).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
            assert not any(n.split(".")[0] == "deepspeed" for n in names), name
