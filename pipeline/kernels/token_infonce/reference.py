"""`token_infonce` in PyTorch: the CPU path, and what the kernel is tested against."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

NEGATIVES = ("all", "position", "image")
CHUNK = 2**21  # similarities held at a time (8 MiB in fp32)


def grouped(query: Tensor, key: Tensor, negatives: str, offset: int) -> tuple[Tensor, Tensor, int]:
    """Views [groups,rows,D] and [groups,columns,D] of the tokens, and the shift."""
    if negatives == "all":
        return query.flatten(0, 1)[None], key.flatten(0, 1)[None], offset * query.shape[1]
    if negatives == "position":
        return query.transpose(0, 1), key.transpose(0, 1), offset
    return query, key[offset : offset + len(query)], 0


def token_infonce_reference(
    query: Tensor, key: Tensor, *, temperature: float, negatives: str, offset: int
) -> tuple[Tensor, Tensor]:
    """`token_infonce` in PyTorch; arguments already checked."""
    exact = torch.promote_types(query.dtype, torch.float32)
    q, k, shift = grouped(query, key, negatives, offset)
    q, k = F.normalize(q.to(exact), dim=-1), F.normalize(k.to(exact), dim=-1)
    loss, similarity = _StreamedInfoNCE.apply(q, k, shift, 1 / temperature)
    return loss, similarity


class _StreamedInfoNCE(torch.autograd.Function):
    """A block of rows against all columns at a time.

    The loss is a scalar, so its gradient is known up to one factor while a block's softmax is at
    hand: it is summed there, three matrix products instead of the four of a recomputation.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, shift: int, scale: float) -> tuple[Tensor, Tensor]:
        groups, rows, _ = q.shape
        columns = k.shape[1]
        # New memory whatever the strides of q and k: rows of a group are contiguous in it.
        q_grad = torch.empty_like(q, memory_format=torch.contiguous_format)
        k_grad = torch.zeros_like(k, memory_format=torch.contiguous_format)
        want_q, want_k = ctx.needs_input_grad[:2]
        loss = q.new_zeros(())
        device = q.device.type if q.device.type != "meta" else "cpu"  # meta knows no autocast
        with torch.autocast(device, enabled=False):
            for group, row in _blocks(groups, rows, columns):
                keys, queries = k[group], q[group, row]
                p = torch.bmm(queries, keys.mT).mul_(scale)
                positive = p.diagonal(shift + row.start, dim1=1, dim2=2)
                loss += _softmax_(p, positive)
                positive -= 1
                if want_q:
                    torch.bmm(p, keys, out=q_grad[group, row])
                if want_k:
                    k_grad[group].baddbmm_(p.mT, queries)
        factor = scale / (groups * rows)
        ctx.save_for_backward(
            q_grad.mul_(factor) if want_q else None, k_grad.mul_(factor) if want_k else None
        )
        similarity = _similarity(q, k, shift)
        ctx.mark_non_differentiable(similarity)
        # The quotient itself, not `.to` its own dtype: Dynamo of torch 2.11 takes one tensor under
        # two names for two outputs, and its gradient is zero then (pytorch issue 180642).
        return loss / (groups * rows), similarity

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q_grad, k_grad = ctx.saved_tensors
        return (
            None if q_grad is None else q_grad * grad,
            None if k_grad is None else k_grad * grad,
            None,
            None,
        )


def _blocks(groups: int, rows: int, columns: int) -> list[tuple[slice, slice]]:
    """(groups, rows) of each block: whole groups while they fit CHUNK, else rows of one group."""
    together = max(1, CHUNK // (rows * columns))
    height = min(rows, max(1, CHUNK // columns))
    return [
        (slice(g, min(g + together, groups)), slice(r, min(r + height, rows)))
        for g in range(0, groups, together)
        for r in range(0, rows, height)
    ]


def _softmax_(logits: Tensor, positive: Tensor) -> Tensor:
    """Softmax over the last axis in place; returns the sum of -log softmax at `positive`.

    positive is a view of logits, so it is read before and after it changes.
    """
    maximum = logits.amax(-1, keepdim=True)
    chosen = positive.sum()
    logits.sub_(maximum).exp_()
    total = logits.sum(-1, keepdim=True)
    logits.div_(total)
    return (maximum + total.log()).sum() - chosen


def _similarity(q: Tensor, k: Tensor, shift: int) -> Tensor:
    """Mean cosine of positive and of negative pairs; the sum over all pairs is a dot of sums."""
    groups, rows, _ = q.shape
    pairs = groups * rows
    positive = (q * k[:, shift : shift + rows]).sum()
    every = (q.sum(1) * k.sum(1)).sum()
    negatives = pairs * (k.shape[1] - 1)
    return torch.stack([positive / pairs, (every - positive) / max(negatives, 1)])
