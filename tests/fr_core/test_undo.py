import torch

from fr_core.undo import Undo, fill, flat


def test_tensors_become_one_and_are_filled_again_whatever_their_layout():
    torch.manual_seed(0)
    tensors = [torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last), torch.randn(()), torch.randn(3, 5).T]
    before = [tensor.clone() for tensor in tensors]
    numbers = flat(tensors)
    assert numbers.shape == (96 + 1 + 15,)
    for tensor in tensors:
        tensor.zero_()
    fill(tensors, numbers)
    assert all(torch.equal(tensor, old) for tensor, old in zip(tensors, before, strict=True))


def test_a_bad_step_is_undone_and_a_good_one_stays():
    for good in (True, False):
        tensors = [torch.zeros(3), torch.zeros((), dtype=torch.int64), torch.zeros(2, 2)]
        undo = Undo(tensors)
        for tensor, value in zip(tensors, (torch.nan, 7, 1.0), strict=True):
            tensor.fill_(value)
        moved = [tensor.clone() for tensor in tensors]
        undo.unless(torch.tensor(good))
        expected = moved if good else [torch.zeros_like(tensor) for tensor in tensors]
        assert all(torch.equal(a.nan_to_num(9), b.nan_to_num(9)) for a, b in zip(tensors, expected, strict=True))


def test_nothing_is_undone_without_tensors():
    Undo().unless(torch.tensor(False))
