"""Every margin against the whole matrix in float64, differentiated by autograd, on one rank and on several."""

import math
from functools import cache

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch.nn import functional as F

from fr_core import rng
from fr_core.config import Config
from fr_core.config.methods import AnyMargin, BigFace
from fr_core.config.optim import SGD
from fr_core.heads.curricularface import CurricularFace
from fr_core.heads.margins import FaceMargin, Faces, slope_by_m2, with_margin
from fr_core.heads.sharded_fc import ShardedFC, initial_rows
from fr_core.heads.streamed import Softmax, margin_softmax
from fr_core.optim.optimizers import head_optimizer
from fr_core.ranks import Ranks
from tests.helpers.ranks import run_ranks

N, D, G, SCALE, STEPS, SEED = 11, 6, 8, 16.0, 2, 1  # 11 rows divide by neither 2 nor 4
MARGINS = {
    "adaface": {"momentum": 0.7},
    "adaface, public": {"momentum": 0.7, "statistics": "public"},
    "adaface, wrap": {"past_ends": "wrap"},
    "magface": {},
    "magface, easy": {"past_pi": "easy"},
    "elastic_arc": {},
    "elastic_arc, wrap": {"sigma": 0.3, "past_pi": "wrap"},
    "elastic_arc, plus": {"sigma": 0.3, "plus": "paper"},
    "elastic_cos": {"sigma": 0.2},
    "elastic_cos, public plus": {"sigma": 0.2, "plus": "public"},
    "curricular": {"momentum": 0.7},
    "uniface": {"balance": 0.7, "rate": 0.3},
}
ALONE = [name for name in MARGINS if "," not in name]  # the kinds
OPTIONS = {
    "whole": {},
    "partial": {"sample_rate": 0.5},
    "filter": {"drop_negatives_above": 0.3},
    "tiles": {"tile": 2},
    "sub-centres": {"subcentres": 2, "tile": 3},
}
CASES = [(name, "whole") for name in MARGINS] + [(name, option) for name in ALONE for option in list(OPTIONS)[1:]]


def method_of(name, **options):
    return BigFace.model_validate(
        {"margin": {"kind": name.partition(",")[0], "scale": SCALE, **MARGINS[name]}, **options}
    )


def embeddings(step):
    """Faces of lengths within and beyond what margins clip, some near their class, in float32."""
    random = torch.Generator().manual_seed(step)
    direction = F.normalize(torch.randn(G, D, generator=random))
    near = torch.linspace(0, 0.9, G)[:, None]
    mixed = F.normalize((1 - near) * direction + near * F.normalize(initial_rows(0, N, D, SEED)[labels(step)]))
    lengths = (1 + step) * torch.tensor([0.3, 4.0, 12, 20, 35, 60, 100, 130])
    return mixed * lengths[torch.randperm(G, generator=random)][:, None]


def labels(step):
    return (torch.tensor([0, 10, 4, 4, 7, 5, 0, 9]) + step) % N  # two classes have two faces


