"""Philox: published answers, independence of everything but its key, uniformity."""

import pytest
import torch

from pipeline.kernels.philox import philox, uniform, words

# Random123, kat_vectors, philox4x32 with 10 rounds: counter, key, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter, key, expected):
    got = philox(tuple(torch.tensor([word]) for word in counter), key)
    assert tuple(int(word) for word in got) == expected


def test_a_sample_draws_the_same_in_any_batch_and_count():
    sample = torch.tensor([7, 2**40 + 1, 0, 12])
    key = {"seed": 2**62 + 3, "epoch": 5, "stream": 9}
    whole = uniform(sample, **key, count=10)
    for row in range(4):
        assert torch.equal(uniform(sample[row : row + 1], **key, count=7)[0], whole[row, :7])


def test_every_part_of_the_key_matters():
    sample = torch.tensor([3, 3 + 2**32])
    key = {"seed": 1, "epoch": 1, "stream": 1}
    base = words(sample, **key, count=8)
    assert not torch.equal(base[0], base[1])
    for name in key:
        other = words(sample, **{**key, name: 2}, count=8)
        assert not (other == base).any(), name
    other = words(sample, **{**key, "seed": 1 + 2**32}, count=8)
    assert not (other == base).any()


def test_uniform_on_the_unit_interval():
    drawn = uniform(torch.arange(2000), seed=0, epoch=0, stream=0, count=50)
    assert drawn.dtype == torch.float32
    assert 0 <= drawn.min() < drawn.max() < 1
    counts = torch.histc(drawn, bins=100, min=0, max=1).double()
    chi_square = ((counts - 1000) ** 2 / 1000).sum()
    assert chi_square < 148.2  # 99 degrees of freedom, p = 0.001


@pytest.mark.parametrize(
    ("change", "words_of_the_error"),
    [
        ({"seed": -1}, "seed must be in"),
        ({"epoch": 2**32}, "epoch must be in"),
        ({"stream": 2**16}, "stream must be below 65536"),
        ({"count": 0}, "count in 1"),
        ({"sample": torch.tensor([1.0])}, "int64 tensor"),
    ],
)
def test_bad_keys(change, words_of_the_error):
    arguments = {"sample": torch.tensor([1]), "seed": 0, "epoch": 0, "stream": 0, "count": 1}
    with pytest.raises(ValueError, match=words_of_the_error):
        uniform(**{**arguments, **change})
