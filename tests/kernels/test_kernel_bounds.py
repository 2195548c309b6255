"""No kernel touches memory beyond its arguments, or the same address from two programs, whatever
the sizes and strides."""

from functools import partial

import pytest
import torch
from kernels_testing import (
    DEVICE,
    IMAGENET,
    TOLERANCE,
    assert_agree,
    gradients,
    noise,
    random_images,
    some_positions,
    using,
)

from pipeline import kernels
from pipeline.kernels.cases import all_cases

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="watches the interpreter")


def plain(x):
    return x


def spread(x):
    """The same values: every second image, of RGBA, or every second element of a larger tensor."""
    if x.dim() == 4:
        rgba = torch.cat([x, x[..., :1]], -1)
        return torch.stack([rgba, 255 - rgba], 1)[:, 0, ..., :3]
    if x.dtype == torch.bool:
        return torch.stack([x, ~x], -1)[..., 0]
    worst = float("nan") if x.is_floating_point() else 77
    return torch.stack([x, torch.full_like(x, worst)], -1)[..., 0]


def embed_visible(dtype, lay):
    """Rows, channels and values that are no multiples of a tile's; rows in two splits of 128."""
    image, visible = lay(random_images(5, 70, 84)), lay(some_positions(5, 30, 27))
    leaves = {
        "weight": noise(33, 3, 14, 14, dtype=dtype) * 0.1,
        "bias": noise(33, dtype=dtype),
        "position": noise(30, 33, dtype=dtype),
    }
    return lambda **w: kernels.embed_visible(image, visible, **w, **IMAGENET), leaves


def patch_loss(dtype, lay, weighted=False):
    """One row more than a tile, 588 values; the last sample's region is cut short."""
    image, region = lay(random_images(3, 28, 42)), lay(some_positions(3, 6, 3))
    weight = lay((some_positions(3, 3, 3) > 0).float()) if weighted else None
    leaves = {name: noise(3, 3, 588, dtype=dtype, seed=n) for n, name in enumerate(("a", "b"))}

    def run(a, b=None):
        return kernels.patch_loss(a, image, region, patch=14, other=b, weight=weight, **IMAGENET)

    return run, leaves if weighted else {"a": leaves["a"]}


def place_tokens(dtype, lay):
    """Rows of the sequence, samples, channels and partial sums beyond full tiles."""
    inverse = lay(some_positions(17, 8, 8))
    leaves = {
        "tokens": noise(17, 4, 33, dtype=dtype),
        "mask_token": noise(33, dtype=dtype),
        "position": noise(9, 33, dtype=dtype),
    }
    return lambda tokens, mask_token, position: kernels.place_tokens(
        tokens, inverse, mask_token, position, prefix=1
    ), leaves


def token_infonce(dtype, lay, negatives):
    leaves = {"query": noise(2, 5, 33, dtype=dtype), "key": noise(4, 5, 33, dtype=dtype, seed=1)}
    return lambda query, key: kernels.token_infonce(
        query, key, temperature=0.2, negatives=negatives, offset=1
    )[0], leaves


FLOAT_CALLS = {
    "embed_visible": embed_visible,
    "patch_loss": patch_loss,
    "patch_loss of two, weighted": partial(patch_loss, weighted=True),
    "place_tokens": place_tokens,
    **{
        f"token_infonce {negatives}": partial(token_infonce, negatives=negatives)
        for negatives in ("all", "position", "image")
    },
}


def whole_calls(lay=plain):
    """Calls without gradient, by name."""
    sample, image = lay(torch.tensor([5, 2**40, 6])), lay(random_images(3, 30, 34))
    key = {"seed": 3, "epoch": 1}
    drawn = kernels.jitter_parameters(sample, **key, view=0, probability=1.0, grayscale=0.5)
    drawn, visible = [lay(d) for d in drawn], lay(some_positions(3, 255, 7))
    masks = {"length": 15, "visible": (4, 0)}
    return {
        "jitter_parameters": lambda: kernels.jitter_parameters(sample, **key, view=0),
        "color_jitter": lambda: kernels.color_jitter(image, *drawn),
        "color_jitter visible": lambda: kernels.color_jitter(
            image, *drawn, visible=visible, patch=2
        ),
        "color_jitter crop": lambda: kernels.color_jitter(image[:, 3:, 5:], *drawn),
        "cutmix": lambda: kernels.cutmix(image, sample, 1.0, **key, view=0),
        "cutmix wide words": lambda: kernels.cutmix(image[:, :, :32], sample, 1.0, **key, view=1),
        "cutmix dense": lambda: kernels.cutmix(
            image[:, :, :32].contiguous(), sample, 1.0, **key, view=1
        ),
        **{
            f"sample_masks {policy}": lambda policy=policy: kernels.sample_masks(
                sample, **key, **masks | {"visible": (4, 6 * (policy == "independent"))},
                policy=policy,
            )
            for policy in ("random", "complement", "independent", "none")
        },
        "select_visible": lambda: kernels.select_visible(
            lay(torch.arange(45).view(3, 15).flip(1) % 4), 7
        ),
    }  # fmt: skip


