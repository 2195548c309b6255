"""cutmix: the kernel is the reference byte for byte; its box: tests/pipeline/method/test_methods"""

import numpy as np
import pytest
import torch
from kernels_testing import DEVICE, random_images, using

from pipeline import kernels
from pipeline.kernels import philox
from pipeline.kernels.streams import Stream


@pytest.mark.parametrize("view", [0, 1])
@pytest.mark.parametrize("planes", [False, True])
@pytest.mark.parametrize(("height", "width"), [(8, 12), (33, 47), (64, 64)])
def test_kernel_equals_reference(height, width, planes, view):
    image, sample = random_images(7, height, width), torch.arange(90, 97, device=DEVICE)
    if planes:
        image = image.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    arguments = {"seed": 2**40 + 3, "epoch": 5, "view": view}
    with using("reference"):
        expected = kernels.cutmix(image, sample, 0.7, **arguments)
    with using("triton"):
        got = kernels.cutmix(image, sample, 0.7, **arguments)
    assert torch.equal(got, expected)
    assert got.is_contiguous()
    assert expected.is_contiguous()
    changed = (got != image).flatten(1).any(1)
    assert changed.any()
    assert not changed.all()


def box_of(u, height, width):
    """Rows and columns of the box of four drawn numbers, by the formula of the paper."""
    half = [int(np.sqrt(np.float32(1) - u[0]) * np.float32(n)) // 2 for n in (height, width)]
    centre = [int(c * np.float32(n)) for c, n in zip(u[1:3], (height, width), strict=True)]
    return [slice(max(c - h, 0), max(c + h, 0)) for c, h in zip(centre, half, strict=True)]


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("width", [64, 50])  # wide words and single values
def test_every_border_of_a_box_against_its_formula(width, implementation):
    """Boxes with this seed begin and end at and beside the ends of wide words; one chance is the
    limit."""
    batch, height = 90, 7
    image, sample = random_images(batch, height, width), torch.arange(batch)
    key = {"seed": 0, "epoch": 2}
    u = philox.uniform(sample, **key, stream=Stream.CUTMIX + 1, count=4).numpy()
    limit = float(np.sort(u[:, 3])[-5])
    with using(implementation):
        got = kernels.cutmix(image, sample.to(DEVICE), limit, **key, view=1)
    expected = image.clone()
    for b in range(batch):
        if u[b, 3] < limit:
            box = box_of(u[b], height, width)
            expected[b][*box] = image[b - 1][*box]
    assert torch.equal(got, expected)


def test_the_neighbour_is_the_next_for_t1_and_the_one_before_for_t2():
    image = torch.arange(4, dtype=torch.uint8, device=DEVICE)[:, None, None, None]
    image = image.expand(4, 40, 40, 3).contiguous()
    for view, step in ((0, 1), (1, -1)):
        with using("triton"):
            mixed = kernels.cutmix(
                image, torch.arange(4, device=DEVICE), 1.0, seed=0, epoch=0, view=view
            )
        for b in range(4):
            assert set(mixed[b].unique().tolist()) <= {b, (b + step) % 4}


def test_opcheck():
    with using("triton"):
        from pipeline.kernels.cutmix.triton import _cutmix

        image, sample = random_images(2, 8, 8), torch.arange(2, device=DEVICE)
        epoch = torch.tensor(1, device=DEVICE)
        torch.library.opcheck(_cutmix, (image, sample, 0.5, 3, epoch, 32, 1))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"sample": torch.arange(3)}, "3 sample numbers for 2 images"),
        ({"view": 2}, "view must be 0 or 1"),
        ({"seed": -1}, "seed must be"),
        ({"image": torch.zeros(2, 8, 8)}, "image"),
    ],
)
def test_arguments_that_do_not_fit(change, error):
    image = torch.zeros(2, 8, 8, 3, dtype=torch.uint8)
    arguments = {"image": image, "sample": torch.arange(2), "probability": 1.0, "seed": 0}
    with pytest.raises(ValueError, match=error):
        kernels.cutmix(**{**arguments, "epoch": 0, "view": 0, **change})
