import csv
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import fr_core
from fr_core.config.nets import IResNetNet, MobileFaceNetNet, MoENet
from fr_core.data.photos import read_rgb
from fr_core.errors import UserError
from fr_core.nets.build import build_net
from fr_core.nets.checkpoint_files import BACKBONE, FORMAT, step_name, write_signed, write_tensors
from fr_core.nets.iresnet import IResNet
from fr_core.nets.mobilefacenet import MobileFaceNet, from_mxnet
from fr_core.nets.names import parse_name
from fr_core.nets.open import open_net
from fr_core.verify.pair_lists import read_pairs
from fr_core.verify.pairs import cosines, score_pairs
from tests.helpers.machine import REAL_DATA, needs_real_data

PARAMETERS = {  # millions at 112×112 and 512 dimensions, as the BigFace report lists them
    18: 24.026,
    34: 34.139,
    50: 43.591,
    100: 65.156,
    120: 76.97,
    140: 87.01,
    200: 118.83,
    240: 137.23,
    600: 306.49,
    1200: 654.43,
}


@pytest.mark.parametrize("depth", PARAMETERS)
def test_parameter_counts_of_the_block_tables(depth):
    with torch.device("meta"):
        count = sum(p.numel() for p in IResNet(depth).parameters())
    digits = 3 if depth <= 100 else 2
    assert round(count / 1e6, digits) == PARAMETERS[depth]


def test_state_dict_names_are_the_published_ones():
    names = set(IResNet(18, width=8, input_size=32, embedding=16).state_dict())
    assert {"conv1.weight", "bn1.running_mean", "prelu.weight", "fc.bias", "features.weight", "bn2.weight"} <= names
    block = {n.removeprefix("layer3.0.") for n in names if n.startswith("layer3.0.")}
    parameters = {n for n in block if not n.endswith("num_batches_tracked")}
    norms = {f"bn{i}.{f}" for i in (1, 2, 3) for f in ("weight", "bias", "running_mean", "running_var")}
    shortcut = {f"downsample.1.{f}" for f in ("weight", "bias", "running_mean", "running_var")}
    assert parameters == norms | shortcut | {"conv1.weight", "conv2.weight", "prelu.weight", "downsample.0.weight"}
    assert "layer3.1.downsample.0.weight" not in names


@pytest.mark.parametrize(
    "config",
    [
        IResNetNet(depth=10, width=8, input_size=48, embedding=24),
        IResNetNet(depth=10, width=8, stem_stride=2, input_size=112),
        IResNetNet(depth=10, width=16, input_size=48, embedding=24, se=True, inner_norm=False, shortcut="pool"),
        MobileFaceNetNet(input_size=64),
        IResNetNet(depth=10, widths=(8, 9, 20, 16), input_size=48, embedding=24),
        MobileFaceNetNet(input_size=64, widths=(8, 9, 10, 11, 12, 13, 14, 15, 16)),
    ],
)
def test_nets_map_images_to_embeddings(config):
    net = build_net(config)
    out = net(torch.randn(3, 3, config.input_size, config.input_size))
    assert out.shape == (3, config.embedding)
    assert not net.features.weight.requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert net(torch.randn(2, 3, config.input_size, config.input_size)).dtype == torch.float32


def test_initial_weights_follow_the_paper():
    net = IResNet(18, width=32)
    for name in ("layer1.0.conv1", "layer4.1.conv2", "layer2.0.downsample.0"):
        weight = net.get_submodule(name).weight
        assert abs(float(weight.detach().std()) - 0.1) < 0.005


def mxnet_names(net):
    """Return the published file's name of each tensor, without the tables of the tested mapping."""
    stages = {3: "23", 4: "34", 5: "45"}
    fields = {
        "conv.weight": "conv2d_weight",
        "prelu.weight": "relu_gamma",
        "bn.weight": "batchnorm_gamma",
        "bn.bias": "batchnorm_beta",
        "bn.running_mean": "batchnorm_moving_mean",
        "bn.running_var": "batchnorm_moving_var",
    }
    parts = {"expand": "conv_sep", "depthwise": "conv_dw", "project": "conv_proj"}
    names = {}
    for name in net.state_dict():
        if name.endswith("num_batches_tracked"):
            continue
        pieces = name.split(".")
        field = fields.get(".".join(pieces[-2:]))
        if pieces[0].startswith("stage"):
            stage, i = int(pieces[0][5:]), int(pieces[1])
            block = f"dconv_{stages[stage]}" if i == 0 else f"res_{stage}_block{i - 1}"
            names[name] = f"{block}_{parts[pieces[2]]}_{field}"
        elif pieces[0] in ("stem", "stem_depthwise", "expand", "pool"):
            layer = {"stem": "conv_1", "stem_depthwise": "conv_2_dw", "expand": "conv_6sep", "pool": "conv_6dw7_7"}
            names[name] = f"{layer[pieces[0]]}_{field}"
    last = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_var"}
    names |= {f"features.{ours}": f"fc1_{theirs}" for ours, theirs in last.items()}
    return names | {"fc.weight": "fc1_weight", "fc.bias": "pre_fc1_bias"}


