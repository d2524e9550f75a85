"""ONNX files: written, opened, damaged, written by other programs, hostile."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from fr_core.config.nets import IResNetNet
from fr_core.errors import UserError
from fr_core.nets import onnx_net
from fr_core.nets.build import build_net
from fr_core.nets.fold_bn import folded
from fr_core.nets.onnx_net import INPUT, OUTPUT, open_onnx, write_onnx
from fr_core.nets.open import Recogniser, open_net
from fr_core.nets.verifications import Verified
from tests.helpers.datasets import put

CPU = torch.device("cpu")
METADATA = {
    "input_size": "32",
    "input_std": "128",
    "embedding": "16",
    "normalisation": "(pixel - 127.5) / input_std",  # as older files have it, without input_mean
    "channels": "RGB",
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Return a net and its ONNX file."""
    torch.manual_seed(0)
    net = build_net(IResNetNet(depth=10, width=8, input_size=32, embedding=16)).eval()
    path = tmp_path_factory.mktemp("onnx") / "net.onnx"
    write_onnx(folded(net), path, Verified(threshold=0.25))
    return net, path


@pytest.fixture(scope="module")
def split(written, tmp_path_factory):
    """Return the file of the same net with its weights in a second file, as large nets have them."""
    path = tmp_path_factory.mktemp("onnx") / "net.onnx"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_net, "WHOLE", 0)
        write_onnx(folded(written[0]), path)
    return path


def copied(source, folder):
    """Copy the weights file, if there is one, and load the model for changes."""
    data = source.with_name("net.onnx.data")
    if data.exists():
        (folder / data.name).write_bytes(data.read_bytes())
    return onnx.load(source, load_external_data=False)


def saved(model, folder):
    (folder / "net.onnx").write_bytes(model.SerializeToString())
    return folder / "net.onnx"


def other_model(folder, metadata=METADATA, name=INPUT, size=32, embedding=16):
    """Write a model whose embeddings are mean colours."""
    nodes = [
        helper.make_node("ReduceMean", [name, "axes"], ["mean"], keepdims=0),
        helper.make_node("MatMul", ["mean", "ones"], [OUTPUT]),
    ]
    ends = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", 3, size, size])],
        [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["B", embedding])],
    ]
    weights = [
        helper.make_tensor("axes", TensorProto.INT64, [2], [2, 3]),
        helper.make_tensor("ones", TensorProto.FLOAT, [3, embedding], [1.0] * 3 * embedding),
    ]
    opsets = [helper.make_opsetid("", 18)]
    model = helper.make_model(helper.make_graph(nodes, "other", *ends, weights), opset_imports=opsets, ir_version=10)
    helper.set_model_props(model, metadata)
    return saved(model, folder)


def test_the_file_is_a_recogniser_like_the_net(written):
    net, path = written
    opened = open_net(path)
    assert opened.verified == Verified(threshold=0.25)
    assert (opened.net.input_size, opened.net.embedding, opened.net.input_std) == (32, 16, 127.5)
    images = np.random.default_rng(0).integers(0, 255, (5, 40, 40, 3), np.uint8)
    wanted = Recogniser(net, CPU).embed(images, batch=2, normalise=False)
    found = opened.embed(images, batch=2, normalise=False)
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()
    assert [path.name for path in path.parent.iterdir()] == ["net.onnx"]


def test_a_name_must_agree_with_the_file(written, tmp_path):
    assert open_net(written[1], "iresnet10").net.name == "iresnet10"
    with pytest.raises(UserError, match=r"net\.onnx holds an iresnet10, not an iresnet50: leave --net out"):
        open_net(written[1], "iresnet50")
    older = other_model(tmp_path)  # its metadata have no name of a net
    assert open_net(older, "iresnet50").net.name is None
    with pytest.raises(UserError, match="did you mean iresnet50"):
        open_net(older, "resnet50")


def test_prelu_is_made_of_operators_that_run_fast(written):
    used = {node.op_type for node in onnx.load(written[1]).graph.node}
    assert "Relu" in used
    assert "PRelu" not in used


def test_the_file_tells_nothing_of_where_it_was_made(written):
    assert b".py" not in written[1].read_bytes()


