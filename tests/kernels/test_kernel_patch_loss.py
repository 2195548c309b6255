"""patch_loss: reference against a loop, kernel against reference, with one term and two."""

import pytest
import torch
from kernels_testing import (
    DEVICE,
    IMAGENET,
    assert_agree,
    assert_gradients,
    assert_implementations_agree,
    gradients,
    noise,
    random_images,
    some_positions,
    using,
)

from pipeline import kernels

# batch, height, width, patch, region
SIZES = [(2, 56, 56, 8, 37), (1, 56, 56, 8, 1), (3, 28, 42, 14, 5), (2, 32, 64, 16, 7)]
VARIANTS = ["mae", "relaxed", "weighted", "raw pixels"]


def leaves(batch, patch, count, dtype=torch.float32, relaxed=False):
    shape = (batch, count, 3 * patch**2)
    second = {"other": noise(*shape, dtype=dtype, seed=1)} if relaxed else {}
    return {"prediction": noise(*shape, dtype=dtype), **second}


def weights(batch, count):
    """Zeros and ones; the first sample counts nothing, which the clamp must survive."""
    weight = (noise(batch, count) > 0).float()
    weight[0] = 0
    return weight


def variant(name, batch, count):
    """Keyword arguments of a variant."""
    weight = weights(batch, count) if name == "weighted" else None
    return {"weight": weight, "norm_pix": name != "raw pixels"}


def op(image, region, patch, **settings):
    return lambda prediction, other=None: kernels.patch_loss(
        prediction, image, region, patch=patch, other=other, **IMAGENET, **settings
    )


