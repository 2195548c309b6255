"""The sentence about a number that is out of its bounds."""

import math

import pytest

from pipeline.errors import UserError, check_range


@pytest.mark.parametrize(
    ("value", "bounds", "said"),
    [
        (0, {"at_least": 1}, "--n 0: must be at least 1"),
        (1234567, {"at_most": 2}, "--n 1234567: must be at most 2"),
        (-(10**400), {"at_least": 1}, f"--n -1{'0' * 400}: must be at least 1"),
        (1.5, {"above": 0, "at_most": 1}, "--n 1.5: must be above 0 and at most 1"),
        (0.0, {"above": 0, "at_most": 1}, "--n 0: must be above 0 and at most 1"),
        (1.0, {"at_least": 0, "below": 1}, "--n 1: must be at least 0 and below 1"),
        (-1e-9, {"at_least": 0}, "--n -1e-09: must be at least 0"),
        (math.nan, {"at_least": 0}, "--n nan: must be at least 0 and finite"),
        (math.inf, {"above": 0}, "--n inf: must be above 0 and finite"),
        (math.nan, {}, "--n nan: must be finite"),
    ],
)
def test_a_number_out_of_its_bounds_is_named(value, bounds, said):
    with pytest.raises(UserError) as error:
        check_range("--n", value, **bounds)
    assert str(error.value) == said


def test_the_ends_belong_to_closed_bounds_and_an_option_not_given_is_in_all():
    check_range("--n", 1, at_least=1, at_most=1)
    check_range("--n", 0.5, above=0, below=1)
    check_range("--n", None, at_least=1)
    check_range("--n", 10**400, at_least=1)
