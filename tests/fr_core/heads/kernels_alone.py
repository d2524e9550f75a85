"""The softmaxes by kernels against float64, in Triton's interpreter or on a card; test_kernels.py runs this file.

It has a process of its own: Triton reads ``TRITON_INTERPRET`` when it is imported.
"""

import math

import pytest
import torch
from torch.nn import functional as F

from fr_core.config.methods import Margin
from fr_core.heads import kernels
from fr_core.heads.margins import FaceMargin, Hard
from fr_core.heads.softmax_on_cards import FixedCentresSoftmax, MarginSoftmax
from fr_core.heads.streamed import Softmax, TileSGD
from fr_core.ranks import Ranks

if kernels.INTERPRETED:
    from tests.helpers.interpreter import mend_interpreter

    mend_interpreter()

DEVICE = "cpu" if kernels.INTERPRETED else "cuda"
ARC = Margin(scale=64, m2=0.5, m3=0)
COS = Margin(scale=30, m3=0.4)
SHAPES = {  # faces, embedding, identities, tile
    "uneven blocks and tiles": (19, 24, 75, 40),
    "whole blocks": (16, 16, 32, 32),
    "one face": (1, 8, 23, 20),
    "two identities": (5, 8, 2, 16),
}
PRECISIONS = [torch.float32, torch.bfloat16, torch.float16]


def problem(faces, dim, identities, spread=1.0):
    """Faces near their rows; the smaller ``spread``, the better trained."""
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(identities, dim, generator=random) * 0.01
    labels = torch.randint(0, identities, (faces,), generator=random)
    labels[-1] = labels[0]  # two faces share a class
    noise = torch.randn(faces, dim, generator=random) / math.sqrt(dim)
    unit = F.normalize(F.normalize(weight[labels]) + spread * noise)
    return unit.to(DEVICE), weight.to(DEVICE), labels.to(DEVICE)


def target(cos, margin):
    value = torch.cos(torch.acos(cos.clamp(-1, 1)) + margin.m2) if margin.m2 else cos
    past = torch.acos(cos.clamp(-1, 1)) + margin.m2 > math.pi
    return torch.where(past, cos - margin.m2 * math.sin(margin.m2), value) - margin.m3


def by_kernels(unit, weight, column, margin, precision, tile, drop_above=1.0, rows=None, eps=0.0, sgd=None, hard=None):
    """The loss and the gradients of faces and rows; None for rows that move."""
    x, w = unit.clone().requires_grad_(), weight.requires_grad_()
    w.grad = None
    softmax = Softmax(margin, drop_above, precision, tile, eps, hard)
    loss = MarginSoftmax.apply(x, w, column, softmax, Ranks(), rows, sgd, softmax.m2_with_gradient)
    loss.backward()
    grad_w = w.grad if rows is None or sgd else w.grad.to_dense()[rows]
    weight.requires_grad_(False)
    return loss.detach(), x.grad, grad_w


def with_value(x, value):
    """x in the gradient, another number in the value."""
    return x + (value.double() - x).detach()


def reference(unit, weight, column, margin, precision, drop_above=1.0, rows=None, hard=None):
    """The formula over the whole matrix in float64 by autograd; the negatives' cosines are those of the operands."""
    x, w = unit.double().requires_grad_(), weight.double().requires_grad_()
    unit_w = F.normalize(w if rows is None else w[rows])
    operand_w = kernels.unit_rows(weight, rows, 0, len(unit_w), precision)
    cos = with_value(x, unit.to(precision)) @ with_value(unit_w, operand_w).T
    own, at = column >= 0, torch.arange(len(x), device=x.device)
    mine = torch.zeros_like(cos, dtype=torch.bool)
    mine[at[own], column[own]] = True
    bent, slope = cos, torch.ones_like(cos)
    if hard:
        is_hard = cos.detach() > hard.above_G[:, None]
        bent = torch.where(is_hard, cos * (hard.t + cos), cos)
        slope = torch.where(is_hard, hard.t + 2 * cos.detach(), 1.0)
    negatives = (margin.scale * bent).masked_fill(mine | (cos.detach() > drop_above), -torch.inf)
    positive = margin.scale * target((x * unit_w[column.clamp_min(0)]).sum(1), margin)
    positive = torch.where(own, positive, 0)  # what a rank adds for the rows of others
    logits = torch.cat([positive[:, None], negatives], 1)
    loss = F.cross_entropy(logits, torch.zeros_like(column))
    loss.backward()
    grad_w = w.grad if rows is None else w.grad[rows]
    return loss.detach(), x.grad, grad_w, logits.softmax(1)[:, 1:].detach() * slope.abs()