class Reference:
    """The formulas over the whole matrix, with the margins' state."""

    def __init__(self, method):
        self.method, self.margin = method, method.margin
        self.state = {}
        if self.margin.kind == "adaface" and self.margin.statistics == "public":
            self.state = {"mean": torch.tensor(20.0).double(), "std": torch.tensor(100.0).double()}

    def average(self, name, value, start=None):
        old = self.state.get(name, start)
        momentum = self.margin.momentum
        self.state[name] = value if old is None else momentum * old + (1 - momentum) * value
        return self.state[name]

    def loss(self, x, weight, columns, step):
        given, at = self.margin, torch.arange(len(x))
        cos = (F.normalize(x) @ F.normalize(weight).T).unflatten(1, (-1, self.method.subcentres)).max(2).values
        own, length = cos[at, columns], x.norm(dim=1)
        theta, extra = torch.acos(own.clamp(-1, 1)), 0.0
        negatives = cos
        match given.kind:
            case "adaface":
                length = length.detach()
                if given.statistics == "public":
                    length = length.clamp(1e-3, 100)
                mean, std = self.average("mean", length.mean()), self.average("std", length.std())
                z = (given.h * (length - mean) / (std + 1e-3)).clamp(-1, 1)
                angle = theta - given.m * z
                target = torch.cos(angle.clamp(0, math.pi) if given.past_ends == "clamp" else angle)
                target = target - given.m - given.m * z
            case "magface":
                a = length.clamp(given.low_length, given.high_length)
                slope = (given.high_margin - given.low_margin) / (given.high_length - given.low_length)
                m = slope * (a - given.low_length) + given.low_margin
                target = torch.cos(theta + m)
                if given.past_pi == "easy":
                    target = torch.where(own > 0, target, own)
                else:
                    target = torch.where(theta + m > math.pi, own - m * torch.sin(m), target)
                extra = given.weight * (a / given.high_length**2 + 1 / a).mean()
            case "elastic_arc" | "elastic_cos":
                m = given.m + given.sigma * torch.from_numpy(rng.normals(SEED, "margin", step, np.arange(G)))
                order = own.detach().argsort(descending=True)
                if given.plus == "paper":  # the face that is k-th nearest has the k-th least margin
                    m = torch.stack([m.sort().values[order.tolist().index(face)] for face in range(G)])
                elif given.plus == "public":
                    m = m.sort().values[order]
                if given.kind == "elastic_cos":
                    target = own - m
                else:
                    target = torch.cos(theta + m)
                    if given.past_pi == "fallback":
                        target = torch.where(theta + m > math.pi, own - m * torch.sin(m), target)
            case "curricular":
                t = self.average("t", own.detach().mean(), start=0.0)
                target = torch.cos(theta + given.m)
                hard = cos.detach() > target.detach()[:, None]
                negatives = torch.where(hard, cos * (t + cos), cos)
                target = torch.where(theta + given.m > math.pi, own - given.m * math.sin(given.m), target)
            case "uniface":
                target = own - given.m
        is_own = torch.zeros_like(cos, dtype=torch.bool).index_put((at, columns), torch.tensor(True))
        negatives = negatives.masked_fill((cos.detach() > self.method.drop_negatives_above) & ~is_own, -torch.inf)
        logits = SCALE * torch.where(is_own, target[:, None], negatives)
        if given.kind == "uniface":
            return self.unified(logits, is_own)
        return F.cross_entropy(logits, columns) + extra

    def unified(self, logits, is_own):
        """UniFace's loss; its threshold moves after it."""
        given = self.margin
        start = math.log(10 * N * self.method.sample_rate)
        b = torch.as_tensor(self.state.get("bias", start), dtype=torch.float64).requires_grad_()
        pairs = torch.log1p(torch.exp(torch.where(is_own, b - logits, logits - b)))
        pairs = torch.where(is_own, pairs, given.balance * pairs)
        loss = pairs.sum(1).mean()
        (gradient,) = torch.autograd.grad(loss, b, retain_graph=True)
        velocity = given.momentum * self.state.get("velocity", 0.0) + gradient
        self.state = {"bias": b.detach() - given.rate * velocity, "velocity": velocity}
        return loss


