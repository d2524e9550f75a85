import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fr_core.config import load_config
from fr_core.errors import UserError
from fr_core.nets.committee import Committee, member_classes
from fr_core.nets.iresnet import IResNet
from fr_core.nets.open import build_net, open_net
from pipelines.export import export
from pipelines.train import train

COMMITTEE = ["net.kind=committee", "net.members=2"]


def test_the_cosine_of_two_faces_is_the_mean_of_the_members():
    torch.manual_seed(0)
    nets = [IResNet(10, 8, 1, 32, size).eval() for size in (16, 16, 16)]
    committee = Committee(nets).eval()
    assert (committee.input_size, committee.embedding) == (32, 48)
    x_BCHW = torch.randn(6, 3, 32, 32)
    with torch.no_grad():
        a_BD, b_BD = committee(x_BCHW).chunk(2)
        wanted = torch.stack([F.cosine_similarity(*net(x_BCHW).chunk(2)) for net in nets]).mean(0)
    assert torch.allclose(F.cosine_similarity(a_BD, b_BD), wanted, atol=1e-5)
    assert torch.allclose(a_BD.norm(dim=1), torch.ones(3), atol=1e-5)


def test_members_are_drawn_apart_and_their_rows_have_classes_of_their_own():
    torch.manual_seed(0)
    net = build_net(load_config("debug_bigface", ["net.kind=committee", "net.members=3", "net.embedding=48"]).net)
    first, second, _ = net.members
    assert not torch.equal(first.conv1.weight, second.conv1.weight)
    x_BCHW = torch.randn(4, 3, net.input_size, net.input_size)
    rows_MBD = net.train()(x_BCHW).unflatten(0, (3, 4))
    assert torch.equal(rows_MBD[1], second(x_BCHW))
    assert member_classes(torch.tensor([0, 5]), 3).tolist() == [0, 15, 1, 16, 2, 17]


def test_a_committee_trains_and_opens(dataset, tmp_path):
    given = [f"data.path={dataset}", "tracking.uri=off", "train.max_steps=20", *COMMITTEE]
    figures = train(load_config("debug_bigface", given), tmp_path, in_process=True)
    alone = load_config("debug_bigface", given[:2])
    assert figures["classifier_parameters"] == figures["identities"] * alone.net.embedding
    rows = np.loadtxt(tmp_path / "metrics.csv", delimiter=",", skiprows=1, usecols=2)
    assert rows[-5:].mean() < rows[:5].mean()
    images = np.random.default_rng(0).integers(0, 255, (3, 32, 32, 3), np.uint8)
    assert open_net(tmp_path).embed(images).shape == (3, alone.net.embedding)
    assert export(str(tmp_path), tmp_path / "net.onnx")["least_cosine"] > 0.9999


@pytest.mark.parametrize(
    ("recipe", "override", "message"),
    [
        ("debug_bigface", "net.members=3", "do not share net.embedding"),
        ("debug_bigface", "method.update=fused", "class rows for each member"),
        ("debug_bigface", "init.head=prototypes", "class rows for each member"),
        ("debug_attfc", "seed=1", "class rows for each member"),
    ],
)
def test_what_a_committee_cannot_do_is_refused(recipe, override, message):
    with pytest.raises(UserError, match=message):
        load_config(recipe, [*COMMITTEE, override])
