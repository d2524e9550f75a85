"""QuantFace's step in the train loop, mostly with float nets as students."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import fr_core.train.loop as loop
from fr_core.config.methods import BigFace
from fr_core.config.recipes import load_config
from fr_core.data.schema import open_dataset
from fr_core.data.stream import batches, blocks_in_process, make_plan
from fr_core.errors import UserError
from fr_core.heads.sharded_fc import ShardedFC
from fr_core.losses.ekd import THRESHOLDS, Agreement
from fr_core.nets.checkpoint_files import checkpoints
from fr_core.nets.iresnet import IResNet
from fr_core.nets.open import open_net
from fr_core.ranks import Ranks
from fr_core.train.initial import initial_state, parameter_figures
from fr_core.train.memory import memory
from fr_core.train.metrics import read_metrics
from fr_core.train.update import buffers_to_restore
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import interrupted, losses, run

CROSS_ENTROPY = "method.cross_entropy={weight=0.1}"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """An untrained net, whose width and input size differ from the student's."""
    return saved(tmp_path_factory.mktemp("teacher") / "teacher.safetensors", 48, 20)


def saved(path, side, embedding):
    torch.manual_seed(0)
    save_file(IResNet(10, 8, 1, side, embedding).state_dict(), path)
    return f"method.teacher={path}", "method.teacher_net=iresnet10"


def config_of(dataset, *overrides):
    return load_config("debug_quantface", [f"data.path={dataset}", "tracking.uri=off", "data.lanes=8", *overrides])


def started(config, ranks=None):
    torch.set_num_threads(1)
    ranks = ranks or Ranks()
    plan = make_plan(config, open_dataset(config.data.path))
    state = initial_state(config, plan, ranks, torch.device("cpu"))
    return state, batches(config, plan, ranks, 0, state.total_steps, blocks_in_process)


def first_batch(config):
    state, stream = started(config)
    batch = next(stream)
    stream.close()
    return state, batch


def test_a_step_is_the_formula(dataset, teacher):
    """EKD and cross-entropy of all images move the backbone; cross-entropy also moves the class matrix."""
    plain = ["optim.momentum=0", "optim.weight_decay=0", "optim.clip=1e9", "optim.lr=1.0", "schedule.kind=constant"]
    config = config_of(dataset, *teacher, *plain, CROSS_ENTROPY)
    state, batch = first_batch(config)
    reference, _ = started(config)
    pixels = batch.images_BHWC.permute(0, 3, 1, 2).float()
    x = reference.backbone.train()((pixels - 127.5) / 127.5)
    with torch.no_grad():
        big = F.interpolate(pixels, (48, 48), mode="bilinear", antialias=True).round()
        target = open_net(config.method.teacher, "iresnet10").net((big - 127.5) / 127.5)
    agreement = Agreement(config.method.loss)
    apart, terms = agreement(x, target, batch.labels_B)
    head = ShardedFC(40, 32, BigFace(margin=config.method.cross_entropy.margin), Ranks(), config.seed)
    margin = head(x, batch.labels_B)
    (apart + 0.1 * margin).backward()
    metrics = loop.step(config, state, batch, Ranks()).metrics
    assert terms["positive_loss"] > 0
    assert metrics["loss"] == pytest.approx((apart + 0.1 * margin).item(), rel=1e-4)
    assert metrics["margin_loss"] == pytest.approx(margin.item(), rel=1e-4)
    for name in ("positive_loss", "negative_loss", *THRESHOLDS):
        assert metrics[name] == pytest.approx(terms[name].item(), rel=1e-3)
    weight = reference.backbone.fc.weight
    assert torch.allclose(state.backbone.fc.weight, weight - weight.grad, atol=1e-3 * float(weight.grad.abs().max()))
    assert torch.allclose(state.head.weight, head.weight - head.weight.grad, atol=1e-5)
    assert all(p.grad is None and not p.requires_grad for p in state.teacher.net.parameters())


def paired(batch):
    """Make every second image another view of the one before, as training without labels does."""
    ids = np.repeat(batch.sample_ids[::2], 2)
    images = batch.images_BHWC.clone()
    images[1::2] = images[::2].flip(2)
    return replace(batch, images_BHWC=images, sample_ids=ids)


