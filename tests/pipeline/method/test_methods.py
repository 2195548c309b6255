"""Methods beside MAE, R-MAE and C-MAE: no masking, cutmix, paired tokens, MoCo v3."""

import math
import os

import oracle
import pytest
import torch
import torch.multiprocessing as mp
from tiny import DECODER_HEADS, HEADS, PATCH, images, tiny_recipe

from pipeline.config.recipe import HeadsRecipe, RecipeError
from pipeline.distributed import cannot_build
from pipeline.errors import UserError
from pipeline.kernels import cutmix
from pipeline.kernels.philox import uniform
from pipeline.method.encoder import Encoder
from pipeline.method.heads import GlobalBatchNorm, feature_std, mlp, spread
from pipeline.method.objective import build_objective
from pipeline.method.parameter_groups import parameter_groups
from pipeline.method.views import FIRST, SECOND, make_views
from pipeline.method.vit import sincos_position
from pipeline.weights.run import encoder_state

SAMPLE = torch.tensor([11, 4, 29])
MOCO = (
    "encoder={masked_tokens: drop, init: mocov3, freeze_patch: true}",
    "views={mask_ratio: 0, second: crop, jitter: {where: visible, grayscale: 0.2}}",
    "measure={kind: infonce, tokens: cls, symmetric: true, scale_2tau: true}",
    "measure.heads={hidden: 24, out: 12, projector_layers: 3, predictor_layers: 2, "
    "batch_norm: true}",
)


def views_of(recipe, image, crop=None, epoch=2):
    return make_views(image, SAMPLE, recipe=recipe, epoch=epoch, patch=PATCH, crop=crop)


def test_without_masking_mae_predicts_every_patch():
    recipe = tiny_recipe("mae", "views.mask_ratio=0")
    objective, _ = build_objective(recipe)
    image = images()
    views = views_of(recipe, image)
    assert [sorted(r) for r in views.region.tolist()] == [list(range(16))] * 3
    loss, _ = objective(image, SAMPLE, 2)
    weights = dict(objective.named_parameters())
    everything = list(range(16))
    expected = []
    for picture in image:
        z = oracle.encode(weights, picture, everything, patch=PATCH, heads=HEADS)
        out = oracle.decode(weights, z, everything, (4, 4), DECODER_HEADS)
        expected += [
            ((out[p] - oracle.target_of(picture, p, PATCH)) ** 2).mean() for p in range(16)
        ]
    torch.testing.assert_close(loss, torch.stack(expected).mean(), rtol=1e-5, atol=1e-6)


def test_without_masking_cmae_compares_two_whole_images():
    recipe = tiny_recipe("cmae", "views={mask_ratio: 0, second: none}")
    views = views_of(recipe, images())
    assert views.first.visible.shape == views.second.visible.shape == (3, 16)
    assert not torch.equal(views.first.image, views.second.image)  # jittered apart
    objective, teacher = build_objective(recipe)
    loss, terms = objective(images(), SAMPLE, 2, teacher)
    loss.backward()
    assert torch.isfinite(loss)
    assert 0 < terms["feature_std"] < 1.5


@pytest.mark.parametrize("view", [FIRST, SECOND])
def test_cutmix_is_one_box_of_a_neighbour(view):
    image = images(6, 16)
    sample = torch.arange(6)
    mixed = cutmix(image, sample, 1.0, seed=3, epoch=1, view=view)
    neighbour = image.roll(-1 if view == FIRST else 1, 0)
    cut = (mixed != image).any(-1)
    assert cut.any()
    for b in range(6):
        rows, columns = cut[b].any(1).nonzero().flatten(), cut[b].any(0).nonzero().flatten()
        if len(rows) == 0:
            continue
        box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        assert torch.equal(mixed[b][box], neighbour[b][box])
        outside = torch.ones(16, 16, dtype=torch.bool)
        outside[box] = False
        assert torch.equal(mixed[b][outside], image[b][outside])
    again = cutmix(image[2:5], sample[2:5], 1.0, seed=3, epoch=1, view=view)
    assert torch.equal((again != image[2:5]).any(-1)[0:1], cut[2:3]) or view == SECOND
    assert torch.equal(cutmix(image, sample, 0.0, seed=3, epoch=1, view=view), image)


