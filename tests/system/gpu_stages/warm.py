"""What torch compiles for the stages that are timed, compiled beside those that are not."""

from __future__ import annotations

import time
from typing import Any

from bench_gpu import time_way

from gpu_stages import kernels, steps
from gpu_stages.common import Skip, Where, join, release, workers

PROCESSES = 2


def compile_all(where: Where) -> dict[str, Any]:
    """Every compiled contestant and reference once; seconds of each."""
    if not where.gpu:
        raise Skip("inductor compiles on a GPU only")
    found: dict[str, Any] = {}
    with workers(PROCESSES) as large, workers(PROCESSES) as small:  # so few fit on a GPU together
        waiting = {t: large.submit(contestant, where, t) for t in steps.compiled_titles()}
        waiting |= {n: small.submit(reference, where, n) for n in kernels.timed(where)}
        for name, future in waiting.items():
            try:
                found[name] = future.result()
            except Exception as error:  # its own stage says so again
                found[name] = f"{type(error).__name__}: {error}"
            print(f"{name}: {found[name]}", flush=True)
            where.note({"seconds_to_compile": found})
    return {"seconds_to_compile": found}


def contestant(where: Where, title: str) -> float:
    """Seconds until two steps are taken."""
    begun = time.monotonic()
    join()
    release(where.device)
    steps.warm(where, title, where.batch)
    return round(time.monotonic() - begun, 1)


def reference(where: Where, name: str) -> float:
    """Seconds until a kernel's compiled reference, and the kernel, have run."""
    begun = time.monotonic()
    release(where.device)
    function, backward = kernels.timed(where)[name]
    for way in ("compiled", "triton"):
        time_way(way, function, backward, where.device, "inductor")
    return round(time.monotonic() - begun, 1)