def test_without_labels_an_image_is_an_identity(dataset, teacher):
    config = config_of(dataset, *teacher, "method.labels=false", "data.views=2")
    state, batch = first_batch(config)
    assert (batch.sample_ids[::2] == batch.sample_ids[1::2]).all()
    free = loop.step(config, state, replace(batch, labels_B=torch.zeros(32, dtype=torch.int64)), Ranks()).metrics
    known = config_of(dataset, *teacher, "data.views=2")
    state, _ = started(known)
    labelled = loop.step(known, state, replace(batch, labels_B=torch.from_numpy(batch.sample_ids)), Ranks()).metrics
    assert free == labelled
    assert free["positive_loss"] > 0


SETTINGS = {
    "ekd": [CROSS_ENTROPY],
    "relative": ["method.loss=relative_similarity", "method.labels=false", "data.views=2"],
    "mse": ["method.loss=mse", CROSS_ENTROPY],
}


def steps_of(ranks, configs):
    """Return metrics and gradients of three steps, final weights and thresholds, with batch norm in inference mode."""
    found = {}
    for name, config in configs.items():
        state, stream = started(config, ranks)
        state.backbone.train = lambda mode=True, net=state.backbone: type(net).train(net, False)
        step = state.optimizers["backbone"].step
        grads, metrics = [], []

        def remembering(step=step, state=state, grads=grads):
            grads.append(state.backbone.fc.weight.grad.clone())
            step()

        state.optimizers["backbone"].step = remembering
        for _ in range(3):
            metrics.append(loop.step(config, state, paired(next(stream)), ranks).metrics)
            weights = state.backbone.fc.weight.detach().clone()
        stream.close()
        thresholds = dict(state.agreement.state_dict())
        found[name] = ([[row[key] for key in sorted(row)] for row in metrics], grads, weights, thresholds)
    return found


def test_two_ranks_are_one_rank(dataset, tmp_path):
    """The loss, its terms, thresholds, gradients and weights agree."""
    teacher = saved(tmp_path / "teacher.safetensors", 32, 32)
    configs = {name: config_of(dataset, *teacher, *given) for name, given in SETTINGS.items()}
    alone = steps_of(Ranks(), configs)
    for found in run_ranks(2, steps_of, configs):
        for name in SETTINGS:
            (metrics, grads, weights, thresholds), (one_metrics, one_grads, one_weights, one) = found[name], alone[name]
            assert np.allclose(metrics, one_metrics, rtol=2e-3, atol=1e-5)
            assert grads[0].norm() > 0
            assert torch.allclose(grads[0], one_grads[0], atol=1e-4 * float(grads[0].abs().max()))
            assert torch.allclose(weights, one_weights, atol=1e-4)
            assert thresholds.keys() == one.keys()
            assert all(torch.allclose(value, one[key], atol=1e-4) for key, value in thresholds.items())


def quantised(teacher, scheme):
    """Overrides that make the student an integer copy of the teacher, calibrated on two batches."""
    path = teacher[0].partition("=")[2]
    inner = "{kind='iresnet', depth=10, width=8, input_size=32, embedding=32}"
    bits = f"weights=6, activations=6, calibration_batches=2, scheme='{scheme}'"
    return [*teacher, f"init.backbone={path}", f"net={{kind='quantised', net={inner}, {bits}}}"]


class Clipped:
    """Clips activations to their ranges, but does not round them to the grid."""

    @staticmethod
    def apply(x, scale, low, high):
        return F.hardtanh(x, low, high)


def quantised_steps(ranks, configs):
    """Return for each scheme the loss of a step, the change of the weights, and the activation scales."""
    from fr_core.nets import quantised_layers

    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantised_layers, "_OnGrid", Clipped)
        return {scheme: quantised_step(ranks, config) for scheme, config in configs.items()}


def quantised_step(ranks, config):
    state = loop.resume_or_init(config, Path("none"), ranks, blocks_in_process)
    stream = loop.remaining_batches(config, state, ranks, blocks_in_process)
    before = torch.cat([weight.detach().flatten().clone() for weight in state.trained.values()])
    loss = loop.step(config, state, next(stream), ranks).metrics["loss"]
    stream.close()
    after = torch.cat([weight.detach().flatten() for weight in state.trained.values()])
    return loss, before - after, [quantiser.scale.item() for quantiser in state.backbone.ranges().values()]


@pytest.fixture(scope="module")
def one_and_two_ranks(dataset, tmp_path_factory):
    """Results of a step of each scheme, on one rank and on two."""
    pytest.importorskip("brevitas")
    teacher = saved(tmp_path_factory.mktemp("teacher") / "teacher.safetensors", 32, 32)
    plain = [
        "method.loss=mse",
        "optim.momentum=0",
        "optim.weight_decay=0",
        "optim.lr=0.1",
        "net.ranges=extremes",
        "net.equalise=false",
    ]
    configs = {scheme: config_of(dataset, *quantised(teacher, scheme), *plain) for scheme in ("integer", "quantface")}
    return [run_ranks(size, quantised_steps, configs) for size in (1, 2)]