def equal(ours, theirs, rounding):
    """Whether numbers differ by 1e-5 of the largest at most, and by the length that rounding may move their row."""
    return bool(((ours - theirs).abs().amax(1) <= rounding + 1e-5 * theirs.abs().max()).all())


def rounded(precision, margin, faces):
    """How far rounding moves d loss / d cos, for a probability of 1: its type, and its logit's in float32."""
    own = 0 if precision == torch.float32 else torch.finfo(precision).eps / 2
    return (own + 2**-23 * margin.scale) * margin.scale / faces


def check(found, expected, weight, margin, precision):
    loss, grad_GD, grad_SD, p_GS = expected
    each = rounded(precision, margin, len(p_GS))
    assert float(found[0]) == pytest.approx(float(loss), rel=1e-6)
    assert equal(found[1], grad_GD, each * p_GS.sum(1))
    assert equal(found[2], grad_SD, each * p_GS.sum(0) / weight.norm(dim=1))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("shape", "margin"), [*((shape, ARC) for shape in SHAPES), ("uneven blocks and tiles", COS)])
def test_loss_and_gradients_equal_float64_autograd(shape, margin, precision):
    *sizes, tile = SHAPES[shape]
    unit, weight, column = problem(*sizes)
    case = unit, weight, column, margin, precision
    check(by_kernels(*case, tile), reference(*case), weight, margin, precision)


def test_one_identity_has_neither_loss_nor_gradient():
    unit, weight, column = problem(4, 8, 1)
    loss, *gradients = by_kernels(unit, weight, column, ARC, torch.float32, 16)
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("precision", PRECISIONS[1:])
def test_rounded_operands_move_the_gradient_by_two_percent_at_most(precision):
    """As for the products of the streamed softmax."""
    case = *problem(16, 64, 100), COS
    found, expected = by_kernels(*case, precision, 64), reference(*case, torch.float32)
    for ours, theirs in zip(found[1:], expected[1:3], strict=True):
        assert not torch.allclose(ours.double(), theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))
        assert torch.allclose(ours.double(), theirs, rtol=0, atol=0.02 * float(theirs.abs().max()))


def test_dropped_negatives_have_no_part():
    unit, weight, column = problem(19, 8, 75)
    case = unit, weight, column, COS, torch.float32
    expected = reference(*case, drop_above=0.3)
    check(by_kernels(*case, 40, drop_above=0.3), expected, weight, COS, torch.float32)
    assert float(expected[0]) != pytest.approx(float(reference(*case)[0]), rel=1e-3)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("t", [0.0, 0.6, 1.0])
def test_hard_negatives_have_their_own_logits_and_slopes(precision, t):
    """Of nearly one class, so that some probabilities are near 1 and their slopes near 3."""
    unit, weight, column = problem(19, 24, 75, spread=0.2)
    weight[7] = weight[column[0]] * 2  # the same direction: a negative of cosine 1 where t = 1
    hard = Hard(torch.linspace(-0.3, 0.5, 19, device=DEVICE), torch.tensor(t, device=DEVICE))
    case = unit, weight, column, ARC, precision
    expected = reference(*case, hard=hard)
    check(by_kernels(*case, 40, hard=hard), expected, weight, ARC, precision)
    assert float(expected[3].max()) > 1 + t / 2
    assert float(expected[0]) != pytest.approx(float(reference(*case)[0]), rel=1e-3)


def test_margins_of_the_faces_get_their_gradient():
    unit, weight, column = problem(19, 24, 75)
    column[::3] = -1
    m2 = torch.linspace(0.2, 0.9, 19, device=DEVICE).requires_grad_()
    by_kernels(unit, weight, column, FaceMargin(ARC.scale, 1.0, m2, 0.0), torch.float32, 40)
    own = column >= 0
    theta = torch.acos((unit.double() * F.normalize(weight.double()[column.clamp_min(0)])).sum(1))
    wide = m2.detach().double().requires_grad_()
    cos = unit.double() @ F.normalize(weight.double()).T
    rows = torch.arange(75, device=DEVICE) == column[:, None]
    logits = torch.cat([torch.where(own, torch.cos(theta + wide), 0)[:, None], cos.masked_fill(rows, -torch.inf)], 1)
    F.cross_entropy(ARC.scale * logits, torch.zeros_like(column)).backward()
    assert float(theta.max() + m2.max()) < math.pi
    assert torch.allclose(m2.grad.double(), wide.grad, rtol=0, atol=1e-5 * float(wide.grad.abs().max()))
    assert not m2.grad[~own].any()


