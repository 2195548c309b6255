"""color_jitter: byte for byte torchvision's, kernel byte for byte the reference."""

import itertools

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from kernels_testing import DEVICE, random_images, some_positions, using
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline import kernels
from pipeline.kernels import philox
from pipeline.kernels.color_jitter.reference import ORDERS
from pipeline.kernels.streams import Stream

OPERATIONS = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)


def parameters(batch, **settings):
    sample = torch.arange(batch, device=DEVICE)
    return kernels.jitter_parameters(
        sample, seed=4, epoch=1, view=0, **{"grayscale": 0.3, "hue": 0.5, **settings}
    )


def torchvision_jitter(image, factors, order, apply, gray):
    """One image [H,W,3] at a time through torchvision's uint8 functions."""
    out = []
    for b, picture in enumerate(image.cpu().permute(0, 3, 1, 2)):
        if apply[b]:
            for operation in ORDERS[int(order[b])]:
                picture = OPERATIONS[operation](picture, float(factors[b, operation]))
        if gray[b]:
            picture = TF.rgb_to_grayscale(picture, num_output_channels=3)
        out.append(picture.permute(1, 2, 0))
    return torch.stack(out).to(image.device)


def colourful(batch, height, width):
    """Random images with flat, grey, black and saturated pixels among them."""
    image = random_images(batch, height, width)
    corners = [*itertools.product([0, 255], repeat=3), (128, 128, 128), (10, 10, 200)]
    flat = image.view(batch, -1, 3)
    flat[:, : len(corners)] = torch.tensor(corners, dtype=torch.uint8, device=image.device)
    return image


def test_reference_equals_torchvision_for_every_order():
    image = colourful(24, 14, 10)
    factors, _, apply, gray = parameters(24)
    order = torch.arange(24, dtype=torch.int32, device=DEVICE)
    drawn = (factors, order, apply | True, gray)
    with using("reference"):
        got = kernels.color_jitter(image, *drawn)
    assert torch.equal(got, torchvision_jitter(image, *drawn))
    assert not torch.equal(got, image)


def test_reference_divides_by_tensors_alone():
    """CUDA multiplies by the reciprocal of a number, which is not the quotient's rounding."""
    divisors, means = [], []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            divisors.extend(args[1:2] if name in ("div", "div_", "true_divide") else [])
            means.extend([name] if name in ("mean", "reciprocal") else [])
            return func(*args, **(kwargs or {}))

    with using("reference"), Watch():
        kernels.color_jitter(colourful(24, 14, 10), *parameters(24, probability=1.0))
    assert len(divisors) >= 3
    assert not means
    assert all(isinstance(d, torch.Tensor) and d.device.type == DEVICE for d in divisors)


