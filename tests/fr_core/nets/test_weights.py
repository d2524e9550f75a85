"""Weights of other projects: opened with their own pixels, asked for where a file does not tell, or refused."""

import argparse
import gzip
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fr_core.config.nets import IResNetNet, MobileFaceNetNet
from fr_core.errors import UserError
from fr_core.nets.build import build_net
from fr_core.nets.checkpoint_files import write_tensors
from fr_core.nets.open import load_weights, open_net
from tests.helpers.foreign import EMBEDDING, IR, SIDE, WIDTHS, Insight, Mobile, embedded, noise, settled

CPU = torch.device("cpu")
RGB, BGR = (False, 127.5, 127.5), (True, 127.5, 127.5)
FACEX, MAG = (True, 127.5, 128.0), (True, 0.0, 255.0)


def prefixed(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def saved(content, path):
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous().clone() for name, tensor in content.items()}, path)
    else:
        torch.save(content, path)
    return path


HEAD = {"head.kernel": torch.randn(EMBEDDING, 9), "head.t": torch.zeros(1)}
LIGHTNING = {"epoch": 3, "pytorch-lightning_version": "1.4.4", "hyper_parameters": argparse.Namespace(lr=0.1)}
# Net · how the project wraps its weights · file · --net · channel order, mean and std.
CASES = {
    "insightface": (lambda: settled(Insight(), gain=False), lambda s: s, "backbone.pth", None, RGB),
    "insightface training": (
        lambda: settled(Insight((2, 2, 2, 2)), gain=False),
        lambda s: {
            "state_dict_backbone": prefixed("module.", s),
            "state_dict_softmax_fc": {"weight": torch.ones(9, 24)},
        },
        "checkpoint_gpu_0.pt",
        "iresnet18",
        RGB,
    ),
    "compiled": (
        lambda: settled(Insight(), gain=False),
        lambda s: {"model": prefixed("module._orig_mod.", s), "optimizer": {"state": {0: {"step": torch.ones(1)}}}},
        "net.ckpt",
        None,
        RGB,
    ),
    "magface": (
        lambda: settled(Insight(eps=2e-5)),
        lambda s: {
            "state_dict": prefixed("features.module.", s) | {"fc.weight": torch.ones(24, 9)},
            "arch": "iresnet10",
        },
        "magface.pth",
        None,
        MAG,
    ),
    "magface bare": (lambda: settled(Insight(eps=2e-5)), lambda s: s, "magface.safetensors", "magface", MAG),
    "adaface": (
        lambda: settled(IR()),
        lambda s: LIGHTNING | {"state_dict": prefixed("model.", s) | HEAD},
        "adaface.ckpt",
        None,
        BGR,
    ),
    "adaface by cvlface": (lambda: settled(IR()), lambda s: prefixed("net.", s), "model.safetensors", "adaface", BGR),
    "cvlface": (lambda: settled(IR(se=True)), lambda s: prefixed("net.", s), "model.pt", "cvlface", RGB),
    "tface": (lambda: settled(IR()), lambda s: s, "Backbone.pth", "tface", RGB),
    "evolve": (lambda: settled(IR(inner=False, affine=True)), lambda s: s, "IR_50.pth", "evolve", RGB),
    "treb1en": (lambda: settled(IR(inner=False, se=True, affine=True)), lambda s: s, "ir_se50.pth", "treb1en", BGR),
    "curricularface": (lambda: settled(IR(inner=False)), lambda s: s, "CurricularFace.pth", None, RGB),
    "facexzoo": (
        lambda: settled(IR(inner=False, affine=True)),
        lambda s: {"state_dict": prefixed("backbone.", s) | {"head.weight": torch.ones(24, 9)}, "batch_id": 7},
        "Epoch_17.pt",
        None,
        FACEX,
    ),
    "facexzoo mobile": (
        lambda: settled(Mobile()),
        lambda s: {"state_dict": prefixed("backbone.", s) | {"head.weight": torch.ones(24, 9)}},
        "Epoch_17.pt",
        None,
        FACEX,
    ),
    "treb1en mobile": (lambda: settled(Mobile()), lambda s: s, "mobilefacenet.pth", "treb1en", BGR),
    "tface mobile": (lambda: settled(Mobile(tface=True)), lambda s: s, "mobile.pth.tar", None, RGB),
}