def test_published_mobilefacenet_names_map_one_to_one():
    net = MobileFaceNet()
    names = mxnet_names(net)
    state = {theirs: net.state_dict()[ours] for ours, theirs in names.items()}
    mapped = from_mxnet(state)
    assert set(mapped) == set(names)
    assert all(torch.equal(mapped[name], net.state_dict()[name]) for name in mapped)
    with pytest.raises(KeyError):
        from_mxnet({"surprise": torch.zeros(1)})


@pytest.fixture
def weights(tmp_path):
    net = IResNet(10, width=8, input_size=32, embedding=16).eval()
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    return net, tmp_path / "net.safetensors"


def test_bare_weights_open_with_and_without_the_net_named(weights):
    net, path = weights
    images = np.random.default_rng(0).integers(0, 255, (5, 32, 32, 3), np.uint8)
    embeddings = fr_core.open_net(path, device=torch.device("cpu")).embed(images, flip=False, batch=2)
    x = (torch.from_numpy(images).permute(0, 3, 1, 2).float() - 127.5) / 127.5
    expected = torch.nn.functional.normalize(net(x)).detach().numpy()
    assert np.allclose(embeddings, expected, atol=1e-5)
    flipped = fr_core.open_net(path, "iresnet10").embed(images)
    assert np.allclose(flipped, fr_core.open_net(path, "iresnet10").embed(images[:, :, ::-1]), atol=1e-4)
    larger = np.kron(images, np.ones((1, 2, 2, 1), np.uint8))
    assert (fr_core.open_net(path, "iresnet10").embed(larger) * flipped).sum(1).min() > 0.8


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (IResNetNet(depth=10, widths=(8, 9, 20, 16), input_size=48, embedding=24), "iresnet10"),
        (MobileFaceNetNet(input_size=64, widths=(8, 9, 10, 11, 12, 13, 14, 15, 16)), "mobilefacenet"),
    ],
)
def test_widths_are_read_off_the_weights(config, name, tmp_path):
    net = build_net(config)
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    opened = open_net(tmp_path / "net.safetensors", name)
    assert opened.config.model_dump(exclude={"width"}) == config.model_dump(exclude={"width"})
    assert torch.equal(opened.net.fc.weight.cpu(), net.fc.weight)


def test_weights_that_tell_their_net_need_no_name(tmp_path):
    """Weights of a checkpoint do, since shapes do not tell a stem of stride 2."""
    config = IResNetNet(depth=10, width=8, stem_stride=2, input_size=64, embedding=16)
    save_file(build_net(config).state_dict(), tmp_path / "net.safetensors", {"net": config.model_dump_json()})
    net = open_net(tmp_path / "net.safetensors").net
    assert net.conv1.stride == (2, 2)
    assert net.input_size == 64


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("iresnet18", "holds an iresnet10, not an iresnet18: leave --net out"),
        ("mobilefacenet", "holds an iresnet10, not a mobilefacenet: leave --net out"),
        ("resnet50", "no net has this name; did you mean iresnet50"),
        ("iresnetX", "give insightface, .*, mobilefacenet, or iresnetDEPTH with 10, 18, 34"),
    ],
)
def test_wrong_net_names_are_explained(weights, name, message):
    with pytest.raises(UserError, match=message):
        open_net(weights[1], name)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("r50", "iresnet50"),
        ("ir50", "iresnet50"),
        ("IR_50", "iresnet50"),
        ("LResNet100E-IR", "iresnet100"),
        ("glint360k_r18", "iresnet18"),
        ("resnet101", "iresnet100"),
        ("mobilefacenet_y1", "mobilefacenet"),
        ("MobileFaceNet-112", "mobilefacenet"),
    ],
)
def test_the_fields_names_of_nets_get_the_one_that_is_meant(name, meant):
    assert parse_name(meant.upper()) == meant
    with pytest.raises(UserError, match=rf"^--net {name}: no net has this name; did you mean {meant}\?$"):
        parse_name(name)


def test_bare_weights_that_no_section_describes_are_called_by_their_name(tmp_path):
    """As far as the names of their tensors tell."""
    path = tmp_path / "net.safetensors"
    small = {"input_size": 32, "embedding": 8}
    plain = IResNet(10, width=8, **small)
    mixture = build_net(MoENet(depth=10, width=8, **small)).state_dict()
    longer = plain.state_dict() | {f"layer2.1.{name}": t for name, t in plain.layer2[0].state_dict().items()}
    strange = {"encoder.weight": torch.zeros(1)}
    for state, holds, mend in [
        (mixture, "a mixture of experts on iresnet10", "open its run or checkpoint instead"),
        (longer, r"an IR-ResNet of 1 \+ 2 \+ 1 \+ 1 blocks", "give weights of depth 10, 18, 34"),
        (strange, "a net that bigface does not know, with tensors such as encoder.weight", "give weights of an IR"),
    ]:
        save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, path)
        for name in (None, "iresnet50"):
            with pytest.raises(UserError, match=rf"net\.safetensors holds {holds}: {mend}"):
                open_net(path, name)