def test_visible_patches_are_the_picture():
    """The jitter of the visible patches is that of an image made of them alone."""
    image, patch, visible = colourful(6, 16, 24), 4, some_positions(6, 24, 5)
    drawn = parameters(6)
    with using("reference"):
        got = kernels.color_jitter(image, *drawn, visible=visible, patch=patch)
    expected = torch.zeros_like(image)
    for b in range(6):
        corners = [(at // 6 * patch, at % 6 * patch) for at in visible[b].tolist()]
        cut = [image[b, y : y + patch, x : x + patch] for y, x in corners]
        own = [parameter[b : b + 1] for parameter in drawn]
        strip = torchvision_jitter(torch.cat(cut, 1)[None], *own)[0]
        for n, (y, x) in enumerate(corners):
            expected[b, y : y + patch, x : x + patch] = strip[:, n * patch : (n + 1) * patch]
    assert torch.equal(got, expected)


def test_the_kernels_products_are_the_quotients_for_every_pixel():
    """x / 255 and sector / 6 as the kernel makes them on a GPU: q = x r, q + r (x - q d), fused."""

    def fused(a, b, c):  # a b is exact in float64
        return (a.astype(np.float64) * b + c).astype(np.float32)

    def quotient(x, by):
        reciprocal = np.float32(1 / by)
        q = x * reciprocal
        return fused(fused(q, -by, x), np.float64(reciprocal), q)

    level = np.arange(256, dtype=np.float32)
    assert np.array_equal(quotient(level, 255.0), level / np.float32(255))
    assert not np.array_equal(level * np.float32(1 / 255), level / np.float32(255))
    unit = level / np.float32(255)
    part = np.unique(np.concatenate([
        ((unit[high] - unit[: high + 1, None]) / (unit[high] - unit[:high])).ravel()
        for high in range(1, 256)
    ]))  # fmt: skip
    part = part[part <= 1]
    one = np.float32(1)
    for towards in (part, one), (one, part):
        for base in (0, 2, 4):
            sector = np.float32(base) + towards[0] - towards[1]
            assert np.array_equal(quotient(sector, 6.0), sector / np.float32(6))


def one_step(operation, pixels, values):
    """(image [V,1,N,3] of the same pixels, parameters that begin with one operation and whose
    other factors change nothing, of V values)."""
    image = torch.as_tensor(np.array(pixels, np.uint8), device=DEVICE)[None, None]
    factors = torch.tensor([[1.0, 1.0, 1.0, 0.0]], device=DEVICE).repeat(len(values), 1)
    factors[:, operation] = torch.as_tensor(np.array(values, np.float32), device=DEVICE)
    first = next(n for n, order in enumerate(ORDERS) if order[0] == operation)
    order = torch.full((len(values),), first, dtype=torch.int32, device=DEVICE)
    yes = torch.ones(len(values), dtype=torch.bool, device=DEVICE)
    return image.repeat(len(values), 1, 1, 1), factors, order, yes


@pytest.fixture
def few_programs(monkeypatch):
    """Large blocks, which the interpreter runs fast."""
    with using("triton"):
        from pipeline.kernels.color_jitter import triton
    monkeypatch.setattr(triton, "BLOCK", 8192)


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_grey_of_colours_on_the_brink_of_a_whole_number(implementation):
    """0.2989 R + 0.587 G + 0.114 B is a whole number: only the rounding of fp32 decides."""
    green, blue = np.arange(256)[:, None], np.arange(256)
    red = np.arange(0, 256, 10)[:, None, None]  # of others the last digit is not 0
    colours = np.argwhere((2989 * red + 5870 * green + 1140 * blue) % 10_000 == 0) * (10, 1, 1)
    assert len(colours) > 1000
    image, factors, order, yes = one_step(0, colours, [1.0])
    with using(implementation):
        got = kernels.color_jitter(image, factors, order, ~yes, yes)
    expected = TF.rgb_to_grayscale(image.cpu().permute(0, 3, 1, 2), 3).permute(0, 2, 3, 1)
    assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_a_hue_that_is_just_short_of_a_whole_turn(implementation):
    """h + f is so little below 0 that its remainder is rounded to 1: red, not a seventh sector."""
    hues = [(255, 255, 0), (0, 255, 0), (0, 255, 255), (0, 0, 255), (255, 0, 255)]
    sector = np.arange(1, 6, dtype=np.float32) / np.float32(6)
    turn = np.fmod(sector + np.float32(1), np.float32(1))
    turn = turn[turn < 0.5]
    shifts = -np.nextafter(turn, np.float32(1))
    assert (torch.from_numpy(turn + shifts).remainder(1) == 1).any()
    image, factors, order, yes = one_step(3, hues, shifts)
    with using(implementation):
        got = kernels.color_jitter(image, factors, order, yes, ~yes)
    assert torch.equal(got, torchvision_jitter(image, factors, order, yes, ~yes))


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_hue_rounds_as_torchvision_does(implementation, few_programs):
    """The order in which turns are added shows in one colour of some thousand, as in the first."""
    colours = np.random.default_rng(0).integers(0, 256, (10_000, 3))
    colours[:4] = (131, 228, 146), (121, 208, 152), (109, 228, 228), (250, 251, 12)
    image, factors, order, yes = one_step(3, colours, [0.1, 0.3])
    with using(implementation):
        got = kernels.color_jitter(image, factors, order, yes, ~yes)
    assert torch.equal(got, torchvision_jitter(image, factors, order, yes, ~yes))


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_the_mean_of_a_large_bright_image_is_exact(implementation, few_programs):
    """The sum of grey is odd beyond the whole numbers of fp32; contrast 0 leaves the mean alone."""
    image = torch.full((1, 264, 256, 3), 254, dtype=torch.uint8, device=DEVICE)
    image[0, 0, 0] = 253  # grey is 253 everywhere but here, where it is 252
    _, factors, order, yes = one_step(1, [[0, 0, 0]], [0.0])
    with using(implementation):
        got = kernels.color_jitter(image, factors, order, yes, ~yes)
    assert got.unique().tolist() == [252]


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_a_chance_is_drawn_strictly_below_its_probability(implementation):
    """So that of a probability of 0 nothing comes, whatever is drawn."""
    key = {"seed": 4, "epoch": 1}
    u = philox.uniform(torch.arange(5), **key, stream=Stream.JITTER, count=7)
    with using(implementation):
        _, _, apply, gray = kernels.jitter_parameters(
            torch.arange(5, device=DEVICE), **key, view=0,
            probability=float(u[2, 5]), grayscale=float(u[3, 6]),
        )  # fmt: skip
    assert apply.tolist() == [bool(x < u[2, 5]) for x in u[:, 5]]
    assert gray.tolist() == [bool(x < u[3, 6]) for x in u[:, 6]]


@pytest.mark.parametrize(("height", "width"), [(14, 10), (9, 33), (32, 32)])
def test_kernel_equals_reference(height, width):
    image = colourful(12, height, width)
    drawn = parameters(12)
    with using("reference"):
        expected = kernels.color_jitter(image, *drawn)
    with using("triton"):
        assert torch.equal(kernels.color_jitter(image, *drawn), expected)


@pytest.mark.parametrize(("patch", "count"), [(8, 12), (14, 1), (4, 83)])
def test_kernel_equals_reference_on_visible_patches_of_planes(patch, count):
    height, width = 28 // patch * patch, 84 // patch * patch
    length = height * width // patch**2
    image = colourful(4, height, width).permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    visible, drawn = some_positions(4, length, count), parameters(4)
    with using("reference"):
        expected = kernels.color_jitter(image, *drawn, visible=visible, patch=patch)
    with using("triton"):
        got = kernels.color_jitter(image, *drawn, visible=visible, patch=patch)
    assert torch.equal(got, expected)
    assert got.is_contiguous()


@pytest.mark.parametrize(
    "settings", [{}, {"brightness": 1.5, "hue": 0.0, "probability": 1.0, "grayscale": 1.0}]
)
def test_parameters_by_the_kernel_are_the_references_bits(settings):
    sample = torch.cat([torch.arange(300), torch.tensor([2**40 + 1, 2**62])]).to(DEVICE)
    keys = {"seed": 2**50 + 7, "epoch": 2**31 + 5, "view": 1, **settings}
    with using("reference"):
        expected = kernels.jitter_parameters(sample, **keys)
    with using("triton"):
        got = kernels.jitter_parameters(sample, **keys)
    for mine, wanted in zip(got, expected, strict=True):
        assert mine.dtype == wanted.dtype
        assert torch.equal(mine, wanted)


def test_parameters_follow_their_distributions():
    factors, order, apply, gray = kernels.jitter_parameters(
        torch.arange(20_000), seed=0, epoch=0, view=1, grayscale=0.2
    )
    low, high = torch.tensor([0.6, 0.6, 0.6, -0.1]), torch.tensor([1.4, 1.4, 1.4, 0.1])
    unit = (factors - low) / (high - low)
    assert unit.min() > -1e-6
    assert unit.max() < 1 + 1e-6
    assert (unit.mean(0) - 0.5).abs().max() < 0.01
    assert abs(float(apply.double().mean()) - 0.8) < 0.012
    assert abs(float(gray.double().mean()) - 0.2) < 0.012
    counts = torch.bincount(order, minlength=24).double()
    assert len(counts) == 24
    assert ((counts - 20_000 / 24) ** 2 / (20_000 / 24)).sum() < 49.7  # 23 degrees, p = 0.001


def test_a_strength_above_one_draws_from_zero_on():
    sample = torch.arange(2000)
    factor = kernels.jitter_parameters(sample, seed=0, epoch=0, view=1, brightness=1.5)[0][:, 0]
    assert 0 <= factor.min() < 0.02
    assert 2.48 < factor.max() <= 2.5


def test_the_two_views_are_jittered_differently():
    sample = torch.arange(8)
    first, second = (kernels.jitter_parameters(sample, seed=0, epoch=0, view=v)[0] for v in (0, 1))
    assert not (first == second).any()


def test_opcheck():
    image, visible = colourful(2, 8, 12), some_positions(2, 6, 3)
    with using("triton"):
        from pipeline.kernels.color_jitter.triton import _color_jitter

        torch.library.opcheck(_color_jitter, (image, *parameters(2), None, 1))
        torch.library.opcheck(_color_jitter, (image, *parameters(2), visible, 4))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"factors": torch.zeros(2, 3)}, "factors must be"),
        ({"order": torch.zeros(2, dtype=torch.int64)}, "order must be"),
        ({"apply": torch.zeros(2)}, "apply must be"),
        ({"patch": 4}, "visible and patch together"),
        ({"patch": 3, "visible": torch.zeros(2, 1, dtype=torch.int32)}, "does not tile"),
        ({"patch": 4, "visible": torch.zeros(2, 1, dtype=torch.int64)}, "visible must be int32"),
        ({"image": torch.zeros(2, 8, 8, 3)}, "image must be uint8"),
    ],
)
def test_arguments_that_do_not_fit(change, error):
    names = ("factors", "order", "apply", "gray")
    drawn = dict(zip(names, (x.cpu() for x in parameters(2)), strict=True))
    image = torch.zeros(2, 8, 8, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match=error):
        kernels.color_jitter(**{"image": image, **drawn, **change})
    for strength in ({"hue": 0.6}, {"hue": -0.1}, {"contrast": -0.1}):
        with pytest.raises(ValueError, match="jitter strengths"):
            kernels.jitter_parameters(torch.arange(2), seed=0, epoch=0, view=0, **strength)
