"""token_infonce: reference against loops and cross-entropy, kernel against reference, streaming."""

import pytest
import torch
import torch.nn.functional as F
from kernels_testing import (
    DEVICE,
    assert_agree,
    assert_gradients,
    assert_implementations_agree,
    gradients,
    noise,
    using,
)

from pipeline import kernels

# images of the query, of the key, tokens, channels, offset
SIZES = [(3, 7, 5, 48, 2), (1, 1, 5, 16, 0), (2, 4, 1, 20, 1), (2, 2, 40, 33, 0)]
NEGATIVES = ["all", "position", "image"]


def leaves(b, g, t, d, dtype=torch.float32):
    return {"query": noise(b, t, d, dtype=dtype), "key": noise(g, t, d, dtype=dtype, seed=1)}


def op(negatives, offset, temperature=0.2):
    return lambda query, key: kernels.token_infonce(
        query, key, temperature=temperature, negatives=negatives, offset=offset
    )[0]


def candidates(b, t, shape, negatives, offset):
    """(image, token) of the keys that query (b, t) meets."""
    images, tokens = shape
    if negatives == "all":
        return [(g, u) for g in range(images) for u in range(tokens)]
    if negatives == "position":
        return [(g, t) for g in range(images)]
    return [(offset + b, u) for u in range(tokens)]


def loop(negatives, offset, temperature=0.2):
    """Float64, one pair after the other; also the mean cosines."""

    def loss(query, key, similarities=False):
        losses, positives, others = [], [], []
        for b in range(query.shape[0]):
            for t in range(query.shape[1]):
                cosine = {
                    at: (query[b, t] @ key[at]) / (query[b, t].norm() * key[at].norm())
                    for at in candidates(b, t, key.shape[:2], negatives, offset)
                }
                own = cosine[offset + b, t]
                total = sum((c / temperature).exp() for c in cosine.values())
                losses.append(total.log() - own / temperature)
                positives.append(own)
                others += [c for at, c in cosine.items() if at != (offset + b, t)]
        if similarities:
            zero = query.new_zeros(())
            return torch.stack(
                [torch.stack(x).mean() if x else zero for x in (positives, others)]
            ).detach()
        return torch.stack(losses).mean()

    return loss


@pytest.mark.parametrize("negatives", NEGATIVES)
@pytest.mark.parametrize("size", SIZES[:3])
def test_reference_against_a_loop(size, negatives):
    *shape, offset = size
    assert_gradients(op(negatives, offset), loop(negatives, offset), leaves(*shape))


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("negatives", NEGATIVES)
@pytest.mark.parametrize("size", SIZES[:3])
def test_mean_similarities(size, negatives, implementation):
    *shape, offset = size
    query, key = leaves(*shape).values()
    with using(implementation):
        _, similarity = kernels.token_infonce(
            query.requires_grad_(), key, temperature=0.2, negatives=negatives, offset=offset
        )
    expected = loop(negatives, offset)(query.double(), key.double(), similarities=True)
    assert similarity.dtype == torch.float32
    assert not similarity.requires_grad
    assert_agree("similarity", similarity, expected, 1e-5)


@pytest.mark.parametrize("chunk", [1, 50, 10_000])
def test_streaming_equals_cross_entropy_whatever_the_chunk(chunk, monkeypatch):
    import sys

    import pipeline.kernels.token_infonce  # noqa: F401

    monkeypatch.setattr(sys.modules["pipeline.kernels.token_infonce.reference"], "CHUNK", chunk)
    query, key = noise(30, 12), noise(50, 12, seed=1)

    def materialised(query, key):
        q, k = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
        return F.cross_entropy(q @ k.T / 0.1, torch.arange(8, 38, device=DEVICE))

    def streaming(query, key):
        return op("all", 8, 0.1)(query[:, None], key[:, None])

    assert_gradients(streaming, materialised, {"query": query, "key": key})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("negatives", NEGATIVES)
@pytest.mark.parametrize("size", SIZES)
def test_kernel_against_reference(size, negatives, dtype):
    *shape, offset = size
    # Without a negative the gradient is exactly 0: what is left of terms of 1 / (t N |q|) = 0.25.
    alone = negatives == "position" and shape[1] == 1
    function, floor = op(negatives, offset), 0.01 if alone else 1e-4
    assert_implementations_agree(function, leaves(*shape, dtype), floor)


def test_kernel_over_several_tiles_of_rows_columns_and_channels():
    assert_implementations_agree(op("all", 1), leaves(2, 4, 45, 160))


@pytest.mark.parametrize(
    ("width", "dtype"),
    [
        (300, torch.bfloat16),
        (500, torch.float32),
        (768, torch.bfloat16),
        (1000, torch.bfloat16),
        (1100, torch.float32),
    ],
)
def test_kernel_whatever_the_parts_of_the_channels(width, dtype):
    """Two to four sums of channels in a program, whole and cut off; above 1024 two programs."""
    assert_implementations_agree(op("all", 1), leaves(2, 3, 6, width, dtype))