def test_cutmix_takes_half_of_the_area_on_average_and_keeps_maes_target():
    sample = torch.arange(1500)
    image = sample.remainder(251).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 128, 128, 3)
    share = (cutmix(image, sample, 1.0, seed=0, epoch=0, view=0) != image).float().mean()
    # E[(1 - l) * share inside]: a centred box keeps (1 - s / 4)^2 of its sides, s^2 = 1 - l
    s = torch.linspace(0, 1, 10001).sqrt()
    assert share == pytest.approx((s**2 * (1 - s / 4) ** 2).mean().item(), abs=0.02)
    recipe = tiny_recipe("mae", "views.cutmix=1")
    views = views_of(recipe, images())
    assert torch.equal(views.target, images())
    assert not torch.equal(views.first.image, images())


@pytest.mark.parametrize("view", [FIRST, SECOND])
def test_cutmix_box_against_its_formula(view):
    """Side sqrt(1 - lambda) of height and width, around a centre, from a neighbour."""
    sample = torch.arange(20)
    image = images(20, 16)
    mixed = cutmix(image, sample, 0.7, seed=3, epoch=1, view=view)
    u = uniform(sample, seed=3, epoch=1, stream=32 + view, count=4).tolist()
    for b, (lam, y, x, chance) in enumerate(u):
        expected = image[b].clone()
        if chance < 0.7:
            half = int(math.sqrt(1 - lam) * 16) // 2
            rows = slice(max(int(y * 16) - half, 0), int(y * 16) + half)
            columns = slice(max(int(x * 16) - half, 0), int(x * 16) + half)
            other = image[(b + 1 if view == FIRST else b - 1) % 20]
            expected[rows, columns] = other[rows, columns]
        assert torch.equal(mixed[b], expected), b


PAIRED = ("encoder.masked_tokens=drop", "views.second=independent", "views.second_mask_ratio=0.5")


@pytest.mark.parametrize("tokens", ["patch", "patch+cls"])
@pytest.mark.parametrize("negatives", ["all", "position", "image", "byol"])
def test_paired_positions_against_the_oracle(tokens, negatives):
    """Dropped patches: the loss is over the positions that both views show."""
    measure = (
        f"measure={{kind: byol, tokens: {tokens}}}"
        if negatives == "byol"
        else f"measure={{tokens: {tokens}, negatives: {negatives}}}"
    )
    recipe = tiny_recipe("cmae", "views.mask_ratio=0.5", *PAIRED, measure, "measure.heads.out=12")
    objective, teacher = build_objective(recipe)
    image = images()
    loss, terms = objective(image, SAMPLE, 2, teacher)
    views = views_of(recipe, image)
    prefix = int("cls" in tokens)

    def at(z, view):
        places = view.visible.tolist()
        return [
            {-1: z[b, 0]} | {p: z[b, prefix + i] for i, p in enumerate(places[b])}
            if prefix
            else {p: z[b, i] for i, p in enumerate(places[b])}
            for b in range(3)
        ]

    query = at(objective.measure.query(objective.encoder(*views.first)), views.first)
    key = at(teacher(views.second), views.second)

    def s(a, b):
        return (a * b).sum() / (a.norm() * b.norm())

    per_image, strangers = [], []
    for b in range(3):
        losses = []
        for p in query[b].keys() & key[b].keys():
            if negatives == "byol":
                losses.append(2 - 2 * s(query[b][p], key[b][p]))
                continue
            among = {
                "position": [key[g][p] for g in range(3) if p in key[g]],
                "image": list(key[b].values()),
                "all": [k for g in range(3) for k in key[g].values()],
            }[negatives]
            logits = torch.stack([s(query[b][p], k) / 0.2 for k in among])
            losses.append(logits.logsumexp(0) - s(query[b][p], key[b][p]) / 0.2)
        per_image.append(torch.stack(losses).mean())
        strangers += [
            s(query[b][p], key[g][o])
            for p in query[b]
            for g in range(3)
            for o in key[g]
            if (g, o) != (b, p)
            and {"all": True, "position": o == p, "image": g == b}.get(negatives)
        ]
    expected = torch.stack(per_image).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    if negatives != "byol":
        torch.testing.assert_close(terms["negative"], torch.stack(strangers).mean().detach())
    ours = torch.autograd.grad(loss, [*objective.parameters()], allow_unused=True)
    theirs = torch.autograd.grad(expected, [*objective.parameters()], allow_unused=True)
    for (name, _), mine, other in zip(objective.named_parameters(), ours, theirs, strict=True):
        if other is not None:
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["byol", "infonce"])
def test_images_whose_views_share_no_or_one_position(kind):
    """None: the image adds nothing (and no nan). One: its pair counts as the mean of it."""
    overrides = (*PAIRED, "views.second_mask_ratio=0.75", f"measure={{kind: {kind}}}")
    recipe = tiny_recipe("cmae", *overrides, "measure.heads.out=12")
    objective, teacher = build_objective(recipe)
    batch, sample = 12, torch.arange(12)
    image = images(batch)
    loss, terms = objective(image, sample, 2, teacher)
    views = make_views(image, sample, recipe=recipe, epoch=2, patch=PATCH)
    query = objective.measure.query(objective.encoder(*views.first))
    key = teacher(views.second)
    first, second = views.first.visible.tolist(), views.second.visible.tolist()

    def s(b, p, g):
        one, other = query[b, first[b].index(p)], key[g, second[g].index(p)]
        return one @ other / (one.norm() * other.norm())

    shared = [set(first[b]) & set(second[b]) for b in range(batch)]
    assert {0, 1, 2} <= {len(places) for places in shared}
    expected, positive = 0.0, 0.0
    for b, places in enumerate(shared):
        for p in places:
            cosine = s(b, p, b)
            others = [s(b, p, g) / 0.2 for g in range(batch) if p in second[g]]
            one = 2 - 2 * cosine
            if kind == "infonce":
                one = torch.stack(others).logsumexp(0) - cosine / 0.2
            expected += one / len(places) / batch
            positive += cosine.detach() / len(places) / batch
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(terms["positive"], positive, rtol=1e-5, atol=1e-6)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in objective.parameters() if p.grad is not None)


