"""quantiser.py: gradients, running means and restarts against examples worked by hand, k-means, codebook usage."""

import numpy as np
import pytest
import torch

import quantiser

KINDS = tuple(quantiser.QUANTISERS)


@pytest.fixture(autouse=True)
def seed():
    """Give every test the same random numbers, whatever ran before it."""
    torch.manual_seed(0)


def quantiser_at(codebook, kind="ema", **options):
    """Return a quantiser of this kind with the codes `codebook` [K, d], each as if just initialised."""
    codebook = torch.as_tensor(codebook, dtype=torch.float32)
    q = quantiser.QUANTISERS[kind](*codebook.shape, **options)
    q.set_codebook(codebook)
    return q


# ----------------------------------------------------------------------------------------------------------------------
# Losses and gradients


def test_gradient_on_two_codes_by_hand():
    """Vectors pass gradients straight through; the loss is 0.25 x commitment, and pulls x towards its code."""
    q = quantiser_at([[0.0, 0.0], [4.0, 0.0]]).eval()
    x = torch.tensor([[[1.0, 1.0], [3.0, -1.0]]], requires_grad=True)
    vectors, codes, loss = q(x)
    assert codes.tolist() == [[0, 1]]
    assert vectors.tolist() == [[[0.0, 0.0], [4.0, 0.0]]]
    weight = torch.tensor([[[2.0, 3.0], [5.0, 7.0]]])
    (passed,) = torch.autograd.grad((vectors * weight).sum(), x, retain_graph=True)
    assert torch.equal(passed, weight)  # straight through: as if vectors were x
    assert loss.item() == pytest.approx(0.25 * (1 + 1 + 1 + 1) / 4)
    (pulled,) = torch.autograd.grad(loss, x)
    assert torch.allclose(pulled, 0.25 * 2 * torch.tensor([[[1.0, 1.0], [-1.0, -1.0]]]) / 4)  # 2 (x - code) / entries


def test_gradient_of_a_learned_codebook_by_hand():
    """The codebook loss pulls the codes towards valid vectors, until the codebook is frozen."""
    q = quantiser_at([[0.0, 0.0], [4.0, 0.0]], "loss")
    x = torch.tensor([[[1.0, 1.0], [1.0, -3.0]]], requires_grad=True)
    valid = torch.tensor([[True, False]])
    vectors, codes, loss = q(x, valid)
    assert codes.tolist() == [[0, 0]] and loss.item() == pytest.approx(1.25 * (1 + 1) / 4)
    x_gradient, code_gradient = torch.autograd.grad(loss + 0 * vectors.sum(), (x, q.codebook))
    assert torch.allclose(x_gradient, 0.25 * 2 * torch.tensor([[[1.0, 1.0], [0.0, 0.0]]]) / 4)
    assert torch.allclose(code_gradient, -2 * torch.tensor([[1.0, 1.0], [0.0, 0.0]]) / 4)  # by the valid vector alone
    q.freeze()
    _, _, loss = q(x, valid)
    assert loss.item() == pytest.approx(0.25 * (1 + 1) / 4) and not q.codebook.requires_grad


# ----------------------------------------------------------------------------------------------------------------------
# How codes move, start and restart


def test_codebook_is_the_running_mean_of_a_reference_loop():
    """30 updates of the EMA codebook equal those of a loop in float64."""
    codebook = np.random.default_rng(0).normal(size=(5, 3))
    q = quantiser_at(codebook, patience=1000)
    counts, sums = np.ones(5), codebook.copy()
    for _ in range(30):
        x, valid = torch.randn(8, 4, 3), torch.rand(8, 4) < 0.7
        q(x, valid)
        batch_counts, batch_sums = np.zeros(5), np.zeros((5, 3))
        for vector in x[valid].double().numpy():
            code = ((codebook - vector) ** 2).sum(1).argmin()
            batch_counts[code] += 1
            batch_sums[code] += vector
        counts = 0.99 * counts + 0.01 * batch_counts
        sums = 0.99 * sums + 0.01 * batch_sums
        codebook = sums / counts[:, None]
    assert np.allclose(q.codebook, codebook, atol=1e-5) and np.allclose(q.counts, counts, atol=1e-5)


def test_code_that_never_restarts_stays_where_it_was():
    """Its running count and sum become too small to divide long before a large patience ends."""
    q = quantiser_at([[0.0, 0.0], [1000.0, 0.0]], patience=10**9)
    q.decay = 0.5
    for _ in range(300):
        q(torch.randn(4, 2, 2))
    assert q.codebook[1, 0].item() == pytest.approx(1000)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_start_on_the_first_batch(kind):
    """Each code on a vector of its own."""
    x = torch.randn(16, 4, 8) * 100
    q = quantiser.QUANTISERS[kind](32, 8)
    q.decay = 1.0  # of "ema": the first update leaves the codes where they start
    q(x)
    distance = (q.codebook[:, None] - x.flatten(0, 1)).norm(dim=-1).min(1).values
    assert distance.max() < 1e-3 and len(torch.unique(q.codebook, dim=0)) == 32


@pytest.mark.parametrize("kind", KINDS)
def test_unused_code_restarts_on_an_encoder_output(kind):
    """After `patience` updates, and not before."""
    q = quantiser_at([[0.0, 0.0], [1000.0, 0.0]], kind, patience=3)
    x = torch.randn(4, 2, 2)
    for _ in range(3):
        assert q.codebook[1, 0].item() == pytest.approx(1000)
        q(x)
    assert torch.cdist(q.codebook[1:], x.flatten(0, 1)).min() < 1e-6
    assert q.unused.tolist() == [0, 0]
    assert kind == "loss" or q.counts[1] == 1 and torch.equal(q.sums[1], q.codebook[1])


def test_codes_are_placed_on_valid_vectors_by_seed_and_update():
    """The draw depends on both; vectors that are not valid are never taken."""
    x = torch.randn(8, 4, 3)
    x[:, 1] = 1000.0
    valid = torch.arange(4).expand(8, 4) != 1
    codebooks = []
    for seed, updates in ((0, 0), (0, 0), (1, 0), (0, 5)):
        q = quantiser.EMAQuantiser(6, 3, seed=seed)
        q.updates.fill_(updates)
        q._reinitialise(torch.ones(6, dtype=torch.bool), x, valid)
        assert q.codebook.abs().max() < 100
        codebooks.append(q.codebook)
    assert torch.equal(codebooks[0], codebooks[1])
    assert not torch.equal(codebooks[0], codebooks[2]) and not torch.equal(codebooks[0], codebooks[3])


# ----------------------------------------------------------------------------------------------------------------------
# k-means


def test_kmeans_finds_clusters_and_leaves_no_mean_where_nothing_is():
    """Also a cluster of 20 points of 1070; the same means by the same seed."""
    centres = torch.tensor([[0.0, 0.0], [50.0, 0.0], [0.0, 50.0], [50.0, 50.0]])
    sizes = (900, 50, 20, 100)
    x = torch.cat([centre + torch.randn(size, 2) for centre, size in zip(centres, sizes)])
    means = quantiser.kmeans(x, 4, seed=1)
    assert torch.cdist(centres, means).amin(1).max() < 1.5
    assert torch.equal(quantiser.kmeans(x, 4, seed=1), means)
    few = torch.tensor([[0.0], [1.0]]).repeat(5, 1)
    assert sorted(quantiser.kmeans(few, 4).unique().tolist()) == [0.0, 1.0]
