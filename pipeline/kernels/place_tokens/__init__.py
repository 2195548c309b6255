"""The full sequence: visible tokens where they belong, mask tokens in hidden places, positions.

    out[b,n,:]   = tokens[b,n,:] + position[n,:]                               n < P (prefix)
    out[b,P+l,:] = (tokens[b,P+inverse[b,l],:] if inverse[b,l] < K else mask_token)
                   + position[P+l,:]                                           l < L

The input of MAE's decoder and of C-MAE's encoder. Backward, with g = d loss / d out:
tokens receive the rows of g they were placed in, mask_token the sum of g over hidden places.
"""

import torch
from torch import Tensor

from pipeline.kernels import backend
from pipeline.kernels.place_tokens.reference import place_tokens_reference


def place_tokens(
    tokens: Tensor, inverse: Tensor, mask_token: Tensor, position: Tensor, *, prefix: int
) -> Tensor:
    """Place tokens among mask tokens and add the position embedding.

    tokens: [B,P+K,D]; inverse: int32 [B,L], inverse[b,l] < K is visible token number
    inverse[b,l]; mask_token: [D]; position: [P+L,D]; prefix: P leading tokens (cls token).
    Returns [B,P+L,D] in tokens' dtype. Gradients: tokens, mask_token, position.
    Raises ValueError for shapes that do not fit.
    """
    batch, count, width = tokens.shape
    if inverse.dtype != torch.int32 or inverse.dim() != 2 or len(inverse) != batch:
        raise ValueError(
            f"inverse must be int32 [{batch},L], not {inverse.dtype} {list(inverse.shape)}"
        )
    length = inverse.shape[1]
    if not 0 <= prefix <= count <= prefix + length:
        raise ValueError(f"{count} tokens, {prefix} of them prefix, do not fit {length} positions")
    if mask_token.shape != (width,) or position.shape != (prefix + length, width):
        raise ValueError(
            f"mask_token must be [{width}] and position [{prefix + length},{width}], not "
            f"{list(mask_token.shape)} and {list(position.shape)}"
        )
    if backend.implementation() == "triton":
        from pipeline.kernels.place_tokens.triton import place_tokens_triton as run
    else:
        run = place_tokens_reference
    return run(tokens, inverse, mask_token, position, prefix=prefix)