@pytest.mark.parametrize("negatives", ["all", "position", "image"])
def test_a_single_token_has_no_negative_and_no_nan(negatives):
    """One image whose views show one position each: the positive is all there is."""
    settings = ("views.mask_ratio=0.9", *PAIRED, "views.second_mask_ratio=0.9")
    recipe = tiny_recipe("cmae", *settings, f"measure={{negatives: {negatives}}}")
    objective, _ = build_objective(recipe)
    views = views_of(recipe, images())
    one = [type(v)(v.image[:1], v.visible[:1], v.inverse[:1]) for v in (views.first, views.first)]
    z = torch.randn(1, 1, 12, requires_grad=True)
    loss, terms = objective.measure.paired(z, torch.randn(1, 1, 12), *one)
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert terms["negative"].item() == 0.0


def test_symmetric_pairs_are_the_mean_of_both_directions():
    recipe = tiny_recipe("cmae", "views.mask_ratio=0.5", *PAIRED, "measure.symmetric=true")
    objective, teacher = build_objective(recipe)
    loss, _ = objective(images(), SAMPLE, 2, teacher)
    views = views_of(recipe, images())
    sides = [
        objective.measure.paired(
            objective.measure.query(objective.encoder(*online)), teacher(other), online, other
        )[0]
        for online, other in ((views.first, views.second), (views.second, views.first))
    ]
    torch.testing.assert_close(loss, sum(sides) / 2)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("encoder.masked_tokens=drop",), "complementary views share no patch position"),
        (("views.second=crop",), "two crops"),
        (("views.mask_ratio=0",), "leaves nothing"),
    ],
)
def test_pairs_that_do_not_exist_are_refused(overrides, words):
    with pytest.raises(RecipeError, match=words):
        tiny_recipe("cmae", *overrides)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("views.second=crop",), "two crops"),
        (("views.second=none", "views.mask_ratio=0"), "masked patch"),
    ],
)
def test_reconstructions_that_do_not_exist_are_refused(overrides, words):
    with pytest.raises(RecipeError, match=words):
        tiny_recipe("mae", *overrides)


@pytest.mark.parametrize("negatives", ["all", "position", "image"])
def test_autocast_does_not_round_the_cosines_of_pairs(negatives):
    recipe = tiny_recipe("cmae", "views.mask_ratio=0.5", *PAIRED, f"measure.negatives={negatives}")
    objective, views = build_objective(recipe)[0], views_of(recipe, images())
    query, key = (torch.randn(3, 8, 12) + 3 for _ in range(2))
    found = []
    for enabled in (False, True):
        leaf = query.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss, terms = objective.measure.paired(leaf, key, views.first, views.second)
        loss.backward()
        found.append((loss, terms["negative"], leaf.grad))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-7)


def test_mocov3_heads_are_linear_norm_relu_with_torchs_batch_norm():
    torch.manual_seed(0)
    head = mlp(16, HeadsRecipe(hidden=24, out=12, batch_norm=True), 3)
    x = torch.randn(5, 1, 16)
    y = x[:, 0]
    for number, linear in enumerate(p for p in head if isinstance(p, torch.nn.Linear)):
        assert linear.bias is None
        norm = torch.nn.BatchNorm1d(linear.out_features, affine=False)
        y = norm(y @ linear.weight.T)
        y = y.relu() if number < 2 else y
    torch.testing.assert_close(head(x)[:, 0], y, rtol=1e-5, atol=1e-5)
    assert [p.weight is not None for p in head if isinstance(p, GlobalBatchNorm)] == [1, 1, 0]