def test_the_scores_of_a_tile_are_made_once_up_to_1024_channels():
    with using("triton"):
        from pipeline.kernels.token_infonce.triton import _backward_tile
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for width in range(1, 1500, 7):
            tile = _backward_tile(dtype, width)
            channels = tile["OUT"] * tile["PARTS"]
            assert channels >= min(width, 1024)
            assert channels <= max(16, 2 * width)


def test_kernel_with_strided_inputs_and_a_cold_temperature():
    inputs = {"query": noise(5, 3, 40).transpose(0, 1)[..., ::2], "key": noise(4, 5, 20)}
    assert_implementations_agree(op("position", 1, 0.02), inputs)


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_short_vectors_keep_their_direction_and_zeros_have_none(implementation):
    query, key = leaves(2, 2, 3, 16).values()
    query[0, 1] *= 1e-6
    key[1, 2] *= 1e-6
    with using(implementation):
        got = gradients(op("all", 0), {"query": query, "key": key})
    expected = gradients(loop("all", 0), {"query": query.double(), "key": key.double()})
    for name, value in expected.items():
        assert_agree(name, got[name], value, 2e-5)
    query[1, 0] = 0  # as F.normalize has it: divided by 1e-12
    with using(implementation):
        got = gradients(op("all", 0), {"query": query, "key": key})["query"][1, 0]
    k = F.normalize(key.double().flatten(0, 1), dim=-1)
    upstream = torch.randn((), generator=torch.Generator().manual_seed(7)).double()
    wanted = (k.mean(0) - k[3]) / (0.2 * 6) * upstream.to(DEVICE) * 1e12
    assert_agree("query of zeros", got, wanted, 1e-4)


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_a_cold_temperature_neither_overflows_nor_vanishes(implementation):
    """exp(1 / t) is beyond fp32; the largest score of a row is not in its first tile."""
    query, key = noise(1, 70, 16), noise(1, 70, 16, seed=1)
    key[0, 69], query[0, :5] = query[0, 0], query[0, 0].clone()
    with using(implementation):
        got = gradients(op("all", 0, 0.01), {"query": query, "key": key})

    def materialised(query, key):
        q, k = F.normalize(query[0], dim=-1), F.normalize(key[0], dim=-1)
        return F.cross_entropy(q @ k.T / 0.01, torch.arange(70, device=DEVICE))

    expected = gradients(materialised, {"query": query.double(), "key": key.double()})
    for name, value in expected.items():
        assert_agree(name, got[name], value, 1e-4)


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_student_and_teacher_of_different_dtypes(implementation):
    query, key = noise(2, 3, 16, dtype=torch.bfloat16).requires_grad_(), noise(2, 3, 16, seed=1)
    with using(implementation):
        op("position", 0)(query, key).backward()
    expected = query.detach().double().requires_grad_()
    loop("position", 0)(expected, key.double()).backward()
    assert query.grad.dtype == torch.bfloat16
    assert_agree("query", query.grad, expected.grad, 2.0**-7)


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_autocast_does_not_round_the_scores(implementation):
    query, key = leaves(2, 2, 3, 16).values()
    with using(implementation):
        expected = op("all", 0)(query, key)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            assert torch.equal(op("all", 0)(query, key), expected)


@pytest.mark.parametrize("negatives", NEGATIVES)
def test_gradcheck_of_the_reference(negatives):
    inputs = [x.double().requires_grad_() for x in leaves(2, 3, 2, 4).values()]
    with using("reference"):
        assert torch.autograd.gradcheck(op(negatives, 1), inputs)


@pytest.mark.parametrize("negatives", ["all", "position"])
def test_opcheck(negatives):
    query, key = (x.requires_grad_() for x in leaves(2, 3, 2, 16).values())
    with using("triton"):
        from pipeline.kernels.token_infonce.triton import _token_infonce

        torch.library.opcheck(_token_infonce, (query, key, 0.2, negatives, 1))
        torch.library.opcheck(_token_infonce, (query, key.detach(), 0.2, negatives, 1))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"key": torch.zeros(3, 2, 5)}, "do not fit"),
        ({"offset": 2}, "leave the 3 images"),
        ({"negatives": "batch"}, "negatives must be one of all, position, image"),
        ({"temperature": 0.0}, "temperature must be positive"),
    ],
)
def test_arguments_that_do_not_fit(change, error):
    arguments = {
        "query": torch.zeros(2, 2, 4),
        "key": torch.zeros(3, 2, 4),
        "temperature": 0.2,
        "negatives": "all",
        "offset": 0,
        **change,
    }
    with pytest.raises(ValueError, match=error):
        kernels.token_infonce(**arguments)
