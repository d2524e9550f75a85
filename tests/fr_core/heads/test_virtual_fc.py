import pytest
import torch
from torch.nn import functional as F

from fr_core.config.methods import Margin
from fr_core.errors import UserError
from fr_core.heads.streamed import Softmax
from fr_core.heads.virtual_fc import Anchors

MARGIN = Margin(scale=8, m2=0.3, m3=0)


def anchors_of(count):
    return Anchors(count, 6, Softmax(MARGIN, tile=3), seed=0)


def test_identities_take_their_groups_anchor_and_the_others_the_lowest_free_one():
    """With 5 anchors, people 3 and 8 are in group 3, and 5, 10 and 15 in group 0. 8, 10 and 15 borrow 1, 2 and 4."""
    taken, borrowed = anchors_of(5).assign(torch.tensor([3, 5, 8, 10, 15]))
    assert taken.tolist() == [3, 0, 1, 2, 4]
    assert borrowed.tolist() == [False, False, True, True, True]
    with pytest.raises(UserError, match=r"method.anchors = 5 is less than the 6 identities of a batch"):
        anchors_of(5).assign(torch.arange(6))


def test_steps_equal_a_dictionary_of_anchors():
    random = torch.Generator().manual_seed(0)
    head = anchors_of(7)
    anchors = dict(enumerate(head.anchors_MD.double()))
    for _ in range(40):
        people = torch.randperm(30, generator=random)[:4]
        labels = people.repeat(3)[torch.randperm(12, generator=random)]
        x = torch.randn(12, 6, generator=random).requires_grad_()
        head.begin_step()
        loss = head(x, labels, x, labels)
        loss.backward()
        head.end_step(torch.tensor(True))

        unit = F.normalize(x.detach().double())
        holders, returned = {}, {}
        groups = {label % 7 for label in labels.tolist()}
        for label in sorted(set(labels.tolist())):
            own = label % 7
            if own in holders.values():
                own = min(set(range(7)) - groups - set(holders.values()))
                returned[own] = anchors[own]
            holders[label] = own
            anchors[own] = F.normalize(unit[labels == label].sum(0), dim=0)
        y = x.detach().double().requires_grad_()
        logits = F.normalize(y) @ torch.stack([anchors[m] for m in range(7)]).T
        column = torch.tensor([holders[label] for label in labels.tolist()])
        faces = torch.arange(12)
        target = torch.cos(torch.acos(logits[faces, column]) + MARGIN.m2)
        expected = F.cross_entropy(MARGIN.scale * logits.index_put((faces, column), target), column)
        expected.backward()
        anchors |= returned
        assert float(loss.detach()) == pytest.approx(float(expected), abs=1e-5)
        assert torch.allclose(x.grad.double(), y.grad, atol=1e-5)
        assert torch.allclose(head.anchors_MD.double(), torch.stack([anchors[m] for m in range(7)]), atol=1e-6)


def test_a_dropped_step_leaves_no_trace():
    head = anchors_of(5)
    before = head.anchors_MD.clone()
    x = torch.randn(4, 6)
    head.begin_step()
    head(x, torch.arange(4), x, torch.arange(4))
    assert not torch.equal(head.anchors_MD, before)
    head.end_step(torch.tensor(False))
    assert torch.equal(head.anchors_MD, before)
