import itertools

import pytest
import torch

from fr_core.ranks import Ranks
from tests.helpers.ranks import run_ranks


@pytest.mark.parametrize(("total", "size"), [(10, 3), (3, 3), (7, 2), (1, 1), (100, 7)])
def test_split_shares_out_every_row_once(total, size):
    parts = [Ranks(rank, size).split(total) for rank in range(size)]
    assert parts[0][0] == 0
    assert parts[-1][1] == total
    assert all(a[1] == b[0] for a, b in itertools.pairwise(parts))
    sizes = [hi - lo for lo, hi in parts]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1


def collectives(ranks):
    torch.manual_seed(ranks.rank)
    rows = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    gathered = ranks.gather(rows)
    weights = torch.arange(gathered.numel(), dtype=torch.float64).view_as(gathered)
    # Each rank uses its own part of the gathered rows, as the sharded softmax does.
    own = (gathered * weights * (ranks.rank + 1)).sum()
    own.backward()
    total = ranks.sum_(torch.tensor([float(ranks.rank)]))
    results = {"rows": rows.detach(), "gathered": gathered.detach(), "grad": rows.grad, "total": float(total)}
    return results | {"handed": dict(ranks.handed)}


def test_collectives_and_their_gradients():
    results = run_ranks(3, collectives)
    rows = torch.cat([result["rows"] for result in results])
    expected = torch.arange(18, dtype=torch.float64).view(6, 3) * (1 + 2 + 3)
    for rank, result in enumerate(results):
        assert torch.equal(result["gathered"], rows)
        assert torch.equal(result["grad"], expected[2 * rank : 2 * rank + 2])
        assert result["total"] == 0 + 1 + 2
        assert result["handed"] == {"all_gather": 2 * 3 * 8, "reduce_scatter": 6 * 3 * 8, "all_reduce": 4}


def test_one_rank_needs_no_process_group():
    x = torch.ones(2, requires_grad=True)
    ranks = Ranks()
    assert ranks.gather(x) is x
    assert ranks.gather_objects("a") == ["a"]
    assert ranks.broadcast_object("b") == "b"