@pytest.mark.parametrize("case", CASES)
def test_weights_of_others_open_as_the_nets_that_they_are(case, tmp_path):
    torch.manual_seed(0)
    make, wrap, name, option, pixels = CASES[case]
    net, images = make(), noise()
    path = saved(wrap(net.state_dict()), tmp_path / name)
    opened = open_net(path, option, CPU)
    found = opened.embed(images, flip=False)
    wanted = embedded(net, images, *pixels)
    assert (found * wanted).sum(1).min() > 0.99999
    other = embedded(net, images, not pixels[0], *pixels[1:])
    assert (found * other).sum(1).min() < 0.9999  # the test would see a wrong order
    assert (opened.config.input_size, opened.config.embedding) == (SIDE, EMBEDDING)
    assert opened.taken_for.endswith(f"{'BGR' if pixels[0] else 'RGB'}, {_scaled(*pixels[1:])}")


def _scaled(mean, std):
    return f"(pixel - {mean:g}) / {std:g}" if mean else f"pixel / {std:g}"


def test_the_form_of_a_net_is_read_off_its_tensors(tmp_path):
    path = saved(IR(inner=False, se=True, affine=True, blocks=(2, 2, 2, 2)).state_dict(), tmp_path / "net.pth")
    form = {"se": True, "inner_norm": False, "shortcut": "pool"}
    sizes = {"depth": 18, "width": WIDTHS[0], "input_size": SIDE, "embedding": EMBEDDING}
    assert open_net(path, "evolve", CPU).config == IResNetNet(**sizes, **form)
    mobile = open_net(saved(Mobile().state_dict(), tmp_path / "mobile.pth"), "facexzoo", CPU).config
    assert (mobile.widths, mobile.norm_eps) == ((16, 24, 16, 32, 24, 40, 32, 24, 48), 1e-5)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (
            lambda: settled(Insight()),
            ["--net insightface (insightface: RGB, (pixel - 127.5) / 127.5)", "--net magface"],
        ),
        (IR, ["--net adaface (AdaFace: BGR,", "--net cvlface (CVLface: RGB,", "--net tface"]),
        (lambda: IR(inner=False, affine=True), ["--net evolve", "--net treb1en", "--net facexzoo (FaceX-Zoo: BGR,"]),
        (Mobile, ["--net evolve", "--net treb1en", "--net facexzoo"]),
    ],
)
def test_a_family_that_cannot_be_told_is_asked_for(make, options, tmp_path):
    path = saved(make().state_dict(), tmp_path / "net.pth")
    with pytest.raises(UserError) as error:
        open_net(path)
    assert str(error.value).startswith(f"{path} does not say what pixels its net takes")
    assert all(option in str(error.value) for option in options)
    assert "\n" not in str(error.value)


def test_an_option_that_contradicts_the_weights_is_refused(tmp_path):
    path = saved(settled(Insight(), gain=False).state_dict(), tmp_path / "net.pth")
    with pytest.raises(UserError, match=r"net\.pth does not hold a net of AdaFace: give --net insightface"):
        open_net(path, "adaface")
    with pytest.raises(UserError, match=r"net\.pth holds an iresnet10, not an iresnet50"):
        open_net(path, "iresnet50")
    with pytest.raises(UserError, match="no net has this name; did you mean insightface"):
        open_net(path, "arcface_r50")
    own = IResNetNet(depth=10, width=8, input_size=32, embedding=8)
    save_file(build_net(own).state_dict(), tmp_path / "own.safetensors", {"net": own.model_dump_json()})
    with pytest.raises(UserError, match="says itself what pixels its net takes: leave --net out"):
        open_net(tmp_path / "own.safetensors", "magface")


STRANGE = {
    "an InceptionResnetV1": ["conv2d_1a.conv.weight", "mixed_6a.branch0.conv.weight", "last_linear.weight"],
    "a vision transformer": ["pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"],
    "a Swin transformer": ["patch_embed.proj.weight", "layers.0.blocks.0.attn.relative_position_bias_table"],
    "a GhostNet": ["conv_stem.weight", "blocks.0.0.ghost1.primary_conv.0.weight"],
    "an EfficientNet": ["_conv_stem.weight", "_blocks.0._depthwise_conv.weight"],
    "a ResNet without PReLU": ["conv1.weight", "layer1.0.bn1.weight", "fc.weight"],
    r"insightface's mobilefacenet \(mbf\)": ["layers.0.layers.0.weight", "conv_sep.layers.0.weight"],
    "a class matrix": ["weight"],
    "a face detector": ["body.stage1.0.0.weight", "BboxHead.0.conv1x1.weight"],
    "the state of an optimiser": ["state.0.exp_avg"],
    "a net that bigface does not know, with tensors such as surprise": ["surprise"],
}


@pytest.mark.parametrize("what", STRANGE)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_other_nets_are_refused_by_their_name(what, prefix, tmp_path):
    names = STRANGE[what] if not what.startswith("a class") else ["weight"]
    content = {prefix * (len(names) > 1) + name: torch.zeros(2, 2) for name in names}
    with pytest.raises(UserError, match=rf"net\.pth holds {what}.*: give weights of an IR-ResNet or a MobileFaceNet$"):
        open_net(saved(content, tmp_path / "net.pth"))


