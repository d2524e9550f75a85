"""Distillation in the train loop."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import fr_core.train.loop as loop
from fr_core.config import unlabelled_batch
from fr_core.config.nets import IResNetNet
from fr_core.config.recipes import load_config
from fr_core.data.schema import open_dataset
from fr_core.data.stream import blocks_in_process, make_plan, unlabelled
from fr_core.errors import UserError
from fr_core.heads.sharded_fc import ShardedFC
from fr_core.nets import iresnet
from fr_core.nets.build import build_float_net
from fr_core.nets.checkpoint_files import checkpoints
from fr_core.nets.open import open_net
from fr_core.ranks import Ranks
from fr_core.train.distill import micro_batches, open_teacher
from fr_core.train.initial import initial_state
from fr_core.train.methods.bigface import bigface_step
from fr_core.train.metrics import read_metrics
from tests.helpers.datasets import write_dataset
from tests.helpers.embeddings import embedded
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import interrupted, last_weights, losses, run, smooth_run


@pytest.fixture(scope="module")
def more(tmp_path_factory):
    """A dataset of 100 images of other people."""
    return write_dataset(tmp_path_factory.mktemp("more") / "shards", 100, 5, seed=9)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """An untrained net with the student's width, but another input size."""
    return saved(tmp_path_factory.mktemp("teacher") / "teacher.safetensors", 32)


def saved(path, embedding):
    torch.manual_seed(0)
    net = IResNetNet(depth=10, width=8, input_size=48, embedding=embedding)
    save_file(build_float_net(net).state_dict(), path, {"net": net.model_dump_json()})
    return f"method.distill.teacher={path}", "method.distill.teacher_net=iresnet10"


def config_of(dataset, *overrides):
    return load_config("debug_distill", [f"data.path={dataset}", "tracking.uri=off", "data.lanes=8", *overrides])


def started(config, ranks=None):
    ranks = ranks or Ranks()
    plan = make_plan(config, open_dataset(config.data.path))
    state = initial_state(config, plan, ranks, torch.device("cpu"))
    return state, loop.remaining_batches(config, state, ranks, blocks_in_process)


def unlabelled_of(more, *fields):
    return [f"method.distill.unlabelled.path={more}", *(f"method.distill.unlabelled.{field}" for field in fields)]


def test_a_step_is_the_formula(dataset, more, teacher):
    """The loss is margin softmax of labelled images + λ × the mean distance to the teacher over all images."""
    plain = ["optim.momentum=0", "optim.weight_decay=0", "optim.clip=1e9", "optim.lr=1.0", "schedule.kind=constant"]
    config = config_of(dataset, *teacher, *unlabelled_of(more, "batch=16"), "method.distill.weight=3", *plain)
    state, stream = started(config)
    batch = next(stream)
    stream.close()
    assert (len(batch.images_BHWC), len(batch.unlabelled.images_BHWC)) == (32, 16)
    reference, _ = started(config)
    images = torch.cat([batch.images_BHWC, batch.unlabelled.images_BHWC])
    x = reference.backbone.train()((images.permute(0, 3, 1, 2).float() - 127.5) / 127.5)
    net = open_net(config.method.distill.teacher, "iresnet10").net
    with torch.no_grad():
        big = F.interpolate(images.permute(0, 3, 1, 2).float(), (48, 48), mode="bilinear", antialias=True)
        target = F.normalize(net((big.round() - 127.5) / 127.5))
    distance = 2 * (1 - (target * F.normalize(x)).sum(1)).mean()
    head = ShardedFC(40, 32, config.method, Ranks(), config.seed)
    margin = head(x[:32], batch.labels_B)
    (margin + 3 * distance).backward()
    metrics = bigface_step(config, config.method, state, batch, Ranks()).metrics
    assert metrics["margin_loss"] == pytest.approx(margin.item(), rel=1e-4)
    assert metrics["distill_loss"] == pytest.approx(distance.item(), rel=1e-4)
    assert metrics["loss"] == pytest.approx((margin + 3 * distance).item(), rel=1e-4)
    weight = reference.backbone.fc.weight
    assert torch.allclose(state.backbone.fc.weight, weight - weight.grad, atol=1e-3 * float(weight.grad.abs().max()))
    assert torch.allclose(state.head.weight, head.weight - head.weight.grad, atol=1e-5)


@pytest.mark.parametrize("update", ["plain", "fused"])
def test_a_distance_that_is_not_finite_leaves_no_trace(dataset, teacher, update):
    config = config_of(dataset, *teacher, f"method.update={update}")
    state, stream = started(config)
    batch = next(stream)
    stream.close()
    state.teacher.net.fc.weight.data.fill_(torch.nan)
    head, backbone = state.head.weight.detach().clone(), state.backbone.fc.weight.detach().clone()
    bigface_step(config, config.method, state, batch, Ranks())
    assert state.bad_steps == 1
    assert torch.equal(state.head.weight, head)
    assert torch.equal(state.backbone.fc.weight, backbone)