def test_positives_that_another_rank_holds_push_only():
    unit, weight, column = problem(19, 24, 75)
    column[::3] = -1
    case = unit, weight, column, COS, torch.float32
    found, expected = by_kernels(*case, 40), reference(*case)
    check(found, expected, weight, COS, torch.float32)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_sample_of_rows_equals_the_softmax_over_them(precision):
    unit, weight, _ = problem(19, 24, 75)
    rows = torch.arange(1, 75, 2, device=DEVICE)
    column = torch.randint(0, len(rows), (19,), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    case = unit, weight, column, ARC, precision
    found, expected = by_kernels(*case, 16, rows=rows), reference(*case, rows=rows)
    check(found, expected, weight[rows], ARC, precision)


def test_rows_of_no_length_have_cosine_0_and_the_gradient_of_normalize():
    unit, weight, column = problem(19, 24, 75)
    zero = torch.zeros(75, dtype=torch.bool, device=DEVICE)
    zero[[int(column[2]), 50, 74]] = True
    weight[zero] = 0
    case = unit, weight, column, COS, torch.float32
    found, (loss, grad_GD, grad_SD, _) = by_kernels(*case, 40), reference(*case)
    assert float(found[0]) == pytest.approx(float(loss), rel=1e-6)
    assert equal(found[1], grad_GD, 0)
    assert grad_SD[zero].abs().max() > 1e9  # divided by the smallest length
    for rows in (zero, ~zero):
        assert equal(found[2][rows], grad_SD[rows], 0)


def test_unit_rows_are_those_of_normalize():
    _, weight, _ = problem(1, 24, 75)
    for rows in (None, torch.arange(0, 75, 3, device=DEVICE)):
        expected = F.normalize(weight.double())[5:25] if rows is None else F.normalize(weight.double())[rows][5:25]
        assert torch.allclose(kernels.unit_rows(weight, rows, 5, 20, torch.float32).double(), expected, atol=2e-7)
        half = kernels.unit_rows(weight, rows, 5, 20, torch.bfloat16)
        assert torch.allclose(half.double(), expected, rtol=2**-8 * 1.01, atol=0)


def moved(rows, precision, bad=None):
    """Rows and momentum after two steps of SGD on the chip, and of SGD in float64 by the kernels' gradients."""
    unit, weight, _ = problem(11, 16, 43)
    ours, momentum = weight.clone(), torch.zeros_like(weight)
    theirs = torch.nn.Parameter(weight.double())
    optimizer = torch.optim.SGD([theirs], 0.1, momentum=0.9, weight_decay=0.01)
    taken = torch.arange(43, device=DEVICE) if rows is None else rows
    if bad is not None:
        unit[2, 3] = bad
    for step in range(2):
        column = (torch.arange(11, device=DEVICE) // 2 + step) % len(taken)
        case = unit, ours, column, ARC, precision, 32
        theirs.grad = torch.zeros_like(theirs)
        theirs.grad[taken] = by_kernels(*case, rows=rows)[2].double()
        optimizer.step()
        by_kernels(*case, rows=rows, sgd=TileSGD(momentum, 0.1, 0.9, 0.01))
    return weight, ours, momentum, theirs.detach(), optimizer.state[theirs]["momentum_buffer"]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rows_move_as_by_sgd(precision):
    weight, ours, momentum, theirs, buffer = moved(None, precision)
    assert (theirs - weight).abs().max() > 0.01
    assert torch.allclose(ours.double(), theirs, rtol=1e-6, atol=1e-6 * float(theirs.abs().max()))
    assert torch.allclose(momentum.double(), buffer, rtol=1e-6, atol=1e-6 * float(buffer.abs().max()))


def test_only_the_rows_of_the_sample_move():
    rows = torch.arange(1, 43, 2, device=DEVICE)
    weight, ours, momentum, theirs, _ = moved(rows, torch.float32)
    assert torch.allclose(ours[rows].double(), theirs[rows], rtol=1e-6, atol=1e-6 * float(theirs.abs().max()))
    assert not torch.allclose(ours[rows], weight[rows])
    assert torch.equal(ours[::2], weight[::2])
    assert not momentum[::2].any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nothing_moves_if_the_loss_is_not_finite(bad):
    weight, ours, momentum, theirs, _ = moved(None, torch.float32, bad)
    assert torch.equal(ours, weight)
    assert not momentum.any()
    assert not theirs.isfinite().all()


TRAINED = Margin(scale=32, m3=0.3)


@pytest.fixture(scope="module")
def trained():
    """A trained head: 48 faces of 320 identities that look alike in sixteens; and its exact gradients."""
    random = torch.Generator().manual_seed(0)
    alike = torch.randn(20, 1, 8, generator=random) + 0.2 * torch.randn(20, 16, 8, generator=random)
    weight = 0.1 * alike.flatten(0, 1)
    column = torch.randint(0, 320, (48,), generator=random).sort().values
    unit = F.normalize(weight[column] + 0.02 * torch.randn(48, 8, generator=random))
    case = unit.to(DEVICE), weight.to(DEVICE), column.to(DEVICE), TRAINED, torch.float32
    return case, reference(*case)


@pytest.mark.parametrize("eps", [1e-5, 1e-3])
def test_the_filter_skips_blocks_of_small_probabilities_and_keeps_its_bound(trained, eps, monkeypatch):
    case, (_, grad_GD, grad_SD, p_GS) = trained
    alive, whole = [], kernels.list_alive
    monkeypatch.setattr(kernels, "list_alive", lambda alive_FC: alive.append(alive_FC) or whole(alive_FC))
    found = by_kernels(*case, 160, eps=eps)
    block_G, block_T = kernels.block_sizes(torch.float32)
    top_FC = F.max_pool2d(p_GS[None], (block_G, block_T), ceil_mode=True)[0]
    assert ((top_FC / eps).log().abs() > 1e-4).all()  # no block is near the edge
    assert torch.equal(torch.cat(alive, 1) == 0, top_FC < eps)
    assert 0.1 < (top_FC < eps).double().mean() < 1

    skipped = (top_FC < eps).repeat_interleave(block_G, 0).repeat_interleave(block_T, 1)[: len(p_GS), : p_GS.shape[1]]
    each, lost = rounded(torch.float32, TRAINED, len(p_GS)), TRAINED.scale / len(p_GS) * eps
    bound_G = each * p_GS.sum(1) + lost * skipped.sum(1)
    bound_S = (each * p_GS.sum(0) + lost * skipped.sum(0)) / case[1].norm(dim=1)
    assert equal(found[1], grad_GD, bound_G)
    assert equal(found[2], grad_SD, bound_S)
    if eps > 1e-4:  # else what it drops is hardly more than rounding
        with pytest.raises(AssertionError):
            check(found, trained[1], case[1], TRAINED, torch.float32)


def test_without_a_filter_nothing_is_lost(trained):
    case, expected = trained
    check(by_kernels(*case, 160), expected, case[1], TRAINED, torch.float32)


def test_a_block_that_is_not_a_number_is_never_skipped():
    unit, weight, column = problem(19, 24, 75)
    centres = kernels.unit_rows(weight, None, 0, 75, torch.float32)
    total = torch.full((19,), 1e4, device=DEVICE)
    total[3] = math.nan
    alive = kernels.exponentials(unit, centres, column, total, 30.0, eps=1e-3).alive_FC
    assert (alive[:1] == 1).all()
    assert kernels.block_sizes(torch.float32)[0] >= 19 or not alive[1:].any()


def test_small_probabilities_survive_float16():
    """Of 1e-8 the plain type would keep nothing; of those below 2⁻³⁹ nothing is kept."""
    unit, weight, column = problem(16, 16, 32)
    operand, centres = unit.half(), kernels.unit_rows(weight, None, 0, 32, torch.float16)
    logits = 4 * operand.double() @ centres.double().T
    total = torch.full((16,), 20.0, device=DEVICE)
    found = kernels.exponentials(operand, centres, column, total, 4.0)
    p = (logits - 20).exp()
    p[torch.arange(16), column] = 0
    assert 1e-11 < float(p[p > 0].min()) < float(p.max()) < 2**-24
    assert not p.half().any() or float((p.half().double() - p).abs().max() / p.max()) > 0.1
    kept = p > 2**-28
    assert kept.any()
    values = found.values_GT.double() / kernels.gain(torch.float16)
    assert torch.allclose(values[kept], p[kept], rtol=2**-11 + 1e-5, atol=0)
    assert torch.allclose(values, p, rtol=2**-11 + 1e-5, atol=2.0**-39)
    assert kernels.gain(torch.float16) < torch.finfo(torch.float16).max  # p = 1


def fixed_problem(scale=64.0):
    unit, centres, labels = problem(19, 24, 75)
    centres = F.normalize(centres)
    noise = torch.randn(19, 24, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    positives = F.normalize(unit + 0.1 * noise)
    labels_S = torch.arange(75, device=DEVICE) // 2
    labels_S[60:] = -1  # slots of no class
    return unit, positives, centres, labels % 30, labels_S, Margin(scale=scale, m3=0.4)


def fixed_reference(unit, positives, centres, labels, labels_S, margin, precision, drop_above=1.0):
    x = unit.double().requires_grad_()
    cos = with_value(x, unit.to(precision)) @ centres.to(precision).double().T
    out = (labels[:, None] == labels_S) | (cos.detach() > drop_above)
    own = margin.scale * target((x * positives.double()).sum(1), margin)
    logits = torch.cat([own[:, None], (margin.scale * cos).masked_fill(out, -torch.inf)], 1)
    loss = F.cross_entropy(logits, torch.zeros_like(labels))
    loss.backward()
    return loss.detach(), x.grad, logits.softmax(1)[:, 1:].detach()


@pytest.mark.parametrize(("scale", "drop_above"), [(64.0, 1.0), (64.0, 0.6), (75.0, 1.0), (200.0, 1.0)])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_fixed_centres_equal_float64_autograd(precision, scale, drop_above):
    *case, margin = fixed_problem(scale)
    x = case[0].clone().requires_grad_()
    found = FixedCentresSoftmax.apply(x, *case[1:], Softmax(margin, drop_above, precision, 40))
    found.backward()
    loss, gradient, p_GS = fixed_reference(*case, margin, precision, drop_above)
    assert float(found.detach()) == pytest.approx(float(loss), rel=1e-6)
    twice = 1 if DEVICE == "cuda" else 2  # the CPU's product of halves is rounded to them again
    assert equal(x.grad, gradient, twice * rounded(precision, margin, len(p_GS)) * p_GS.sum(1))


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cosine", [1.0, -1.0])
def test_the_reference_of_one_pass_holds_for_every_cosine(cosine, precision):
    unit = F.normalize(torch.randn(3, 24, generator=torch.Generator().manual_seed(0))).to(DEVICE)
    reference_G = kernels.one_pass_reference(unit, kernels.LARGEST_SCALE, precision)
    operand, centres = unit.to(precision), (cosine * unit[:1]).repeat(20, 1).to(precision)
    own, labels = torch.zeros(3, dtype=torch.int64, device=DEVICE), torch.ones(20, dtype=torch.int64, device=DEVICE)
    found = kernels.exponentials(operand, centres, own, reference_G, kernels.LARGEST_SCALE, labels_T=labels)
    logits = kernels.LARGEST_SCALE * operand[0].double() @ centres[0].double()
    sums = found.sums_CG.sum(0)[0].double().log() + reference_G[0]
    assert float(sums) == pytest.approx(float(logits + math.log(20)), rel=1e-6)
    value = float(found.values_GT[0, 0])
    assert torch.finfo(torch.float32).tiny < value < torch.finfo(torch.float32).max / 1e10


@pytest.mark.parametrize("cosine", [1.0, -1.0])
def test_the_first_pass_holds_for_any_scale(cosine):
    unit = F.normalize(torch.randn(3, 24, generator=torch.Generator().manual_seed(0))).to(DEVICE)
    centres, none = (cosine * unit[:1]).repeat(20, 1), torch.full((3,), -1, device=DEVICE)
    found = kernels.log_sum_exp(unit, centres, none, 1000.0).logsumexp(0)[0]
    assert float(found) == pytest.approx(float(1000 * unit[0].double() @ centres[0].double() + math.log(20)), rel=1e-6)


def test_there_is_no_constant_reference_for_larger_scales_and_float16():
    unit = torch.zeros(3, 8)
    assert kernels.one_pass_reference(unit, 75.5, torch.float32) is None
    assert kernels.one_pass_reference(unit, 30.0, torch.float16) is None


def test_a_queue_of_own_labels_only_has_no_gradient():
    unit, _, centres, _, _, margin = fixed_problem()
    none, all_S = torch.zeros(19, dtype=torch.int64, device=DEVICE), torch.zeros(75, dtype=torch.int64, device=DEVICE)
    operand = unit.bfloat16()
    found = kernels.exponentials(operand, centres.bfloat16(), none, unit.new_zeros(19), margin.scale, labels_T=all_S)
    assert not found.values_GT.any()
    assert not found.sums_CG.any()
    parts = kernels.log_sum_exp(operand, centres.bfloat16(), none, margin.scale, labels_T=all_S)
    assert (parts == -torch.inf).all()


@pytest.mark.skipif(kernels.INTERPRETED, reason="the interpreter has one order")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_results_repeat(precision):
    case = *problem(300, 128, 3000, 0.4), COS, precision, 1024
    first, second = (by_kernels(*case, eps=1e-4) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
