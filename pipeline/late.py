"""Lazy imports: defer what other packages import only in case it is needed.

timm imports torchvision's models and, for one decorator, torch's compiler; torch and DeepSpeed
import the compiler for any optimizer; tensorboard imports boto3 in case a path is on S3. Nothing is
left out or replaced: the body of such a package runs when a missing name is first looked up in it,
and decorators of torch's compiler take effect at the first call of their function. `pipeline`
installs this; packages that are imported already stay as they are.
"""

from __future__ import annotations

import functools
import gc
import importlib.abc
import importlib.machinery
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Run = Callable[[importlib.abc.Loader, ModuleType], None]


class Waiting(ModuleType):
    """A package whose own body has not run yet, but whose submodules can be imported."""

    def __getattr__(self, name: str) -> Any:
        # inspect, unittest and others look for such names in every module.
        if name.startswith("__") and name not in ("__all__", "__version__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        self.__class__ = ModuleType  # type: ignore[assignment]
        sys.modules[self.__name__] = self
        loader = self.__spec__ and self.__spec__.loader
        assert isinstance(loader, Loader)
        loader.loader.exec_module(self)
        return getattr(self, name)


def wait(loader: importlib.abc.Loader, module: ModuleType) -> None:
    """Do not run the body of a package yet."""
    module.__class__ = Waiting


def compile_later(loader: importlib.abc.Loader, module: ModuleType) -> None:
    """Run a body whose decorators torch.compile and torch.compiler.disable act later."""
    import torch

    compiled, disabled = torch.compile, torch.compiler.disable

    def disable(fn: Any = None, recursive: bool = True, *, reason: str | None = None) -> Any:
        return torch._disable_dynamo(fn, recursive)

    torch.compile, torch.compiler.disable = at_first_call(compiled), disable
    try:
        loader.exec_module(module)
    finally:
        torch.compile, torch.compiler.disable = compiled, disabled
        for name in LATE:  # as if nobody had asked for them
            if isinstance(sys.modules.get(name), Waiting):
                del sys.modules[name]


def at_first_call(decorate: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator that applies another one when the function is called for the first time."""

    def decorator(function: Callable[..., Any]) -> Callable[..., Any]:
        decorated = functools.cache(lambda: decorate(function))
        return functools.wraps(function)(lambda *a, **k: decorated()(*a, **k))

    return decorator


def optimize_uncompiled(loader: importlib.abc.Loader, module: ModuleType) -> None:
    """Run torch.optim.optimizer; its methods import the compiler, to stay out of it, only where
    something else has imported it."""
    import torch._compile

    loader.exec_module(module)
    for method in filter(inspect.isfunction, vars(module.Optimizer).values()):
        if method.__code__.co_filename == torch._compile.__file__:
            plain: Any = inspect.unwrap(method)
            plain.__dynamo_disable = disabled_where_compiled(plain)  # where torch looks first


def disabled_where_compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, kept out of torch.compile where anything can be compiled."""

    def call(*args: Any, **kwargs: Any) -> Any:
        dynamo = sys.modules.get("torch._dynamo")
        return (dynamo.disable(function) if dynamo else function)(*args, **kwargs)

    return call


LATE: dict[str, Run] = {
    "torchvision.models": wait,
    "torchvision.ops": wait,
    "boto3": wait,
    "timm": compile_later,
    "deepspeed.runtime.zero.muon.original_muon": compile_later,
    "torch.optim.optimizer": optimize_uncompiled,
}


class Loader(importlib.abc.Loader):
    """Loads a module with `run` in place of running its body."""

    def __init__(self, loader: importlib.abc.Loader, run: Run) -> None:
        self.loader, self.run = loader, run
        self._module: ModuleType | None = None

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._module  # the same one where it was forgotten

    def exec_module(self, module: ModuleType) -> None:
        self._module = module
        self.run(self.loader, module)


class Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of LATE where the import system would find them."""

    def __init__(self) -> None:
        self._found: dict[str, ModuleSpec] = {}

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in LATE or name in sys.modules:
            return None
        if name not in self._found:
            spec = importlib.machinery.PathFinder.find_spec(name, path)
            if spec is None or spec.loader is None:
                return None
            spec.loader = Loader(spec.loader, LATE[name])
            self._found[name] = spec
        return self._found[name]


def install() -> None:
    """From here on; once."""
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder())


@contextmanager
def uncollected() -> Iterator[None]:
    """For imports: what they make is no garbage, and to look for some takes a fifth of their time.

    The first time, it is not looked through afterwards either, and forked workers share it.
    """
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():
            gc.freeze()
        gc.enable()
