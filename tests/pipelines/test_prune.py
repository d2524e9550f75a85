"""``bigface prune``: bare weights, and a run that fine-tunes them."""

import json
from itertools import combinations

import pytest
import torch
from safetensors.torch import save_file

from fr_core.config.nets import IResNetNet, MoENet
from fr_core.errors import UserError
from fr_core.nets.build import build_net
from fr_core.nets.open import open_net
from tests.helpers.commands import bigface, figures

pytest.importorskip("torch_pruning")

NET = IResNetNet(depth=10, width=16, input_size=32, embedding=16)
LEFT = (12, 25, 51, 102)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("nets") / "net.safetensors"
    save_file(build_net(NET).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def pairs(photos):
    path = photos.parent / "prune_pairs.csv"
    names = [f"person{i}/{shot}.jpg" for i in range(6) for shot in (0, 1)]
    rows = [f"{a},{b},{int(a[:7] == b[:7])}" for a, b in combinations(names, 2)]
    path.write_text("\n".join(["image_a,image_b,same", *rows]) + "\n")
    return path


def test_pruned_weights_open_by_themselves(weights, tmp_path):
    output = bigface(
        "prune", weights, "--net", "iresnet10", "--out", tmp_path / "a" / "p.safetensors", "--json", tmp_path / "p.json"
    )
    assert "MMAC" in output
    assert output.count("┏") == 1  # one table
    assert output.splitlines()[-1].startswith(f"next: bigface verify {tmp_path}/a/p.safetensors --images DIR")
    one = open_net(tmp_path / "a" / "p.safetensors", device=torch.device("cpu"))
    assert one.config.widths == LEFT
    found = figures(tmp_path / "p.json")
    assert found["pruned_parameters"] == sum(p.numel() for p in one.net.parameters())
    assert found["whole_parameters"] == sum(p.numel() for p in build_net(NET).parameters())
    assert found["pruned_mib"] == pytest.approx((tmp_path / "a" / "p.safetensors").stat().st_size / 2**20, rel=0.1)
    assert found["whole_mmac"] == pytest.approx(multiplications(16, 32, 64, 128), rel=1e-6)
    assert found["pruned_mmac"] == pytest.approx(multiplications(*LEFT), rel=1e-6)


def multiplications(*widths):
    """Millions of them in IR-10 for a 32 × 32 image, layer by layer."""
    total, inputs, side = 3 * 9 * widths[0] * 32**2, widths[0], 32
    for width in widths:
        total += inputs * width * 9 * side**2
        side //= 2
        total += (width * width * 9 + inputs * width) * side**2
        inputs = width
    return (total + inputs * side**2 * 16) / 1e6


def test_widths_by_stage_in_multiples(weights, tmp_path):
    out = tmp_path / "p.safetensors"
    bigface("prune", weights, "--net", "iresnet10", "--ratio", "0,0.2,0.3,.5", "--round-to", 8, "--out", out)
    assert open_net(out).config.widths == (16, 24, 40, 64)


def tune(weights, dataset, out, *args):
    short = ["tracking.uri=off", "train.max_steps=3"]
    bigface("prune", weights, "--net", "iresnet10", "--data", dataset, *short, "--in-process", "--out", out, *args)


def test_the_whole_net_teaches_what_is_left(weights, dataset, photos, pairs, tmp_path):
    run = tmp_path / "run"
    verified = ("--images", photos, "--pairs", pairs, "--json", tmp_path / "p.json")
    tune(weights, dataset, run, *verified)
    found = figures(tmp_path / "p.json")
    assert found["tuned_parameters"] == found["pruned_parameters"] < found["whole_parameters"]
    assert {f"{form}_accuracy" for form in ("whole", "pruned", "tuned")} <= found.keys()
    report = json.loads((run / "report.json").read_text())
    assert report["figures"]["whole_accuracy"] == found["whole_accuracy"]
    assert report["figures"]["tuned_accuracy"] == report["figures"]["accuracy"]
    config = report["config"]
    assert config["net"]["widths"] == list(LEFT)
    assert config["method"]["teacher"] == str(weights)
    before, after = open_net(run / "pruned.safetensors"), open_net(run)
    assert after.config == before.config
    assert not torch.equal(after.net.fc.weight, before.net.fc.weight)

    with pytest.raises(UserError, match="holds a run"):
        tune(weights, dataset, run, "--ratio", 0.3)
    with pytest.raises(UserError, match=r"net\.widths? differs"):
        tune(weights, dataset, run, "--ratio", 0.3, "--resume")
    assert open_net(run / "pruned.safetensors").config == before.config
    tune(weights, dataset, run, "train.max_steps=4", "--resume")
    assert (run / "checkpoints" / "step_00000004").is_dir()


def test_mistakes_are_told_in_one_line(weights, dataset, tmp_path):
    out = tmp_path / "p.safetensors"
    moe = MoENet(depth=10, width=16, input_size=32, embedding=8)
    save_file(build_net(moe).state_dict(), tmp_path / "moe.safetensors", {"net": moe.model_dump_json()})
    net = (weights, "--net", "iresnet10")
    wrong = {
        "between 0 and 1": (*net, "--out", out, "--ratio", 1.5),
        "give a number": (*net, "--out", out, "--ratio", "a fifth"),
        "one for each of 4": (*net, "--out", out, "--ratio", "0.1,0.2"),
        "less than 8": (*net, "--out", out, "--ratio", 0.6),
        "one of l1, l2, bn": (*net, "--out", out, "--importance", "taylor"),
        "kind moe": (tmp_path / "moe.safetensors", "--out", out),
        r"FILE\.safetensors": (*net, "--out", tmp_path / "folder"),
        "give --data": (*net, "--out", out, "--in-process"),
        "pruning decides": (*net, "--out", tmp_path / "run", "net.width=8", "--data", dataset),
        "no shards|no dataset|no such|manifest": (*net, "--out", tmp_path / "run", "--data", tmp_path / "absent"),
    }
    for message, args in wrong.items():
        with pytest.raises(UserError, match=message) as caught:
            bigface("prune", *args)
        assert "\n" not in str(caught.value)
    assert not out.exists()
