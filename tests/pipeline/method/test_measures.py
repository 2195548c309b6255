"""M: the parts of the similarity measurements (the losses themselves: test_objective.py)."""

import oracle
import pytest
import torch
import torch.multiprocessing as mp
from tiny import images, tiny_recipe

from pipeline.config.planning import plan_recipe
from pipeline.method.encoder import Encoder
from pipeline.method.heads import choose_tokens
from pipeline.method.measures import BYOL, InfoNCE, contrast, gather_keys, keys_as_of
from pipeline.method.measures.contrast import _candidates
from pipeline.method.objective import build_objective


def test_choose_tokens():
    z = torch.randn(2, 5, 3)
    assert torch.equal(choose_tokens(z, "cls"), z[:, :1])
    assert torch.equal(choose_tokens(z, "patch"), z[:, 1:])
    assert torch.equal(choose_tokens(z, "patch+cls"), z)
    torch.testing.assert_close(
        choose_tokens(z, "mean_patch"), (z[:, 1:2] + z[:, 2:3] + z[:, 3:4] + z[:, 4:5]) / 4
    )


@pytest.mark.parametrize("negatives", ["all", "position", "image"])
@pytest.mark.parametrize("scale", [False, True])
def test_infonce_against_the_pair_by_pair_oracle(negatives, scale):
    recipe = tiny_recipe("cmae", f"measure.negatives={negatives}", f"measure.scale_2tau={scale}")
    measure = InfoNCE(recipe, Encoder(recipe))
    torch.manual_seed(1)
    query = torch.randn(3, 5, 12, requires_grad=True)
    key = torch.randn(3, 5, 12)
    loss, terms = measure.compare(query, key)
    expected = oracle.infonce_loss(query, key, temperature=0.2, negatives=negatives)
    expected = expected * 0.4 if scale else expected
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    (ours,) = torch.autograd.grad(loss, query)
    (theirs,) = torch.autograd.grad(expected, query)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    positive = torch.nn.functional.cosine_similarity(query, key, dim=-1).mean()
    torch.testing.assert_close(terms["positive"], positive.detach(), rtol=1e-5, atol=1e-6)


def test_byol_is_two_minus_two_cosines():
    recipe = tiny_recipe("cmae", "measure={kind: byol}")
    measure = BYOL(recipe, Encoder(recipe))
    query, key = torch.randn(2, 3, 12), torch.randn(2, 3, 12)
    loss, parts = measure.compare(query, key)
    terms = [
        2 - 2 * (query[b, t] @ key[b, t]) / (query[b, t].norm() * key[b, t].norm())
        for b in range(2)
        for t in range(3)
    ]
    torch.testing.assert_close(loss, torch.stack(terms).mean())
    torch.testing.assert_close(parts["positive"], 1 - loss / 2)  # the mean cosine
    assert measure.compare(query, query)[0].item() == pytest.approx(0.0, abs=1e-6)


def _two_ranks(rank, port, negatives, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    recipe = tiny_recipe("cmae", f"measure.negatives={negatives}")
    objective, teacher = build_objective(recipe)
    image, sample = images(4), torch.arange(4)
    mine = slice(2 * rank, 2 * rank + 2)
    loss, _ = objective(image[mine], sample[mine], 0, teacher)
    loss.backward()
    gradients = {k: p.grad / 2 for k, p in objective.named_parameters()}
    for value in (loss, *gradients.values()):
        torch.distributed.all_reduce(value.detach())
    if rank == 0:
        torch.save({"loss": loss.detach() / 2, "gradients": gradients}, folder / "two.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("negatives", ["all", "position", "image"])
def test_two_ranks_equal_one_rank_with_the_whole_batch(negatives, tmp_path, free_port):
    mp.spawn(_two_ranks, (free_port, negatives, tmp_path), nprocs=2)
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    objective, teacher = build_objective(tiny_recipe("cmae", f"measure.negatives={negatives}"))
    loss, _ = objective(images(4), torch.arange(4), 0, teacher)
    loss.backward()
    torch.testing.assert_close(two["loss"], loss.detach(), rtol=1e-5, atol=1e-6)
    for name, parameter in objective.named_parameters():
        torch.testing.assert_close(
            two["gradients"][name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name
        )


@pytest.mark.parametrize("negatives", ["all", "position", "image"])
def test_a_ranks_own_key_is_found_among_those_of_all_ranks(negatives):
    query, keys = torch.randn(2, 3, 5), torch.randn(6, 3, 5)
    shown = torch.ones(6, 3, dtype=torch.bool)
    cosine, _, own = _candidates(query, keys, shown, negatives, offset=4)
    positive = cosine.gather(-1, own[..., None])[..., 0]
    torch.testing.assert_close(positive, (query * keys[4:6]).sum(-1))


def test_one_process_gathers_nothing():
    key = torch.randn(2, 3, 4)
    gathered, offset = gather_keys(key)
    assert gathered is key
    assert offset == 0


def test_keys_of_all_ranks_lie_in_rank_order_and_carry_no_gradient(monkeypatch):
    every = torch.randn(3, 2, 5, 4)  # ranks, images, tokens, channels

    def gather(into, own):
        assert torch.equal(own, every[contrast.dist.get_rank()])
        assert own.is_contiguous()
        into.copy_(every.flatten(0, 1))

    monkeypatch.setattr(contrast.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(contrast.dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(contrast.dist, "all_gather_into_tensor", gather)
    for rank in range(3):
        monkeypatch.setattr(contrast.dist, "get_rank", lambda rank=rank: rank)
        key = every[rank].mT.contiguous().mT.requires_grad_()
        gathered, offset = gather_keys(key)
        assert torch.equal(gathered, torch.cat([every[0], every[1], every[2]]))
        assert not gathered.requires_grad
        assert torch.equal(gathered[offset : offset + 2], every[rank])


@pytest.mark.parametrize(
    "dropped", [(), ("encoder.masked_tokens=drop", "views.second=independent")]
)
def test_negatives_of_the_same_image_need_no_other_rank(dropped):
    recipe = tiny_recipe("cmae", "measure.negatives=image", *dropped)
    objective, teacher = build_objective(recipe)
    with keys_as_of(3) as sent:
        loss, _ = objective(images(2), torch.arange(2), 0, teacher)
    assert sent == []
    expected, _ = objective(images(2), torch.arange(2), 0, teacher)
    assert torch.equal(loss, expected)
    plan = plan_recipe({}, recipe, 2)
    assert (plan.pooled, plan.exchanges) == ("", False)
    assert plan_recipe({}, tiny_recipe("cmae"), 2).pooled == "negatives"


def test_a_dry_run_has_the_keys_of_the_ranks_it_stands_for():
    key = torch.randn(2, 3, 4)
    for ranks in (2, 3):
        with keys_as_of(ranks) as sent:
            gathered, offset = gather_keys(key)
        assert torch.equal(gathered, key.repeat(ranks, 1, 1))
        assert offset == 0
        assert [id(t) for t in sent] == [id(key)]
    assert gather_keys(key)[0] is key