def own_part(ranks):
    return slice(ranks.rank * G // ranks.size, (ranks.rank + 1) * G // ranks.size)


def sharded_steps(ranks, method, sgd=False):
    """Take steps on this rank: losses, gradients of its faces and rows, the rows that take part, and the buffers."""
    head, found = ShardedFC(N, D, method, ranks, SEED), []
    optimizer = head_optimizer(Config(method=method), method, head) if sgd else None
    for step in range(STEPS):
        x_BD = embeddings(step)[own_part(ranks)].clone().requires_grad_()
        rows = head.sample(labels(step), step)
        (drawn,) = head.draw(step, G, 1, torch.device("cpu"))
        ranks.handed.clear()
        moves = optimizer.tile_sgd() if optimizer else None
        loss = head(ranks.gather(x_BD), labels(step), rows, moves, drawn)
        loss.backward()
        if optimizer:
            optimizer.step()
        grad = None if head.weight.grad is None else head.weight.grad.to_dense()
        taken = torch.arange(head.lo, head.hi) if rows is None else rows + head.lo
        state = {name: buffer.clone() for name, buffer in head.margin.named_buffers()}
        found.append((float(loss.detach()), x_BD.grad, grad, taken, state, dict(ranks.handed)))
        head.weight.grad = None
    return found, head.weight.detach()


def everything(ranks):
    found = {case: sharded_steps(ranks, method_of(case[0], **OPTIONS[case[1]]))[0] for case in CASES}
    return found | {name: sharded_steps(ranks, method_of(name, update="fused", tile=2), sgd=True) for name in ALONE}


@pytest.fixture(scope="module")
def found_on():
    """A function that returns the results of each rank, by case, for a number of ranks."""
    return cache(lambda size: run_ranks(size, everything))


def close(ours, theirs):
    """Whether they differ by the rounding of float32 logits at most, carried through a few dozen operations."""
    return torch.allclose(ours.double(), theirs, rtol=0, atol=64 * 2**-23 * SCALE * float(theirs.abs().max()))


@pytest.mark.parametrize("case", CASES, ids=" ".join)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_losses_gradients_and_state_equal_the_whole_matrix_in_float64(found_on, size, case):
    results = [found[case] for found in found_on(size)]
    name, option = case
    method = method_of(name, **OPTIONS[option])
    reference, whole = Reference(method), N * method.subcentres
    for step in range(STEPS):
        losses, x_grads, grads, taken, states, _ = zip(*(result[step] for result in results), strict=True)
        rows = torch.cat(taken)
        assert len(rows) == (whole if option != "partial" else sum(len(part) for part in taken))
        x, w = embeddings(step).double().requires_grad_(), initial_rows(0, whole, D, SEED).double().requires_grad_()
        expected = reference.loss(x, w[rows], torch.searchsorted(rows, labels(step)), step)
        expected.backward()
        assert all(close(torch.tensor(loss), expected.detach()) for loss in losses)
        assert len(set(losses)) == 1  # the same on all ranks, to the last bit
        assert close(torch.cat(x_grads), x.grad)
        assert close(torch.cat(grads), w.grad)
        for state in states:
            assert all(torch.equal(state[key], states[0][key]) for key in state)
            assert all(
                float(state[key]) == pytest.approx(float(reference.state[key]), rel=1e-5, abs=64 * 2**-23)
                for key in state
            )


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_fused_steps_equal_sgd_on_the_whole_matrix(found_on, size, name):
    results = [found[name] for found in found_on(size)]
    weight, reference = initial_rows(0, N, D, SEED).double().requires_grad_(), Reference(method_of(name))
    optimizer = torch.optim.SGD([weight], **SGD().model_dump(include={"lr", "momentum", "weight_decay"}))
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = reference.loss(embeddings(step).double(), weight, labels(step), step)
        loss.backward()
        optimizer.step()
        assert all(found[step][0] == pytest.approx(float(loss.detach()), rel=1e-4) for found, _ in results)
    assert torch.allclose(torch.cat([rows for _, rows in results]).double(), weight, atol=1e-4)


@pytest.mark.parametrize("name", MARGINS)
def test_only_margins_that_say_so_hand_more_to_collectives(found_on, name):
    handed = found_on(2)[0][name, "whole"][-1][-1]
    margin = method_of(name).margin
    faces = {"all_gather": G // 2 * D * 4 + margin.sums * G * 4, "reduce_scatter": G * D * 4}
    assert handed == faces | ({"all_reduce": G * 4} if margin.sees_cosines else {})


@pytest.mark.parametrize("name", [name for name in MARGINS if not name.startswith("adaface")])
def test_gradcheck(name):
    """Of unlike lengths, so that MagFace's gradient through the margin and the regulariser has its part."""
    head = ShardedFC(5, 3, method_of(name), Ranks(), SEED).double()
    random = torch.Generator().manual_seed(3)
    x = (30 * torch.randn(4, 3, generator=random, dtype=torch.float64)).requires_grad_()
    w = torch.randn(5, 3, generator=random, dtype=torch.float64).requires_grad_()
    columns, drawn = torch.tensor([0, 3, 3, 1]), torch.randn(4, generator=random, dtype=torch.float64)
    cos = (F.normalize(x) * F.normalize(w)[columns]).sum(1).detach()  # on which t and thresholds depend

    def loss(x, w):
        if isinstance(head.margin, CurricularFace):
            head.margin.t.fill_(0.3)
        margin = head.margin(Faces(x, cos if head.method.margin.sees_cosines else None, drawn))
        found = margin_softmax(
            F.normalize(x), w, columns, Softmax(margin, tile=2, hard=margin.hard, threshold=margin.threshold), Ranks()
        )
        return found if margin.extra_G is None else found + margin.extra_G.mean()

    assert torch.autograd.gradcheck(loss, (x, w))


@pytest.mark.parametrize("name", [name for name in MARGINS if "plus" not in name])  # which would have ties to break
def test_at_both_ends_of_the_cosine_the_loss_is_exact_and_gradients_are_finite(name):
    method = method_of(name)
    head = ShardedFC(N, D, method, Ranks(), SEED)
    rows = F.normalize(head.weight.detach())[labels(0)]
    x = (torch.tensor([1.0, -1] * (G // 2))[:, None] * rows * embeddings(0).norm(dim=1, keepdim=True)).requires_grad_()
    loss = head(x, labels(0), drawn_G=head.draw(0, G, 1, x.device)[0])
    loss.backward()
    exact = torch.tensor([1.0, -1] * (G // 2))[:, None] * F.normalize(head.weight.detach().double())[labels(0)]
    expected = Reference(method).loss(
        exact * x.detach().double().norm(dim=1, keepdim=True), head.weight.double(), labels(0), 0
    )
    # An angle that float32 rounds at a cosine of 1 errs by √(2 · 2⁻²⁴) = 3.5e-4, and the loss by this times the scale.
    assert float(loss.detach()) == pytest.approx(float(expected), abs=3.5e-4 * SCALE)
    assert x.grad.isfinite().all()
    assert head.weight.grad.isfinite().all()


@pytest.mark.parametrize("past_pi", ["fallback", "wrap", "clamp", "easy"])
def test_the_slope_by_m2_is_that_of_autograd(past_pi):
    cos = torch.linspace(-0.99, 0.99, 41, dtype=torch.float64)
    m2 = torch.linspace(0.2, 0.9, 41, dtype=torch.float64).requires_grad_()
    margin = FaceMargin(SCALE, 1.0, m2, 0.1, past_pi=past_pi)
    with_margin(cos, margin)[0].sum().backward()
    assert torch.allclose(slope_by_m2(cos, margin).detach(), m2.grad)


def test_drawn_margins_depend_on_the_place_in_the_global_batch_alone():
    """Of any number of ranks and micro-batches; and they are standard normal."""
    method = method_of("elastic_arc")
    heads = {size: ShardedFC(N, D, method, Ranks(0, size), SEED) for size in (1, 2, 4)}
    (whole,) = heads[1].draw(7, 24, 1, torch.device("cpu"))
    for size, head in heads.items():
        for micro in (1, 2, 3):
            parts = head.draw(7, 24, micro, torch.device("cpu"))
            by_rank = torch.stack(list(parts)).view(micro, size, -1).transpose(0, 1)
            assert torch.equal(by_rank.flatten(), whole)
    assert not torch.equal(heads[1].draw(8, 24, 1, torch.device("cpu"))[0], whole)
    (many,) = heads[1].draw(0, 40_000, 1, torch.device("cpu"))
    assert float(many.mean()) == pytest.approx(0, abs=4 / 200)  # four standard errors of 40,000 numbers
    assert float(many.std()) == pytest.approx(1, abs=4 / 200 / math.sqrt(2))


def test_elasticface_plus_gives_the_greatest_margin_to_the_farthest_face():
    method = method_of("elastic_cos")
    faces = Faces(torch.zeros(4, D), torch.tensor([0.1, 0.9, 0.5, 0.3]), torch.tensor([0.0, 3, -1, 1]))
    paper = TypeAdapter(AnyMargin).validate_python({"kind": "elastic_cos", "m": 0.3, "sigma": 0.1, "plus": "paper"})
    head = ShardedFC(N, D, method.model_copy(update={"margin": paper}), Ranks(), SEED)
    assert torch.allclose(head.margin(faces).m3, torch.tensor([0.6, 0.2, 0.3, 0.4]))


def test_adaface_by_hand():
    """Lengths 1 and 3 have mean 2 and deviation √2: z = ±0.333 / (√2 + 0.001)."""
    head = ShardedFC(N, D, method_of("adaface"), Ranks(), SEED)
    x = torch.zeros(2, D)
    x[:, 0] = torch.tensor([1.0, 3])
    found = head.margin(Faces(x))
    z = 0.333 / (math.sqrt(2) + 1e-3)
    assert torch.allclose(found.m2, torch.tensor([0.4 * z, -0.4 * z]))
    assert torch.allclose(found.m3, torch.tensor([0.4 - 0.4 * z, 0.4 + 0.4 * z]))
    head.margin(Faces(torch.ones(1, D)))  # the deviation of one face is 0
    assert head.margin.std.isfinite()


def test_magface_refuses_ends_in_the_wrong_order():
    for wrong in ({"low_length": 110}, {"low_margin": 0.9}):
        with pytest.raises(ValidationError, match="must"):
            BigFace.model_validate({"margin": {"kind": "magface"} | wrong})
