"""M(f(T1(x)), f(T2(x))): losses, terms and gradients against the loop oracle; teacher; groups."""

from types import SimpleNamespace

import oracle
import pytest
import torch
from tiny import DECODER_HEADS, HEADS, METHODS, PATCH, images, tiny_recipe

from pipeline.errors import UserError
from pipeline.method.heads import feature_std
from pipeline.method.objective import build_objective
from pipeline.method.parameter_groups import parameter_groups
from pipeline.method.teacher import Teacher
from pipeline.method.views import make_views

SAMPLE = torch.tensor([11, 4, 29])


def both_ways(name, *overrides):
    """Loss, terms and gradients of the objective, and of the oracle on the same weights."""
    recipe = tiny_recipe(name, *overrides)
    objective, teacher = build_objective(recipe)
    image = images()
    loss, terms = objective(image, SAMPLE, 2, teacher)
    loss.backward()
    ours = {k: p.grad for k, p in objective.named_parameters()}

    weights = {k: v.detach().clone().requires_grad_() for k, v in objective.named_parameters()}
    views = make_views(image, SAMPLE, recipe=recipe, epoch=2, patch=PATCH)
    expected = (oracle_contrast if name.startswith("cmae") else oracle_reconstruction)(
        recipe, weights, views, image
    )
    theirs = dict(
        zip(weights, torch.autograd.grad(expected["loss"], [*weights.values()]), strict=True)
    )
    return loss, terms, ours, expected, theirs


def oracle_reconstruction(recipe, weights, views, image):
    second = views.second.visible.tolist() if views.second is not None else None
    return oracle.reconstruction_loss(
        weights, image, views.first.visible.tolist(), second, patch=PATCH, heads=HEADS,
        decoder_heads=DECODER_HEADS, lam=recipe.measure.lambda_,
    )  # fmt: skip


def oracle_contrast(recipe, weights, views, image):
    """Fresh weights: the teacher still equals the online encoder and projector."""

    def project(w, view):
        z = [
            oracle.encode(
                w, view.image[b], view.visible[b].tolist(), patch=PATCH, heads=HEADS,
                tokens=recipe.encoder.masked_tokens == "replace",
            )
            for b in range(len(image))
        ]  # fmt: skip
        tokens = [{"patch": t[1:], "mean_patch": t[1:].mean(0, keepdim=True), "cls": t[:1],
                   "patch+cls": t}[recipe.measure.tokens] for t in z]  # fmt: skip
        return oracle.mlp(torch.stack(tokens), w, "measure.projector")

    frozen = {k: v.detach() for k, v in weights.items()}

    def one_side(online, other):
        query = oracle.mlp(project(weights, online), weights, "measure.predictor")
        return oracle.infonce_loss(
            query, project(frozen, other), temperature=recipe.measure.temperature,
            negatives=recipe.measure.negatives,
        )  # fmt: skip

    loss = one_side(views.first, views.second)
    if recipe.measure.symmetric:
        loss = (loss + one_side(views.second, views.first)) / 2
    return {"loss": loss}


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("mae", ()),
        ("rmae", ()),
        ("rmae", ("measure.lambda=0.3",)),
        ("rmae_dagger", ()),
        ("rmae_ddagger", ()),
        ("cmae", ()),
        ("cmae", ("measure.negatives=all", "measure.tokens=patch+cls")),
        ("cmae", ("measure.negatives=position", "measure.tokens=cls", "measure.symmetric=true")),
        ("cmae", ("measure.tokens=mean_patch", "encoder.masked_tokens=drop")),
    ],
)
def test_loss_terms_and_every_gradient_against_the_loop_oracle(name, overrides):
    loss, terms, ours, expected, theirs = both_ways(name, *overrides)
    torch.testing.assert_close(loss, expected["loss"], rtol=1e-5, atol=1e-6)
    for term, value in terms.items():
        if term in expected:
            torch.testing.assert_close(value, expected[term].detach(), rtol=1e-5, atol=1e-6)
    assert ours.keys() == theirs.keys()
    for parameter, gradient in theirs.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(
            ours[parameter], gradient, rtol=1e-4, atol=1e-5 * scale + 1e-9, msg=parameter
        )


PAIRS = ("cmae", "encoder.masked_tokens=drop", "views.second=independent")
BOTH_SIDES = ("cmae", "measure.symmetric=true")


@pytest.mark.parametrize("setting", [*((name,) for name in METHODS), PAIRS, BOTH_SIDES])
def test_every_measure_reports_the_spread_of_the_first_views_features(setting):
    recipe = tiny_recipe(*setting)
    objective, teacher = build_objective(recipe)
    _, terms = objective(images(), SAMPLE, 2, teacher)
    views = make_views(images(), SAMPLE, recipe=recipe, epoch=2, patch=PATCH)
    expected = feature_std(objective.encoder(*views.first))
    torch.testing.assert_close(terms["feature_std"], expected)


@pytest.mark.parametrize(
    "setting", [*((name,) for name in METHODS), ("cmae", "measure={kind: byol}"), PAIRS]
)
def test_terms_hold_no_graph(setting):
    """They are kept until they are logged."""
    objective, teacher = build_objective(tiny_recipe(*setting))
    loss, terms = objective(images(), SAMPLE, 2, teacher)
    assert loss.requires_grad
    assert [name for name, term in terms.items() if term.requires_grad] == []