def test_weights_beside_the_file(written, split):
    assert split.stat().st_size < split.with_name("net.onnx.data").stat().st_size
    x = torch.randn(3, 3, 32, 32)
    assert torch.allclose(open_onnx(split)(x), open_onnx(written[1])(x))
    assert open_onnx(split).checksum != open_onnx(written[1]).checksum


def test_weights_that_are_not_beside_the_file(split, tmp_path):
    path = saved(copied(split, tmp_path), tmp_path)
    data = path.with_name("net.onnx.data")
    data.replace(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="put that file beside it"):
        open_net(path)
    data.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="put that file beside it"):
        open_net(path)
    data.unlink()
    data.write_bytes((tmp_path / "elsewhere").read_bytes()[:100])
    with pytest.raises(UserError, match="not a model that ONNX Runtime opens"):
        open_net(path)


@pytest.mark.parametrize("location", ["../secret", "/etc/hostname", "*/_ORT_MEM_ADDR_/*", "net.onnx.data/../secret"])
def test_other_files_are_never_read(split, tmp_path, location):
    model = copied(split, tmp_path)
    tensor = next(t for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL)
    next(entry for entry in tensor.external_data if entry.key == "location").value = location
    with pytest.raises(UserError, match="refused: it reads other files"):
        open_net(saved(model, tmp_path))


def test_other_files_are_never_read_by_tensors_that_hide(written, tmp_path):
    model = copied(written[1], tmp_path)
    hidden = helper.make_tensor("hidden", TensorProto.FLOAT, [1], [0.0])
    hidden.data_location = TensorProto.EXTERNAL
    hidden.external_data.add(key="location", value="../secret")
    graph = helper.make_graph([helper.make_node("Constant", [], ["c"], value=hidden)], "branch", [], [])
    model.graph.node.append(helper.make_node("If", ["yes"], ["out"], then_branch=graph, else_branch=graph))
    with pytest.raises(UserError, match="refused: it reads other files"):
        open_net(saved(model, tmp_path))


def test_damaged_files_are_explained(written, tmp_path):
    data = written[1].read_bytes()
    path = tmp_path / "net.onnx"
    path.touch()
    with pytest.raises(UserError, match=r"net\.onnx: the file is empty: copy it again"):
        open_net(path)
    for damaged in (data[:10], data[:1000], data[: len(data) // 2], data[:-1], b"\x80\x04K\x01.", b"a" * 999):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"net\.onnx: (not readable as ONNX|not written by bigface export)"):
            open_net(path)


def test_models_of_others_are_explained(tmp_path):
    assert open_net(other_model(tmp_path)).embed(np.zeros((2, 32, 32, 3), np.uint8)).shape == (2, 16)
    for changed in ({"name": "data"}, {"size": 64}, {"size": "any"}, {"embedding": 17}):
        with pytest.raises(UserError, match="not written by bigface export: it maps"):
            open_net(other_model(tmp_path, **changed))
    wrong = [{"input_size": "-1"}, {"input_std": "nan"}, {"channels": "BGR"}, {"threshold": "7"}]
    for metadata in (METADATA | change for change in wrong):
        with pytest.raises(UserError, match="not written by bigface export: metadata"):
            open_net(other_model(tmp_path, metadata))
    model = onnx.load(other_model(tmp_path))
    model.graph.node[0].op_type = "Surprise"
    with pytest.raises(UserError, match="not a model that ONNX Runtime opens"):
        open_net(saved(model, tmp_path))


def test_a_file_at_a_url(written, split, bucket):
    x = torch.randn(2, 3, 32, 32)
    opened = open_net(str(put(written[1], bucket / "net.onnx")))
    assert torch.equal(opened.net(x), open_onnx(written[1])(x))
    with pytest.raises(UserError, match=r"^s3://.*net\.onnx: .*on a local disk"):
        open_net(str(put(split, bucket / "large" / "net.onnx")))


def test_without_the_packages_it_says_what_to_install(written, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_net, "PACKAGES", ("onnx", "no_such_package"))
    with pytest.raises(UserError, match=r"pip install 'bigface\[export\]'"):
        open_net(written[1])
    with pytest.raises(UserError, match=r"pip install 'bigface\[export\]'"):
        write_onnx(folded(written[0]), tmp_path / "net.onnx")
