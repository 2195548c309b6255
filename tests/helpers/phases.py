"""Where a step's time and launches go, by phase; what is nested counts once, for the inner one."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any

from pipeline import kernels
from pipeline.kernels.cases import ops
from pipeline.method import objective as objective_module

ORDER = (
    "data wait", "masks", "embed", "encoder", "teacher", "decoder", "heads", "loss", "backward",
    "communication", "optimizer", "EMA", "rest",
)  # fmt: skip


class Phases:
    """Sums whatever grows while a step runs, by the phase that is open.

    read: its reading now (seconds, launches, a CUDA event); span: from one reading to a later one,
    asked for at the end, when events have been reached.
    """

    def __init__(
        self, read: Callable[[], Any], span: Callable[[Any, Any], float] = lambda a, b: b - a
    ) -> None:
        self.read, self.span = read, span
        self._open: list[str] = []
        self.restart()

    def restart(self) -> None:
        """Forget what was read."""
        self._marks: list[tuple[str, Any]] = [("rest", self.read())]
        self._closed = False

    def close(self) -> None:
        """Read for the last time."""
        self._marks.append(("", self.read()))
        self._closed = True

    def _turn(self) -> None:
        self._marks.append((self._open[-1] if self._open else "rest", self.read()))

    @contextmanager
    def watch(self, name: str, owner: Any, attribute: str) -> Iterator[None]:
        """Every call of owner.attribute belongs to a phase, while the context is open."""
        inner = getattr(owner, attribute)
        own = attribute in vars(owner)

        def watched(*args: Any, **keywords: Any) -> Any:
            self._open.append(name)
            self._turn()
            try:
                return inner(*args, **keywords)
            finally:
                self._open.pop()
                self._turn()

        setattr(owner, attribute, watched)
        try:
            yield
        finally:
            if own:
                setattr(owner, attribute, inner)
            else:
                delattr(owner, attribute)

    def sums(self) -> Counter[str]:
        """The sum of every phase from the start to the end, or up to now."""
        if not self._closed:
            self.close()
        found: Counter[str] = Counter()
        for (name, begin), (_, end) in pairwise(self._marks):
            found[name] += self.span(begin, end)
        return found


@contextmanager
def watching(phases: Phases, objective: Any, teacher: Any, engine: Any) -> Iterator[None]:
    """The phases of a training step. engine: DeepSpeed's, or None."""
    measure, encoder = objective.measure, objective.encoder
    watched = [
        ("masks", objective_module, "make_views"),
        ("encoder", encoder, "forward"),
        ("embed", encoder.patch_embed["proj"], "forward"),
    ]
    for name, part in (("decoder", "decoder"), ("heads", "projector"), ("heads", "predictor")):
        if hasattr(measure, part):
            watched.append((name, getattr(measure, part), "forward"))
    watched += [("loss", kernels, op) for op, m in ops().items() if m.PHASE == "loss"]
    if engine is not None:
        watched += [("backward", engine, "backward"), ("optimizer", engine, "step")]
    if teacher is not None:
        watched += [("teacher", teacher, "forward"), ("EMA", teacher, "update")]
    with ExitStack() as open_:
        for name, owner, attribute in watched:
            open_.enter_context(phases.watch(name, owner, attribute))
        yield
