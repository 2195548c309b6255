"""Triton kernels of `token_infonce`: scores are made tile by tile and never stored.

With raw vectors q, k, inverse norms a_i = 1/|q_i|, b_j = 1/|k_j| (fp32) and t = temperature,

    s[i,j] = a_i b_j q_i . k_j / t          lse_i = log sum_j exp s[i,j]    (running maximum)
    w[i,j] = (exp(s[i,j] - lse_i) - 1[j = i + shift]) / (t N)
    u_i = sum_j w[i,j] b_j k_j              dq_i = a_i (u_i - (u_i . q_i) a_i^2 q_i)
    v_j = sum_i w[i,j] a_i q_i              dk_j = b_j (v_j - (v_j . k_j) b_j^2 k_j)

Forward writes lse, the positive and the summed score of each row. Backward makes the scores again:
one kernel owns rows and walks the columns (dq), the other owns columns and walks the rows (dk);
they are the same kernel with the two sides exchanged. A program keeps the sums of all channels (up
to 1024), so a tile's scores are made once, and the channels of `other` that it reads again for the
sums are still in the L1 cache. u_i . q_i = sum_j w[i,j] b_j k_j . q_i comes out of the scores too.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.kernels import backend
from pipeline.kernels.dot_triton import dot
from pipeline.kernels.token_infonce.reference import grouped

PARTS = 4  # accumulators of a backward program: PARTS x 256 channels at most


@triton.jit
def _vectors(ptr, group, n, count, d, group_stride, row_stride, WIDTH: tl.constexpr):
    """Channels d of rows n of a group of vectors, zero beyond count and WIDTH: [n, d]."""
    start = ptr + tl.cast(group, tl.int64) * group_stride
    at = start + n.to(tl.int64)[:, None] * row_stride + d[None, :]
    return tl.load(at, mask=(n < count)[:, None] & (d < WIDTH)[None, :], other=0)


@triton.jit
def _products(x_ptr, y_ptr, group, m, n, x_count, y_count, x_group_stride, x_row_stride,
              y_group_stride, y_row_stride, M: tl.constexpr, N: tl.constexpr,
              WIDTH: tl.constexpr, D: tl.constexpr):  # fmt: skip
    """x_m . y_n of rows m and n, D channels at a time: fp32 [M, N]."""
    products = tl.zeros((M, N), tl.float32)
    for first in range(0, WIDTH, D):
        d = first + tl.arange(0, D)
        x = _vectors(x_ptr, group, m, x_count, d, x_group_stride, x_row_stride, WIDTH)
        y = _vectors(y_ptr, group, n, y_count, d, y_group_stride, y_row_stride, WIDTH)
        products = dot(x, tl.trans(y), products)
    return products


@triton.jit
def inverse_norm_kernel(
    x_ptr, out_ptr, count, group_stride, row_stride,
    WIDTH: tl.constexpr, M: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """out[group, n] = 1 / max(|x|, 1e-12), as F.normalize has it."""
    group = tl.program_id(1)
    n = tl.program_id(0) * M + tl.arange(0, M)
    x = _vectors(x_ptr, group, n, count, tl.arange(0, D), group_stride, row_stride, WIDTH)
    x = x.to(tl.float32)
    norm = tl.maximum(tl.sqrt(tl.sum(x * x, 1)), 1e-12)
    tl.store(out_ptr + group * count + n, 1.0 / norm, mask=n < count)


@triton.jit
def token_infonce_kernel(
    q_ptr, k_ptr, a_ptr, b_ptr, lse_ptr, positive_ptr, sum_ptr, rows, columns, shift, scale,
    q_group_stride, q_row_stride, k_group_stride, k_row_stride,
    WIDTH: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """lse, positive score and sum of scores (all in units of cosine / t) of rows of a group."""
    group = tl.program_id(1)
    i = tl.program_id(0) * M + tl.arange(0, M)
    a = tl.load(a_ptr + group * rows + i, mask=i < rows, other=0) * scale
    maximum = tl.full((M,), -float("inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    summed = tl.zeros((M,), tl.float32)
    positive = tl.zeros((M,), tl.float32)
    for first in range(0, columns, N):
        j = first + tl.arange(0, N)
        b = tl.load(b_ptr + group * columns + j, mask=j < columns, other=0)
        s = _products(q_ptr, k_ptr, group, i, j, rows, columns, q_group_stride, q_row_stride,
                      k_group_stride, k_row_stride, M, N, WIDTH, D)  # fmt: skip
        s *= a[:, None] * b[None, :]
        summed += tl.sum(s, 1)
        positive += tl.sum(tl.where(j[None, :] == (i + shift)[:, None], s, 0.0), 1)
        s = tl.where((j < columns)[None, :], s, -float("inf"))
        larger = tl.maximum(maximum, tl.max(s, 1))
        total = total * tl.exp(maximum - larger) + tl.sum(tl.exp(s - larger[:, None]), 1)
        maximum = larger
    at = group * rows + i
    tl.store(lse_ptr + at, maximum + tl.log(total), mask=i < rows)
    tl.store(positive_ptr + at, positive, mask=i < rows)
    tl.store(sum_ptr + at, summed, mask=i < rows)


@triton.jit
def _add_product(total, w, other_ptr, group, n, count, d, group_stride, row_stride,
                 WIDTH: tl.constexpr):  # fmt: skip
    """total + w @ channels d of vectors n."""
    return dot(w, _vectors(other_ptr, group, n, count, d, group_stride, row_stride, WIDTH), total)


@triton.jit
def _store_gradient(total, own_ptr, out_ptr, group, m, count, d, along, scale, own_group_stride,
                    own_row_stride, out_group_stride, out_row_stride,
                    WIDTH: tl.constexpr):  # fmt: skip
    """Channels d of a gradient: scale (total - along own)."""
    own = _vectors(own_ptr, group, m, count, d, own_group_stride, own_row_stride, WIDTH)
    gradient = (total - along[:, None] * own.to(tl.float32)) * scale[:, None]
    start = out_ptr + tl.cast(group, tl.int64) * out_group_stride
    at = start + m.to(tl.int64)[:, None] * out_row_stride + d[None, :]
    mask = (m < count)[:, None] & (d < WIDTH)[None, :]
    tl.store(at, gradient.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def token_infonce_backward_kernel(
    own_ptr, other_ptr, own_norm_ptr, other_norm_ptr, lse_ptr, grad_ptr, out_ptr,
    own_count, other_count, shift, scale, factor,
    own_group_stride, own_row_stride, other_group_stride, other_row_stride,
    out_group_stride, out_row_stride,
    OWNS_ROWS: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    D: tl.constexpr, OUT: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """PARTS x OUT channels of the gradient of vectors `own` (queries if OWNS_ROWS, else keys)."""
    group = tl.program_id(1)
    m = tl.program_id(0) * M + tl.arange(0, M)
    d = tl.program_id(2) * OUT * PARTS + tl.arange(0, OUT)
    norm = tl.load(own_norm_ptr + group * own_count + m, mask=m < own_count, other=0)
    if OWNS_ROWS:
        partner = m + shift
        lse = tl.load(lse_ptr + group * own_count + m, mask=m < own_count, other=0)[:, None]
    else:
        partner = m - shift
    along = tl.zeros((M,), tl.float32)
    total0 = tl.zeros((M, OUT), tl.float32)
    total1 = tl.zeros((M, OUT), tl.float32)
    total2 = tl.zeros((M, OUT), tl.float32)
    total3 = tl.zeros((M, OUT), tl.float32)
    for start in range(0, other_count, N):
        n = start + tl.arange(0, N)
        inside = n < other_count
        b = tl.load(other_norm_ptr + group * other_count + n, mask=inside, other=0)
        if not OWNS_ROWS:
            lse = tl.load(lse_ptr + group * other_count + n, mask=inside, other=0)[None, :]
        cosine = _products(own_ptr, other_ptr, group, m, n, own_count, other_count,
                           own_group_stride, own_row_stride, other_group_stride,
                           other_row_stride, M, N, WIDTH, D)  # fmt: skip
        cosine *= norm[:, None] * b[None, :]
        w = tl.exp(cosine * scale - lse)
        w -= tl.where(n[None, :] == partner[:, None], 1.0, 0.0)
        w = tl.where(inside[None, :], w, 0.0)
        along += tl.sum(w * cosine, 1)
        w = (w * b[None, :]).to(other_ptr.dtype.element_ty)
        total0 = _add_product(total0, w, other_ptr, group, n, other_count, d,
                              other_group_stride, other_row_stride, WIDTH)  # fmt: skip
        if PARTS > 1:
            total1 = _add_product(total1, w, other_ptr, group, n, other_count, d + OUT,
                                  other_group_stride, other_row_stride, WIDTH)  # fmt: skip
        if PARTS > 2:
            total2 = _add_product(total2, w, other_ptr, group, n, other_count, d + 2 * OUT,
                                  other_group_stride, other_row_stride, WIDTH)  # fmt: skip
        if PARTS > 3:
            total3 = _add_product(total3, w, other_ptr, group, n, other_count, d + 3 * OUT,
                                  other_group_stride, other_row_stride, WIDTH)  # fmt: skip
    along *= norm
    norm *= factor * tl.load(grad_ptr)
    _store_gradient(total0, own_ptr, out_ptr, group, m, own_count, d, along, norm,
                    own_group_stride, own_row_stride, out_group_stride, out_row_stride,
                    WIDTH)  # fmt: skip
    if PARTS > 1:
        _store_gradient(total1, own_ptr, out_ptr, group, m, own_count, d + OUT, along, norm,
                        own_group_stride, own_row_stride, out_group_stride, out_row_stride,
                        WIDTH)  # fmt: skip
    if PARTS > 2:
        _store_gradient(total2, own_ptr, out_ptr, group, m, own_count, d + 2 * OUT, along, norm,
                        own_group_stride, own_row_stride, out_group_stride, out_row_stride,
                        WIDTH)  # fmt: skip
    if PARTS > 3:
        _store_gradient(total3, own_ptr, out_ptr, group, m, own_count, d + 3 * OUT, along, norm,
                        own_group_stride, own_row_stride, out_group_stride, out_row_stride,
                        WIDTH)  # fmt: skip


def _tile(dtype: torch.dtype, width: int) -> dict[str, int]:
    """Rows and columns of a tile of scores, and the channels multiplied at a time."""
    size = 32 if dtype == torch.float32 else 64
    d = min(size, max(16, triton.next_power_of_2(width)))
    tile = {"WIDTH": width, "M": size, "N": size, "D": d, "num_warps": 4}
    # Channels that are cut off cost the registers of masks, which a larger tile has not left.
    return {**tile, "N": 128, "num_warps": 8} if size == 64 and width % 64 == 0 else tile


def _backward_tile(dtype: torch.dtype, width: int, capability: int = 90) -> dict[str, int]:
    """As _tile, and the gradient's channels: PARTS of OUT in one program, so that its scores are
    made once; above 1024 channels several programs share them. Sizes that do not spill, but for
    768 channels on an H100: twice the rows spill 168 bytes a thread; forward and backward take
    936 us where they took 1566 (256 images of ViT-B, 196 positions).
    """
    tile = _tile(dtype, width)
    tile["N"] = tile["M"]
    out = min(256, max(16, triton.next_power_of_2(width)))
    if width > 256 and -(-width // 128) * 128 < -(-width // 256) * 256 <= PARTS * 128:
        out = 128
    parts = min(PARTS, triton.cdiv(width, out))
    stages = 2
    if out * parts > 256:
        stages = 2 if dtype == torch.float32 else 3
        if dtype == torch.float32 or out * parts != width or width > 384:
            tile["M"] //= 2
        fits = 384 if dtype == torch.float32 else 768
        tile["N"] = 32 if out * parts <= fits else 16
        # For an sm_80 they would spill 288 bytes, and for an sm_100 Triton makes an empty kernel.
        if capability // 10 == 9 and dtype != torch.float32 and 512 <= out * parts == width <= 768:
            tile["M"], stages = 64, 4
    return {**tile, "OUT": out, "PARTS": parts, "num_warps": 8, "num_stages": stages}


def _inverse_norms(x: Tensor) -> Tensor:
    """1 / |x| of [groups, count, D], any strides of the first two: fp32 [groups, count]."""
    groups, count, width = x.shape
    out = x.new_empty(groups, count, dtype=torch.float32)
    d = max(16, triton.next_power_of_2(width))
    inverse_norm_kernel[(triton.cdiv(count, 4), groups)](
        x, out, count, x.stride(0), x.stride(1), WIDTH=width, M=4, D=d, num_warps=4
    )
    return out


@torch.library.custom_op("relaxmim::token_infonce", mutates_args=())
def _token_infonce(
    query: Tensor, key: Tensor, temperature: float, negatives: str, offset: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, similarity, lse, inverse norms of queries, of keys)."""
    q, k, shift = grouped(query, key, negatives, offset)
    groups, rows, width = q.shape
    columns = k.shape[1]
    a, b = _inverse_norms(q), _inverse_norms(k)
    lse, positive, summed = torch.empty_like(a), torch.empty_like(a), torch.empty_like(a)
    tile = _tile(q.dtype, width)
    token_infonce_kernel[(triton.cdiv(rows, tile["M"]), groups)](
        q, k, a, b, lse, positive, summed, rows, columns, shift, 1 / temperature,
        *q.stride()[:2], *k.stride()[:2], **tile,
    )  # fmt: skip
    loss = (lse - positive).mean()
    negative = (summed - positive).sum() / max(groups * rows * (columns - 1), 1)
    similarity = torch.stack([positive.mean(), negative]) * temperature
    return loss, similarity, lse, a, b


