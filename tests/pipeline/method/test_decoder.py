"""d: what the decoder leaves out changes nothing (oracles: plain loops, MAE written plainly)."""

import oracle
import pytest
import torch
from peer_mae import PlainMAE
from tiny import DECODER_HEADS, HEADS, images, tiny_recipe
from torch.multiprocessing.reductions import StorageWeakRef

from pipeline.config.recipe import DecoderRecipe
from pipeline.errors import UserError
from pipeline.method.cross_decoder import CrossDecoder
from pipeline.method.decoder import Decoder, DecoderBlock, place_rows, take_rows
from pipeline.method.objective import build_objective
from pipeline.method.views import View, make_views
from pipeline.weights.interop import _ours, to_mae


@pytest.mark.parametrize("once", [True, False])
def test_take_rows_is_plain_indexing_with_its_gradient(once):
    x = torch.randn(3, 5, 2, requires_grad=True)
    rows = torch.tensor([[0, 4], [2, 0 if once else 2], [3, 1]], dtype=torch.int32)
    taken = take_rows(x, rows, once=once)
    expected = torch.stack([x[b, rows[b].long()] for b in range(3)])
    assert torch.equal(taken, expected)
    upstream = torch.randn_like(taken)
    (ours,) = torch.autograd.grad(taken, x, upstream)
    (theirs,) = torch.autograd.grad(expected, x, upstream)
    torch.testing.assert_close(ours, theirs)


def test_place_rows_is_plain_indexing_with_its_gradients():
    own = torch.randn(2, 3, 4, requires_grad=True)  # cls token and two visible patches
    hidden = torch.randn(5, 4, requires_grad=True)
    inverse = torch.tensor([[0, 2, 3, 1, 4], [4, 1, 2, 3, 0]], dtype=torch.int32)
    places = torch.tensor([[0, 1, 4], [0, 5, 2]], dtype=torch.int32)
    placed = place_rows(own, hidden, inverse, places)
    rows = [
        [own[b, 0]] + [own[b, 1 + n] if n < 2 else hidden[place] for place, n in enumerate(numbers)]
        for b, numbers in enumerate(inverse.tolist())
    ]
    expected = torch.stack([torch.stack(row) for row in rows])
    assert torch.equal(placed, expected)
    upstream = torch.randn_like(placed)
    ours = torch.autograd.grad(placed, [own, hidden], upstream)
    theirs = torch.autograd.grad(expected, [own, hidden], upstream)
    for mine, plain in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, plain)


def test_gradients_of_hidden_places_are_summed_in_fp32():
    """In bf16, 512 gradients of 1 would add up to 256."""
    batch = 512
    own = torch.zeros(batch, 1, 2, dtype=torch.bfloat16, requires_grad=True)
    hidden = torch.zeros(3, 2, dtype=torch.bfloat16, requires_grad=True)
    inverse = torch.arange(3, dtype=torch.int32).repeat(batch, 1)
    placed = place_rows(own, hidden, inverse, torch.zeros(batch, 1, dtype=torch.int32))
    placed.sum().backward()
    assert torch.equal(hidden.grad, torch.full((3, 2), 512.0, dtype=torch.bfloat16))
    assert torch.equal(own.grad, torch.ones_like(own))


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_decoder_predicts_the_region_only_and_as_the_oracle_does(depth):
    torch.manual_seed(0)
    recipe = DecoderRecipe(width=8, depth=depth, heads=2)
    decoder = Decoder(recipe, width=16, patch=4, grid=(3, 5))
    torch.nn.init.normal_(decoder.mask_token)
    weights = {f"measure.decoder.{k}": v for k, v in decoder.state_dict().items()}
    visible = torch.tensor([[7, 0, 3], [14, 2, 9]], dtype=torch.int32)
    inverse = torch.empty(2, 15, dtype=torch.int32)
    for b in range(2):
        hidden = [p for p in range(15) if p not in visible[b].tolist()]
        for slot, p in enumerate([*visible[b].tolist(), *hidden]):
            inverse[b, p] = slot
    region = torch.tensor([[1, 13], [0, 5]], dtype=torch.int32)
    z = torch.randn(2, 4, 16)
    ours = decoder(z, View(images(2), visible, inverse), region)
    assert ours.shape == (2, 2, 48)
    for b in range(2):
        theirs = oracle.decode(weights, z[b], visible[b].tolist(), (3, 5), DECODER_HEADS)
        torch.testing.assert_close(ours[b], theirs[region[b].long()], rtol=1e-5, atol=1e-5)
    other = View(images(2), visible.flip(0), inverse.flip(0))
    first, second = decoder(z, View(images(2), visible, inverse), region, (z.flip(1), other))
    torch.testing.assert_close(first, ours)
    torch.testing.assert_close(second, decoder(z.flip(1), other, region))