def test_nets_with_other_parts_are_refused(tmp_path):
    """A variant would open and compute something else."""
    good = settled(Insight(), gain=False).state_dict()
    deep = IR(blocks=(1, 1, 1, 1)).state_dict()
    wrong = {
        "like those of insightface, but with other parts, such as quality": good | {"quality.weight": torch.ones(1)},
        "but not its tensor bn2.running_var": {k: v for k, v in good.items() if k != "bn2.running_var"},
        r"fc.bias of shape \[3\], not \[24\]": good | {"fc.bias": torch.ones(3)},
        "several nets, student., teacher.": prefixed("student.", good) | prefixed("teacher.", good),
        "the input is not square": good | {"fc.weight": torch.zeros(24, 128 * 6)},
        "IR net of bottleneck blocks": deep | {"body.0.res_layer.1.weight": torch.zeros(16, 16, 1, 1)},
        "IR net whose blocks form 1 stages, not four": {k: v for k, v in deep.items() if "shortcut" not in k},
        "IR-ResNet of 1 \\+ 2 \\+ 1 \\+ 1 blocks": Insight((1, 2, 1, 1)).state_dict()
        | {"features.weight": torch.ones(24)},
    }
    for message, content in wrong.items():
        with pytest.raises(UserError, match=rf"net\.pth.*holds.*{message}"):
            open_net(saved(content, tmp_path / "net.pth"))


