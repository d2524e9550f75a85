"""The streamed softmax on one rank; several ranks are in test_sharded_fc.py."""

import math

import pytest
import torch
from torch.nn import functional as F

import fr_core.heads.streamed as streamed
from fr_core.config.methods import Margin
from fr_core.heads.streamed import Softmax, TileSGD, fixed_centres_softmax, margin_softmax, same_label
from fr_core.ranks import Ranks

ARC = Margin(scale=64, m2=0.5, m3=0)
COS = Margin(scale=30, m3=0.4)
COMBINED = Margin(scale=16, m1=1.1, m2=0.2, m3=0.1)
SHAPES = {  # faces, embedding, identities, tile
    "uneven tiles": (6, 8, 23, 5),
    "one face": (1, 8, 23, 5),
    "fewer identities than a tile": (6, 8, 7, 100),
    "two identities": (5, 8, 2, 1),
    "one identity": (4, 8, 1, 10),
}


def problem(faces, dim, identities, dtype=torch.float64):
    random = torch.Generator().manual_seed(0)
    unit = F.normalize(torch.randn(faces, dim, generator=random, dtype=torch.float64))
    weight = torch.randn(identities, dim, generator=random, dtype=torch.float64) * 0.01
    labels = torch.randint(0, identities, (faces,), generator=random)
    labels[-1] = labels[0]  # two faces share a class
    return unit.to(dtype), weight.to(dtype), labels


def target(cos, margin):
    theta = torch.acos(cos.clamp(-1, 1))
    angle = margin.m1 * theta + margin.m2
    value = torch.cos(angle) - margin.m3
    if margin.m1 == 1 and margin.m2:
        value = torch.where(angle > math.pi, cos - margin.m2 * math.sin(margin.m2), value)
    if margin.gradient == "straight_through":
        value = value.detach() + cos - cos.detach()
    return value


def reference(unit, weight, labels, margin, drop_above=1.0, rows=None):
    """The formula over the whole matrix in float64, differentiated by autograd."""
    x, w = unit.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    cos = x @ F.normalize(w if rows is None else w[rows]).T
    at = torch.arange(len(x))
    other = torch.ones_like(cos, dtype=torch.bool).index_put((at, labels), torch.tensor(False))
    logits = cos.masked_fill(other & (cos.detach() > drop_above), -torch.inf)
    logits = logits.index_put((at, labels), target(cos[at, labels], margin))
    loss = F.cross_entropy(margin.scale * logits, labels)
    loss.backward()
    return loss.detach(), x.grad, w.grad


def streamed_loss_and_gradients(unit, weight, labels, softmax, rows=None):
    x, w = unit.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = margin_softmax(x, w, labels, softmax, Ranks(), rows)
    loss.backward()
    return loss.detach(), x.grad, w.grad.to_dense()


@pytest.mark.parametrize("gradient", ["exact", "straight_through"])
@pytest.mark.parametrize("margin", [ARC, COS, COMBINED], ids=["arcface", "cosface", "combined"])
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradients_equal_float64_autograd(shape, margin, gradient):
    *sizes, tile = SHAPES[shape]
    unit, weight, labels = problem(*sizes, torch.float32)
    margin = margin.model_copy(update={"gradient": gradient})
    found = streamed_loss_and_gradients(unit, weight, labels, Softmax(margin, tile=tile))
    expected = reference(unit, weight, labels, margin)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours.double(), theirs, atol=1e-5 * max(1.0, float(theirs.abs().max())), rtol=1e-5)


@pytest.mark.parametrize("margin", [ARC, COS, COMBINED], ids=["arcface", "cosface", "combined"])
def test_gradcheck(margin):
    unit, weight, labels = problem(3, 4, 7)
    softmax = Softmax(margin.model_copy(update={"scale": 4.0}), tile=3)

    def loss(x, w):
        return margin_softmax(F.normalize(x), w, labels, softmax, Ranks())

    assert torch.autograd.gradcheck(loss, (unit.requires_grad_(), (100 * weight).requires_grad_()))


def test_dropped_negatives_have_no_part():
    unit, weight, labels = problem(6, 4, 23)
    found = streamed_loss_and_gradients(unit, weight, labels, Softmax(COS, drop_above=0.3, tile=5))
    expected = reference(unit, weight, labels, COS, drop_above=0.3)
    assert all(torch.allclose(a, b) for a, b in zip(found, expected, strict=True))
    assert not torch.allclose(found[0], reference(unit, weight, labels, COS)[0])


