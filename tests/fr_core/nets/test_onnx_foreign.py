"""ONNX files of other programs: what they take is found out or asked for, and their graphs become nets again."""

from itertools import product

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from fr_core.config.nets import IResNetNet
from fr_core.errors import UserError
from fr_core.nets.build import build_net
from fr_core.nets.fold_bn import folded
from fr_core.nets.onnx_net import write_onnx
from fr_core.nets.open import open_net
from tests.helpers.foreign import EMBEDDING, IR, SIDE, Insight, Mobile, embedded, noise, settled

CPU = torch.device("cpu")


def colours(folder, name="input.1", batch="N", shape=(3, SIDE, SIDE), before=(), after=(), outputs=("out",), domain=""):
    """Write a model whose embedding is a mix of the mean colours, between other operators."""
    first = before[-1].output[0] if before else name
    nodes = [
        *before,
        helper.make_node("ReduceMean", [first], ["mean"], axes=[2, 3] if shape[0] == 3 else [1, 2], keepdims=0),
        helper.make_node("MatMul", ["mean", "mix"], ["out"], domain=domain),
        *after,
    ]
    mix = numpy_helper.from_array(np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32), "mix")
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, *shape])]
    outs = [helper.make_tensor_value_info(out, TensorProto.FLOAT, None) for out in outputs]
    numbers = [numpy_helper.from_array(np.float32(value), key) for key, value in CONSTANTS.items()]
    graph = helper.make_graph(nodes, "colours", ends, outs, [mix, *numbers])
    opsets = [helper.make_opsetid("", 13), *([helper.make_opsetid(domain, 1)] if domain else [])]
    path = folder / "net.onnx"
    path.write_bytes(helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString())
    return path


CONSTANTS = {"mean_": 127.5, "scale": 0.0078125, "std": 128}
MIX = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)


def mixed(images, bgr, mean, std):
    """Return the embeddings that the model of ``colours`` has."""
    x = (images[..., ::-1] if bgr else images).astype(np.float64)
    out = ((x - mean) / std).mean((1, 2)) @ MIX
    return out / np.linalg.norm(out, axis=1, keepdims=True)


def exported(net, path, dynamo=False, **options):
    images = torch.zeros(1, 3, SIDE, SIDE)
    form = {"dynamo": True, "external_data": False, "verbose": False} if dynamo else {"dynamo": False}
    torch.onnx.export(net, (images,), path, **form, **({} if dynamo else {"opset_version": 11}), **options)
    return path


@pytest.mark.parametrize("batch", ["N", 1, 4])
@pytest.mark.parametrize("name", ["input.1", "data"])
def test_insightfaces_files_are_known_by_their_input(batch, name, tmp_path):
    """A fixed batch is honoured, whatever the number of images."""
    opened = open_net(colours(tmp_path, name, batch))
    assert opened.taken_for == "insightface: RGB, (pixel - 127.5) / 127.5"
    assert opened.net.ends.batch == (None if batch == "N" else batch)
    images = noise(7)
    assert np.allclose(opened.embed(images, flip=False, batch=5), mixed(images, False, 127.5, 127.5), atol=1e-5)
    assert opened.embed(images[:0]).shape == (0, 8)


def test_a_family_that_the_file_does_not_tell_is_asked_for(tmp_path):
    path = colours(tmp_path, "images")
    with pytest.raises(
        UserError, match=r"net\.onnx: does not say what pixels it takes: give --net insightface \(ins"
    ) as e:
        open_net(path)
    for option in ("--net magface (MagFace: BGR, pixel / 255)", "--net adaface", "--net facexzoo", "--net y1"):
        assert option in str(e.value)
    for name, pixels in {"adaface": (True, 127.5, 127.5), "magface": (True, 0, 255), "y1": (False, 127.5, 128)}.items():
        assert np.allclose(open_net(path, name).embed(noise(), flip=False), mixed(noise(), *pixels), atol=1e-5)


@pytest.mark.parametrize("scaled", ["Mul", "Div"])
def test_a_graph_that_normalises_takes_plain_pixels(scaled, tmp_path):
    """As insightface's files from MXNet do."""
    constant = "scale" if scaled == "Mul" else "std"
    before = [
        helper.make_node("Sub", ["images", "mean_"], ["centred"]),
        helper.make_node(scaled, ["centred", constant], ["x"]),
    ]
    opened = open_net(colours(tmp_path, "images", before=before))
    assert (opened.net.input_mean, opened.net.input_std) == (0, 1)
    assert np.allclose(opened.embed(noise(), flip=False), mixed(noise(), False, 127.5, 128), atol=1e-5)


def test_the_first_output_that_is_an_embedding_counts(tmp_path):
    """AdaFace's files give the length beside it."""
    norm = [helper.make_node("ReduceL2", ["out"], ["norm"], axes=[1], keepdims=1)]
    opened = open_net(colours(tmp_path, after=norm, outputs=("norm", "out")))
    assert (opened.net.embedding, opened.net.ends.output) == (8, "out")


def test_what_is_no_net_of_faces_is_explained(tmp_path):
    for options, message in [
        ({"shape": (SIDE, SIDE, 3)}, r"takes input\.1 tensor\(float\) .*, not images \[B, 3, H, W\]"),
        ({"shape": (3, 32, 48)}, "takes images of 32 × 48 pixels, not square ones"),
        ({"domain": "hostile.ops"}, "refused: it needs operators of hostile.ops, which are code of another program"),
        (
            {"after": [helper.make_node("ReduceSum", ["out"], ["all"], keepdims=0)], "outputs": ("all",)},
            "does not map an image to an embedding: its outputs are of shapes",
        ),
    ]:
        with pytest.raises(UserError, match=rf"net\.onnx: {message}"):
            open_net(colours(tmp_path, **options))
    with pytest.raises(UserError, match="no net has this name"):
        open_net(colours(tmp_path), "surprise")


