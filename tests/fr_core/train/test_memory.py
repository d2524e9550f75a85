import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fr_core.config.nets import IResNetNet, MobileFaceNetNet, MoENet, ViTNet
from fr_core.config.recipes import load_config
from fr_core.data.schema import open_dataset
from fr_core.data.stream import make_plan
from fr_core.nets.build import build_net
from fr_core.nets.finetune import freeze, set_mode
from fr_core.nets.iresnet import recompute
from fr_core.ranks import Ranks
from fr_core.train.initial import initial_state
from fr_core.train.memory import backbone_bytes, memory, saved_bytes


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("net", "segment"),
    [
        (IResNetNet(depth=18, width=16, input_size=64), None),
        (IResNetNet(depth=18, width=16, input_size=64, se=True, inner_norm=False, shortcut="pool"), None),
        (IResNetNet(depth=18, width=16, input_size=64, se=True, shortcut="pool"), 1),
        (MobileFaceNetNet(input_size=64), None),
        (MoENet(depth=18, width=16, input_size=64, experts=2), 2),
        (ViTNet(depth=4, width=32, drop_path=0.2, mask=0.2, input_size=64), None),
        (ViTNet(depth=5, width=32, drop_path=0.2, mask=0.2, input_size=64), 2),
    ],
    ids=["iresnet", "ir_se", "ir_se recomputed", "mobilefacenet", "moe recomputed", "vit", "vit recomputed"],
)
def test_counts_on_fake_tensors_are_those_of_real_ones(net, segment, precision):
    _, fake, _ = backbone_bytes(net, 6, precision, segment)
    module = build_net(net).train()
    if segment:
        recompute(module, segment)
    real = saved_bytes(module, torch.randn(6, 3, 64, 64), precision)
    assert fake == pytest.approx(real, rel=0.02)


def test_frozen_layers_save_no_activations_and_have_no_gradient():
    net, frozen = IResNetNet(depth=18, width=16, input_size=64), ("conv1*", "bn1*", "prelu*", "layer1.*", "layer2.*")
    _, fake, _ = backbone_bytes(net, 6, "float32", None, frozen)
    module = build_net(net)
    set_mode(module, True, freeze(module, frozen))
    assert fake == pytest.approx(saved_bytes(module, torch.randn(6, 3, 64, 64), "float32"), rel=0.02)
    assert fake < 0.5 * backbone_bytes(net, 6, "float32")[1]
    plain = memory(load_config("bigface_r50"), 1000, 1)
    some = memory(load_config("bigface_r50", ["init.backbone=x", "finetune.freeze=['layer3.*']"]), 1000, 1)
    left = 4 * sum(
        p.numel() for n, p in build_net(load_config("bigface_r50").net).named_parameters() if n.startswith("layer3.")
    )
    assert plain["backbone"] - some["backbone"] == left  # their gradient
    assert plain["backbone_optimizer"] - some["backbone_optimizer"] == left


def test_saved_bytes_by_hand():
    """Autograd saves the linear layer's input and the sigmoid's output; weights are not counted."""
    module = torch.nn.Sequential(torch.nn.Linear(10, 20), torch.nn.Sigmoid())
    assert saved_bytes(module, torch.randn(3, 10), "float32") == 3 * 10 * 4 + 3 * 20 * 4


def test_parts_by_hand():
    config = load_config("bigface_r50", ["train.precision=float32"])
    plain = memory(config, 1000, 3)
    assert plain["class_matrix"] == plain["class_momentum"] == plain["class_gradient"] == 334 * 512 * 4
    fused = memory(load_config("bigface_r50", ["method.update=fused"]), 1000, 3)
    assert fused["class_gradient"] == 0
    partial = memory(load_config("bigface_r50", ["method.sample_rate=0.1"]), 1000, 3)
    assert partial["class_gradient"] == 33 * 512 * 4
    three = memory(load_config("bigface_r50", ["method.subcentres=3", "method.sample_rate=0.1"]), 1000, 3)
    assert (three["class_matrix"], three["class_gradient"]) == (3 * 334 * 512 * 4, 3 * 33 * 512 * 4)
    rows, faces = 3 * 33, 384  # a tile has them all; 6 sweeps over its logits in bytes, of classes those and a place
    assert three["tile"] == 2 * (rows + faces) * 512 + faces * rows * 10 + faces * 33 * 16 + 4 * rows * 512
    kept = sum(
        plain[n]
        for n in ("backbone", "backbone_optimizer", "class_matrix", "class_momentum", "class_gradient", "context")
    )
    assert plain["total"] == kept + max(plain["activations"] + plain["tile"], plain["update"])


