"""CKA, dropped patches and the k-NN vote against formulas written out."""

import math

import pytest
import torch

from pipeline.kernels.philox import words
from pipeline.method.metrics import biased_hsic, cka, gram, hsic, kept_patches, vote


def test_hsic_is_the_mean_over_distinct_quadruples():
    """Song et al. 2012, Eq. 4: E[k12 l12] + E[k12 l34] - 2 E[k12 l13], indices all distinct."""
    torch.manual_seed(0)
    n = 6
    k, m = (x @ x.T for x in torch.randn(2, n, 3, dtype=torch.float64))
    total, count = 0.0, 0
    for a in range(n):
        for b in range(n):
            for c in range(n):
                for d in range(n):
                    if len({a, b, c, d}) == 4:
                        total += k[a, b] * (m[a, b] + m[c, d] - 2 * m[a, c])
                        count += 1
    assert hsic(k, m).item() == pytest.approx(float(total) / count, rel=1e-10)


def test_cka_is_one_for_rotations_and_near_zero_for_strangers():
    torch.manual_seed(0)
    x = torch.randn(300, 8)
    rotation = torch.linalg.qr(torch.randn(8, 8)).Q
    assert cka(x, 3 * x @ rotation + 5).item() == pytest.approx(1.0, abs=1e-5)
    assert abs(cka(x, torch.randn(300, 8)).item()) < 0.05
    assert torch.allclose(gram(x + 7), gram(x), atol=1e-3)


def test_biased_hsic_is_the_trace_of_centred_matrices():
    """Gretton et al. 2005: tr(K H L H) / (n - 1)², also of matrices that are not centred."""
    k, m = (x @ x.T for x in torch.randn(2, 6, 3, dtype=torch.float64) + 1)
    h = torch.eye(6, dtype=torch.float64) - 1 / 6
    expected = (k @ h @ m @ h).trace() / 25
    torch.testing.assert_close(biased_hsic(k, m), expected)


def test_a_gram_matrix_is_exact_to_float64_and_of_centred_features():
    x = (torch.randn(7, 5, generator=torch.Generator().manual_seed(0)) + 3).half().float()
    centred = x.double() - sum(x.double()) / 7
    expected = [[sum(a * b for a, b in zip(u, v, strict=True)) for v in centred] for u in centred]
    torch.testing.assert_close(gram(x), torch.tensor(expected).double(), rtol=0, atol=1e-12)


def test_kept_patches_are_sorted_and_of_the_right_number():
    kept = kept_patches(torch.arange(50), 16, 0.25, 3)
    assert kept.shape == (50, 12)
    assert (kept.diff(dim=1) > 0).all()
    assert torch.equal(kept_patches(torch.tensor([7]), 16, 0.25, 3)[0], kept[7])
    assert kept_patches(torch.arange(2), 196, 0.3, 3).shape[1] == 196 - 59  # 58.8 rounded


def test_kept_patches_have_a_stream_of_their_own():
    """77, none that a training draws from: a probe does not show what the mask has shown."""
    noise = words(torch.tensor([7]), seed=3, epoch=0, stream=77, count=16)[0].tolist()
    smallest = sorted(sorted(range(16), key=noise.__getitem__)[:12])
    assert kept_patches(torch.tensor([7]), 16, 0.25, 3)[0].tolist() == smallest


def test_votes_count_by_exp_of_cosine():
    feature = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-1.0, 0.0]])
    label = torch.tensor([0, 1, 1, 0])
    votes = vote(torch.tensor([[2.0, 0.0]]), feature, label, 2, k=3, temperature=0.5)[0]
    weights = [math.exp((c - 1) / 0.5) for c in (1.0, 0.6, 0.0)]
    assert votes.tolist() == pytest.approx([weights[0], weights[1] + weights[2]], rel=1e-5)
