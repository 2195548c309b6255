"""Bytes moved: the counters against hand-made cases and the interpreter, promised ratios."""

import pytest
import torch
from kernels_testing import DEVICE, IMAGENET, noise, random_images, some_positions, using
from kernels_traced import traced
from kernels_traffic import count_bytes, ratios
from torch._subclasses.fake_tensor import FakeTensorMode

from pipeline import kernels
from pipeline.kernels.cases import Sizes, all_bytes
from pipeline.kernels.embed_visible.cases import traffic as embed_visible_traffic
from pipeline.kernels.patch_loss.cases import traffic as patch_loss_traffic
from pipeline.kernels.place_tokens.cases import traffic as place_tokens_traffic
from pipeline.kernels.sample_masks.cases import traffic as sample_masks_traffic
from pipeline.kernels.select_visible.cases import traffic as select_visible_traffic
from pipeline.kernels.token_infonce.cases import traffic as token_infonce_traffic

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="reads the interpreter")
SMALL = Sizes(batch=3, side=64, patch=16, width=160, decoder=96, keep=5)


def test_the_counter_counts_what_ops_read_and_write():
    x = torch.empty(4, 8, device="meta")
    assert count_bytes(lambda: x + 1) == 2 * 128
    assert count_bytes(lambda: x.view(8, 4).transpose(0, 1)) == 0
    assert count_bytes(lambda: x + x[:, :1].expand(4, 8)) == 128 + 16 + 128
    index = torch.zeros(2, 8, dtype=torch.int64, device="meta")
    assert count_bytes(lambda: torch.gather(x, 0, index)) == 64 + 128 + 64
    assert count_bytes(lambda: x.repeat(2, 1)) == 128 + 256
    with FakeTensorMode():  # where autograd's question for the device is an op
        weight = torch.empty(4, 8, requires_grad=True)
        assert count_bytes(lambda: weight * 2) == 2 * 128
    leaf = torch.empty(4, 8, device="meta", requires_grad=True)
    forward = count_bytes(lambda: (leaf * x).sum())
    assert count_bytes(lambda: (leaf * x).sum().backward()) > forward + 128


def trace_of(run):
    with using("triton"), traced() as trace:
        run()
    return trace


def assert_traced(trace, traffic):
    assert trace.requested == traffic.requested
    # Tensors whose bytes are no multiple of 32 end inside a sector.
    assert traffic.moved <= trace.moved <= traffic.moved * 1.01 + 320


def test_place_tokens_moves_what_its_index_ranges_say():
    s = SMALL
    inverse = some_positions(s.batch, s.length, s.length)
    tokens = noise(s.batch, s.keep + 1, s.decoder, dtype=s.dtype)
    mask_token, position = noise(s.decoder, dtype=s.dtype), noise(17, s.decoder, dtype=s.dtype)
    trace = trace_of(lambda: kernels.place_tokens(tokens, inverse, mask_token, position, prefix=1))
    assert_traced(trace, place_tokens_traffic(s)["forward"])
    grad = noise(s.batch, 17, s.decoder, dtype=s.dtype)
    with using("triton"):
        from pipeline.kernels.place_tokens.triton import _place_tokens_backward as backward
    trace = trace_of(lambda: backward(grad, inverse, 1, s.keep + 1, s.dtype))
    walked, summed = (place_tokens_traffic(s)[launch] for launch in ("backward", "sum"))
    assert trace.requested == walked.requested + summed.requested
    assert walked.moved <= trace.moved <= walked.moved * 1.01 + 320  # the sums are in the cache


@pytest.mark.parametrize("relaxed", [False, True])
def test_patch_loss_moves_what_its_index_ranges_say(relaxed):
    s = SMALL
    image, region = random_images(s.batch, s.side, s.side), some_positions(s.batch, 16, 11)
    prediction = noise(s.batch, 11, s.values, dtype=s.dtype)
    other = prediction.clone() if relaxed else None
    expected = patch_loss_traffic(s, image, region, relaxed)
    settings = {"patch": s.patch, "other": other, **IMAGENET}
    trace = trace_of(lambda: kernels.patch_loss(prediction, image, region, **settings))
    assert_traced(trace, expected["forward"])
    with using("triton"):
        from pipeline.kernels.patch_loss.triton import _patch_loss_backward as backward
    grad, floats = torch.ones(2), [0.5] * 3
    trace = trace_of(
        lambda: backward(
            grad, prediction, other, image, region, None, s.patch, floats, floats, True
        )
    )
    assert_traced(trace, expected["backward"])