@_token_infonce.register_fake
def _(
    query: Tensor, key: Tensor, temperature: float, negatives: str, offset: int
) -> tuple[Tensor, ...]:
    q, k, _ = grouped(query, key, negatives, offset)
    single = query.new_empty((), dtype=torch.float32)
    a = query.new_empty(q.shape[:2], dtype=torch.float32)
    b = query.new_empty(k.shape[:2], dtype=torch.float32)
    return single, query.new_empty(2, dtype=torch.float32), torch.empty_like(a), a, b


@torch.library.custom_op("relaxmim::token_infonce_backward", mutates_args=())
def _token_infonce_backward(
    grad: Tensor, query: Tensor, key: Tensor, lse: Tensor, a: Tensor, b: Tensor,
    temperature: float, negatives: str, offset: int, want_query: bool, want_key: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(d query, d key); empty where not wanted. Keys outside every group have gradient 0."""
    q, k, shift = grouped(query, key, negatives, offset)
    contiguous = torch.contiguous_format
    query_grad = torch.zeros_like(query if want_query else query[:0], memory_format=contiguous)
    key_grad = torch.zeros_like(key if want_key else key[:0], memory_format=contiguous)
    tile = _backward_tile(q.dtype, q.shape[2], backend.capability(q.device))
    programs = triton.cdiv(q.shape[2], tile["OUT"] * tile["PARTS"])
    scale, factor = 1 / temperature, 1 / (temperature * q.shape[0] * q.shape[1])
    grad = grad.contiguous()

    def launch(own: Tensor, other: Tensor, own_norm: Tensor, other_norm: Tensor, to: Tensor,
               rows: bool) -> None:  # fmt: skip
        grid = (triton.cdiv(own.shape[1], tile["M"]), own.shape[0], programs)
        token_infonce_backward_kernel[grid](
            own, other, own_norm, other_norm, lse, grad, to, own.shape[1], other.shape[1], shift,
            scale, factor, *own.stride()[:2], *other.stride()[:2], *to.stride()[:2],
            OWNS_ROWS=rows, **tile,
        )  # fmt: skip

    if want_query:
        launch(q, k, a, b, grouped(query_grad, key, negatives, offset)[0], True)
    if want_key:
        launch(k, q, b, a, grouped(query, key_grad, negatives, offset)[1], False)
    return query_grad, key_grad


@_token_infonce_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, lse: Tensor, a: Tensor, b: Tensor,
    temperature: float, negatives: str, offset: int, want_query: bool, want_key: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    contiguous = torch.contiguous_format
    return (
        torch.empty_like(query if want_query else query[:0], memory_format=contiguous),
        torch.empty_like(key if want_key else key[:0], memory_format=contiguous),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, *ctx.settings = inputs
    ctx.save_for_backward(query, key, *output[2:])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    want_query, want_key = ctx.needs_input_grad[:2]
    query_grad, key_grad = _token_infonce_backward(
        grad, *ctx.saved_tensors, *ctx.settings, want_query, want_key
    )
    return query_grad if want_query else None, key_grad if want_key else None, None, None, None


_token_infonce.register_autograd(_backward, setup_context=_setup)


def token_infonce_triton(
    query: Tensor, key: Tensor, *, temperature: float, negatives: str, offset: int
) -> tuple[Tensor, Tensor]:
    """`token_infonce` by the kernel; arguments already checked.

    Queries and keys of different dtypes (a bf16 student, an fp32 teacher) meet in the wider one.
    """
    dtype = torch.promote_types(query.dtype, key.dtype)
    query, key = query.to(dtype).contiguous(), key.to(dtype).contiguous()
    loss, similarity, *_ = _token_infonce(query, key, temperature, negatives, offset)
    return loss, similarity
