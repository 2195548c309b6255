"""embed_visible: reference against a loop and a convolution, kernel against reference."""

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

# batch, height, width, patch, channels, visible
SIZES = [
    (2, 56, 56, 8, 48, 12),
    (1, 56, 56, 8, 33, 1),
    (3, 28, 42, 14, 20, 5),  # 14: no power of two, lines of 42 bytes
    (2, 32, 64, 16, 130, 7),  # all but one visible, more channels than a tile
]


def leaves(patch, width, length, dtype=torch.float32):
    return {
        "weight": noise(width, 3, patch, patch, dtype=dtype) * 0.1,
        "bias": noise(width, dtype=dtype),
        "position": noise(length, width, dtype=dtype, seed=3),
    }


def loop(image, visible, mean, std):
    """Float64, one visible patch after the other."""

    def embed(weight, bias, position):
        patch, columns = weight.shape[-1], image.shape[2] // weight.shape[-1]
        rows = []
        for b in range(len(image)):
            for at in visible[b].tolist():
                y, x = at // columns * patch, at % columns * patch
                total = bias + position[at]
                for c in range(3):
                    pixels = image[b, y : y + patch, x : x + patch, c].double() / 255
                    total = (
                        total + weight[:, c].flatten(1) @ ((pixels - mean[c]) / std[c]).flatten()
                    )
                rows.append(total)
        return torch.stack(rows).unflatten(0, visible.shape)

    return embed


def op(image, visible):
    return lambda weight, bias, position: kernels.embed_visible(
        image, visible, weight, bias, position, **IMAGENET
    )


@pytest.mark.parametrize(("batch", "height", "width", "patch", "channels", "count"), SIZES)
def test_reference_against_a_loop(batch, height, width, patch, channels, count):
    image, length = random_images(batch, height, width), height * width // patch**2
    visible = some_positions(batch, length, count)
    function, oracle = op(image, visible), loop(image, visible, **IMAGENET)
    assert_gradients(function, oracle, leaves(patch, channels, length))


def test_reference_against_a_convolution():
    image, visible = random_images(2, 56, 56), some_positions(2, 49, 49)
    weights = leaves(8, 24, 49)
    mean, std = (torch.tensor(IMAGENET[n], device=DEVICE)[:, None, None] for n in ("mean", "std"))
    planes = (image.permute(0, 3, 1, 2) / 255 - mean) / std
    grid = torch.nn.functional.conv2d(planes, weights["weight"], weights["bias"], stride=8)
    expected = grid.flatten(2).mT + weights["position"]
    index = visible.long()[..., None].expand(-1, -1, 24)
    with using("reference"):
        assert_agree("output", op(image, visible)(**weights), expected.gather(1, index), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "height", "width", "patch", "channels", "count"), SIZES)
def test_kernel_against_reference(batch, height, width, patch, channels, count, dtype):
    image, length = random_images(batch, height, width), height * width // patch**2
    visible = some_positions(batch, length, count)
    assert_implementations_agree(op(image, visible), leaves(patch, channels, length, dtype))


def test_kernel_with_planes_and_strided_inputs():
    planes = random_images(2, 24, 40).permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    visible = some_positions(2, 15, 8)[:, ::2]
    weights = leaves(8, 16, 15)
    weights["weight"] = weights["weight"].to(memory_format=torch.channels_last)
    weights["position"] = noise(16, 15).T
    assert_implementations_agree(op(planes, visible), weights)
    crops = random_images(2, 32, 64)[:, 4:28, 8:48]
    assert_implementations_agree(op(crops, visible), weights)


def test_kernel_splits_the_rows_of_the_weight_gradient(monkeypatch):
    from pipeline.kernels.embed_visible import triton as embed_visible_triton

    monkeypatch.setattr(embed_visible_triton, "SPLIT_ROWS", 64)
    image, visible = random_images(5, 56, 56), some_positions(5, 49, 30)
    assert_implementations_agree(op(image, visible), leaves(8, 16, 49))


