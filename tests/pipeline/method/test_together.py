"""Two views in one call: as two calls, without padding, in fewer launches. The teacher's copy."""

import copy

import pytest
import torch
from launches import CountLaunches
from timm.layers import Attention, DropPath
from tiny import PATCH, images, tiny_recipe

from pipeline.method.decoder import Decoder
from pipeline.method.encoder import Encoder
from pipeline.method.measures import contrast
from pipeline.method.objective import build_objective
from pipeline.method.teacher import linear_weights
from pipeline.method.views import make_views

SAMPLE = torch.arange(3)
SIZES = {
    "lengths apart": ("rmae",),
    "lengths equal": ("rmae", "views.mask_ratio=0.5"),
    "all of T2": ("rmae_ddagger",),
    "independent": ("rmae_dagger",),
    "mask tokens": ("cmae",),
    "norms and scales": (
        "rmae",
        "encoder.options={patch_size: 4, embed_dim: 16, depth: 2, num_heads: 2, "
        "qkv_bias: false, qk_norm: true, init_values: 0.3}",
    ),
}


def setting(name):
    recipe = tiny_recipe(*SIZES[name])
    views = make_views(images(), SAMPLE, recipe=recipe, epoch=0, patch=PATCH)
    torch.manual_seed(0)
    encoder = Encoder(recipe)
    for weight in encoder.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return encoder, views


def both(encoder, views, apart=False):
    if apart:
        return encoder(*views.first), encoder(*views.second)
    return encoder(*views.first, second=views.second)


def gradients(z, encoder):
    generator = torch.Generator().manual_seed(1)
    loss = sum((part * torch.randn(part.shape, generator=generator)).sum() for part in z)
    return torch.autograd.grad(loss, list(encoder.parameters()))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", SIZES)