def moco():
    return build_objective(tiny_recipe("cmae", *MOCO))


def test_mocov3_trains_with_a_frozen_patch_embedding_and_its_own_table():
    objective, teacher = moco()
    image, crop = images(3), images(3, seed=1)
    loss, _ = objective(image, SAMPLE, 0, teacher, crop)
    loss.backward()
    frozen = [n for n, p in objective.named_parameters() if p.grad is None]
    assert frozen == ["encoder.patch_embed.proj.weight", "encoder.patch_embed.proj.bias"]
    in_groups = {id(p) for g in parameter_groups(objective) for p in g["params"]}
    assert id(objective.encoder.patch_embed["proj"].weight) not in in_groups
    mae = sincos_position((4, 4), 16)
    ours = encoder_state(objective.encoder.state_dict(), objective.encoder)["pos_embed"][0]
    torch.testing.assert_close(ours, torch.cat([mae[:, 8:], mae[:, :8]], dim=1))
    assert objective.encoder.cls_token.abs().max() < 1e-4
    swapped, _ = objective(crop, SAMPLE, 0, teacher, image)  # symmetric, jitter apart from the view
    assert swapped.item() != loss.item()
    with pytest.raises(UserError, match="second crop"):
        objective(image, SAMPLE, 0, teacher)


def test_jitter_of_the_whole_image_is_in_both_crops_of_it():
    changes = "views.jitter.where=whole", "views.jitter.probability=1"
    image = images(3)
    views = views_of(tiny_recipe("mocov3", *changes), image, image.clone())
    assert not torch.equal(views.first.image, image)
    assert torch.equal(views.first.image, views.second.image)


def test_mocov3_qkv_is_initialised_as_three_linears():
    recipe = tiny_recipe("cmae", *MOCO, "encoder.options.embed_dim=64")
    weight = Encoder(recipe).blocks[0].attn.qkv.weight
    bound = (6 / (64 + 64)) ** 0.5
    assert bound * 0.95 < weight.abs().max() <= bound


def test_symmetric_mocov3_loss_is_the_mean_of_both_directions():
    recipe = tiny_recipe("cmae", *MOCO)
    objective, teacher = build_objective(recipe)
    image, crop = images(3), images(3, seed=1)
    loss, _ = objective(image, SAMPLE, 2, teacher, crop)
    views = views_of(recipe, image, crop)
    expected = 0.0
    for online, other in ((views.first, views.second), (views.second, views.first)):
        query = objective.measure.query(objective.encoder(*online))
        expected += oracle.infonce_loss(query, teacher(other), temperature=0.2, negatives="all")
    torch.testing.assert_close(loss, expected / 2 * 0.4, rtol=1e-5, atol=1e-5)


def test_terms_of_a_symmetric_measure_are_those_of_both_directions():
    """As the loss is: BYOL's is 2 - 2 cos of the positives."""
    objective, teacher = build_objective(tiny_recipe("cmae", "measure={kind: byol}"))
    sides = [objective(images(), SAMPLE, 2, teacher)]
    objective.measure.recipe = objective.measure.recipe.model_copy(update={"symmetric": True})
    both = objective(images(), SAMPLE, 2, teacher)
    assert abs(float(both[0].detach() - sides[0][0].detach())) > 1e-4
    for loss, terms in (*sides, both):
        torch.testing.assert_close(2 - 2 * terms["positive"], loss.detach())


