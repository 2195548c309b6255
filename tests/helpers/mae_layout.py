"""facebookresearch/mae's names: random weights, and that architecture written out plainly."""

import oracle
import torch
from tiny import DECODER_HEADS, HEADS, PATCH


def random_mae_state(width=16, decoder=8, depth=2, decoder_depth=1, patch=4, grid=4):
    """A state dict with the keys and shapes of facebookresearch/mae and random values."""
    torch.manual_seed(3)
    shapes = {
        "cls_token": (1, 1, width), "mask_token": (1, 1, decoder),
        "patch_embed.proj.weight": (width, 3, patch, patch), "patch_embed.proj.bias": (width,),
        "norm.weight": (width,), "norm.bias": (width,),
        "decoder_embed.weight": (decoder, width), "decoder_embed.bias": (decoder,),
        "decoder_norm.weight": (decoder,), "decoder_norm.bias": (decoder,),
        "decoder_pred.weight": (3 * patch**2, decoder), "decoder_pred.bias": (3 * patch**2,),
    }  # fmt: skip
    for prefix, count, d in (("blocks", depth, width), ("decoder_blocks", decoder_depth, decoder)):
        for i in range(count):
            for name, shape in {
                "norm1": (d,), "norm2": (d,), "attn.qkv": (3 * d, d), "attn.proj": (d, d),
                "mlp.fc1": (4 * d, d), "mlp.fc2": (d, 4 * d),
            }.items():  # fmt: skip
                shapes[f"{prefix}.{i}.{name}.weight"] = shape
                shapes[f"{prefix}.{i}.{name}.bias"] = shape[:1]
    state = {k: torch.randn(s) * 0.2 for k, s in shapes.items()}
    state["pos_embed"] = oracle.sincos(grid, grid, width)[None]
    state["decoder_pos_embed"] = oracle.sincos(grid, grid, decoder)[None]
    return state


def plain_mae(state, image, visible):
    """That architecture on one image, from its own key names: predictions [L, p·p·3]."""
    names = {
        "decoder_embed": "measure.decoder.embed", "decoder_norm": "measure.decoder.norm",
        "decoder_pred": "measure.decoder.head", "decoder_blocks": "measure.decoder.blocks",
        "mask_token": "measure.decoder.mask_token",
    }  # fmt: skip
    w = {}
    for key, value in state.items():
        first, dot, rest = key.partition(".")
        w[names.get(first, f"encoder.{first}") + dot + rest] = value
    w["measure.decoder.mask_token"] = w["measure.decoder.mask_token"].reshape(-1)
    z = oracle.encode(w, image, visible, patch=PATCH, heads=HEADS)
    return oracle.decode(w, z, visible, (4, 4), DECODER_HEADS)