def loop(image, region, patch, weight, norm_pix):
    """Float64, one patch after the other, from the definition."""
    mean, std = (torch.tensor(IMAGENET[n], dtype=torch.float64) for n in ("mean", "std"))

    def target(b, at):
        y, x = at // (image.shape[2] // patch) * patch, at % (image.shape[2] // patch) * patch
        pixels = image[b, y : y + patch, x : x + patch].cpu().double()
        values = ((pixels / 255 - mean) / std).flatten()
        if not norm_pix:
            return values
        centre = values.sum() / len(values)
        variance = ((values - centre) ** 2).sum() / (len(values) - 1)
        return (values - centre) / (variance + 1e-6) ** 0.5

    def loss(prediction, other=None):
        samples = []
        for b in range(len(region)):
            total, count = prediction.new_zeros(2), 0.0
            for r, at in enumerate(region[b].tolist()):
                chosen = 1.0 if weight is None else float(weight[b, r])
                first = ((prediction[b, r] - target(b, at).to(prediction)) ** 2).mean()
                second = 0 * first
                if other is not None:
                    second = ((other[b, r] - prediction[b, r]) ** 2).mean()
                total, count = total + chosen * torch.stack([first, second]), count + chosen
            samples.append(total / max(count, 1.0))
        return torch.stack(samples).mean(0)

    return loss


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(("batch", "height", "width", "patch", "count"), SIZES)
def test_reference_against_a_loop(batch, height, width, patch, count, name):
    image = random_images(batch, height, width)
    region = some_positions(batch, height * width // patch**2, count)
    settings = variant(name, batch, count)
    assert_gradients(
        op(image, region, patch, **settings),
        loop(image, region, patch, **settings),
        leaves(batch, patch, count, relaxed=name in ("relaxed", "weighted")),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(("batch", "height", "width", "patch", "count"), SIZES)
def test_kernel_against_reference(batch, height, width, patch, count, name, dtype):
    image = random_images(batch, height, width)
    region = some_positions(batch, height * width // patch**2, count)
    assert_implementations_agree(
        op(image, region, patch, **variant(name, batch, count)),
        leaves(batch, patch, count, dtype, relaxed=name in ("relaxed", "weighted")),
    )


def test_kernel_with_planes_and_strided_inputs():
    planes = random_images(2, 24, 40).permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    region = some_positions(2, 15, 8)[:, ::2]
    inputs = {"prediction": noise(2, 4, 384)[..., ::2], "other": noise(4, 2, 192).transpose(0, 1)}
    weight = weights(4, 2).T
    assert_implementations_agree(op(planes, region, 8, weight=weight), inputs)


def test_kernel_adds_up_the_weights_of_a_large_region():
    """More than the 256 weights that a program reads at a time, and a program with two samples."""
    image, region = random_images(2, 68, 68), some_positions(2, 289, 257)
    weight = weights(2, 257)
    weight[1, 256:] = 1
    function = op(image, region, 4, weight=weight)
    assert_implementations_agree(function, leaves(2, 4, 257, relaxed=True))


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_epsilon_beside_the_variance_of_almost_flat_patches(implementation):
    """One value of a patch is a level off, a variance of epsilon's size; or none, and all is 0."""
    image = torch.full((2, 16, 16, 3), 128, dtype=torch.uint8, device=DEVICE)
    image[0, ::8, 1::8, 2] += 1
    region = some_positions(2, 4, 4)
    prediction = torch.zeros(2, 4, 192, device=DEVICE, requires_grad=True)
    with using(implementation):
        loss = kernels.patch_loss(
            prediction, image, region, patch=8, mean=(0.5,) * 3, std=(0.25,) * 3
        )
        loss[0].backward()
    values = torch.zeros(192, dtype=torch.float64)
    values[5] = 1 / 255 / 0.25  # of the second pixel the blue
    target = torch.zeros(2, 4, 192, dtype=torch.float64)
    target[0] = (values - values.mean()) / (values.var(unbiased=True) + 1e-6).sqrt()
    assert_agree("target", -prediction.grad.cpu() * (target.numel() / 2), target, 1e-4)
    assert_agree("loss", loss[:1].detach().cpu(), (target**2).mean()[None], 1e-4)


def test_predictions_of_different_dtypes():
    image, region = random_images(2, 16, 16), some_positions(2, 4, 3)
    inputs = leaves(2, 8, 3, torch.bfloat16, relaxed=True)
    inputs["other"] = noise(2, 3, 192, seed=1)
    assert_implementations_agree(op(image, region, 8), inputs)
    with using("triton"):
        got = gradients(op(image, region, 8), inputs)["other"]
    assert not torch.equal(got.bfloat16().float(), got)  # as exact as its own dtype


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_a_sample_whose_region_counts_less_than_one_patch(implementation):
    """The sum of weights is at least 1: a sample without a patch is 0, not 0 / 0."""
    image, region = random_images(2, 16, 16), some_positions(2, 4, 2)
    prediction = noise(2, 2, 192)
    weight = torch.tensor([[0.0, 0.5], [1.0, 0.25]], device=DEVICE)
    with using(implementation):
        got = op(image, region, 8, weight=weight)(prediction)
    expected = loop(image, region, 8, weight, True)(prediction.double())
    assert_agree("loss", got, expected, 1e-5)


def test_gradient_reaches_both_predictions_and_they_balance():
    """Eq. 8 has no stop-gradient: the relaxed term pulls both ways with equal strength."""
    image, region = random_images(2, 16, 16), some_positions(2, 4, 3)
    inputs = [x.requires_grad_() for x in leaves(2, 8, 3, relaxed=True).values()]
    with using("reference"):
        second = op(image, region, 8)(*inputs)[1]
    first, other = torch.autograd.grad(second, inputs)
    assert first.abs().min() > 0
    torch.testing.assert_close(first, -other)


def test_gradcheck_of_the_reference():
    image, region = random_images(2, 8, 8), some_positions(2, 4, 2)
    inputs = [x.double().requires_grad_() for x in leaves(2, 4, 2, relaxed=True).values()]
    with using("reference"):
        function = op(image, region, 4, weight=weights(2, 2))
        assert torch.autograd.gradcheck(function, inputs)


def test_opcheck():
    image, region = random_images(2, 16, 16), some_positions(2, 4, 3)
    prediction, other = (x.requires_grad_() for x in leaves(2, 8, 3, relaxed=True).values())
    with using("triton"):
        from pipeline.kernels.patch_loss.triton import _patch_loss

        settings = (8, [0.5] * 3, [0.2] * 3, True)
        both = (prediction, other, image, region, weights(2, 3), *settings)
        torch.library.opcheck(_patch_loss, both)
        torch.library.opcheck(_patch_loss, (prediction, None, image, region, None, *settings))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"image": torch.zeros(2, 16, 16, 3)}, "image must be uint8"),
        ({"region": torch.zeros(2, 3)}, "region must be int32"),
        ({"region": torch.zeros(2, 0, dtype=torch.int32)}, "region is empty"),
        ({"prediction": torch.zeros(2, 3, 64)}, "predictions must be"),
        ({"other": torch.zeros(2, 4, 192)}, "predictions must be"),
        ({"weight": torch.zeros(2, 3, dtype=torch.int32)}, "weight must be float32"),
    ],
)
def test_shapes_that_do_not_fit(change, error):
    arguments = {
        "prediction": torch.zeros(2, 3, 192),
        "image": torch.zeros(2, 16, 16, 3, dtype=torch.uint8),
        "region": torch.zeros(2, 3, dtype=torch.int32),
        "patch": 8,
        **IMAGENET,
        **change,
    }
    with pytest.raises(ValueError, match=error):
        kernels.patch_loss(**arguments)