@pytest.mark.parametrize("scheme", ["integer", "quantface"])
def test_two_ranks_train_a_quantised_net_as_one(one_and_two_ranks, scheme):
    """Weights lie on their grid, which is the same on all ranks. Activations are clipped to their ranges, not rounded.

    With rounding, another batch size or processor can flip a single code. That changed this loss by up to 10 %, and
    turned the step: its cosine was 0.3 to 1, over three seeds and two instruction sets. For the same reason, the ranges
    are the extremes, and no channels are equalised: equalising moves weights before they are rounded.
    """
    [alone], shared = one_and_two_ranks
    loss, moved, scales = alone[scheme]
    assert moved.norm() > 0
    for shared_loss, shared_moved, shared_scales in (found[scheme] for found in shared):
        assert shared_scales == pytest.approx(scales, rel=1e-4)
        assert shared_loss == pytest.approx(loss, rel=1e-3)
        assert F.cosine_similarity(shared_moved, moved, dim=0) > 0.999
        assert shared_moved.norm() == pytest.approx(moved.norm().item(), rel=1e-2)


def test_a_quantised_net_has_no_norm_that_virtual_identities_move(dataset, tmp_path):
    pytest.importorskip("brevitas")
    teacher = saved(tmp_path / "teacher.safetensors", 32, 32)
    config = config_of(dataset, *quantised(teacher, "integer"), "data.variants=2", "train.max_steps=2")
    assert run(config, tmp_path / "run")["steps"] == 2


@pytest.mark.parametrize("extra", [[], [CROSS_ENTROPY, "train.ema=0.9"], ["integer", "train.ema=0.9"]])
def test_a_resumed_run_is_bit_identical(dataset, tmp_path, monkeypatch, extra):
    """At the interruption, the pool is being filled for the second time."""
    teacher = saved(tmp_path / "teacher.safetensors", 32, 32)
    if extra[:1] == ["integer"]:
        pytest.importorskip("brevitas")
        teacher, extra = quantised(teacher, "integer"), extra[1:]
    config = config_of(dataset, *teacher, "method.loss.pool=2000", "train.max_steps=9", "train.save_every=4", *extra)
    run(config, tmp_path / "whole")
    interrupted(config, tmp_path / "resumed", 6, monkeypatch)
    run(config, tmp_path / "resumed")
    assert len(losses(tmp_path / "whole")) == 9
    assert losses(tmp_path / "whole") == losses(tmp_path / "resumed")
    one, other = (checkpoints(tmp_path / name)[-1] for name in ("whole", "resumed"))
    beside = CROSS_ENTROPY in extra
    held = "agreement/pool_NM" if beside else "pool_NM"
    assert held in load_file(one / f"{'backbone_state' if beside else 'head'}_00000.safetensors")
    for file in sorted(path.name for path in one.glob("*.safetensors")):
        ours, theirs = load_file(one / file), load_file(other / file)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), file
    assert load_file(one / "backbone.safetensors").keys() == open_net(one).net.state_dict().keys()


def test_a_loss_without_thresholds_leaves_no_file_and_resumes(dataset, tmp_path, monkeypatch):
    teacher = saved(tmp_path / "teacher.safetensors", 32, 32)
    config = config_of(dataset, *teacher, "method.loss=mse", "train.max_steps=3", "train.save_every=2")
    run(config, tmp_path / "whole")
    interrupted(config, tmp_path / "resumed", 2, monkeypatch)
    assert not list(checkpoints(tmp_path / "resumed")[-1].glob("head_*"))
    run(config, tmp_path / "resumed")
    assert losses(tmp_path / "whole") == losses(tmp_path / "resumed")


def test_a_bad_step_leaves_no_trace(dataset, teacher):
    config = config_of(dataset, *teacher)
    state, stream = started(config)
    loop.step(config, state, next(stream), Ranks())
    kept = [buffer.clone() for buffer in buffers_to_restore(state)]
    with torch.no_grad():
        state.backbone.conv1.weight.fill_(torch.inf)
    loop.step(config, state, next(stream), Ranks())
    stream.close()
    assert state.bad_steps == 1
    assert all(torch.equal(*pair) for pair in zip(kept, buffers_to_restore(state), strict=True))
    assert any(buffer is state.agreement.pool_NM for buffer in buffers_to_restore(state))


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_tells_nearly_the_same(dataset, teacher, precision):
    found = {}
    for name in ("float32", precision):
        config = config_of(dataset, *teacher, CROSS_ENTROPY, f"train.precision={name}")
        state, batch = first_batch(config)
        state.loss_scale = 2.0**6 if name == "float16" else 1.0
        found[name] = loop.step(config, state, batch, Ranks()).metrics
    for name in ("loss", "positive_loss", "grad_norm"):
        assert found[precision][name] == pytest.approx(found["float32"][name], rel=0.1)