@pytest.mark.parametrize("kind", [Decoder, CrossDecoder])
def test_initialisation_is_maes(kind):
    recipe = DecoderRecipe(width=128, depth=2, heads=2)
    decoder = kind(recipe, width=96, patch=4, grid=(3, 5)).requires_grad_(False)
    for part in decoder.modules():
        if isinstance(part, torch.nn.Linear):
            bound = (6 / sum(part.weight.shape)) ** 0.5
            assert part.weight.abs().max() <= bound
            assert part.weight.std() == pytest.approx(bound / 3**0.5, rel=0.03)
            assert not part.bias.any()
        elif isinstance(part, torch.nn.LayerNorm):
            assert part.eps == 1e-6
    assert decoder.mask_token.std() == pytest.approx(0.02, rel=0.25)


@pytest.mark.parametrize("rows", [None, torch.tensor([[3, 0], [1, 1]], dtype=torch.int32)])
def test_normed_tensors_are_made_again_for_backward_and_not_kept(rows):
    torch.manual_seed(0)
    block = DecoderBlock(8, 2)
    x = torch.randn(2, 5, 8)
    gradients = []
    for again in (False, True):
        normed = []
        hooks = [
            norm.register_forward_hook(
                lambda _m, _i, out, to=normed: to.append(StorageWeakRef(out.untyped_storage()))
            )
            for norm in (block.norm1, block.norm2)
        ]
        mine = x.clone().requires_grad_()
        loss = block(mine, None, rows, again).square().sum()
        assert [ref.expired() for ref in normed] == [again, again]
        for hook in hooks:
            hook.remove()
        gradients.append(torch.autograd.grad(loss, [mine, *block.parameters()]))
    for kept, made_again in zip(*gradients, strict=True):
        assert torch.equal(kept, made_again)


def test_decoder_width_must_fit_its_heads():
    with pytest.raises(UserError, match="not divisible by its heads 3"):
        Decoder(DecoderRecipe(width=8, depth=1, heads=3), width=16, patch=4, grid=(2, 2))


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_step_is_that_of_mae_written_plainly(depth, checkpointing):
    recipe = tiny_recipe("mae", f"measure.decoder.depth={depth}")
    objective, _ = build_objective(recipe)
    assert objective.measure.decoder.grad_checkpointing is False
    objective.measure.decoder.grad_checkpointing = checkpointing
    image, sample = images(5), torch.arange(5)
    loss, _ = objective(image, sample, 0)
    loss.backward()

    peer = PlainMAE(side=16, patch=4, encoder=(16, 2, HEADS), decoder=(8, depth, DECODER_HEADS))
    peer.load_state_dict(to_mae(objective))
    views = make_views(image, sample, recipe=recipe, epoch=0, patch=4)
    mean, std = (torch.tensor(v) for v in (recipe.data.mean, recipe.data.std))
    pixels = ((image / 255 - mean) / std).permute(0, 3, 1, 2)
    expected = peer(pixels, views.first.inverse.float())
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    ours = dict(objective.named_parameters())
    for name, parameter in peer.named_parameters():
        mine = ours[_ours(name)].grad.reshape(parameter.shape)
        scale = parameter.grad.abs().max()
        assert (mine - parameter.grad).abs().max() <= 1e-5 * scale, name
