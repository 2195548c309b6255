"""Masks: what each policy promises, the same bits from the kernel, uniformity."""

import pytest
import torch
from kernels_testing import DEVICE, using

from pipeline import kernels

SIZES = [
    (196, 49, 60),
    (600, 150, 301),
    (49, 12, 5),
    (49, 1, 48),
    (49, 48, 1),
    (4, 4, 2),
    (1, 1, 1),
    (15, 7, 7),
]


def draw(samples, length, first, second, policy, **key):
    second = {"independent": second}.get(policy, 0)
    return kernels.sample_masks(
        torch.as_tensor(samples, device=DEVICE),
        **{"seed": 11, "epoch": 2, **key},
        length=length,
        visible=(first, second),
        policy=policy,
    )


def sorted_noise(sample, length, view, seed=11, epoch=2):
    """Positions by (Philox word, position), one by one."""
    noise = kernels.philox.words(
        torch.tensor([sample]), seed=seed, epoch=epoch, stream=view, count=length
    )[0].tolist()
    return sorted(range(length), key=lambda position: (noise[position], position))


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("policy", ["random", "complement", "independent", "none"])
def test_what_a_policy_promises(policy, implementation):
    samples, length, first, second = [5, 2**40, 6], 15, 4, 6
    with using(implementation):
        masks = draw(samples, length, first, second, policy)
    for row, sample in enumerate(samples):
        order = sorted_noise(sample, length, 0)
        assert masks.visible1[row].tolist() == sorted(order[:first])
        assert masks.hidden1[row].tolist() == sorted(order[first:])
        slots = masks.visible1[row].tolist() + masks.hidden1[row].tolist()
        assert [slots[n] for n in masks.inverse1[row].tolist()] == list(range(length))
        if policy == "random":
            assert masks.visible2 is None
            assert masks.inverse2 is None
            continue
        expected = {
            "complement": sorted(order[first:]),
            "independent": sorted(sorted_noise(sample, length, 1)[:second]),
            "none": list(range(length)),
        }[policy]
        assert masks.visible2[row].tolist() == expected
        slots = expected + sorted(set(range(length)) - set(expected))
        assert [slots[n] for n in masks.inverse2[row].tolist()] == list(range(length))


@pytest.mark.parametrize(("length", "first", "second"), SIZES)
@pytest.mark.parametrize("policy", ["complement", "independent"])
def test_the_kernel_draws_the_same_bits(length, first, second, policy):
    if policy == "complement" and first == length:
        pytest.skip("nothing is left for the second view")
    samples, key = [0, 77, 2**33 + 5], {"seed": 2**40 + 9, "epoch": 2**31 + 1}
    with using("reference"):
        expected = draw(samples, length, first, second, policy, **key)
    with using("triton"):
        got = draw(samples, length, first, second, policy, **key)
    for name, table in expected._asdict().items():
        assert getattr(got, name).dtype == table.dtype == torch.int32
        assert torch.equal(getattr(got, name), table), name


def test_every_patch_is_equally_likely():
    length, keep, samples = 49, 12, 20_000
    with using("reference"):
        shown = draw(torch.arange(samples), length, keep, 0, "random").visible1.long()
    counts = torch.bincount(shown.flatten().cpu(), minlength=length).double()
    expected = samples * keep / length
    # A sample shows exactly `keep`: counts vary less than independent ones by the last factor.
    chi_square = ((counts - expected) ** 2 / expected).sum() * (length - 1) / (length - keep)
    assert 23.3 < chi_square < 84.0  # 48 degrees of freedom, p = 0.001 on either side


def test_every_pair_of_patches_is_equally_likely():
    length, keep, samples = 12, 4, 20_000
    with using("reference"):
        shown = draw(torch.arange(samples), length, keep, 0, "random").visible1.long()
    table = torch.zeros(samples, length, dtype=torch.float64).scatter_(1, shown.cpu(), 1.0)
    pairs = torch.triu_indices(length, length, 1)
    counts = (table.T @ table)[*pairs]
    # chance[u]: that u given patches are all shown; a pair and a pair make u = 2, 3 or 4 patches.
    chance = torch.ones(5, dtype=torch.float64)
    for u in range(4):
        chance[u + 1] = chance[u] * (keep - u) / (length - u)
    shared = (pairs.T[:, None, :, None] == pairs.T[None, :, None, :]).sum((2, 3))
    covariance = samples * (chance[4 - shared] - chance[2] ** 2)
    off = counts - samples * chance[2]
    chi_square = off @ torch.linalg.pinv(covariance, hermitian=True) @ off
    assert 35.5 < chi_square < 106.0  # 65 degrees of freedom, p = 0.001 on either side


def test_views_epochs_and_seeds_draw_anew():
    with using("reference"):
        base = draw(torch.arange(50), 49, 12, 12, "independent")
        assert not torch.equal(base.visible1, base.visible2)
        for key in ({"epoch": 3}, {"seed": 12}):
            other = draw(torch.arange(50), 49, 12, 12, "independent", **key)
            assert not torch.equal(other.visible1, base.visible1)
        again = draw(torch.arange(50).flip(0), 49, 12, 12, "independent")
    assert torch.equal(again.visible1.flip(0), base.visible1)


@pytest.mark.parametrize(
    ("visible", "policy", "error"),
    [
        ((0, 0), "random", "1 <= K1 <= L"),
        ((50, 0), "random", "1 <= K1 <= L"),
        ((12, 12), "complement", "shows 37 patches"),
        ((12, 12), "none", "shows 49 patches"),
        ((12, 0), "independent", "needs 1 <= K2"),
        ((49, 0), "complement", "needs 1 <= K2"),
        ((12, 0), "checkerboard", "must be one of random, complement, independent, none"),
    ],
)
def test_sizes_that_contradict_the_policy(visible, policy, error):
    with pytest.raises(ValueError, match=error):
        kernels.sample_masks(
            torch.tensor([1]), seed=0, epoch=0, length=49, visible=visible, policy=policy
        )
