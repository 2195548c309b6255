"""What a step launches on a device, and where it makes the host wait.

`CountReads` and `CountLaunches` are dispatch modes: they count ops on any device, on the CPU in
place of a GPU. Where there is a device, `device_counts` counts what reaches it: by the stand-in of
null_gpu.py as calls come in, on a real GPU by torch's profiler.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import null_gpu
import torch
from phases import Phases
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.kernels.cases import all_cases

# Ops whose result the host reads, or whose output's size it must know.
READS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2")
# What CUDA's runtime and driver are called with, as the profiler names it.
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaMemset", "cudaGraphLaunch")
COPIES = ("cudaMemcpy",)
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


class CountReads(TorchDispatchMode):
    """Counts the ops after which the host must have waited for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put_") and any(
            t.dtype == torch.bool for t in args[1] if t is not None
        )
        self.count += name in READS or masks
        return func(*args, **(kwargs or {}))


class CountLaunches(CountReads):
    """Counts also what a device would launch: ops that are no views, kernels, and copies of Python
    numbers to the device, which wait for it."""

    FREE = ("empty", "empty_like", "new_empty", "empty_strided", "detach", "lift_fresh")

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.numbers += name == "lift_fresh"  # torch.tensor(…), Tensor.new_tensor(…)
        if func.namespace == "aten" and not func.is_view and name not in self.FREE:
            self.launches += 1
        return super().__torch_dispatch__(func, types, args, kwargs)


class Transfers(TorchDispatchMode):
    """Names of the ops that carry data between host and device, under a fake device too."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        sides = {t.device.type for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)}
        if len(sides) > 1 or name == "lift_fresh":  # torch.tensor(…), Tensor.new_tensor(…)
            self.names.append(name)
        return out


def move_to_fake_cuda(module: torch.nn.Module) -> None:
    """Put tensors of a fake CUDA device, inside a FakeTensorMode, in place of a module's own."""
    for part in module.modules():
        for name, value in [*part.named_parameters(recurse=False)]:
            fake = torch.empty(value.shape, dtype=value.dtype, device="cuda")
            setattr(part, name, torch.nn.Parameter(fake, requires_grad=value.requires_grad))
        for name, value in [*part.named_buffers(recurse=False)]:
            setattr(part, name, torch.empty(value.shape, dtype=value.dtype, device="cuda"))


@dataclass(frozen=True)
class Counts:
    """Kernels launched (memory set among them), copies, and waits of the host; milliseconds that a
    real GPU was busy with each kernel, by its name."""

    launches: int
    copies: int
    waits: int
    busy: Mapping[str, float] = field(default_factory=dict)


def device_counts(call: Callable[[], Any], device: str) -> Counts:
    """What one call sends to its device. On the CPU its ops take the place of launches."""
    if device == "cpu":
        with CountLaunches() as seen:
            call()
        return Counts(seen.launches, seen.numbers, seen.count)
    if null_gpu.here():
        before = null_gpu.counts()
        call()
        after = null_gpu.counts()
        return Counts(*(b - a for a, b in zip(before[:3], after[:3], strict=True)))
    events = profile(call)
    names = Counter(event.name for event in events)
    busy: Counter[str] = Counter()
    for event in events:
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            busy[event.name] += event.time_range.elapsed_us() / 1e3

    def of(prefixes: tuple[str, ...]) -> int:
        return sum(n for name, n in names.items() if name.startswith(prefixes))

    waits = of(WAITS) - 1  # the last is the profile's own
    return Counts(of(LAUNCHES), of(COPIES), waits, busy)


OWN = {name for case in all_cases().values() for name in case.kernels}
# What a kernel does, by its name; the first that fits.
KINDS = {
    "attention": r"flash|fmha|attention",
    "matrix products": r"gemm|gemv|nvjet|cutlass|xmma|splitk",
    "masking kernels": rf"^({'|'.join(sorted(OWN))})_kernel",
    "compiled": r"^triton_",
    "optimizer": r"multi_tensor|adam",
    "layer norm": r"layer_?norm|gammabeta",
    "copies and casts": r"copy|memcpy|memset|catarray|fill",
    "other elementwise": r"elementwise",
    "sums": r"reduce",
}


def busy_by_kind(busy: Mapping[str, float]) -> dict[str, float]:
    """Milliseconds of a profile's kernels by KINDS."""
    found: Counter[str] = Counter()
    for name, milliseconds in busy.items():
        kinds = (kind for kind, form in KINDS.items() if re.search(form, name, re.IGNORECASE))
        found[next(kinds, "rest")] += milliseconds
    return dict(found.most_common())


def profile(call: Callable[[], Any]) -> list[Any]:
    """The profiler's events of one call on a CUDA device, ended by a wait for it."""
    from torch.profiler import ProfilerActivity

    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    return list(seen.events())


Watching = Callable[[Phases], AbstractContextManager[Any]]


def launches_by_phase(call: Callable[[], Any], watching: Watching, device: str) -> Counter[str]:
    """Launches of one call by the phases that `watching` opens (phases.watching)."""
    if device == "cpu":
        with CountLaunches() as seen:
            return _summed(call, watching, Phases(lambda: seen.launches))
    if null_gpu.here():
        return _summed(call, watching, Phases(lambda: null_gpu.counts()[0]))
    made: list[int] = []

    def mark() -> int:
        """An event of the profile at this moment; its number."""
        with torch.profiler.record_function(f"mark {len(made)}"):
            made.append(len(made))
        return made[-1]

    when: dict[int, float] = {}
    launched: list[float] = []
    phases = Phases(mark, lambda a, b: sum(when[a] <= t < when[b] for t in launched))

    def marked() -> None:
        phases.restart()
        with watching(phases):
            call()
        phases.close()

    for event in profile(marked):
        if event.name.startswith("mark "):
            when[int(event.name.split()[1])] = event.time_range.start
        elif event.name.startswith(LAUNCHES):
            launched.append(event.time_range.start)
    return phases.sums()


def _summed(call: Callable[[], Any], watching: Watching, phases: Phases) -> Counter[str]:
    with watching(phases):
        phases.restart()
        call()
        return phases.sums()
