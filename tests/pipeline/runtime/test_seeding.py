"""Seeds of the global generators: every generator by every number, and alike in a resumed run."""

import random

import numpy as np
import pytest
import torch

from pipeline.runtime.seeding import seed_all


def drawn():
    """The next numbers of `random`, numpy and torch."""
    return random.random(), float(np.random.random()), float(torch.rand(()))  # noqa: NPY002


@pytest.fixture(autouse=True)
def _left_as_it_was():
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    yield
    random.setstate(state[0])
    np.random.set_state(state[1])  # noqa: NPY002
    torch.set_rng_state(state[2])


def test_every_number_of_a_step_changes_what_every_generator_draws():
    places = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (1, 2, 3, 4)]
    found = []
    for place in (*places, *places):
        seed_all(*place)
        found.append(drawn())
    first, again = found[: len(places)], found[len(places) :]
    assert first == again
    for values in zip(*first, strict=True):
        assert len(set(values)) == len(places)


def test_the_generators_have_seeds_of_their_own():
    state = np.random.SeedSequence((5, 7)).generate_state(3, np.uint32).tolist()
    seed_all(5, 7)
    expected = (
        random.Random(state[0]).random(),
        np.random.RandomState(state[1]).random(),
        float(torch.rand((), generator=torch.Generator().manual_seed(state[2]))),
    )
    assert drawn() == expected
