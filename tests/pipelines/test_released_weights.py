"""Released weights of each family through the commands: fine-tuned, exported, quantised, pruned, distilled from."""

import json

import numpy as np
import onnx
import pytest
import torch

from fr_core.data.synthetic import render_face
from fr_core.errors import UserError
from fr_core.nets.checkpoint_files import checkpoints
from fr_core.nets.open import open_net
from tests.helpers.commands import bigface
from tests.helpers.datasets import write_dataset
from tests.helpers.foreign import IR, SIDE, Insight, Mobile, embedded, noise, settled

CPU = torch.device("cpu")
# Net · its wrapping · --net · BGR, mean and std · what its section has beside the sizes.
FAMILIES = {
    "insightface": (lambda: settled(Insight(), gain=False), "", None, (False, 127.5, 127.5), {}),
    "magface": (
        lambda: settled(Insight(eps=2e-5)),
        "features.module.",
        None,
        (True, 0, 255),
        {"input_mean": 0, "input_std": 255, "norm_eps": 2e-5},
    ),
    "adaface": (lambda: settled(IR()), "model.", None, (True, 127.5, 127.5), {"shortcut": "pool"}),
    "cvlface": (lambda: settled(IR(se=True)), "net.", "cvlface", (False, 127.5, 127.5), {"se": True}),
    "tface": (lambda: settled(IR()), "", "tface", (False, 127.5, 127.5), {"shortcut": "pool"}),
    "evolve": (
        lambda: settled(IR(inner=False, affine=True)),
        "module.",
        "evolve",
        (False, 127.5, 127.5),
        {"inner_norm": False},
    ),
    "treb1en": (
        lambda: settled(IR(inner=False, se=True, affine=True)),
        "",
        "treb1en",
        (True, 127.5, 127.5),
        {"inner_norm": False, "se": True, "shortcut": "pool"},
    ),
    "facexzoo": (lambda: settled(Mobile()), "", "facexzoo", (True, 127.5, 128), {"norm_eps": 1e-5}),
}

CALIBRATION = (
    *("--calibrate-only", "--in-process", "tracking.uri=off"),
    *("net.calibration_batches=4", "train.global_batch=32"),
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "shards", 128, 8, SIDE, 64)