def test_embed_visible_and_sample_masks_move_what_their_index_ranges_say():
    s = SMALL
    image, visible = random_images(s.batch, s.side, s.side), some_positions(s.batch, 16, s.keep)
    weight, bias = noise(s.width, 3, 16, 16, dtype=s.dtype), noise(s.width, dtype=s.dtype)
    position = noise(16, s.width, dtype=s.dtype)
    trace = trace_of(
        lambda: kernels.embed_visible(image, visible, weight, bias, position, **IMAGENET)
    )
    assert_traced(trace, embed_visible_traffic(s, image, visible))
    sample = torch.arange(s.batch)
    trace = trace_of(
        lambda: kernels.sample_masks(
            sample, seed=0, epoch=0, length=16, visible=(s.keep, 0), policy="complement"
        )
    )
    assert_traced(trace, sample_masks_traffic(s))
    priority = torch.arange(s.batch * 16).view(s.batch, 16)
    trace = trace_of(lambda: kernels.select_visible(priority, s.keep))
    assert_traced(trace, select_visible_traffic(s))


@pytest.mark.parametrize(("batch", "width"), [(37, 160), (33, 300)])
def test_token_infonce_moves_what_its_index_ranges_say(batch, width):
    """One and three sums of channels in a backward program."""
    s = Sizes(batch=batch, side=32, width=width)
    query, key = (noise(s.batch, s.length, s.width, dtype=s.dtype, seed=n) for n in (0, 1))
    expected = token_infonce_traffic(s)
    with using("triton"):
        from pipeline.kernels.token_infonce.triton import (
            _inverse_norms,
            _token_infonce,
            _token_infonce_backward,
        )
    assert_traced(trace_of(lambda: _inverse_norms(query)), expected["norms"])
    lse, a, b = _token_infonce(query, key, 0.2, "position", 0)[2:]
    forward = trace_of(lambda: _token_infonce(query, key, 0.2, "position", 0))
    assert forward.requested == expected["forward"].requested + 2 * expected["norms"].requested
    settings = (torch.tensor(1.0), query, key, lse, a, b, 0.2, "position", 0, True, False)
    assert_traced(trace_of(lambda: _token_infonce_backward(*settings)), expected["backward"])


def test_color_jitter_reads_twice_through_the_cache_and_moves_once():
    image = random_images(2, 32, 32)
    drawn = kernels.jitter_parameters(torch.arange(2), seed=0, epoch=0, view=0, probability=1.0)
    trace = trace_of(lambda: kernels.color_jitter(image, *drawn))
    assert 3 * image.numel() <= trace.requested <= 3 * image.numel() * 1.05
    assert 2 * image.numel() <= trace.moved <= 2 * image.numel() * 1.05


def test_the_promised_ratios_hold_at_vit_b16():
    ratio, of_minimum = ratios(Sizes())
    assert ratio["embed_visible"] <= 1 / 5  # a larger tile asks for less, but is slower
    assert ratio["patch_loss"] <= 1 / 6
    assert ratio["place_tokens"] <= 1 / 4
    assert max(of_minimum.values()) <= 1.15, of_minimum


def test_the_references_are_lean():
    """Each moves under half of what MAE's chain moves, on the same sizes."""
    s = Sizes(batch=8)
    with using("reference"):
        for name, most in (("embed_visible", 0.5), ("place_tokens", 0.5), ("patch_loss", 1.0)):
            b = all_bytes()[name]
            ours, chain = (count_bytes(lambda run=run: run(s)) for run in (b.reference, b.chain))
            assert ours < most * chain, name