def test_two_views_in_one_call_are_two_calls(name, checkpointing):
    encoder, views = setting(name)
    encoder.grad_checkpointing = checkpointing
    z, expected = both(encoder, views), both(encoder, views, apart=True)
    for ours, theirs in zip(z, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    names = [n for n, _ in encoder.named_parameters()]
    ours, theirs = gradients(z, encoder), gradients(expected, encoder)
    for name_, mine, other in zip(names, ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4, msg=name_)


def test_they_agree_in_bf16_to_its_rounding():
    encoder, views = setting("lengths apart")
    with torch.autocast("cpu", torch.bfloat16):
        z, expected = both(encoder, views), both(encoder, views, apart=True)
    for ours, theirs in zip(z, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.05)


def test_only_timms_own_fused_attention_takes_both_views_at_once():
    """Another would not be what both views go through."""
    block = Encoder(tiny_recipe("rmae")).blocks[0]
    attn = block.attn
    assert block.takes_parts
    attn.fused_attn = False
    assert not block.takes_parts
    attn.fused_attn, attn.gate = True, torch.nn.Identity()
    assert not block.takes_parts
    attn.gate, attn.attn_drop.p = None, 0.1
    assert not block.takes_parts
    assert block.eval().takes_parts
    attn.__class__ = type("Other", (Attention,), {})
    assert not block.takes_parts


def test_linears_see_every_token_once_and_no_padding():
    encoder, views = setting("lengths apart")
    seen = []
    encoder.blocks[1].mlp.fc1.register_forward_hook(lambda m, x, y: seen.append(x[0].shape))
    both(encoder, views)
    assert seen == [(3 * (1 + 4) + 3 * (1 + 12), 16)]


def drop_paths(block):
    block.drop_path1 = DropPath(0.5)


def drop_attention(block):
    block.attn.attn_drop.p = 0.5


def drop_values(block):
    block.mlp.drop1.p = 0.5


@pytest.mark.parametrize("drop", [drop_paths, drop_attention, drop_values])
def test_what_is_dropped_at_random_is_drawn_as_in_two_calls(drop):
    """The same numbers from the same seed, per image; in eval mode nothing is drawn."""
    encoder, views = setting("lengths apart")
    drop(encoder.blocks[1])
    torch.manual_seed(3)
    z = both(encoder, views)
    torch.manual_seed(3)
    expected = both(encoder, views, apart=True)
    assert all(torch.equal(a, b) for a, b in zip(z, expected, strict=True))
    torch.manual_seed(4)
    assert not torch.equal(both(encoder, views)[1], z[1])
    encoder.eval()
    seen = []
    encoder.blocks[0].attn.qkv.register_forward_hook(lambda m, x, y: seen.append(x[0].shape))
    torch.testing.assert_close(both(encoder, views), both(encoder, views, apart=True))
    assert len(seen) == 1 + 2


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_decoder_takes_both_views(depth):
    recipe = tiny_recipe("rmae", f"measure.decoder={{width: 8, depth: {depth}, heads: 2}}")
    views = make_views(images(), SAMPLE, recipe=recipe, epoch=0, patch=PATCH)
    decoder = Decoder(recipe.measure.decoder, width=16, patch=PATCH, grid=(4, 4))
    z1, z2 = torch.randn(3, 5, 16), torch.randn(3, 13, 16)
    ours = decoder(z1, views.first, views.region, (z2, views.second))
    theirs = decoder(z1, views.first, views.region), decoder(z2, views.second, views.region)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    weights = list(decoder.parameters())
    for mine, other in zip(
        torch.autograd.grad(ours[0].sin().sum() + ours[1].cos().sum(), weights),
        torch.autograd.grad(theirs[0].sin().sum() + theirs[1].cos().sum(), weights),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["lengths apart", "lengths equal"])
def test_a_block_is_hardly_more_launches_for_two_views_than_for_one(name):
    def launches(encoder, views, **how):
        with CountLaunches() as seen:
            encoder(*views.first, **how)
        return seen.launches

    encoder, views = setting(name)
    blocks = encoder.blocks
    counts = {}
    for second in (None, views.second):
        more = launches(encoder, views, second=second)
        encoder.blocks = blocks[:1]
        counts[second is None] = more - launches(encoder, views, second=second)
        encoder.blocks = blocks
    # One attention more, and what puts its tokens beside the others'.
    assert counts[False] <= counts[True] + (0 if name == "lengths equal" else 4), counts


# ---- the teacher's copy -------------------------------------------------------------------------


def with_teacher(name="cmae", *overrides):
    objective, teacher = build_objective(tiny_recipe(name, *overrides))
    recipe = objective.recipe
    crop = images(seed=1) if recipe.views.second == "crop" else None
    views = make_views(images(), SAMPLE, recipe=recipe, epoch=0, patch=PATCH, crop=crop)
    with torch.no_grad():
        for weight in objective.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return objective, teacher, views


def plain_keys(teacher, view):
    """By torch's autocast, which rounds the fp32 weights in every call."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        z = teacher.encoder(*view)[:, 1:]
        return z if teacher.projector is None else teacher.projector(z)


def test_keys_of_the_16_bit_copy_are_those_of_autocast_after_every_kind_of_change():
    objective, teacher, views = with_teacher()
    names = list(teacher.state_dict())

    def check():
        keys = teacher(views.second, dtype=torch.bfloat16)
        assert keys.dtype == torch.bfloat16
        assert torch.equal(keys, plain_keys(teacher, views.second))
        return keys

    fresh = check()
    teacher.update(objective, 0.5)
    updated = check()
    assert not torch.equal(fresh, updated)
    saved = {k: v.clone() for k, v in teacher.state_dict().items()}
    teacher.update(objective, 0.5)
    assert not torch.equal(check(), updated)
    teacher.load_state_dict(saved)
    assert torch.equal(check(), updated)
    teacher.encoder.load_state_dict({k: v * 1.5 for k, v in teacher.encoder.state_dict().items()})
    assert not torch.equal(check(), updated)
    before = teacher.double().float()(views.second, dtype=torch.bfloat16)
    teacher._apply(lambda tensor: 1.5 * tensor)  # as `to` does, but for the values
    assert not torch.equal(check(), before)
    assert list(teacher.state_dict()) == names
    assert {p.dtype for p in teacher.parameters()} == {torch.float32}


def test_the_average_is_of_fp32_weights_though_the_copy_is_read():
    """A thousandth of a change is lost in bf16; the fp32 state adds it up."""
    objective, teacher, views = with_teacher()
    start = teacher.encoder.blocks[0].attn.qkv.weight.clone()
    online = objective.encoder.blocks[0].attn.qkv.weight
    for _ in range(3):
        teacher(views.second, dtype=torch.bfloat16)
        teacher.update(objective, 0.999)
    expected = online + 0.999**3 * (start - online)
    torch.testing.assert_close(
        teacher.encoder.blocks[0].attn.qkv.weight, expected, rtol=0, atol=1e-7
    )


def test_no_weight_is_rounded_twice_for_one_update():
    _, teacher, views = with_teacher()

    def casts():
        with CountLaunches() as seen:
            teacher(views.second, dtype=torch.bfloat16)
        return seen.launches

    first, second, third = casts(), casts(), casts()
    with CountLaunches() as plain:
        plain_keys(teacher, views.second)
    linears = sum(isinstance(m, torch.nn.Linear) for m in teacher.modules())
    assert second == third == plain.launches - 2 * linears  # weights and biases
    assert first >= second + 2 * linears


def test_a_refreshed_copy_is_up_to_date_without_a_forward_pass():
    """Which the replay of a captured graph does not make."""
    objective, teacher, views = with_teacher()
    teacher.refresh()
    assert teacher._copy is None  # nothing to bring up to date
    teacher(views.second, dtype=torch.bfloat16)
    held = teacher._copy._narrow
    before = [weight.clone() for weight in held]
    teacher.update(objective, 0.5)
    teacher.refresh()
    for old, new, wide in zip(before, held, linear_weights(teacher), strict=True):
        assert torch.equal(new, wide.bfloat16())
        assert not torch.equal(new, old)


def test_the_16_bit_keys_of_a_measure_without_a_projector():
    _, teacher, views = with_teacher()
    teacher.projector = None
    keys = teacher(views.second, dtype=torch.bfloat16)
    assert torch.equal(keys, plain_keys(teacher, views.second).bfloat16())


def test_a_copy_in_one_16_bit_type_is_not_taken_for_another():
    _, teacher, views = with_teacher()
    alone = copy.deepcopy(teacher)
    teacher(views.second, dtype=torch.bfloat16)
    keys = [t(views.second, dtype=torch.float16) for t in (teacher, alone)]
    assert torch.equal(*keys)


@pytest.mark.parametrize("symmetric", [False, True])
def test_keys_meet_queries_in_16_bits(symmetric, monkeypatch):
    """The gathered keys too, half the bytes; loss and gradients are near those of fp32."""
    objective, teacher, _ = with_teacher("cmae", f"measure.symmetric={symmetric}")
    seen = []

    def gather(key):
        seen.append(key.dtype)
        return key, 0

    monkeypatch.setattr(contrast, "gather_keys", gather)
    exact, _ = objective(images(), SAMPLE, 0, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, _ = objective(images(), SAMPLE, 0, teacher)
    count = 2 if symmetric else 1
    assert seen == [torch.float32] * count + [torch.bfloat16] * count
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0.0)
