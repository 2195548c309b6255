"""What each project's code fixes that neither the names of its weights nor timm's name of the
architecture say: heads, the norms' eps, the pixels' mean and std, and how positions are resized.

Sources: facebookresearch/moco-v3 `vits.py`, `main_moco.py`; facebookresearch/mae `models_mae.py`,
`util/pos_embed.py`; facebookresearch/dino `vision_transformer.py`; facebookresearch/dinov2
`dinov2/models/vision_transformer.py`, `dinov2/hub/backbones.py`; facebookresearch/ijepa
`src/models/vision_transformer.py`; microsoft/unilm `beit/modeling_pretrain.py`; microsoft/SimMIM
`models/simmim.py`, `data/data_simmim.py`;
open-mmlab/mmpretrain `models/backbones/vision_transformer.py`, `mocov3.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.weights.files import EMA as EMA_WORDS
from pipeline.weights.files import Found
from pipeline.weights.positions import is_sincos, square

# Projects outside timm: LayerNorm's eps and the activation of every one of them.
EPS = 1e-6


@dataclass(frozen=True)
class Layout:
    """A project's encoders.

    heads: by width. imagenet: pixels are normalised by ImageNet's mean and std; else as timm's
    configuration of the architecture says. positions: how a table is resized; `exact`: the sin-cos
    table is recomputed; `bicubic`: bicubic to the new size; `scale`: bicubic by DINO's scale factor
    of (new + 0.1) / old; `timm`: antialiased bicubic.
    """

    name: str
    heads: Mapping[int, int] = field(default_factory=dict)
    imagenet: bool = True
    positions: Literal["exact", "bicubic", "scale", "timm"] = "timm"
    fixed: bool = True  # whether eps and activation are those of its code


TIMM = Layout("timm", imagenet=False, fixed=False)
OURS = Layout("relaxmim", imagenet=False, positions="exact", fixed=False)
MOCO_V3 = Layout("MoCo v3", {384: 12, 768: 12}, positions="exact")
MAE = Layout("MAE", {768: 12, 1024: 16, 1280: 16}, positions="bicubic")
DINO = Layout("DINO", {192: 3, 384: 6, 768: 12, 1024: 16}, positions="scale")
# Layer scale; timm's names of the architectures say the rest.
DINO_V2 = Layout("DINOv2", {384: 6, 768: 12, 1024: 16, 1536: 24}, positions="scale", fixed=False)
DINO_V2_REGISTERS = replace(DINO_V2, positions="timm")  # as those models are built
DEIT_III = Layout("DeiT III", {384: 6, 768: 12, 1024: 16, 1280: 16}, positions="bicubic")
I_JEPA = Layout(
    "I-JEPA", {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16}, positions="bicubic"
)
MMPRETRAIN = Layout("mmpretrain", {**DINO.heads, 1280: 16}, positions="bicubic")
# Of MoCo v3's row-first positions; its MAE has them too, and as many heads at 768.
MMPRETRAIN_MOCO_V3 = Layout("mmpretrain", MOCO_V3.heads, positions="bicubic")
BEIT = Layout("BEiT", {768: 12, 1024: 16}, imagenet=False, fixed=False)
# BEiT's code, but ImageNet's pixels.
SIM_MIM = Layout("SimMIM", BEIT.heads, fixed=False)
OTHER = Layout("another project", fixed=False)

# Words around a timm model that name no project.
_WRAPPERS = {"module", "model", "state_dict", *EMA_WORDS}
# Parts that a plain ViT has not; the architecture's name, and so timm, says the rest of them.
_NOT_PLAIN = ("reg_token", "register_tokens", "storage_tokens", "norm_pre.", "attn_pool.", "dist_",
              "visual.", "class_embedding", "patch_embed.backbone.")  # fmt: skip
_NOT_PLAIN_BLOCK = (".q_bias", ".q_norm.weight", ".q_proj.weight")
_SCALE = (".ls1.gamma", ".gamma_1")


def layout_of(found: Found, content: Any, arch: str = "") -> Layout:
    """Whose file it is, by where its encoder is and what is beside it. arch: timm's name of it, the
    tag of which (`.augreg_in21k`) says whose weights they are where the file does not."""
    words, state = set(found.words), found.state
    if found.mmpretrain:
        whose = MMPRETRAIN_MOCO_V3 if _row_first(state) else MMPRETRAIN
        return replace(whose, imagenet="." not in arch, fixed="norm_pre.weight" not in state)
    if "base_encoder" in words or "momentum_encoder" in words or _row_first(state):
        return MOCO_V3
    if "decoder_embed.weight" in state:
        return MAE
    if any(k.endswith("relative_position_bias_table") for k in state):
        # SimMIM's encoder is below `encoder.`, beside a decoder of one convolution.
        return SIM_MIM if found.around.keys() & {"decoder.0.weight"} else BEIT
    scaled = any(k.endswith(_SCALE) for k in state)
    if "storage_tokens" in state:  # DINOv3's
        return TIMM
    if scaled and (words & {"teacher", "student", "backbone"} or _dinov2s_mask_token(state)):
        return DINO_V2_REGISTERS if "register_tokens" in state else DINO_V2
    if any(k.startswith(_NOT_PLAIN) or k.endswith(_NOT_PLAIN_BLOCK) for k in state):
        return TIMM
    beside = content if isinstance(content, dict) else {}
    if "target_encoder" in words or ("encoder" in words and "target_encoder" in beside):
        return I_JEPA
    if words & {"teacher", "student"} or "masked_embed" in state:  # which is iBOT's
        return DINO
    if "." in arch or "cls_token" not in state:  # not what a word alone may name
        return TIMM
    if "backbone" in words:
        return DINO
    whole = bool(found.words) and isinstance(beside.get(found.words[0]), dict)  # no prefix of names
    if whole and found.words[0] in ("model", "model_ema") and words <= _WRAPPERS:
        return DEIT_III if scaled else MAE  # and DeiT, which has MAE's code
    return TIMM if words <= _WRAPPERS else OTHER


def _row_first(state: Mapping[str, Tensor]) -> bool:
    """Whether the positions are MoCo v3's, which no other project has: its encoders are left under
    bare names by its linear probe."""
    table = state.get("pos_embed")
    plain = table is not None and table.is_floating_point() and not table.is_sparse
    if table is None or not plain or table.is_meta or (side := square(table.shape[1] - 1)) is None:
        return False
    return side > 1 and is_sincos(table[0, 1:], (side, side)) is True


def _dinov2s_mask_token(state: Mapping[str, Tensor]) -> bool:
    """Whether a mask token [1, D] is beside a position table, as in DINOv2's bare files; timm's
    have none, and DINOv3 has no table."""
    token = state.get("mask_token")
    return token is not None and token.ndim == 2 and "pos_embed" in state


def refuse_stem(found: Found, path: object) -> None:
    """Refuse MoCo v3's convolutional stem, which timm does not have."""
    if "patch_embed.proj.0.weight" in found.state:
        raise UserError(
            f"{path}: a ViT with MoCo v3's convolutional stem (vit_conv_*) is not timm's"
        )


def fixed_options(layout: Layout, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Keywords of timm.create_model that the project's code fixes for these weights: heads."""
    first = state.get("patch_embed.proj.weight")
    heads = None if first is None else layout.heads.get(len(first))
    return {} if heads is None else {"num_heads": heads}


def mae_decoder_heads(state: Mapping[str, Tensor]) -> int:
    """Heads of the decoder of facebookresearch/mae's models (width 512); 0 where that is open."""
    return 16 if state["decoder_embed.weight"].shape[0] == 512 else 0


def fix_norms(vit: nn.Module, layout: Layout, where: str) -> None:
    """Give the norms the project's eps; UserError where the architecture's activation is not its.

    where: what the sentence is about.
    """
    if not layout.fixed:
        return
    for part in vit.modules():
        if isinstance(part, nn.LayerNorm):
            part.eps = EPS
        act = getattr(part, "act", None)
        if act is not None and not (isinstance(act, nn.GELU) and act.approximate == "none"):
            raise UserError(f"{where} uses {act}, {layout.name} exact GELU; choose another --arch")
