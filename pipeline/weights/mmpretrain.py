"""The names that mmpretrain and mmselfsup give a ViT's weights, as timm's.

Sources: open-mmlab/mmpretrain `models/backbones/vision_transformer.py`; open-mmlab/mmcv
`cnn/bricks/transformer.py` (PatchEmbed, FFN).
"""

import re
from collections.abc import Mapping

from torch import Tensor

FIRST = "patch_embed.projection.weight"  # what no other project calls so
_NAMES = tuple(
    (re.compile(theirs), ours)
    for theirs, ours in (
        (r"patch_embed\.projection\.", "patch_embed.proj."),
        (r"pre_norm\.", "norm_pre."),
        (r"ln1\.", "norm."),
        (r"ln2\.", "fc_norm."),  # where patches are averaged
        (r"layers\.(\d+)\.ln([12])\.", r"blocks.\1.norm\2."),
        (r"layers\.(\d+)\.ffn\.layers\.0\.0\.", r"blocks.\1.mlp.fc1."),
        (r"layers\.(\d+)\.ffn\.layers\.1\.", r"blocks.\1.mlp.fc2."),
        (r"layers\.(\d+)\.(?:attn\.gamma|ffn\.gamma)([12])\.\w+$", r"blocks.\1.ls\2.gamma"),
        (r"layers\.(\d+)\.", r"blocks.\1."),
    )
)


def timms_name(name: str) -> str:
    """timm's name of a weight."""
    for theirs, ours in _NAMES:
        if match := theirs.match(name):
            return match.expand(ours) + name[match.end() :]
    return name


def with_timms_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An encoder's weights under timm's names; what has no such name keeps its own."""
    return {timms_name(name): value for name, value in state.items()}
