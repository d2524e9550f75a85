"""EKD, its general form and QuantFace's MSE, against the formulas pair by pair in float64."""

import itertools

import numpy as np
import pytest
import torch

from fr_core.config.methods import EKD, EmbeddingMSE, RelativeSimilarity
from fr_core.losses.ekd import THRESHOLDS, Agreement


class ByHand:
    """EKD's formulas (docs/methods/quantface.md), with a pool per network that begins with the newest negatives."""

    def __init__(self, form):
        self.form, self.pools, self.thresholds = form, ([], []), [None, None]

    def loss(self, student, teacher, labels):
        found = [self.cosines(x) for x in (teacher, student)]
        pairs = list(itertools.combinations(range(len(labels)), 2))
        negatives = [p for p in pairs if labels[p[0]] != labels[p[1]]]
        for n in range(2):
            self.observe(n, [found[n][p] for p in negatives])
        hardest = sorted(negatives, key=lambda p: -found[1][p])[: self.form.hardest]
        positives = [p for p in pairs if p not in negatives]
        return [np.mean([self.apart(*(f[p] for f in found)) for p in group]) for group in (positives, hardest)]

    def cosines(self, x):
        return {(i, j): a @ b / np.sqrt((a @ a) * (b @ b)) for i, a in enumerate(x) for j, b in enumerate(x)}

    def observe(self, n, negatives):
        self.pools[n][:0] = negatives
        del self.pools[n][self.form.pool :]
        falling = sorted(self.pools[n], reverse=True)
        now = np.array([falling[int(len(falling) / 10**k)] for k in range(1, 7)])
        share = 1 - self.form.threshold_momentum
        old = self.thresholds[n]
        self.thresholds[n] = now if old is None else share * now + (1 - share) * old

    def apart(self, teacher, student):
        if self.form.kind == "ekd":
            places = [
                sum(1 / (1 + np.exp(-(x - a) / self.form.temperature)) for a in self.thresholds[n])
                for n, x in enumerate((teacher, student))
            ]
            return (places[0] - places[1]) ** 2
        gaps = (teacher - self.thresholds[0]) - (student - self.thresholds[1])
        return np.mean(gaps**2)


def features(seed, rows=24, spread=0.8):
    """Return student embeddings [G, 5] of six identities, similar teacher embeddings [G, 7], and labels [G]."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 6, rows)
    people = np.random.default_rng(99).normal(size=(6, 5))
    student = people[labels] + spread * random.normal(size=(rows, 5))
    turn, _ = np.linalg.qr(np.random.default_rng(98).normal(size=(7, 7)))
    return student, np.pad(student + 0.1 * random.normal(size=(rows, 5)), ((0, 0), (0, 2))) @ turn, labels


def tensors(*arrays):
    return [torch.as_tensor(array) for array in arrays]


FORMS = [
    EKD(hardest=50, pool=700, threshold_momentum=0.8, temperature=0.05, lambda_pos=0.3, lambda_neg=0.2),
    RelativeSimilarity(hardest=50, pool=700, threshold_momentum=0.8, lambda_pos=0.3, lambda_neg=0.2),
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.kind)
def test_loss_and_thresholds_are_those_of_the_formula_over_steps(form):
    """From the third batch on, the pool is full and drops its oldest pairs."""
    agreement, reference = Agreement(form), ByHand(form)
    for step in range(6):
        given = features(step)
        positive, negative = reference.loss(*given)
        loss, terms = agreement(*tensors(*given))
        assert terms["positive_loss"].item() == pytest.approx(positive, rel=1e-4)
        assert terms["negative_loss"].item() == pytest.approx(negative, rel=1e-4)
        assert loss.item() == pytest.approx(0.3 * positive + 0.2 * negative, rel=1e-4)
        found = [terms[name].item() for name in THRESHOLDS]
        assert np.allclose(found, np.concatenate(reference.thresholds), atol=1e-5)
        assert np.allclose(agreement.pool_NM[:, : len(reference.pools[0])], reference.pools, atol=1e-6)
    assert len(reference.pools[0]) == 700
    assert len(set(found)) == 6  # for rates of 1e-3 and below, it is the maximum of the pool of 700


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.kind)
def test_gradient_at_thresholds_that_stand_still(form, monkeypatch):
    student, teacher, labels = tensors(*features(0, rows=9))
    agreement = Agreement(form)
    agreement(student, teacher, labels)
    monkeypatch.setattr(agreement, "observe", lambda negatives, momentum: None)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: agreement(x, teacher, labels)[0], student)


def test_mse_is_the_mean_over_images_of_the_squared_distance():
    student, teacher, labels = features(0)
    teacher = teacher[:, :5]
    loss, terms = Agreement(EmbeddingMSE())(*tensors(student, teacher, labels))
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (student, teacher)]
    assert loss.item() == pytest.approx(np.mean(np.sum((unit[0] - unit[1]) ** 2, axis=1)), rel=1e-5)
    assert terms == {"distill_loss": loss}


@pytest.mark.parametrize("form", [EKD(), RelativeSimilarity()], ids=lambda form: form.kind)
@pytest.mark.parametrize(
    ("labels", "empty"),
    [
        ([0, 1, 2, 3], "positive_loss"),
        ([5, 5, 5, 5], "negative_loss"),
        ([0, 1], "positive_loss"),
        ([3, 3], "negative_loss"),
    ],
)
@pytest.mark.parametrize("kind", ["random", "constant", "zero"])
def test_edge_cases_are_finite(form, labels, empty, kind):
    rows = len(labels)
    x = {"random": torch.randn(rows, 5), "constant": torch.ones(rows, 5), "zero": torch.zeros(rows, 5)}[kind]
    x.requires_grad_()
    loss, terms = Agreement(form)(x, torch.randn(rows, 7), torch.tensor(labels))
    loss.backward()
    assert all(value.isfinite() for value in terms.values())
    assert loss.isfinite()
    assert x.grad.isfinite().all()
    assert terms[empty] == 0


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    student, _, labels = tensors(*features(0))
    student.requires_grad_()
    loss, _ = Agreement(EKD())(student, student.detach(), labels)
    loss.backward()
    assert loss == 0
    assert not student.grad.any()


def test_a_batch_without_negatives_leaves_the_thresholds():
    agreement = Agreement(EKD(pool=100))
    student, teacher, labels = tensors(*features(0))
    one_person = torch.zeros_like(labels)
    assert (agreement(student, teacher, one_person)[1]["threshold_student_1e-1"]) == 1
    agreement(student, teacher, labels)
    before = agreement.thresholds_NK.clone()
    assert (before < 1).all()
    agreement(student, teacher, one_person)
    assert torch.equal(agreement.thresholds_NK, before)
    assert agreement.pool_NM.isfinite().all()  # the pool holds 100 of more than 200 negatives


def test_autocast_and_half_precision_leave_the_cosines_in_float32():
    student, teacher, labels = tensors(*features(0))
    student, teacher = student.bfloat16(), teacher.float()
    plain, _ = Agreement(EKD())(student.float(), teacher, labels)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = Agreement(EKD())(student, teacher, labels)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, plain)