def test_a_name_must_agree_with_weights_that_tell_their_net(tmp_path):
    config = IResNetNet(depth=10, width=8, input_size=32, embedding=8)
    path = tmp_path / "net.safetensors"
    save_file(build_net(config).state_dict(), path, {"net": config.model_dump_json()})
    assert open_net(path, "iresnet10").config == open_net(path).config == config
    with pytest.raises(UserError, match=r"net\.safetensors holds an iresnet10, not a mobilefacenet: leave --net out"):
        open_net(path, "mobilefacenet")
    with pytest.raises(UserError, match="did you mean iresnet10"):
        open_net(path, "r10")


@pytest.mark.parametrize("kind", ["run", "checkpoint"])
def test_a_name_must_agree_with_a_run_and_a_checkpoint(tmp_path, kind):
    config = IResNetNet(depth=10, width=8, input_size=32, embedding=8)
    checkpoint = tmp_path / "checkpoints" / step_name(1)
    checkpoint.mkdir(parents=True)
    files = {BACKBONE: write_tensors(checkpoint / BACKBONE, build_net(config).state_dict(), {})}
    write_signed(checkpoint, {"format": FORMAT, "files": files, "config": {"net": config.model_dump()}})
    ref = tmp_path if kind == "run" else checkpoint
    assert open_net(ref, "iresnet10").config == config
    with pytest.raises(UserError, match=rf"{ref.name} holds an iresnet10, not an iresnet50: leave --net out"):
        open_net(ref, "iresnet50")


def test_what_is_no_net_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such run"):
        open_net(tmp_path / "absent")
    with pytest.raises(UserError, match="no checkpoint there"):
        open_net(tmp_path)
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(UserError, match="not readable as safetensors"):
        open_net(tmp_path / "cut.safetensors", "iresnet50")


def test_embed_refuses_other_shapes(weights):
    recogniser = open_net(weights[1], "iresnet10")
    for bad in (np.zeros((32, 32, 3), np.uint8), np.zeros((1, 3, 32, 32), np.uint8), np.zeros((1, 32, 32, 3))):
        with pytest.raises(ValueError, match="uint8"):
            recogniser.embed(bad)
    assert recogniser.embed(np.zeros((0, 32, 32, 3), np.uint8)).shape == (0, 16)


@needs_real_data
def test_the_published_teacher_ranks_faces():
    """The gallery has image 1 of each of ORL's 40 people; the other 360 images are probes."""
    with tarfile.open(REAL_DATA / "orl" / "orl_112.tar") as tar:
        faces = {member.name: read_rgb(tar.extractfile(member).read()) for member in tar if member.isfile()}
    people = np.array([int(Path(name).parent.name[1:]) for name in faces])
    first = np.array([Path(name).stem == "1" for name in faces])
    assert (first.sum(), (~first).sum()) == (40, 360)
    recogniser = open_net(REAL_DATA / "teacher" / "mobilefacenet_y1.safetensors", "mobilefacenet")
    embeddings = recogniser.embed(np.stack(list(faces.values())))
    nearest = (embeddings[~first] @ embeddings[first].T).argmax(1)
    assert (people[first][nearest] == people[~first]).sum() == 360


@needs_real_data
@pytest.mark.soak
def test_the_published_teacher_recognises_faces():
    """Two of ten folds of real pairs; all ten give 96.6 ± 0.4 %."""
    pairs = read_pairs(REAL_DATA / "faces" / "dev_pairs.csv")
    some = np.isin(pairs.fold, (0, 1))
    wanted = {pairs.paths[i] for i in np.concatenate([pairs.left[some], pairs.right[some]])}
    images = np.zeros((len(pairs.paths), 112, 112, 3), np.uint8)
    with tarfile.open(REAL_DATA / "faces" / "dev.tar") as tar:
        for member in tar:
            if member.name in wanted:
                images[pairs.paths.index(member.name)] = read_rgb(tar.extractfile(member).read())
    usable = np.array([path in wanted for path in pairs.paths])
    recogniser = open_net(REAL_DATA / "teacher" / "mobilefacenet_y1.safetensors", "mobilefacenet")
    embeddings = np.zeros((len(images), 128), np.float32)
    embeddings[usable] = recogniser.embed(images[usable])
    kept = pairs.keep(usable)
    with open(REAL_DATA / "faces" / "dev_pairs.csv") as file:
        assert len(kept.same) == sum(row["fold"] in "01" for row in csv.DictReader(file))
    assert score_pairs(cosines(embeddings, kept), kept).accuracy > 0.955