def kernels_of(name):
    """Kernels of the op or case of a call."""
    cases = [c for c in all_cases().values() if c.name.split()[0] == name.split()[0]]
    return {f"{kernel}_kernel" for case in cases for kernel in case.kernels}


def watched(name, run):
    """What run() gives by the kernels of its op; fails with what they did that they may not."""
    from kernels_traced import guarded

    with using("triton"), guarded() as guard:
        got = run()
    assert not guard.faults, sorted(set(guard.faults))
    assert guard.launched == kernels_of(name)
    return got


@pytest.mark.parametrize(("dtype", "lay"), [(torch.float16, plain), (torch.float32, spread)])
@pytest.mark.parametrize("name", FLOAT_CALLS)
def test_kernels_with_gradients_stay_inside(name, dtype, lay, monkeypatch):
    with using("triton"):
        from pipeline.kernels.embed_visible import triton as embed_visible_triton
        from pipeline.kernels.place_tokens import triton as place_tokens_triton
    monkeypatch.setattr(embed_visible_triton, "SPLIT_ROWS", 128)
    monkeypatch.setattr(place_tokens_triton, "SUM_ROWS", 4)
    monkeypatch.setattr(place_tokens_triton, "PROGRAMS", 1)  # chunks of 16 samples
    call, leaves = FLOAT_CALLS[name](dtype, lay)

    def function(**given):
        out = call(**given)  # whose gradient is every second element of a larger tensor
        return torch.stack([out, torch.zeros_like(out)], -1)

    leaves = {key: spread(w) if lay is spread and w.dim() < 4 else w for key, w in leaves.items()}
    got = watched(name, lambda: gradients(function, leaves))
    call, _ = FLOAT_CALLS[name](dtype, plain)
    with using("reference"):
        expected = gradients(function, {key: leaf.contiguous() for key, leaf in leaves.items()})
    for part, value in expected.items():
        assert_agree(part, got[part], value, TOLERANCE.get(dtype, 2.0**-9))


@pytest.mark.parametrize("lay", [plain, spread])
@pytest.mark.parametrize("name", whole_calls())
def test_kernels_of_bytes_and_indices_stay_inside(name, lay):
    got = watched(name, whole_calls(lay)[name])
    with using("reference"):
        expected = whole_calls()[name]()
    if isinstance(expected, torch.Tensor):
        got, expected = (got,), (expected,)
    for mine, wanted in zip(got, expected, strict=True):
        assert (mine is None and wanted is None) or torch.equal(mine, wanted)


def test_every_kernel_is_watched():
    watched_kernels = set().union(*map(kernels_of, [*FLOAT_CALLS, *whole_calls()]))
    assert watched_kernels == {f"{k}_kernel" for case in all_cases().values() for k in case.kernels}


def test_the_guard_sees_what_it_is_for():
    from kernels_traced import guarded

    with using("triton"):
        import triton
        import triton.language as tl

    @triton.jit
    def careless_kernel(x_ptr, out_ptr, count, BLOCK: tl.constexpr):
        n = tl.arange(0, BLOCK)
        x = tl.load(x_ptr + n, mask=n < count + 1, other=0)
        kept = tl.load(x_ptr + n, mask=n < count)
        tl.store(out_ptr + n, x + kept, mask=n < count)
        tl.store(out_ptr + n, x, mask=n < 1)

    x, out = torch.ones(40)[:16], torch.zeros(16)
    with guarded() as guard:
        careless_kernel[(1,)](x, out, 16, BLOCK=32)
    assert guard.launched == {"careless_kernel"}
    assert guard.faults == [
        "careless_kernel: load outside of every argument",
        "careless_kernel: two stores to one address",
    ]