def test_without_position():
    image, visible = random_images(2, 24, 24), some_positions(2, 9, 3)
    weights = leaves(8, 16, 9)
    del weights["position"]
    assert_implementations_agree(
        lambda weight, bias: kernels.embed_visible(image, visible, weight, bias, None, **IMAGENET),
        weights,
    )


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_multiplied_is_the_normalised_pixel_rounded_once(dtype, implementation):
    """Channel d picks value d of its patch, (p, q, colour); some pixels are near the mean."""
    image, visible = random_images(2, 8, 12) // 64 + 104, some_positions(2, 6, 5)
    weight = torch.eye(48, dtype=dtype, device=DEVICE).view(48, 4, 4, 3).permute(0, 3, 1, 2)
    with using(implementation):
        got = op(image, visible)(weight, weight.new_zeros(48), None)
    mean, std = (torch.tensor(IMAGENET[n], dtype=torch.float64) for n in ("mean", "std"))
    exact = ((image.cpu().double() / 255 - mean) / std).unflatten(2, (3, 4)).unflatten(1, (2, 4))
    for b in range(2):
        for k, at in enumerate(visible[b].tolist()):
            wanted = exact[b, at // 3, :, at % 3].flatten()
            # The interpreter cuts bf16 off, where others round.
            torch.testing.assert_close(
                got[b, k].cpu().double(), wanted, rtol=torch.finfo(dtype).eps, atol=1e-6
            )


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_positions_of_another_dtype(implementation):
    image, visible = random_images(2, 24, 24), some_positions(2, 9, 3)
    weights = leaves(8, 16, 9, torch.bfloat16)
    weights["position"] = weights["position"].float()
    with using(implementation):
        got = gradients(op(image, visible), weights)
    assert [got[n].dtype for n in ("output", "weight", "position")] == [
        torch.bfloat16, torch.bfloat16, torch.float32,
    ]  # fmt: skip


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_autocast_rounds_factors_once_and_no_sums(implementation):
    """In fp16, to which the interpreter rounds too: patches, weight and upstream, nothing else."""
    image, visible = random_images(2, 16, 24), some_positions(2, 6, 5)
    weights = leaves(8, 16, 6)
    with using(implementation):
        got = gradients(under_autocast(op(image, visible), torch.float16), weights)
    upstream = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(7)).half().double()
    mean, std = (torch.tensor(IMAGENET[n], dtype=torch.float64) for n in ("mean", "std"))
    pixels = ((image.cpu().double() / 255 - mean) / std).half().double()
    weight = weights["weight"].cpu().half().double()
    expected, out = torch.zeros(16, 3, 8, 8, dtype=torch.float64), torch.empty(2, 5, 16)
    added = weights["bias"] + weights["position"]
    for b in range(2):
        for k, at in enumerate(visible[b].tolist()):
            y, x = at // 3 * 8, at % 3 * 8
            patch = pixels[b, y : y + 8, x : x + 8].permute(2, 0, 1)
            expected += upstream[b, k][:, None, None, None] * patch
            out[b, k] = (weight * patch).sum((1, 2, 3)) + added[at].cpu()
    assert_agree("weight", got["weight"].cpu(), expected, 2e-5)
    assert_agree("output", got["output"].cpu(), out, 1e-5)


def rounded_loop(image, visible):
    """Float64, one visible patch after the other, of factors rounded to bf16 once."""

    def embed(weight, bias, position):
        weight, patch = weight.detach(), weight.shape[-1]
        columns, scale = image.shape[2] // patch, [1 / (255 * std) for std in IMAGENET["std"]]
        rows = []
        for b in range(len(image)):
            for at in visible[b].tolist():
                y, x = at // columns * patch, at % columns * patch
                total = bias + position[at]
                for c, (mean, std) in enumerate(zip(*IMAGENET.values(), strict=True)):
                    pixels = image[b, y : y + patch, x : x + patch, c].double()
                    factors = (pixels * scale[c] - mean / std).to(torch.bfloat16).double()
                    rounded = weight[:, c].to(torch.bfloat16).double()
                    total = total + rounded.flatten(1) @ factors.flatten()
                rows.append(total)
        return torch.stack(rows).unflatten(0, visible.shape)

    return embed


