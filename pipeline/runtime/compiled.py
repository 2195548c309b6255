"""Compiled transformer blocks."""

from __future__ import annotations

import torch
from torch import nn

# All blocks of an encoder or decoder are one function to torch, which compiles it once for each
# shape and way of calling it (views of two lengths, the decoder's first and last block, probes and
# pictures without gradients) and silently runs it uncompiled past its own limit, 8.
RECOMPILES = 64


def compile_blocks(objective: nn.Module, *, may_fail: bool = False) -> None:
    """Let the blocks compile at their first call. may_fail: a block that cannot be compiled runs as
    it is, with torch's warning."""
    torch._dynamo.config.recompile_limit = RECOMPILES
    torch._dynamo.config.suppress_errors = may_fail
    for part in objective.modules():
        for block in getattr(part, "blocks", ()):
            block.compile(dynamic=False)