def failed(*args):
    """Return the one line that a command ends with."""
    with pytest.raises(UserError) as error:
        bigface(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def weights_file(family, folder):
    torch.manual_seed(0)
    net, prefix = FAMILIES[family][0](), FAMILIES[family][1]
    torch.save({"state_dict": {prefix + name: t for name, t in net.state_dict().items()}}, folder / "net.pth")
    return net, folder / "net.pth"


def run_of(shards, out, path, net, *more):
    named = [f"init.net={net}"] if net else []
    given = [f"data.path={shards}", f"init.backbone={path}", *named, "tracking.uri=off", "train.max_steps=3", *more]
    bigface("train", "debug_bigface", *given, "--in-process", "--out", out)
    return out


SOAK = {name: pytest.mark.soak for name in FAMILIES if name != "cvlface"}


@pytest.mark.parametrize("family", [pytest.param(name, marks=SOAK.get(name, ())) for name in FAMILIES])
def test_weights_are_fine_tuned_exported_and_quantised(family, shards, tmp_path):
    pytest.importorskip("brevitas")
    net, path = weights_file(family, tmp_path)
    _, _, option, pixels, section = FAMILIES[family]
    source, named = open_net(path, option, CPU), ["--net", option] if option else []

    run = run_of(shards, tmp_path / "run", path, option, "optim.lr=1e-9")
    tuned = open_net(run, device=CPU)
    assert tuned.config == source.config
    kept = json.loads((checkpoints(run)[-1] / "checkpoint.json").read_text())["config"]["net"]
    assert kept | section == kept
    changed = [(a - b).abs().max() for a, b in zip(tuned.net.parameters(), source.net.parameters(), strict=True)]
    assert max(changed) < 1e-4

    bigface("export", path, *named, "--out", tmp_path / "net.onnx")
    exported = open_net(tmp_path / "net.onnx")
    wanted = embedded(net, noise(), *pixels)
    assert (exported.embed(noise(), flip=False) * wanted).sum(1).min() > 0.99999
    assert (exported.net.input_mean, exported.net.input_std) == pixels[1:]
    bigface("quantize", path, *named, *CALIBRATION, "--data", shards, "--run", tmp_path / "q")
    images = np.stack([render_face(identity, 0, size=SIDE)[0] for identity in range(8)])
    integers = open_net(tmp_path / "q", device=CPU)
    assert (integers.net.input_mean, integers.net.input_std) == pixels[1:]
    assert (integers.embed(images) * source.embed(images)).sum(1).mean() > 0.9


def test_a_fine_tuned_net_becomes_a_file_of_integers(shards, tmp_path):
    pytest.importorskip("brevitas")
    _, path = weights_file("treb1en", tmp_path)
    run = run_of(shards, tmp_path / "run", path, "treb1en")
    made = ["--run", tmp_path / "q", "--out", tmp_path / "q.onnx"]
    bigface("quantize", run, *CALIBRATION, "--data", shards, *made)
    images = np.stack([render_face(identity, 0, size=SIDE)[0] for identity in range(8)])
    simulated, file = open_net(tmp_path / "q", device=CPU), open_net(tmp_path / "q.onnx")
    assert (simulated.embed(images) * file.embed(images)).sum(1).min() > 0.999


def test_a_foreign_net_is_pruned_and_tuned_with_itself_as_the_teacher(shards, tmp_path):
    pytest.importorskip("torch_pruning")
    _, path = weights_file("treb1en", tmp_path)
    tune = ["--data", shards, "--in-process", "train.max_steps=2", "train.global_batch=32", "tracking.uri=off"]
    bigface("prune", path, "--net", "treb1en", "--out", tmp_path / "run", "--ratio", "0.2", *tune)
    pruned = open_net(tmp_path / "run", device=CPU).config
    assert (pruned.widths, pruned.se, pruned.inner_norm) == ((12, 25, 51, 102), True, False)


def test_a_foreign_net_teaches(shards, tmp_path):
    """The teacher's pixels are its own, whatever the student's are."""
    _, path = weights_file("magface", tmp_path)
    given = [f"data.path={shards}", "tracking.uri=off", "train.max_steps=2", "net.embedding=24"]
    bigface("distill", "debug_bigface", "--teacher", path, *given, "--in-process", "--out", tmp_path / "run")
    assert open_net(tmp_path / "run", device=CPU).config.input_std == 127.5


def test_a_family_is_asked_for_by_the_field_of_the_run(shards, tmp_path):
    _, path = weights_file("evolve", tmp_path)
    given = ["train", "debug_bigface", f"data.path={shards}", "--in-process", "--out", tmp_path / "run"]
    error = failed(*given, f"init.backbone={path}")
    assert "init.backbone: " in error
    assert "give init.net=evolve (face.evoLVe: RGB, (pixel - 127.5) / 127.5), init.net=treb1en" in error
    error = failed(*given, f"method.distill.teacher={path}", "net.embedding=24")
    assert "method.distill.teacher_net=evolve" in error
    assert "init.net = evolve says what init.backbone holds" in failed(*given, "init.net=evolve")


def test_overrides_of_the_net_still_count(shards, tmp_path):
    """A mixture of experts is made of the released net; another depth does not fit."""
    _, path = weights_file("adaface", tmp_path)
    run = run_of(shards, tmp_path / "moe", path, None, "net.kind=moe", "net.experts=2", "net.dropout=0.1")
    config = open_net(run, device=CPU).config
    assert (config.kind, config.shortcut, config.embedding, config.dropout) == ("moe", "pool", 24, 0.1)
    given = [f"data.path={shards}", f"init.backbone={path}", "--in-process", "--out", tmp_path / "run"]
    assert "holds an iresnet10, not an iresnet18" in failed("train", "debug_bigface", *given, "net.depth=18")


def test_verify_and_match_say_whose_net_a_file_was_taken_for(tmp_path, photos):
    _, path = weights_file("magface", tmp_path)
    a, b = sorted(photos.glob("*/0.jpg"))[:2]
    assert "MagFace: BGR, pixel / 255" in bigface("match", a, b, "--model", path)


def test_commands_that_change_a_net_say_whose_it_was_taken_for(shards, tmp_path):
    pytest.importorskip("torch_pruning")
    pytest.importorskip("brevitas")
    _, path = weights_file("magface", tmp_path)
    for command in (
        ["export", path, "--out", tmp_path / "a.onnx"],
        ["prune", path, "--out", tmp_path / "a.safetensors"],
        ["quantize", path, *CALIBRATION, "--data", shards, "--run", tmp_path / "q"],
    ):
        assert "MagFace: BGR, pixel / 255" in bigface(*command)


def test_match_never_prints_nan(tmp_path, photos):
    net, path = weights_file("insightface", tmp_path)
    net.fc.bias.data.fill_(3e38)  # finite weights whose embeddings are not
    net.features.weight.data.fill_(1)
    net.features.running_var.fill_(1e-30)
    torch.save(net.state_dict(), path)
    a, b = sorted(photos.glob("*/0.jpg"))[:2]
    assert "its embeddings of these photos are not finite" in failed("match", a, b, "--model", path)
    torch.save({name: torch.zeros_like(tensor) for name, tensor in net.state_dict().items()}, path)
    assert "not finite, or all 0" in failed("match", a, b, "--model", path, "--net", "insightface")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "family", ["insightface", *(pytest.param(name, marks=pytest.mark.soak) for name in ("treb1en", "facexzoo"))]
)
def test_a_graph_of_others_is_verified_and_trained(family, shards, tmp_path):
    net, _ = weights_file(family, tmp_path)
    _, _, option, pixels, _ = FAMILIES[family]
    path = tmp_path / "w600k.onnx"
    torch.onnx.export(net, (torch.zeros(1, 3, SIDE, SIDE),), path, dynamo=False, opset_version=11)
    assert [end.name for end in onnx.load(path).graph.input] == ["input.1"]
    wanted = embedded(net, noise(), *pixels)
    assert (open_net(path, option).embed(noise(), flip=False) * wanted).sum(1).min() > 0.99999
    back = open_net(path, option, CPU, changeable=True)
    assert (back.embed(noise(), flip=False) * wanted).sum(1).min() > 0.99999

    run = run_of(shards, tmp_path / "run", path, option, "optim.lr=1e-9", "train.max_steps=1")
    tuned = open_net(run, device=CPU)
    assert tuned.config == back.config
    images = np.stack([render_face(identity, 0, size=SIDE)[0] for identity in range(8)])
    assert (tuned.embed(images) * back.embed(images)).sum(1).min() > 0.9
