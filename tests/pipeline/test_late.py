"""What is put off at an import happens when it is asked for, and is the same then."""

import functools
import gc
import importlib
import sys
from types import ModuleType

import pytest
import torch

from pipeline import late

BODY = "from {0}.part import value\nfrom {0} import part\n__all__ = ['value']\nvalue += 1\n"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The name of a package that waits; `part` is a submodule, `value` 2 once its body has run."""
    name = "waiting_package"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text(BODY.format(name))
    (tmp_path / name / "part.py").write_text("value = 1\n")
    (tmp_path / "user.py").write_text(f"from {name} import *\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(late.LATE, name, late.wait)
    monkeypatch.setattr(sys, "meta_path", [late.Finder(), *sys.meta_path])
    yield name
    for module in [m for m in sys.modules if m == "user" or m.split(".")[0] == name]:
        del sys.modules[module]


def test_a_package_waits_until_a_name_of_its_own_is_asked_for(package):
    part = importlib.import_module(f"{package}.part")
    module = sys.modules[package]
    assert type(module) is late.Waiting
    assert module.part is part  # a submodule needs no body
    assert not hasattr(module, "__wrapped__")  # nor does what inspect looks for
    assert type(module) is late.Waiting
    assert module.value == 2
    assert type(module) is ModuleType
    assert module.part is part
    with pytest.raises(AttributeError, match="nothing"):
        _ = module.nothing


@pytest.mark.parametrize("how", ["from {} import value", "from {} import *", "from user import *"])
def test_every_kind_of_import_runs_it(package, how):
    names = {}
    exec(how.format(package), names)
    assert names["value"] == 2


def test_a_package_that_was_forgotten_is_the_same_again(package):
    importlib.import_module(f"{package}.part")
    module = sys.modules.pop(package)
    importlib.import_module(package)
    assert sys.modules[package] is module
    assert type(module) is late.Waiting
    del sys.modules[package]
    assert module.value == 2
    assert sys.modules[package] is module  # where `import` finds it from now on
    assert importlib.reload(module).value == 2


def test_torchs_compiler_is_put_off_and_put_back(tmp_path, monkeypatch):
    (tmp_path / "decorates.py").write_text(
        "import torch\n"
        "@torch.compile\ndef one(x): return x + 1\n"
        "@torch.compiler.disable\ndef two(x): return x + 2\n"
        "@torch.compiler.disable(recursive=False)\ndef three(x): return x + 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(late.LATE, "decorates", late.compile_later)
    monkeypatch.setattr(sys, "meta_path", [late.Finder(), *sys.meta_path])
    calls = []

    def compiled(function):
        calls.append(function)
        return lambda x: 10 * function(x)

    monkeypatch.setattr(torch, "compile", compiled)
    before = torch.compiler.disable
    module = importlib.import_module("decorates")
    del sys.modules["decorates"]
    assert calls == []
    assert [module.one(1), module.one(2), module.two(1), module.three(1)] == [20, 30, 3, 4]
    assert len(calls) == 1
    assert module.one.__name__ == "one"
    assert (torch.compile, torch.compiler.disable) == (compiled, before)


def test_an_optimizer_asks_the_compiler_only_where_there_is_one(monkeypatch):
    class Compiler(ModuleType):
        @staticmethod
        def disable(function):
            return lambda *a: ("disabled", function(*a))

    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    call = late.disabled_where_compiled(lambda x: x + 1)
    assert call(1) == 2
    assert "torch._dynamo" not in sys.modules
    monkeypatch.setitem(sys.modules, "torch._dynamo", Compiler("torch._dynamo"))
    assert call(1) == ("disabled", 2)


def test_collection_is_off_inside_only():
    with late.uncollected():
        assert not gc.isenabled()
    assert gc.isenabled()
    frozen = gc.get_freeze_count()
    assert frozen > 0
    with pytest.raises(ZeroDivisionError), late.uncollected():
        functools.reduce(int.__floordiv__, [1, 0])
    assert gc.isenabled()
    assert gc.get_freeze_count() <= frozen
