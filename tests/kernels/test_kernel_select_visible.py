"""select_visible: against a sort by hand, the same bits from the kernel, ties by position."""

import pytest
import torch
from kernels_testing import DEVICE, using

from pipeline import kernels

SIZES = [(196, 49), (49, 12), (49, 1), (49, 48), (4, 4), (1, 1), (35, 9), (1031, 700)]


def priorities(batch, length, high, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, high, (batch, length), generator=generator).to(DEVICE)


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("high", [1, 3, 2**46])  # ties alone, many of them, and the whole range
@pytest.mark.parametrize(("length", "visible"), SIZES)
def test_against_a_sort_by_hand(length, visible, high, implementation):
    priority = priorities(3, length, high)
    with using(implementation):
        shown, hidden, inverse = kernels.select_visible(priority, visible)
    assert {t.dtype for t in (shown, hidden, inverse)} == {torch.int32}
    for b, row in enumerate(priority.tolist()):
        order = sorted(range(length), key=lambda position: (row[position], position))
        assert shown[b].tolist() == sorted(order[:visible])
        assert hidden[b].tolist() == sorted(order[visible:])
        slots = shown[b].tolist() + hidden[b].tolist()
        assert [slots[n] for n in inverse[b].tolist()] == list(range(length))


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("visible", [1, 5, 8])
def test_the_largest_priorities_and_one_far_from_the_others(visible, implementation):
    last = 2**46 - 1
    rows = [[last] * 9, [last] * 4 + [0] + [last] * 4, [0] * 4 + [last] + [0] * 4]
    with using(implementation):
        shown = kernels.select_visible(torch.tensor(rows, device=DEVICE), visible)[0]
    for b, row in enumerate(rows):
        order = sorted(range(9), key=lambda position: (row[position], position))
        assert shown[b].tolist() == sorted(order[:visible])


@pytest.mark.parametrize(
    ("priority", "visible", "error"),
    [
        (torch.zeros(2, 9), 3, "priority must be int64"),
        (torch.zeros(9, dtype=torch.int64), 3, "priority must be int64"),
        (torch.zeros(2, 9, dtype=torch.int64), 0, "cannot show 0 of 9"),
        (torch.zeros(2, 9, dtype=torch.int64), 10, "cannot show 10 of 9"),
    ],
)
def test_what_does_not_fit_is_refused(priority, visible, error):
    with pytest.raises(ValueError, match=error):
        kernels.select_visible(priority, visible)