def _rank(rank, port, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    mine = slice(2 * rank, 2 * rank + 2)
    gradients = {}
    for name, build, sample in cases():
        objective, teacher = build()
        crops = [images(4, seed=1)[mine]] if name == "moco" else []
        loss, _ = objective(images(4)[mine], sample[mine], 0, teacher, *crops)
        loss.backward()
        for key, parameter in objective.named_parameters():
            if parameter.grad is not None:
                torch.distributed.all_reduce(parameter.grad)
                gradients[f"{name} {key}"] = parameter.grad / 2
    if rank == 0:
        torch.save(gradients, folder / "two.pt")
    torch.distributed.destroy_process_group()


def cases():
    yield "moco", moco, torch.arange(4)
    for negatives in ("all", "position", "image"):
        overrides = ("views.mask_ratio=0.5", *PAIRED, f"measure.negatives={negatives}")
        yield (
            negatives,
            lambda o=overrides: build_objective(tiny_recipe("cmae", *o)),
            torch.arange(4),
        )


def test_two_ranks_equal_one_with_batch_norm_and_with_paired_positions(tmp_path, free_port):
    mp.spawn(_rank, (free_port, tmp_path), nprocs=2)
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    seen = 0
    for name, build, sample in cases():
        objective, teacher = build()
        crops = [images(4, seed=1)] if name == "moco" else []
        loss, _ = objective(images(4), sample, 0, teacher, *crops)
        loss.backward()
        for key, parameter in objective.named_parameters():
            if parameter.grad is not None:
                seen += 1
                scale = parameter.grad.abs().max().item()
                torch.testing.assert_close(
                    two[f"{name} {key}"], parameter.grad, rtol=1e-3, atol=1e-4 * scale + 1e-6,
                    msg=f"{name} {key}",
                )  # fmt: skip
    assert seen == len(two)


def test_feature_std_tells_a_collapse():
    torch.manual_seed(0)
    spread = feature_std(torch.randn(500, 2, 64))
    assert spread == pytest.approx(1.0, abs=0.05)
    assert feature_std(torch.ones(8, 3, 64)) == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("setting", [("mae",), ("rmae",), ("cmae", "measure.symmetric=true")])
def test_a_single_image_reports_no_spread(setting):
    """Its standard deviation is 0, which a report would take for a collapse."""
    objective, teacher = build_objective(tiny_recipe(*setting))
    _, terms = objective(images(1), SAMPLE[:1], 0, teacher)
    assert "feature_std" not in terms
    assert spread(torch.randn(2, 3, 4)).keys() == {"feature_std"}


def test_feature_std_is_its_formula():
    z, unit = torch.randn(5, 4, 6), []
    for tokens in z:
        mean = tokens[1:].sum(0) / 3
        unit.append(mean / (mean**2).sum().sqrt())
    centre = sum(unit) / 5
    variance = sum((u - centre) ** 2 for u in unit) / 5
    torch.testing.assert_close(feature_std(z), variance.sqrt().sum() / 6 * math.sqrt(6))


def test_teacher_distance():
    objective, teacher = build_objective(tiny_recipe("cmae"))
    assert teacher.distance(objective) == 0.0
    with torch.no_grad():
        objective.measure.projector[0].bias += 3.0
    size = math.sqrt(sum((p.double() ** 2).sum() for p in teacher.parameters()))
    change = 3.0 * math.sqrt(objective.measure.projector[0].bias.numel())
    assert teacher.distance(objective) == pytest.approx(change / size, rel=1e-5)
    with torch.no_grad():
        objective.measure.projector[0].bias -= 3.0
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.mul_(1.25)
    assert teacher.distance(objective) == pytest.approx(0.25, rel=1e-5)


@pytest.mark.parametrize("name", ["rmae", "cmae"])
def test_gradient_checkpointing_changes_no_gradient(name):
    gradients = []
    for checkpointing in (False, True):
        objective, teacher = build_objective(tiny_recipe(name))
        for part in objective.modules():
            if hasattr(part, "grad_checkpointing"):
                part.grad_checkpointing = checkpointing
        loss, _ = objective(images(), SAMPLE, 0, teacher)
        loss.backward()
        gradients.append({k: p.grad for k, p in objective.named_parameters()})
    for key, value in gradients[0].items():
        assert torch.equal(value, gradients[1][key]), key


@pytest.mark.slow
@pytest.mark.skipif(cannot_build() != "", reason="needs a C++ compiler and Python.h")
def test_compiled_blocks_give_the_same_loss_and_gradients(monkeypatch):
    if os.environ.get("ATEN_CPU_CAPABILITY"):
        # Inductor's AVX2 code gave NaN on an AVX-512 processor held to AVX2: scalar code there.
        monkeypatch.setattr("torch._inductor.config.cpp.simdlen", 1)
    results = []
    for compiled in (False, True):
        objective, _ = build_objective(tiny_recipe("mae"))
        if compiled:
            for block in objective.encoder.blocks:
                block.compile(dynamic=False)
        loss, _ = objective(images(), SAMPLE, 0)
        loss.backward()
        results.append((loss.detach(), {k: p.grad for k, p in objective.named_parameters()}))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-6)
    assert results[0][1].keys() == results[1][1].keys()  # names stay as they were
    for key, value in results[0][1].items():
        torch.testing.assert_close(value, results[1][1][key], rtol=1e-3, atol=1e-5, msg=key)
