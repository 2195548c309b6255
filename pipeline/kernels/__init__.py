"""Fused masking ops: each a PyTorch reference (the CPU path) and a Triton kernel.

`use` chooses once per process. An op is a folder: in `__init__` its equation and the public
function, which checks and dispatches; `reference.py`; `triton.py`, imported only when chosen.
"""

from pipeline.kernels import philox
from pipeline.kernels.backend import implementation, use
from pipeline.kernels.color_jitter import color_jitter, jitter_parameters
from pipeline.kernels.cutmix import cutmix
from pipeline.kernels.embed_visible import embed_visible
from pipeline.kernels.patch_loss import patch_loss
from pipeline.kernels.patch_loss.reference import patch_target
from pipeline.kernels.place_tokens import place_tokens
from pipeline.kernels.sample_masks import Masks, sample_masks
from pipeline.kernels.select_visible import select_visible
from pipeline.kernels.token_infonce import token_infonce

__all__ = [
    "Masks",
    "color_jitter",
    "cutmix",
    "embed_visible",
    "implementation",
    "jitter_parameters",
    "patch_loss",
    "patch_target",
    "philox",
    "place_tokens",
    "sample_masks",
    "select_visible",
    "token_infonce",
    "use",
]