def test_no_epoch_ships_the_net_as_it_starts(dataset, teacher, tmp_path):
    backbone = tmp_path / "student.safetensors"
    torch.manual_seed(3)
    save_file(IResNet(10, 8, 1, 32, 32).state_dict(), backbone)
    config = config_of(dataset, *teacher, "train.epochs=0", f"init.backbone={backbone}")
    for _ in range(2):  # the second time, the run is already finished
        figures = run(config, tmp_path / "run")
        assert (figures["steps"], figures["epochs"]) == (0, 0)
        ours, theirs = load_file(checkpoints(tmp_path / "run")[-1] / "backbone.safetensors"), load_file(backbone)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert json.loads((tmp_path / "run" / "report.json").read_text())["figures"]["steps"] == 0
    with pytest.raises(UserError, match=r"train\.epochs = 0 trains nothing: bigface takes 1"):
        load_config("debug_bigface", ["train.epochs=0"])


def test_cross_entropy_starts_from_prototypes(dataset, teacher, tmp_path):
    backbone = tmp_path / "student.safetensors"
    torch.manual_seed(3)
    save_file(IResNet(10, 8, 1, 32, 32).state_dict(), backbone)
    given = [*teacher, f"init.backbone={backbone}", "init.head=prototypes", "train.max_steps=2"]
    firsts = {}
    for head in ("prototypes", "random"):
        run(config_of(dataset, *given, CROSS_ENTROPY, f"init.head={head}"), tmp_path / head)
        firsts[head] = read_metrics(tmp_path / head)[0]["margin_loss"]
    assert firsts["prototypes"] < 0.8 * firsts["random"]
    with pytest.raises(UserError, match='"prototypes" is for a class matrix; quantface has none'):
        config_of(dataset, *given)


@pytest.mark.parametrize("extra", [[], [CROSS_ENTROPY]])
def test_parameters_and_memory_are_those_of_a_run(dataset, teacher, extra):
    config = config_of(dataset, *teacher, *extra)
    state, _ = started(config)
    found, parts = parameter_figures(config, 40), memory(config, 40, 1)
    assert found["classifier_parameters"] == (40 * 32 if extra else 0)
    assert ("class_matrix" in parts) == bool(extra)
    assert parts["pairs"] > sum(buffer.nbytes for buffer in state.agreement.buffers())
    net = state.teacher.net
    assert parts["teacher"] == sum(tensor.nbytes for tensor in (*net.parameters(), *net.buffers()))


def test_metrics_of_an_older_run_are_read(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,epoch,loss,lr,data_wait\n1,0.5,3.0,0.1,0.2\n")
    assert read_metrics(tmp_path) == [{"step": 1, "epoch": 0.5, "loss": 3.0, "lr": 0.1, "data_wait": 0.2}]


def test_mistakes(dataset, teacher, tmp_path):
    with pytest.raises(UserError, match=r"no teacher is named: give method\.teacher=RUN$"):
        started(config_of(dataset))
    with pytest.raises(UserError, match="no such run, checkpoint or weights file"):
        started(config_of(dataset, f"method.teacher={tmp_path / 'none'}"))
    with pytest.raises(
        UserError, match=r"has 20 dimensions, the student's 32: give net\.embedding=20, or method\.loss"
    ):
        started(config_of(dataset, *teacher, "method.loss=mse"))
    with pytest.raises(UserError, match=r"pairs of the whole batch: train\.accumulate = 1"):
        config_of(dataset, "train.accumulate=2")
    with pytest.raises(UserError, match=r"method\.cross_entropy needs labels"):
        config_of(dataset, CROSS_ENTROPY, "method.labels=false")
    with pytest.raises(UserError, match=r"needs more than the 1500 images"):
        started(config_of(dataset, *teacher, "train.global_batch=2048"))
    with pytest.raises(UserError, match=r"'msee' of method\.loss, did you mean 'mse'. The kinds are: ekd, relative"):
        config_of(dataset, "method.loss=msee")