def test_weights_that_are_not_finite_are_refused(tmp_path):
    path = colours(tmp_path)
    model = onnx.load(path)
    mix = next(tensor for tensor in model.graph.initializer if tensor.name == "mix")
    broken = MIX.copy()
    broken[0, 0] = np.nan
    mix.CopyFrom(numpy_helper.from_array(broken, "mix"))
    path.write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match=r"holds numbers that are not finite, in mix: give another file"):
        open_net(path)


NETS = {
    "insightface": (lambda: settled(Insight((2, 2, 2, 2)), gain=False), (False, 127.5, 127.5)),
    "magface": (lambda: settled(Insight(eps=2e-5)), (True, 0, 255)),
    "adaface": (lambda: settled(IR(blocks=(2, 2, 2, 2))), (True, 127.5, 127.5)),
    "treb1en": (lambda: settled(IR(inner=False, se=True, affine=True, blocks=(2, 2, 2, 2))), (True, 127.5, 127.5)),
    "facexzoo": (lambda: settled(Mobile()), (True, 127.5, 128)),
}


SLOW = {(family, True) for family in NETS if family != "insightface"}  # the new exporter takes ten seconds a net
EXPORTS = [pytest.param(*case, marks=pytest.mark.soak if case in SLOW else ()) for case in product(NETS, (False, True))]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("family", "dynamo"), EXPORTS)  # TorchScript's exporter, or dynamo's
def test_a_graph_becomes_the_net_that_it_was(family, dynamo, tmp_path):
    """Exporters fold most norms; the net has them all again, and the same embeddings."""
    torch.manual_seed(0)
    net, pixels = NETS[family][0](), NETS[family][1]
    path = exported(net, tmp_path / "net.onnx", dynamo)
    wanted = embedded(net, noise(), *pixels)
    assert (open_net(path, family).embed(noise(), flip=False) * wanted).sum(1).min() > 0.99999
    back = open_net(path, family, CPU, changeable=True)
    assert (back.embed(noise(), flip=False) * wanted).sum(1).min() > 0.99999
    torch.save(net.state_dict(), tmp_path / "net.pth")
    assert back.config == open_net(tmp_path / "net.pth", family, CPU).config


@pytest.mark.filterwarnings("ignore")
def test_a_graph_with_plain_pixels_and_a_norm_in_every_place_becomes_a_net(tmp_path):
    """As insightface's files from MXNet are: nothing is folded, the pixels are normalised inside."""
    torch.manual_seed(0)
    net = settled(Insight(), gain=False)

    class Whole(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, pixels):
            return self.net((pixels - 127.5) * 0.0078125)

    kept = {"training": torch.onnx.TrainingMode.PRESERVE, "do_constant_folding": False, "input_names": ["pixels"]}
    path = exported(Whole().eval(), tmp_path / "net.onnx", **kept)
    assert sum(node.op_type == "BatchNormalization" for node in onnx.load(path).graph.node) > 6
    back = open_net(path, device=CPU, changeable=True)
    assert (back.config.input_mean, back.config.input_std) == (127.5, 128)
    wanted = embedded(net, noise(), False, 127.5, 128)
    assert (back.embed(noise(), flip=False) * wanted).sum(1).min() > 0.99999
    assert torch.allclose(back.net.layer2[0].bn2.running_var, net.layer2[0].bn2.running_var)


@pytest.mark.filterwarnings("ignore")
def test_a_graph_that_is_no_net_here_stays_as_it_is(tmp_path):
    with pytest.raises(UserError, match=r"its graph is no IR-ResNet or MobileFaceNet: use it as it is, or give other"):
        open_net(colours(tmp_path), changeable=True)
    other = torch.nn.Sequential(torch.nn.ReLU(), settled(Insight(), gain=False))
    path = exported(other, tmp_path / "other.onnx")
    with pytest.raises(UserError, match=r"other\.onnx: its graph is no IR-ResNet or MobileFaceNet"):
        open_net(path, "insightface", changeable=True)


@pytest.mark.filterwarnings("ignore")
def test_a_graph_that_computes_something_else_is_not_taken_for_a_net(tmp_path):
    """Its tensors fit, but it pads with a border of its own making: embeddings are compared."""
    net = settled(Insight(), gain=False)
    model = onnx.load(exported(net, tmp_path / "net.onnx"))
    conv = next(node for node in model.graph.node if node.op_type == "Conv" and node.attribute[0].name == "dilations")
    next(entry for entry in conv.attribute if entry.name == "pads").ints[:] = [0, 0, 2, 2]
    (tmp_path / "net.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match="a net with its weights computes something else"):
        open_net(tmp_path / "net.onnx", changeable=True)


def test_bigfaces_own_file_is_not_changed(tmp_path):
    net = build_net(IResNetNet(depth=10, width=8, input_size=32, embedding=EMBEDDING)).eval()
    write_onnx(folded(net), tmp_path / "net.onnx")
    with pytest.raises(
        UserError, match="bigface export wrote it: give the run or the weights that it was exported from"
    ):
        open_net(tmp_path / "net.onnx", changeable=True)
