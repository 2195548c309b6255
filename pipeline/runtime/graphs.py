"""A micro-batch's forward and backward as one CUDA graph: the host launches it as a whole.

A step of ViT-B has more than a thousand launches, and on many hosts they take longer than the GPU's
work. A graph is captured at the first micro-batch and replayed from then on. It reads a number (the
epoch, of which masks and jitter are a function) from the device, where the number is written before
a replay. It is of one shape: where the images change their size (data.sizes) it begins from
scratch. Gradients are in the graph's own memory and hold until the next micro-batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import UserError

WARM = 3  # passes before the first capture: they compile kernels and blocks


class CaptureError(RuntimeError):
    """No graph can be captured; what CUDA or torch says, also that memory ran out."""


class MicroStepGraph:
    """Forward and backward of micro-batches of one shape, captured and replayed.

    forward: (inputs of the objective) → loss and terms, under the autocast that training has.
    After `run` the gradients of loss / accumulation are in the parameters' `grad`.
    """

    def __init__(self, forward: Callable[..., Any], module: nn.Module, accumulation: int) -> None:
        self._forward, self._module, self._accumulation = forward, module, accumulation
        for parameter in module.parameters():
            # DeepSpeed's view of it keeps its node of autograd, which belongs to another stream.
            view = getattr(parameter, "_hp_mapping", None)
            if view is not None:
                view.lp_fragment = view.lp_fragment.detach()
        self._stream = torch.cuda.Stream()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Any] = []  # as the graph reads them: its own tensors, and modules
        self._gradients: list[tuple[nn.Parameter, Tensor]] = []
        self._found: tuple[Tensor, dict[str, Tensor]] = (torch.empty(0), {})
        self.captured = 0  # graphs so far

    def forget(self) -> None:
        """Let the next micro-batch be as the first one, of any shape; the memory is freed."""
        self._graph, self._inputs = None, []
        self._gradients, self._found = [], (torch.empty(0), {})

    def run(self, *inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and terms of a micro-batch; captures where there is no graph yet.

        Raises UserError where its tensors have other shapes than the first one's, CaptureError.
        """
        inputs = tuple(map(_on_device, inputs))
        self._check(inputs)
        for mine, given in zip(self._inputs, inputs, strict=True):
            if isinstance(given, Tensor):
                mine.copy_(given, non_blocking=True)
            else:
                assert mine is given  # baked into the graph
        if self._graph is None:
            self._capture()
        for given in inputs:
            if hasattr(given, "refresh"):  # a teacher's 16-bit copy, which the graph reads
                given.refresh()
        assert self._graph is not None
        self._graph.replay()
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        loss, terms = self._found
        return loss.clone(), {name: value.clone() for name, value in terms.items()}

    def _check(self, inputs: tuple[Any, ...]) -> None:
        if not self._inputs:
            self._inputs = [t.clone() if isinstance(t, Tensor) else t for t in inputs]
        mine, given = (
            [tuple(t.shape) for t in part if isinstance(t, Tensor) and t.ndim]
            for part in (self._inputs, inputs)
        )
        if mine != given:
            raise UserError(
                f"cuda_graphs of the ds_config: a micro-batch has shapes {given}, the first had "
                f"{mine}; they must not vary: leave cuda_graphs out"
            )

    def _capture(self) -> None:
        """Capture a graph of `_inputs`; nothing but the graph is left of the passes around it.

        Raises CaptureError where none can be.
        """
        held = _State([self._module, *(m for m in self._inputs if isinstance(m, nn.Module))])
        try:
            self._record()
        except RuntimeError as error:
            held.leave_capture()
            raise CaptureError(str(error)) from error
        finally:
            held.restore()

    def _record(self) -> None:
        """Warm up, and record a graph."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(WARM):
                self._pass()
                self._take_gradients()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Threads of the loader and of NCCL may call CUDA meanwhile.
        with _recording(graph, stream=self._stream, capture_error_mode="thread_local"):
            loss, terms = self._pass()
        self._gradients = self._take_gradients()
        self._found = loss.detach(), {name: value.detach() for name, value in terms.items()}
        self._graph, self.captured = graph, self.captured + 1

    def _pass(self) -> tuple[Tensor, dict[str, Tensor]]:
        loss, terms = self._forward(*self._inputs)
        (loss / self._accumulation).backward()
        return loss, terms

    def _take_gradients(self) -> list[tuple[nn.Parameter, Tensor]]:
        """The parameters that have a gradient, and it; they have none afterwards."""
        found = [(p, p.grad) for p in self._module.parameters() if p.grad is not None]
        for parameter, _ in found:
            parameter.grad = None
        return found


@contextlib.contextmanager
def _recording(graph: torch.cuda.CUDAGraph, **how: Any) -> Iterator[None]:
    """torch.cuda.graph, but what fails inside is raised: at the end of a capture that has failed
    torch raises that it has, over the cause."""
    cause: BaseException | None = None
    try:
        with torch.cuda.graph(graph, **how):
            try:
                yield
            except BaseException as error:
                cause = error
                raise
    except RuntimeError:
        if cause is None:
            raise
        raise cause from None


def _on_device(given: Any) -> Any:
    """A number as a tensor, since a graph would keep the first one's; all else as it is."""
    return torch.full((), given, device="cuda") if isinstance(given, int) else given


class _State:
    """What a pass changes beside gradients: running statistics, and the random numbers drawn."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self._buffers = [b for module in modules for b in module.buffers()]
        self._values = [b.clone() for b in self._buffers]
        self._random = torch.get_rng_state(), torch.cuda.get_rng_state()

    def leave_capture(self) -> None:
        """Free the device's generator of a capture that failed: torch 2.8 leaves it there, where it
        refuses to draw."""
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        generator.graphsafe_set_state(generator.clone_state())

    def restore(self) -> None:
        """Put it back."""
        for buffer, value in zip(self._buffers, self._values, strict=True):
            buffer.copy_(value)
        host, device = self._random
        torch.set_rng_state(host)
        torch.cuda.set_rng_state(device)
