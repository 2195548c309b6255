"""InfoNCE over tokens (Eq. 9-10 of the paper), streaming: no N x N matrix is ever held.

    s[i,j] = cosine(query i, key j),  p[i,:] = softmax(s[i,:] / temperature)
    loss   = mean over i of  -log p[i, positive(i)]
    d loss / d cosine vectors:  dq_i = (sum_j p[i,j] k_j - k_positive) / (temperature N),
                                dk_j =  sum_i (p[i,j] - 1[j = positive(i)]) q_i / (temperature N)

Which keys query (b, t) meets is the choice of `negatives`; every choice is the same computation
on [groups, rows, D] queries and [groups, columns, D] keys, positive of row n in column n + shift:

    all       one group,  rows (b, t), columns (g, t)    shift = offset * T
    position  T groups,   rows b,      columns g         shift = offset
    image     B groups,   rows t,      columns t         shift = 0
"""

from torch import Tensor

from pipeline.kernels import backend
from pipeline.kernels.token_infonce.reference import NEGATIVES, token_infonce_reference


def token_infonce(
    query: Tensor, key: Tensor, *, temperature: float, negatives: str, offset: int
) -> tuple[Tensor, Tensor]:
    """InfoNCE of every query token against its positive and the chosen negatives.

    query: [B,T,D]; key: [G,T,D], those of the global batch; the positive of query (b,t) is key
    (offset+b, t). negatives: `all` (every token of every image), `position` (the same position in
    every image), `image` (the other tokens of the same image).
    Returns (loss: float32 scalar, similarity: float32 [2], the mean cosine of positive pairs and
    of negative pairs, 0 where there is none; without gradient). Computed in fp32.
    Gradients: query, key. Raises ValueError for shapes that do not fit.
    """
    if query.dim() != 3 or key.dim() != 3 or query.shape[1:] != key.shape[1:]:
        raise ValueError(
            f"query [B,T,D] and key [G,T,D] do not fit: {list(query.shape)}, {list(key.shape)}"
        )
    if negatives not in NEGATIVES:
        raise ValueError(f"negatives must be one of {', '.join(NEGATIVES)}, not {negatives!r}")
    if offset < 0 or offset + len(query) > len(key):
        raise ValueError(
            f"offset {offset} and {len(query)} images leave the {len(key)} images of key"
        )
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    if backend.implementation() == "triton":
        from pipeline.kernels.token_infonce.triton import token_infonce_triton as run
    else:
        run = token_infonce_reference
    return run(query, key, temperature=temperature, negatives=negatives, offset=offset)