def test_parts_with_recomputation_by_hand():
    """R50's 24 blocks form segments of √(24 / 6) = 2. Further experts of a mixture cost weights."""
    config = load_config("bigface_r50", ["train.recompute=true", "method.update=fused"])
    plain, parts = memory(load_config("bigface_r50"), 1000, 1), memory(config, 1000, 1)
    given = memory(load_config("bigface_r50", ["train.recompute=true", "train.recompute_blocks=2"]), 1000, 1)
    assert parts["activations"] == given["activations"] < 0.25 * plain["activations"]
    assert parts["recomputed"] == given["recomputed"]
    kept = sum(size for name, size in parts.items() if name not in ("tile", "update", "recomputed", "total"))
    assert parts["total"] == kept + max(parts["recomputed"], parts["tile"])
    mixture = memory(load_config("bigface_r50", ["net.kind=moe", "net.experts=2"]), 1000, 1)
    last = sum(p.numel() for p in build_net(IResNetNet(depth=50, width=64)).layer4.parameters())
    assert 4 * last < mixture["backbone_optimizer"] - plain["backbone_optimizer"] < 4.1 * last


def test_parts_of_fixed_centres_by_hand():
    """A share r = 0.3 of 10,000 people is 3,000 centres: 7 whole batches of 384. There is no class matrix."""
    parts = memory(load_config("attfc_r50"), 10_000, 1)
    assert parts["centres"] == 7 * 384 * 512 * 2
    assert parts["encoder"] == parts["backbone_optimizer"]
    assert not {"class_matrix", "class_momentum"} & parts.keys()
    assert parts["class_images"] == 3 * 112**2 * 2 * 384 * (1 + 4)  # uint8, and float32 for the encoder
    kept = sum(parts[n] for n in ("backbone", "backbone_optimizer", "encoder", "centres", "class_images", "context"))
    working = parts["activations"] + max(parts["tile"], parts["encoder_features"])
    assert parts["total"] == kept + max(working, parts["update"])
    assert memory(load_config("attfc_r50"), 10**7, 1)["activations"] == parts["activations"]
    for recipe, copies, size in (("debug_dcq", 1, 96), ("debug_f2c", 2, 80), ("debug_virtual_fc", 1, 80)):
        assert memory(load_config(recipe), 1000, 1)["centres"] == copies * size * 32 * 4


@pytest.mark.parametrize("method", ["attfc", "f2c", "virtual_fc"])
def test_centres_are_what_a_run_holds(grouped, method):
    config = load_config(f"debug_{method}", [f"data.path={grouped}"])
    state = initial_state(config, make_plan(config, open_dataset(grouped)), Ranks(), torch.device("cpu"))
    held = sum(t.nbytes for t in state.head.buffers() if t.is_floating_point())
    parts = memory(config, 60, 1)
    assert parts["centres"] == held
    if state.encoder is not None:
        assert parts["encoder"] == sum(t.nbytes for t in (*state.encoder.parameters(), *state.encoder.buffers()))


def test_state_is_what_a_run_holds(dataset):
    config = load_config("debug_bigface", [f"data.path={dataset}"])
    state = initial_state(config, make_plan(config, open_dataset(dataset)), Ranks(), torch.device("cpu"))
    parts = memory(config, 40, 1)
    assert parts["class_matrix"] == state.head.weight.nbytes
    assert parts["backbone"] + parts["backbone_optimizer"] == 3 * sum(
        t.nbytes for t in (*state.backbone.parameters(), *state.backbone.buffers())
    )


class Watch(TorchDispatchMode):
    """Measures the most bytes that storages held at one time, without the net's own tensors."""

    def __init__(self, net):
        super().__init__()
        self.now = self.peak = 0
        self.known = weakref.WeakSet(t.untyped_storage() for t in (*net.parameters(), *net.buffers()))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self.known:
                storage = tensor.untyped_storage()
                self.known.add(storage)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.forget, storage.nbytes())
        return out

    def forget(self, count):
        self.now -= count


def test_recomputation_against_a_step_that_is_watched():
    """The planned bytes are alive at the peak of a step, besides gradients and the maps at work."""
    net, peaks = IResNetNet(depth=34, width=8, input_size=64), []
    for segment in (None, 3):
        module = build_net(net).train()
        if segment:
            recompute(module, segment)
        images = torch.randn(16, 3, 64, 64)
        with Watch(module) as watch:
            module(images).sum().backward()
        _, saved, recomputed = backbone_bytes(net, 16, "float32", segment)
        gradients = sum(p.grad.nbytes for p in module.parameters() if p.grad is not None)
        assert saved + recomputed < watch.peak < 1.15 * (saved + recomputed + gradients)
        peaks.append(watch.peak - gradients)
    assert peaks[1] < 0.7 * peaks[0]