def under_autocast(function, dtype=torch.bfloat16):
    def run(**weights):
        with torch.autocast(DEVICE, dtype=dtype):
            return function(**weights)

    return run


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_autocast_rounds_what_is_multiplied_and_nothing_else(implementation):
    image, visible = random_images(2, 56, 56), some_positions(2, 49, 12)
    weights = leaves(8, 48, 49)
    with using(implementation):
        got = gradients(under_autocast(op(image, visible)), weights)
    assert {value.dtype for value in got.values()} == {torch.float32}
    doubles = {name: leaf.double() for name, leaf in weights.items()}
    expected = gradients(rounded_loop(image, visible), doubles)
    # The interpreter cuts off what it should round.
    exact = implementation == "reference" or DEVICE == "cuda"
    for name in ("output", "bias", "position"):
        tolerance = 2e-5 if exact or name != "output" else 2.0**-6
        assert_agree(name, got[name], expected[name], tolerance)
    full = gradients(loop(image, visible, **IMAGENET), doubles)
    assert_agree("weight", got["weight"], full["weight"], 2.0**-6)
    assert not torch.equal(got["weight"].to(torch.bfloat16).float(), got["weight"])
    with pytest.raises(AssertionError, match="output"):
        assert_agree("output", got["output"], full["output"], 2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("batch", "height", "width", "patch", "channels", "count"), SIZES)
def test_kernel_against_reference_under_autocast(
    batch, height, width, patch, channels, count, dtype
):
    image, length = random_images(batch, height, width), height * width // patch**2
    function = under_autocast(op(image, some_positions(batch, length, count)), dtype)
    weights = leaves(patch, channels, length)
    found = {}
    for implementation in ("reference", "triton"):
        with using(implementation):
            found[implementation] = gradients(function, weights)
    tolerance = 2e-5 if DEVICE == "cuda" else 2.0**-6
    for name, value in found["reference"].items():
        assert found["triton"][name].dtype == value.dtype == torch.float32, name
        assert_agree(name, found["triton"][name], value, tolerance)


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_autocast_leaves_weights_of_its_own_dtype_and_float64_alone(implementation):
    image, visible = random_images(2, 24, 24), some_positions(2, 9, 3)
    for dtype in (torch.bfloat16, torch.float64)[: 1 if implementation == "triton" else 2]:
        weights = leaves(8, 16, 9, dtype)
        with using(implementation):
            plain, cast = (
                gradients(f, weights)
                for f in (op(image, visible), under_autocast(op(image, visible)))
            )
        assert all(torch.equal(cast[name], value) for name, value in plain.items())


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_torch_compile_follows_autocast(implementation):
    image, visible = random_images(2, 24, 24), some_positions(2, 9, 3)
    weights, function = leaves(8, 16, 9), under_autocast(op(image, visible))
    with using(implementation):
        expected = gradients(function, weights)
        torch.compiler.reset()
        got = gradients(torch.compile(function, backend="aot_eager", fullgraph=True), weights)
    for name, value in expected.items():
        assert got[name].dtype == value.dtype
        assert_agree(name, got[name], value, 1e-6)


def test_gradcheck_of_the_reference():
    image, visible = random_images(2, 8, 12), some_positions(2, 6, 3)
    inputs = [x.double().requires_grad_() for x in leaves(4, 3, 6).values()]
    with using("reference"):
        assert torch.autograd.gradcheck(op(image, visible), inputs)


def test_opcheck():
    image, visible = random_images(2, 16, 24), some_positions(2, 6, 3)
    weights = [x.requires_grad_() for x in leaves(8, 16, 6).values()]
    with using("triton"):
        from pipeline.kernels.embed_visible.triton import _embed_visible

        arguments = (image, visible, *weights, [0.5] * 3, [0.2] * 3)
        torch.library.opcheck(_embed_visible, (*arguments, torch.float32))
        torch.library.opcheck(_embed_visible, (*arguments, torch.bfloat16))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"image": torch.zeros(2, 16, 24, 3)}, "image must be uint8"),
        ({"image": torch.zeros(2, 15, 24, 3, dtype=torch.uint8)}, "does not tile"),
        ({"visible": torch.zeros(2, 3, dtype=torch.int64)}, "visible must be int32"),
        ({"visible": torch.zeros(1, 3, dtype=torch.int32)}, "is for 1 images"),
        ({"bias": torch.zeros(5)}, "bias"),
        ({"position": torch.zeros(7, 16)}, "position must be"),
        ({"position": torch.zeros(6, 8)}, "position must be"),
        ({"std": (0.2, 0.0, 0.2)}, "std > 0"),
    ],
)
def test_shapes_that_do_not_fit(change, error):
    arguments = {
        "image": torch.zeros(2, 16, 24, 3, dtype=torch.uint8),
        "visible": torch.zeros(2, 3, dtype=torch.int32),
        **leaves(8, 16, 6),
        **IMAGENET,
        **change,
    }
    with pytest.raises(ValueError, match=error):
        kernels.embed_visible(**arguments)
