"""Compiled transformer blocks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

# All blocks of an encoder or decoder are one function to torch, which compiles it once for each
# shape and way of calling it (views of two lengths, the decoder's first and last block) and
# silently runs it uncompiled past its own limit, 8.
RECOMPILES = 64


def compile_blocks(objective: nn.Module, *, may_fail: bool = False) -> None:
    """Let the blocks compile at their first call. may_fail: a block that cannot be compiled runs as
    it is, with torch's warning."""
    torch._dynamo.config.recompile_limit = RECOMPILES
    torch._dynamo.config.suppress_errors = may_fail
    for part in objective.modules():
        for block in getattr(part, "blocks", ()):
            block.compile(dynamic=False)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Within it compiled blocks run as they are: what is run now and then, in fp32, without
    gradients and with shapes of its own, would compile for longer than it runs."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and its import takes seconds
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