def test_rmae_reports_its_terms_apart():
    loss, terms, *_ = both_ways("rmae", "measure.lambda=0.5")
    torch.testing.assert_close(loss.detach(), terms["similarity"] + 0.5 * terms["constraint"])


@pytest.mark.parametrize("name", METHODS)
def test_the_loss_is_a_mean_over_samples(name):
    """Hence two halves of a batch average to the whole: ranks and accumulation change nothing."""
    if name == "cmae":
        return  # its negatives come from the batch: see test_measures
    objective, _ = build_objective(tiny_recipe(name))
    image, sample = images(4), torch.arange(4)
    whole, _ = objective(image, sample, 0)
    halves = [objective(image[h], sample[h], 0)[0] for h in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close(whole, (halves[0] + halves[1]) / 2, rtol=1e-6, atol=1e-6)


def test_weights_come_from_the_recipes_seed():
    a, b, c = (build_objective(tiny_recipe("cmae", f"seed={s}"))[0] for s in (0, 0, 1))
    names = dict(a.named_parameters())
    for name, parameter in b.named_parameters():
        assert torch.equal(parameter, names[name])
    assert not torch.equal(c.encoder.blocks[0].attn.qkv.weight, a.encoder.blocks[0].attn.qkv.weight)


def test_teacher_is_the_moving_average_and_gets_no_gradient():
    objective, teacher = build_objective(tiny_recipe("cmae"))
    start = {k: v.clone() for k, v in teacher.named_parameters()}
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.add_(torch.randn_like(parameter))
    teacher.update(objective, 0.9)
    online = dict(objective.named_parameters())
    for name, value in teacher.named_parameters():
        source = online[name if name.startswith("encoder.") else f"measure.{name}"]
        torch.testing.assert_close(value, 0.9 * start[name] + 0.1 * source)
        assert not value.requires_grad
    loss, _ = objective(images(), SAMPLE, 0, teacher)
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("size", [1, 3, 24])
def test_slices_of_any_size_hold_every_parameter_once(size, monkeypatch):
    objective, teacher = build_objective(tiny_recipe("cmae"))
    monkeypatch.setattr("pipeline.method.teacher.SLICE", size)
    mine = [p for part, _ in teacher.pairs(objective) for p in part]
    online = [p for _, part in teacher.pairs(objective) for p in part]
    assert [id(p) for p in mine] == [id(p) for p in teacher.parameters()]
    followed = [*objective.encoder.parameters(), *objective.measure.projector.parameters()]
    assert [id(p) for p in online] == [id(p) for p in followed]


def test_teacher_stays_fp32_beside_a_bf16_student():
    objective, teacher = build_objective(tiny_recipe("cmae"))
    objective.bfloat16()
    loss, _ = objective(images(), SAMPLE, 0, teacher)
    assert loss.dtype == torch.float32
    loss.backward()
    teacher.update(objective, 0.5)
    assert {p.dtype for p in teacher.parameters()} == {torch.float32}
    assert {p.dtype for p in Teacher(objective).parameters()} == {torch.float32}


def test_measures_without_a_teacher_say_so():
    objective, teacher = build_objective(tiny_recipe("mae"))
    assert teacher is None
    with pytest.raises(UserError, match="measure reconstruction has no teacher"):
        Teacher(objective)
    contrastive, _ = build_objective(tiny_recipe("cmae"))
    with pytest.raises(UserError, match="needs a teacher"):
        contrastive(images(), SAMPLE, 0, None)


def test_a_measure_that_names_no_tokens_gets_all_of_them():
    objective, _ = build_objective(tiny_recipe("cmae"))
    recipe = SimpleNamespace(kind="new", needs_teacher=True)
    measure = SimpleNamespace(recipe=recipe)
    teacher = Teacher(SimpleNamespace(encoder=objective.encoder, measure=measure))
    view = make_views(images(), SAMPLE, recipe=objective.recipe, epoch=0, patch=PATCH).first
    assert torch.equal(teacher(view), objective.encoder(*view))


@pytest.mark.parametrize("name", ["mae", "cmae"])
@pytest.mark.parametrize("tokens", [True, False])
def test_parameter_groups(name, tokens):
    objective, _ = build_objective(tiny_recipe(name, f"optimizer.weight_decay.tokens={tokens}"))
    objective.measure.heads = torch.nn.ParameterDict({"bias": torch.zeros(2, 3)})  # of each head
    groups = {g["name"]: g for g in parameter_groups(objective)}
    assert groups["decay"]["weight_decay"] == 0.05
    assert groups["no_decay"]["weight_decay"] == 0.0
    group_of = {id(p): g for g, group in groups.items() for p in group["params"]}
    for parameter_name, parameter in objective.named_parameters():
        if "token" in parameter_name:
            expected = "decay" if tokens else "no_decay"
        elif parameter_name.endswith(".weight") and parameter.ndim > 1:
            expected = "decay"
        else:
            expected = "no_decay"
        assert group_of.pop(id(parameter)) == expected, parameter_name
    assert not group_of
