"""place_tokens: reference against a loop, kernel against reference."""

import pytest
import torch
from kernels_testing import (
    DEVICE,
    assert_agree,
    assert_gradients,
    assert_implementations_agree,
    gradients,
    noise,
    some_positions,
    using,
)

from pipeline import kernels

# batch, positions, prefix, visible, channels
SIZES = [
    (2, 49, 1, 12, 48),
    (1, 49, 0, 1, 33),
    (3, 15, 2, 14, 130),
    (2, 6, 1, 6, 16),
    (2, 6, 1, 0, 8),
]


def leaves(batch, length, prefix, visible, width, dtype=torch.float32):
    return {
        "tokens": noise(batch, prefix + visible, width, dtype=dtype),
        "mask_token": noise(width, dtype=dtype),
        "position": noise(prefix + length, width, dtype=dtype),
    }


def loop(inverse, prefix):
    """One row after the other."""

    def place(tokens, mask_token, position):
        count, rows = tokens.shape[1], []
        for b in range(len(inverse)):
            rows += [tokens[b, n] + position[n] for n in range(prefix)]
            for at, slot in enumerate(inverse[b].tolist()):
                shown = prefix + slot < count
                token = tokens[b, prefix + slot] if shown else mask_token
                rows.append(token + position[prefix + at])
        return torch.stack(rows).unflatten(0, (len(inverse), -1))

    return place


def op(inverse, prefix):
    return lambda tokens, mask_token, position: kernels.place_tokens(
        tokens, inverse, mask_token, position, prefix=prefix
    )


@pytest.mark.parametrize("size", SIZES)
def test_reference_against_a_loop(size):
    batch, length, prefix, _, _ = size
    inverse = some_positions(batch, length, length)
    assert_gradients(op(inverse, prefix), loop(inverse, prefix), leaves(*size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
def test_kernel_against_reference(size, dtype):
    batch, length, prefix, _, _ = size
    inverse = some_positions(batch, length, length)
    assert_implementations_agree(op(inverse, prefix), leaves(*size, dtype))


@pytest.mark.parametrize("programs", [1, 30, 10_000])  # chunks of 16, 4 and 1 samples
@pytest.mark.parametrize("sums", [4, 1024])  # partial sums at a time: some of them, all
def test_kernel_with_strided_inputs_and_samples_in_chunks(programs, sums, monkeypatch):
    from pipeline.kernels.place_tokens import triton

    monkeypatch.setattr(triton, "PROGRAMS", programs)
    monkeypatch.setattr(triton, "SUM_ROWS", sums)
    inverse = some_positions(35, 9, 9).repeat_interleave(2, dim=1)[:, ::2]
    inputs = {
        "tokens": noise(4, 35, 24).transpose(0, 1),
        "mask_token": noise(24, 3)[:, 1],
        "position": noise(24, 10).T,
    }
    assert_implementations_agree(op(inverse, 1), inputs)


def test_positions_of_another_dtype():
    inverse = some_positions(2, 6, 6)
    inputs = leaves(2, 6, 1, 3, 16, torch.bfloat16)
    inputs["position"] = inputs["position"].float()
    assert_implementations_agree(op(inverse, 1), inputs)


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_fp32_leaves_beside_16_bit_tokens_get_fp32_gradients(implementation):
    """As under autocast: a sum is not rounded to the 16 bits of what is added up."""
    inverse = some_positions(20, 9, 9)
    given = leaves(20, 9, 1, 2, 24, torch.bfloat16)
    given |= {"mask_token": noise(24), "position": noise(10, 24)}
    with using(implementation):
        got = gradients(op(inverse, 1), given)
    upstream = torch.randn(20, 10, 24, generator=torch.Generator().manual_seed(7)).to(DEVICE)
    upstream, hidden = upstream.bfloat16().double(), (inverse >= 2)[..., None]
    assert_agree("mask_token", got["mask_token"], (upstream[:, 1:] * hidden).sum((0, 1)), 1e-6)
    assert_agree("position", got["position"], upstream.sum(0), 1e-6)


def test_it_undoes_sample_masks():
    with using("reference"):
        masks = kernels.sample_masks(
            torch.arange(3, device=DEVICE), seed=1, epoch=0, length=20, visible=(7, 0),
            policy="complement",
        )  # fmt: skip
        ones = torch.zeros(21, 1, device=DEVICE)
        at = masks.visible1[..., None].float()
        placed = kernels.place_tokens(
            torch.cat([at[:, :1] * 0, at], 1), masks.inverse1, ones[0] - 1, ones, prefix=1
        )[:, 1:, 0]
    expected = torch.arange(20.0, device=DEVICE).repeat(3, 1)
    expected.scatter_(1, masks.hidden1.long(), -1.0)
    assert torch.equal(placed, expected)


def test_gradcheck_of_the_reference():
    inverse = some_positions(2, 5, 5)
    inputs = [x.double().requires_grad_() for x in leaves(2, 5, 1, 2, 3).values()]
    with using("reference"):
        assert torch.autograd.gradcheck(op(inverse, 1), inputs)


def test_opcheck():
    inverse = some_positions(2, 5, 5)
    tokens, mask_token, position = (x.requires_grad_() for x in leaves(2, 5, 1, 2, 16).values())
    with using("triton"):
        from pipeline.kernels.place_tokens.triton import _place_tokens

        torch.library.opcheck(_place_tokens, (tokens, inverse, mask_token, position, 1))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"inverse": torch.zeros(2, 5, dtype=torch.int64)}, "inverse must be int32"),
        ({"inverse": torch.zeros(3, 5, dtype=torch.int32)}, "inverse must be int32"),
        ({"tokens": torch.zeros(2, 7, 4)}, "do not fit 5 positions"),
        ({"mask_token": torch.zeros(1, 1, 4)}, "mask_token must be"),
        ({"position": torch.zeros(5, 4)}, "position"),
    ],
)
def test_shapes_that_do_not_fit(change, error):
    arguments = {
        "tokens": torch.zeros(2, 3, 4),
        "inverse": torch.zeros(2, 5, dtype=torch.int32),
        "mask_token": torch.zeros(4),
        "position": torch.zeros(6, 4),
        "prefix": 1,
        **change,
    }
    with pytest.raises(ValueError, match=error):
        kernels.place_tokens(**arguments)