def test_two_ranks_equal_one_rank_of_two_micro_batches(dataset, more, tmp_path, monkeypatch):
    """Over 8 steps, with unlabelled images, an adapter, and sharded optimiser state."""
    with monkeypatch.context() as patch:
        patch.setattr(iresnet, "PReLU", lambda channels: torch.nn.SiLU())
        teacher = saved(tmp_path / "smooth.safetensors", 20)
    given = [*teacher, *unlabelled_of(more, "batch=16"), "method.distill.adapter=true"]
    given += ["optim.shard_state=true", "train.max_steps=8"]
    smooth_run(Ranks(), config_of(dataset, *given, "train.accumulate=2"), tmp_path / "one")
    run_ranks(2, smooth_run, config_of(dataset, *given), tmp_path / "two")
    ours, theirs = (
        [[row[name] for name in ("loss", "margin_loss", "distill_loss")] for row in read_metrics(tmp_path / run)]
        for run in ("one", "two")
    )
    assert len(ours) == 8
    assert np.allclose(ours, theirs, atol=1e-3)
    assert ours[-1][2] < ours[0][2]
    one, two = last_weights(tmp_path / "one"), last_weights(tmp_path / "two")
    for name in ("head", "fc.weight", "conv1.weight"):
        assert torch.allclose(one[name], two[name], atol=1e-3)
    adapters = [
        load_file(checkpoints(tmp_path / run)[-1] / "backbone_state_00000.safetensors")["adapter/weight"]
        for run in ("one", "two")
    ]
    assert torch.allclose(*adapters, atol=1e-3)


@pytest.mark.parametrize(
    "extra",
    [
        ["method.distill.adapter=true", "train.ema=0.9", "optim={kind='adamw', head={lr=0.05}}"],
        ["method.update=fused", "data.variants=2", "data.progressive={size=20,share=0.5}", "net.stem_stride=2"],
    ],
)
def test_a_resumed_run_is_bit_identical(dataset, more, teacher, tmp_path, monkeypatch, extra):
    """The interruption is inside the second epoch of the unlabelled stream. Nothing of the teacher is shipped."""
    given = [*teacher, *unlabelled_of(more), *extra, "train.max_steps=9", "train.save_every=4"]
    config = config_of(dataset, *given)
    run(config, tmp_path / "whole")
    interrupted(config, tmp_path / "resumed", 6, monkeypatch)
    run(config, tmp_path / "resumed")
    assert len(losses(tmp_path / "whole")) == 9
    assert losses(tmp_path / "whole") == losses(tmp_path / "resumed")
    one, other = (checkpoints(tmp_path / name)[-1] for name in ("whole", "resumed"))
    for file in ("backbone.safetensors", "backbone_state_00000.safetensors", "head_00000.safetensors"):
        ours, theirs = load_file(one / file), load_file(other / file)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), file
    assert load_file(one / "backbone.safetensors").keys() == open_net(one).net.state_dict().keys()


def test_embeddings_stand_for_the_teacher_sample_by_sample(dataset, more, tmp_path):
    vectors = embedded(tmp_path / "e", open_dataset(dataset), dimensions=32)
    others = embedded(tmp_path / "f", open_dataset(more), dimensions=32, seed=3)
    given = [f"method.distill.embeddings={tmp_path / 'e'}", *unlabelled_of(more, f"embeddings={tmp_path / 'f'}")]
    config = config_of(dataset, *given, "train.accumulate=2")
    state, stream = started(config)
    batch = next(stream)
    targets = state.teacher.targets(batch, micro_batches(batch, 2))
    for half, target in zip((slice(0, 16), slice(16, 32)), targets, strict=True):
        expected = [vectors[batch.sample_ids[half]], others[batch.unlabelled.sample_ids[half]]]
        assert np.allclose(target, np.concatenate(expected), atol=5e-4)
    metrics = bigface_step(config, config.method, state, batch, Ranks()).metrics
    stream.close()
    assert metrics["loss"] == pytest.approx(metrics["margin_loss"] + 9 * metrics["distill_loss"], rel=1e-5)


def test_streams_of_the_same_shards_draw_apart(dataset, teacher):
    """The streams have different orders, and flip the same sample differently."""
    config = config_of(dataset, *teacher, *unlabelled_of(dataset))
    _, stream = started(config)
    first, flipped = {}, 0
    for _, batch in zip(range(40), stream, strict=False):
        assert not np.array_equal(batch.sample_ids, batch.unlabelled.sample_ids)
        first |= dict(zip(batch.sample_ids.tolist(), batch.images_BHWC, strict=True))
        pairs = zip(batch.unlabelled.sample_ids.tolist(), batch.unlabelled.images_BHWC, strict=True)
        flipped += sum(i in first and torch.equal(first[i].flip(1), image) for i, image in pairs)
    stream.close()
    assert flipped > 50