def test_a_sample_of_rows_equals_the_softmax_over_them():
    unit, weight, _ = problem(6, 8, 23)
    rows = torch.tensor([0, 3, 4, 9, 12, 20, 22])
    columns = torch.tensor([0, 6, 3, 3, 1, 2])
    found = streamed_loss_and_gradients(unit, weight, columns, Softmax(ARC, tile=3), rows)
    expected = reference(unit, weight, columns, ARC, rows=rows)
    assert all(torch.allclose(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("native", [False, True])
def test_bfloat16_products(monkeypatch, native):
    """Operands have 8 significant bits: cosines are exact to 2⁻⁸, gradients to 2 % of the largest."""
    monkeypatch.setattr(streamed, "multiplies_bfloat16", lambda device: native)
    unit, weight, labels = problem(16, 64, 300, torch.float32)
    found = streamed_loss_and_gradients(unit, weight, labels, Softmax(COS, precision=torch.bfloat16, tile=70))
    loss, *gradients = reference(unit, weight, labels, COS)
    assert float(found[0]) == pytest.approx(float(loss), abs=COS.scale * 2**-8)
    for ours, theirs in zip(found[1:], gradients, strict=True):
        assert not torch.equal(ours.double(), theirs)
        assert torch.allclose(ours.double(), theirs, atol=0.02 * float(theirs.abs().max()))


def test_float16_products_keep_small_probabilities():
    """Operands have 11 significant bits. Of a loss scaled by 2¹⁶ no number overflows; probabilities of 1e-6 count."""
    unit, weight, labels = problem(16, 64, 300, torch.float32)
    weight = weight * torch.logspace(-1, 1, 300)[:, None]
    x, w = unit.clone().requires_grad_(), weight.clone().requires_grad_()
    margin = Margin(scale=20, m3=0.0)
    loss = margin_softmax(x, w, labels, Softmax(margin, precision=torch.float16, tile=70), Ranks())
    (2.0**16 * loss).backward()
    expected, *gradients = reference(unit, weight, labels, margin)
    assert float(loss.detach()) == pytest.approx(float(expected), abs=margin.scale * 2**-11)
    for ours, theirs in zip((x.grad, w.grad), gradients, strict=True):
        assert not torch.equal(ours.double() / 2**16, theirs)
        assert torch.allclose(ours.double() / 2**16, theirs, rtol=0.05, atol=0.003 * float(theirs.abs().max()))
    rows = torch.ones(300, dtype=torch.bool)
    rows[labels] = False  # of no face: their gradients are made of small probabilities alone
    small = gradients[1][rows]
    assert torch.allclose(w.grad[rows].double() / 2**16, small, rtol=0.05, atol=0.01 * float(small.abs().max()))


def test_cosines_at_both_ends_and_saturated_probabilities_are_finite():
    weight = torch.tensor([[1.0, 0, 0], [-3, 0, 0], [0, 1, 0], [0, 0, 0]])
    unit = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    loss, *gradients = streamed_loss_and_gradients(unit, weight, torch.arange(4), Softmax(ARC, tile=3))
    assert all(g.isfinite().all() for g in gradients)
    alone = streamed_loss_and_gradients(unit[1:2], weight, torch.tensor([1]), Softmax(ARC))[0]
    assert float(alone) == pytest.approx(64 * (2 + 0.5 * math.sin(0.5)), abs=1e-3)  # no clamp at 69
    assert float(loss) > float(alone) / 4


def test_one_identity_has_neither_loss_nor_gradient():
    unit, weight, _ = problem(4, 8, 1)
    loss, *gradients = streamed_loss_and_gradients(unit, weight, torch.zeros(4, dtype=torch.int64), Softmax(ARC))
    assert float(loss) == 0
    assert all((g == 0).all() for g in gradients)


def fused_and_plain(softmax, rows=None, steps=4):
    """Return weights after steps of the fused mode, and of torch.optim.SGD on the plain mode's gradients."""
    unit, weight, labels = problem(6, 8, 23)
    fused, plain = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    sgd = TileSGD(torch.zeros_like(weight), 0.1, 0.9, 0.01)
    optimizer = torch.optim.SGD([plain], 0.1, momentum=0.9, weight_decay=0.01)
    for step in range(steps):
        columns = (labels + step) % (23 if rows is None else len(rows))
        ours, theirs = (unit.clone().requires_grad_() for _ in range(2))
        a = margin_softmax(ours, fused, columns, softmax, Ranks(), rows, sgd)
        b = margin_softmax(theirs, plain, columns, softmax, Ranks(), rows)
        a.backward()
        b.backward()
        assert fused.grad is None
        plain.grad = plain.grad.to_dense()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.allclose(a, b)
        assert torch.allclose(ours.grad, theirs.grad)
    return weight, fused.detach(), plain.detach()


def test_fused_equals_plain():
    weight, fused, plain = fused_and_plain(Softmax(ARC, tile=5))
    assert torch.allclose(fused, plain)
    assert not torch.allclose(fused, weight)


def test_fused_moves_sampled_rows_only():
    rows = torch.tensor([0, 3, 4, 9, 12, 20, 22])
    weight, fused, plain = fused_and_plain(Softmax(ARC, tile=3), rows)
    assert torch.allclose(fused[rows], plain[rows])
    others = torch.ones(23, dtype=torch.bool).index_put((rows,), torch.tensor(False))
    assert torch.equal(fused[others], weight[others])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_moves_no_row(bad):
    unit, weight, labels = problem(6, 8, 23)
    moved, momentum = weight.clone().requires_grad_(), torch.zeros_like(weight)
    unit[2, 3] = bad
    unit.requires_grad_()
    loss = margin_softmax(unit, moved, labels, Softmax(ARC, tile=5), Ranks(), sgd=TileSGD(momentum, 0.1, 0.9, 0.01))
    loss.backward()
    assert not loss.isfinite()
    assert torch.equal(moved.detach(), weight)
    assert not momentum.any()
    assert not unit.grad.isfinite().any()  # so that the update of the backbone drops the step, too


@pytest.mark.parametrize("drop_above", [1.0, 0.3])
@pytest.mark.parametrize("margin", [ARC, COS], ids=["arcface", "cosface"])
def test_one_pass_over_fixed_centres(margin, drop_above):
    unit, centres, labels = problem(6, 8, 23)
    centres = F.normalize(centres)
    positives = F.normalize(unit + 0.5 * torch.randn(6, 8, generator=torch.Generator().manual_seed(1)).double())
    labels_S = torch.arange(23) // 2
    x = unit.clone().requires_grad_()
    softmax = Softmax(margin, drop_above=drop_above, tile=5)
    loss = fixed_centres_softmax(x, positives, centres, labels, labels_S, softmax)
    (3 * loss).backward()

    y = unit.clone().requires_grad_()
    others = y @ centres.T
    others = others.masked_fill((labels[:, None] == labels_S) | (others.detach() > drop_above), -torch.inf)
    logits = torch.cat([target((y * positives).sum(1), margin)[:, None], others], 1)
    expected = F.cross_entropy(margin.scale * logits, torch.zeros(6, dtype=torch.int64))
    (3 * expected).backward()
    assert torch.allclose(loss, expected)
    assert torch.allclose(x.grad, y.grad)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card")
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_card_computes_what_the_cpu_does(precision):
    unit, weight, labels = problem(16, 64, 3000, torch.float32)
    softmax = Softmax(COS, precision=precision, tile=700)
    loss, *gradients = reference(unit, weight, labels, COS)
    found = streamed_loss_and_gradients(unit.cuda(), weight.cuda(), labels.cuda(), softmax)
    coarse = precision == torch.bfloat16
    assert float(found[0]) == pytest.approx(float(loss), abs=COS.scale * 2**-8 if coarse else 1e-3)
    for ours, theirs in zip(found[1:], gradients, strict=True):
        assert torch.allclose(ours.cpu().double(), theirs, atol=(0.02 if coarse else 1e-4) * float(theirs.abs().max()))


def test_a_queue_of_own_labels_only_has_no_gradient():
    unit, centres, _ = problem(3, 8, 4)
    x, labels = unit.requires_grad_(), [torch.zeros(count, dtype=torch.int64) for count in (3, 4)]
    loss = fixed_centres_softmax(x, unit.detach(), F.normalize(centres), *labels, Softmax(ARC))
    loss.backward()
    assert loss == 0
    assert (x.grad == 0).all()


def test_same_label_finds_what_comparing_all_with_all_does():
    random = torch.Generator().manual_seed(0)
    labels, labels_S = torch.randint(0, 30, (17,), generator=random), torch.randint(-1, 30, (200,), generator=random)
    faces, columns = same_label(labels, labels_S)
    dense = (labels_S[:, None] == labels).nonzero()
    assert torch.equal(torch.stack([columns, faces], 1), dense)
    assert (columns.diff() >= 0).all()
    places = same_label(labels, None)
    assert all(torch.equal(a, b) for a, b in zip(places, same_label(labels, torch.arange(30)), strict=True))
    none = same_label(torch.tensor([5]), torch.tensor([-1, 3]))
    assert [len(part) for part in none] == [0, 0]