def test_of_averages_and_raw_weights_the_raw_ones_open(tmp_path):
    good = settled(Insight(), gain=False).state_dict()
    content = {"state_dict": good, "state_dict_ema": {name: tensor + 1 for name, tensor in good.items()}}
    opened = open_net(saved(content, tmp_path / "net.pth"), device=CPU)
    assert torch.equal(opened.net.fc.bias, good["fc.bias"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_numbers_that_are_not_finite_are_refused(value, suffix, tmp_path):
    state = settled(Insight(), gain=False).state_dict()
    state["layer2.0.conv1.weight"][3, 2, 1, 0] = value
    with pytest.raises(
        UserError, match=r"holds numbers that are not finite, in layer2\.0\.conv1\.weight: give another"
    ):
        open_net(saved(state, tmp_path / f"net{suffix}"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensor: tensor.to("meta"), r"its tensor layer2\.0\.conv1\.weight has no values"),
        (lambda tensor: tensor.to_sparse(), r"its tensor layer2\.0\.conv1\.weight is sparse, quantised or complex"),
        (lambda tensor: tensor.to(torch.complex64), r"layer2\.0\.conv1\.weight is sparse, quantised or complex"),
        (lambda tensor: tensor.to(torch.int8), r"holds whole numbers in layer2\.0\.conv1\.weight: give the float net"),
    ],
)
def test_tensors_of_other_kinds_are_refused(change, message, tmp_path):
    state = settled(Insight(), gain=False).state_dict()
    state["layer2.0.conv1.weight"] = change(state["layer2.0.conv1.weight"])
    with pytest.raises(UserError, match=message):
        open_net(saved(state, tmp_path / "net.pth"))


def test_a_net_in_a_list_opens(tmp_path):
    state = settled(Insight(), gain=False).state_dict()
    assert torch.equal(open_net(saved((7, [state]), tmp_path / "net.pth"), device=CPU).net.fc.bias, state["fc.bias"])


def test_half_precision_opens(tmp_path):
    net = settled(Insight(), gain=False)
    wanted = embedded(net, noise(), *RGB)
    path = saved(
        {name: t.half() if t.is_floating_point() else t for name, t in net.state_dict().items()}, tmp_path / "h.pth"
    )
    found = open_net(path, device=CPU).embed(noise(), flip=False)
    assert (found * wanted).sum(1).min() > 0.999


class Hostile:
    """Makes a file when it is unpickled."""

    def __init__(self, made):
        self.made = made

    def __reduce__(self):
        return os.system, (f"touch {self.made}",)


class Strange(nn.Module):
    """A whole module, as people save it."""


@pytest.mark.parametrize("suffix", [".pth", ".ckpt", ".pt", ".pth.tar"])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_hostile_pickle_is_refused_and_does_not_run(suffix, legacy, tmp_path):
    state = settled(Insight(), gain=False).state_dict()
    made, path = tmp_path / "made", tmp_path / f"net{suffix}"
    for content in ({"state_dict": state, "hook": Hostile(made)}, OrderedDict(state, callbacks=[Hostile(made)])):
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(UserError, match=r"refused: it holds a program object, .*system, not tensors alone"):
            open_net(path)
    path.write_bytes(pickle.dumps(Hostile(made)))
    with pytest.raises(UserError, match="refused"):
        open_net(path)
    assert not made.exists()


def test_programs_and_damaged_files_are_explained(tmp_path):
    path = tmp_path / "net.pth"
    torch.save(Strange(), path)
    with pytest.raises(
        UserError, match=r"refused: it holds a program object, .*Strange, not tensors alone: save the net's"
    ):
        open_net(path)
    torch.jit.script(nn.Linear(2, 2)).save(path)
    with pytest.raises(UserError, match=r"TorchScript program: save the net's state_dict\(\) instead"):
        open_net(path)
    good = saved(settled(Insight(), gain=False).state_dict(), path).read_bytes()
    for damaged in (good[:100], good[: len(good) // 2], good[:-30], b"\x80\x02}", b"PK\x03\x04"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"not readable as PyTorch weights: .*cut off or damaged: copy the file"):
            open_net(path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(UserError, match="a Git LFS pointer, not the file itself: run git lfs pull"):
        open_net(path)
    others = {
        b"<!DOCTYPE html>": "a web page, not the file itself",
        b"\x89HDF\r\n": "Keras",
        b"\x12\x01\x00\x00\0": "MXNet",
        b"\x1c\0\0\0TFL3": "TensorFlow Lite: convert it to ONNX",
        gzip.compress(good): "compressed by gzip: decompress it first",
        b"": "the file is empty: copy it again",
        b"\x08\x01\x12\xb0" * 20: "no file of weights: give safetensors, ONNX or what torch.save writes",  # a .pb
    }
    for begins, what in others.items():
        path.write_bytes(begins)
        with pytest.raises(UserError, match=what):
            open_net(path)


def test_a_zip_around_weights_is_to_be_unpacked(tmp_path):
    path = saved(settled(Insight(), gain=False).state_dict(), tmp_path / "inner.pth")
    with zipfile.ZipFile(tmp_path / "net.pth", "w") as archive:
        archive.write(path, "inner.pth")
    with pytest.raises(UserError, match=r"a zip that torch\.save did not write, which holds inner\.pth: unpack it"):
        open_net(tmp_path / "net.pth")


@pytest.mark.parametrize("suffix", [".safetensors", ".onnx"])
def test_files_that_are_empty_cut_off_or_were_not_fetched(tmp_path, suffix):
    path = tmp_path / f"net{suffix}"
    for data, what in (
        (b"", "the file is empty: copy it again"),
        (b"<!DOCTYPE html>", "a web page, not the file itself"),
        ((2000).to_bytes(8, "little") + b'{"a":', "cut off"),
    ):
        path.write_bytes(data)
        with pytest.raises(UserError, match=what):
            open_net(path)


def test_what_trainers_keep_beside_weights_is_passed_over(tmp_path):
    """Figures of NumPy, settings and paths; their classes are not imported."""
    state = settled(Insight(), gain=False).state_dict()
    beside = {"best": np.float64(0.9), "args": argparse.Namespace(lr=1), "out": Path("runs"), "curve": np.zeros(3)}
    opened = open_net(saved({"model": state, **beside}, tmp_path / "net.pth"), device=CPU)
    assert torch.equal(opened.net.fc.bias, state["fc.bias"])


def test_a_bgr_net_and_its_file_of_bigface_take_the_same_images(tmp_path):
    """The order is turned round once; what bigface writes of the net takes RGB and says so."""
    net = settled(IR())
    opened = open_net(saved({"state_dict": prefixed("model.", net.state_dict())}, tmp_path / "a.ckpt"), device=CPU)
    path = tmp_path / "own.safetensors"
    write_tensors(path, opened.net.state_dict(), {"net": opened.config.model_dump_json()})
    again = open_net(path, device=CPU)
    assert again.config == opened.config
    assert again.taken_for is None
    assert np.array_equal(again.embed(noise()), opened.embed(noise()))


def test_a_net_of_another_form_says_which_fields_would_fit(tmp_path):
    path = saved({"state_dict": prefixed("model.", IR(se=True).state_dict())}, tmp_path / "a.ckpt")
    net = build_net(IResNetNet(depth=10, width=16, input_size=SIDE, embedding=EMBEDDING + 1))
    with pytest.raises(UserError, match=r"do not fit the net: give net.embedding=24 net.se=true net.shortcut='pool'$"):
        load_weights(net, path)


def test_mobilefacenets_keep_their_own_pixels():
    assert (MobileFaceNetNet().input_mean, MobileFaceNetNet().input_std) == (127.5, 128)
    assert build_net(MobileFaceNetNet(input_size=32, input_std=100)).input_std == 100