def test_unlabelled_images_follow_progressive_resizing(dataset, more, teacher):
    given = ["data.progressive={size=20,share=0.5}", "net.stem_stride=2", *unlabelled_of(more, "batch=8")]
    config = config_of(dataset, *teacher, *given)
    _, stream = started(config)
    batch = next(stream)
    stream.close()
    assert (batch.images_BHWC.shape[1], batch.unlabelled.images_BHWC.shape[1]) == (20, 32)
    (images,) = micro_batches(batch, 1)
    assert images.shape == (40, 20, 20, 3)
    assert torch.equal(images[:32], batch.images_BHWC)
    assert images[32:].float().mean() == pytest.approx(batch.unlabelled.images_BHWC.float().mean().item(), abs=1)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_tells_nearly_the_same(dataset, more, teacher, precision):
    """The adapter moves equally far: the loss scale is applied to its gradient and taken out again."""
    given = [*teacher, *unlabelled_of(more, "batch=8"), "method.distill.adapter=true"]
    found = {}
    for name in ("float32", precision):
        config = config_of(dataset, *given, f"train.precision={name}")
        state, stream = started(config)
        state.loss_scale = 2.0**6 if name == "float16" else 1.0
        before = state.adapter.weight.detach().clone()
        found[name] = bigface_step(config, config.method, state, next(stream), Ranks()).metrics
        found[name]["moved"] = float((state.adapter.weight.detach() - before).norm())
        stream.close()
    for name in ("loss", "distill_loss", "grad_norm", "moved"):
        assert found[precision][name] == pytest.approx(found["float32"][name], rel=0.1)


def test_an_adapter_meets_a_teacher_of_another_width(dataset, tmp_path):
    teacher = saved(tmp_path / "wide.safetensors", 20)
    config = config_of(dataset, *teacher)
    with pytest.raises(UserError, match=r"net\.embedding=20, or method\.distill\.adapter=true"):
        started(config)
    config = config_of(dataset, *teacher, "method.distill.adapter=true")
    state, stream = started(config)
    before = state.adapter.weight.detach().clone()
    metrics = [bigface_step(config, config.method, state, next(stream), Ranks()).metrics for _ in range(10)]
    stream.close()
    assert state.adapter.weight.shape == (20, 32)
    assert not torch.equal(state.adapter.weight, before)
    assert metrics[-1]["distill_loss"] < 0.8 * metrics[0]["distill_loss"]
    assert all(p.grad is None and not p.requires_grad for p in state.teacher.net.parameters())
    assert not state.teacher.net.training


def test_mistakes(dataset, more, grouped, tmp_path):
    opened, cpu = open_dataset(dataset), torch.device("cpu")
    config = config_of(dataset)
    with pytest.raises(UserError, match=r"no teacher is named: give method\.distill\.teacher"):
        open_teacher(config, opened, cpu)
    embedded(tmp_path / "e", opened, dimensions=32)
    embedded(tmp_path / "f", open_dataset(more), dimensions=30)
    two = [f"method.distill.embeddings={tmp_path / 'e'}", *unlabelled_of(more, f"embeddings={tmp_path / 'f'}")]
    with pytest.raises(UserError, match=r"have 30 dimensions, .* 32: give embeddings of one teacher"):
        open_teacher(config_of(dataset, *two), opened, cpu)
    with pytest.raises(UserError, match="not both"):
        config_of(dataset, "method.distill.teacher=a", "method.distill.embeddings=b")
    with pytest.raises(UserError, match="unlabelled images go together"):
        config_of(dataset, "method.distill.embeddings=b", *unlabelled_of(more))
    with pytest.raises(UserError, match=r"give method\.distill\.teacher"):
        config_of(dataset, "method.distill.embeddings=b", "data.variants=2")
    with pytest.raises(UserError, match=r"accumulate = 2 does not divide method\.distill\.unlabelled\.batch = 15"):
        config_of(dataset, *unlabelled_of(more, "batch=15"), "train.accumulate=2")
    with pytest.raises(
        UserError, match=r"holds 100 images, but a step takes 128: lower method\.distill\.unlabelled\.batch"
    ):
        unlabelled(config_of(dataset, *unlabelled_of(more, "batch=128")))
    with pytest.raises(UserError, match="bigface reads flat ones"):
        unlabelled(config_of(dataset, *unlabelled_of(grouped)))
    with pytest.raises(UserError, match=r"method\.distill\.unlabelled\.path is missing"):
        config_of(dataset, "method.distill.unlabelled.batch=8")
    assert unlabelled_batch(config_of(dataset, *unlabelled_of(more))) == 32
    assert unlabelled(config) is None
