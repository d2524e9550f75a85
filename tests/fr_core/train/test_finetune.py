"""Fine-tuning in the train loop: frozen weights, rates of layers, and steps that train the head alone."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fr_core.train.loop as loop
from fr_core.config.recipes import load_config
from fr_core.data.stream import blocks_in_process
from fr_core.errors import UserError
from fr_core.nets.build import build_net
from fr_core.nets.checkpoint_files import checkpoints, write_tensors
from fr_core.nets.open import open_net
from fr_core.nets.start import load_started
from fr_core.optim.schedules import learning_rate
from fr_core.ranks import Ranks
from fr_core.train.check import fitting_plan, open_training_data
from fr_core.train.methods import step
from fr_core.train.metrics import read_metrics
from fr_core.train.update import buffers_to_restore
from tests.helpers.foreign import IR, settled
from tests.helpers.nets import random_net
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import config_of, interrupted, last_weights, losses, rank_run, run, state_and_batches

NET = load_config("debug_bigface").net
FREEZE = "finetune.freeze=['conv1*', 'bn1*', 'layer1.*', 'layer2.0.bn?.*']"
FROZEN = ("conv1.", "bn1.", "layer1.", "layer2.0.bn")
HEAD_ONLY = "finetune.head_epochs=0.11"  # 5 steps of 46 in an epoch


@pytest.fixture
def weights(tmp_path):
    """Weights of the debug recipes' net, with norms as after a training."""
    return written(random_net(NET), tmp_path / "net.safetensors")


def written(net, path):
    write_tensors(path, net.state_dict(), {"net": NET.model_dump_json()})
    return path


def given(weights, *overrides):
    return [f"init.backbone={weights}", *overrides]


def changed(before, after):
    """Names of the tensors that differ by a bit."""
    return {name for name in before if not torch.equal(before[name], after[name])}


def is_frozen(name):
    return name.startswith(FROZEN)


@pytest.mark.parametrize(
    ("ranks", "extra"),
    [
        (1, ["train.ema=0.9", "optim.weight_decay=0.1", "data.progressive={size=20, share=0.5}"]),
        (2, ["train.recompute=true", "train.accumulate=2", "train.ghost_batch=4", "optim.shard_state=true"]),
        (3, ["optim={kind='muon'}", "net.dropout=0.2", "data.variants=2", "train.ema=0.9"]),
    ],
    ids=["ema", "recompute", "muon"],
)
def test_frozen_weights_and_their_statistics_do_not_move(dataset, weights, tmp_path, ranks, extra):
    """Three ranks, since the mean of three equal numbers may be rounded."""
    length = ["train.global_batch=48", "data.lanes=12", "train.max_steps=4"]
    config = config_of(dataset, *given(weights, FREEZE, *length, *extra))
    run_ranks(ranks, rank_run, config, tmp_path / "run")
    start, end = load_file(weights), last_weights(tmp_path / "run")
    moved = changed(start, end)
    assert not {name for name in moved if is_frozen(name)}
    assert {"layer2.0.conv1.weight", "layer3.0.bn1.running_mean", "fc.weight", "features.bias"} <= moved


def test_frozen_weights_have_no_gradient_and_no_state_of_the_optimiser(dataset, weights):
    state, stream = state_and_batches(config := config_of(dataset, *given(weights, FREEZE, "optim.clip=none")))
    step(config, state, next(stream), Ranks())
    held = {id(param) for param in state.optimizers["backbone"].state}
    for name, param in state.backbone.named_parameters():
        assert (id(param) in held) == param.requires_grad == (name != "features.weight" and not is_frozen(name)), name
    restored = {id(buffer) for buffer in buffers_to_restore(state)}
    for name, buffer in state.backbone.named_buffers():
        assert (id(buffer) in restored) != is_frozen(name), name


@pytest.mark.parametrize("method", ["attfc", "dcq", "f2c"])
def test_frozen_parts_of_a_momentum_encoder_do_not_move(grouped, weights, tmp_path, method):
    """Its frozen norms normalise as those of the backbone do."""
    base = [f"data.path={grouped}", "tracking.uri=off", "train.max_steps=3", "data.lanes=4", "train.global_batch=32"]
    config = load_config(f"debug_{method}", [*base, *given(weights, FREEZE)])
    run(config, tmp_path / "run")
    folder, start = checkpoints(tmp_path / "run")[-1], load_file(weights)
    files = load_file(folder / "backbone_state_00000.safetensors")
    for prefix in ("encoder/", "weights/"):
        net = {name.removeprefix(prefix): tensor for name, tensor in files.items() if name.startswith(prefix)}
        assert not {name for name in changed(net, start) if is_frozen(name)}
    assert not {name for name in changed(start, load_file(folder / "backbone.safetensors")) if is_frozen(name)}


def test_a_frozen_last_norm_is_not_measured_on_real_faces(dataset, weights, tmp_path):
    """Nor are frozen norms that a file had folded: they stay in eval mode, and need it not."""
    frozen = "finetune.freeze=['fc.*', 'features.*']"
    run(config_of(dataset, *given(weights, frozen, "data.variants=2", "train.max_steps=2")), tmp_path / "run")
    moved = changed(load_file(weights), last_weights(tmp_path / "run"))
    assert not {name for name in moved if name.startswith(("fc.", "features."))}
    assert "bn2.running_mean" in moved


def test_only_trained_norms_that_were_folded_are_settled(dataset, tmp_path):
    net = build_net(NET)
    for norm in (net.layer1[0].bn3, net.layer3[0].bn3):
        norm.running_var.fill_(1).sub_(norm.eps)
    start = given(written(net, tmp_path / "net.safetensors"))
    found = {}
    for name, more in (("plain", []), ("frozen", [FREEZE])):
        state = loop.resume_or_init(config_of(dataset, *start, *more), Path("none"), Ranks(), blocks_in_process)
        found[name] = [
            bool(stage[0].bn3.running_mean.any()) for stage in (state.backbone.layer1, state.backbone.layer3)
        ]
    assert found == {"plain": [True, True], "frozen": [False, True]}


OPTIMISERS = {
    "sgd": {"lr": 0.05},
    "muon": {"lr": 0.02},
    "lars": {"lr": 2.0, "head": {"lr": 0.05}},
    "adamw": {"lr": 1e-3, "head": {"lr": 0.05}},
}


@pytest.mark.parametrize("kind", OPTIMISERS)
def test_every_layer_has_its_share_of_the_rate_through_the_whole_schedule(dataset, weights, kind):
    """Depth 10 has a block in each of the four stages, so the stem has decay⁵ of the rate."""
    config = config_of(
        dataset,
        *given(weights, "finetune.layer_decay=0.5", "schedule.warmup_epochs=0.1"),
        f"optim.kind={kind}",
        *(["optim.head.lr=0.05"] if "head" in OPTIMISERS[kind] else []),
        f"optim.lr={OPTIMISERS[kind]['lr']}",
        "optim.reference_batch=32",
    )
    state, stream = state_and_batches(config)
    layers = {"conv1.weight": 5, "layer1.0.conv2.weight": 4, "layer4.0.bn1.weight": 1, "fc.weight": 0, "bn2.bias": 0}
    for _ in range(3):
        factor = learning_rate(config.schedule, state.step, state.total_steps, state.plan.steps_per_epoch)
        before = {name: param.detach().clone() for name, param in state.backbone.named_parameters()}
        step(config, state, next(stream), Ranks())
        rates = {id(p): group["lr"] for group in state.optimizers["backbone"].param_groups for p in group["params"]}
        for name, depth in layers.items():
            param = state.backbone.get_parameter(name)
            base = config.optim.sgd.lr if kind == "muon" and param.ndim == 1 else config.optim.lr
            assert rates[id(param)] == pytest.approx(factor * base * 0.5**depth, rel=1e-12), name
        assert state.optimizers["backbone"].param_groups[0]["lr"] == pytest.approx(factor * config.optim.lr)  # logged
        assert not torch.equal(before["conv1.weight"], state.backbone.conv1.weight)


def first_step(ranks, config, names):
    """Return how far the first step moves some weights of the backbone."""
    state = loop.resume_or_init(config, Path("none"), ranks, blocks_in_process)
    _, stream = state_and_batches(config, ranks)
    before = {name: state.backbone.get_parameter(name).detach().clone() for name in names}
    step(config, state, next(stream), ranks)
    return {name: state.backbone.get_parameter(name).detach() - before[name] for name in names}


def test_a_step_of_sharded_state_moves_each_layer_by_its_share_of_the_plain_step(dataset, weights):
    """The first step of SGD is −rate × gradient. A float32 weight rounds its move, to 2⁻²³ of the weight at most."""
    names = {"conv1.weight": 5, "layer2.0.conv1.weight": 3, "fc.weight": 0}
    common = [
        "optim.shard_state=true",
        "optim.weight_decay=0",
        "optim.clip=none",
        "schedule={kind='constant'}",
        "train.max_steps=1",
        "optim.lr=1",
    ]
    plain, decayed = (
        run_ranks(2, first_step, config_of(dataset, *given(weights, *common, f"finetune.layer_decay={decay}")), names)
        for decay in (1.0, 0.5)
    )
    start = load_file(weights)
    for rank in range(2):
        for name, depth in names.items():
            wanted = 0.5**depth * plain[rank][name]
            room = 2**-22 * (start[name].abs() + plain[rank][name].abs())
            assert ((decayed[rank][name] - wanted).abs() <= room).all(), name
            assert wanted.abs().max() > 10 * room.max()


@pytest.mark.parametrize("ranks", [1, 3])
def test_the_backbone_stays_as_it_was_while_the_head_alone_is_trained(dataset, weights, tmp_path, ranks):
    extra = ["train.ema=0.9", "train.save_every=5", "train.max_steps=7", "train.global_batch=48", "data.lanes=12"]
    config = config_of(dataset, *given(weights, "finetune.head_epochs=0.17", *extra))  # 5 steps of 31
    run_ranks(ranks, rank_run, config, tmp_path / "run")
    early, late = checkpoints(tmp_path / "run")
    start = load_file(weights)
    assert changed(start, load_file(early / "backbone.safetensors")) == set()
    state = load_file(early / "backbone_state_00000.safetensors")
    assert not [name for name in state if name.startswith("optimizer/")]
    moved = changed(start, load_file(late / "backbone.safetensors"))
    assert {"conv1.weight", "bn1.running_mean", "fc.weight", "features.bias"} <= moved
    heads = [torch.cat([load_file(p)["weight"] for p in sorted(f.glob("head_*"))]) for f in (early, late)]
    assert not torch.equal(*heads)


SAVED = (3, 5, 6)  # steps of checkpoints before, at and after the switch


def whole_and_resumed(ranks, config, folder):
    """Train a run, and train it again from some of its checkpoints."""
    run(config, folder / "whole", ranks)
    for saved in SAVED:
        start, out = folder / "whole" / "checkpoints" / f"step_{saved:08d}", folder / f"from{saved}"
        if ranks.rank == 0:
            shutil.copytree(start, out / "checkpoints" / start.name)
        ranks.gather_objects(None)
        run(config, out, ranks)


@pytest.mark.parametrize(
    ("ranks", "extra"),
    [
        (2, ["optim={kind='adamw', head={lr=0.05}, shard_state=true}", "train.ema=0.9", FREEZE]),
        (1, ["method.update=fused", "method.sample_rate=0.5", "net.dropout=0.3", "finetune.layer_decay=0.7"]),
        (1, ["schedule={kind='fastface', window=0.3, slope=0.99, patience=0.2, tail=0.5}", "train.max_steps=12"]),
    ],
    ids=["adamw", "fused", "fastface"],
)
def test_a_run_resumed_before_at_and_after_the_switch_is_bit_identical(dataset, weights, tmp_path, ranks, extra):
    """The head alone is trained for 5 steps. Runs save alike, since a save averages statistics over ranks."""
    length = ["train.max_steps=8", "train.save_every=1", "train.keep=12"]
    config = config_of(dataset, *given(weights, HEAD_ONLY, *length, *extra))
    run_ranks(ranks, whole_and_resumed, config, tmp_path)
    for saved in SAVED:
        out = tmp_path / f"from{saved}"
        assert losses(tmp_path / "whole")[saved:] == losses(out)
        assert changed(last_weights(tmp_path / "whole"), last_weights(out)) == set()


def test_a_run_that_dies_in_the_warm_up_goes_on(dataset, weights, tmp_path, monkeypatch):
    config = config_of(dataset, *given(weights, HEAD_ONLY, "train.save_every=2", "train.max_steps=8"))
    run(config, tmp_path / "whole")
    interrupted(config, tmp_path / "died", 4, monkeypatch)
    run(config, tmp_path / "died")
    assert losses(tmp_path / "whole") == losses(tmp_path / "died")
    assert changed(last_weights(tmp_path / "whole"), last_weights(tmp_path / "died")) == set()


def test_ranks_train_the_head_alone_as_one_process_does(dataset, weights, tmp_path):
    """Batch norm uses running statistics then, so that even batch sizes do not matter: float32 sums of 32 losses.

    Two sums of n float32 numbers differ by at most 2·n·2⁻²⁴ of their size: 4e-6 for n = 32. Momentum adds steps up.
    """
    config = config_of(dataset, *given(weights, "finetune.head_epochs=2", "train.max_steps=10", "train.accumulate=2"))
    run(config, tmp_path / "one")
    run_ranks(2, rank_run, config, tmp_path / "two")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    one, two = last_weights(tmp_path / "one"), last_weights(tmp_path / "two")
    assert torch.allclose(one.pop("head"), two.pop("head"), atol=1e-5)
    assert changed(one, two) == set()
    assert changed(load_file(weights), one) == set()  # the whole run trained the head alone


def test_fastface_does_not_see_the_losses_of_the_head_alone(dataset, weights, tmp_path):
    schedule = "schedule={kind='fastface_recurrence', alpha=0.5, beta=0.5, threshold=99.0, patience=0.25}"
    run(config_of(dataset, *given(weights, "finetune.head_epochs=0.18", schedule)), tmp_path / "run")  # 8 of 20 steps
    rows = read_metrics(tmp_path / "run")
    assert [row["stationary"] for row in rows[:13]] == [0] * 9 + [1, 2, 3, 0]  # a quarter of 12 steps is a stretch


def test_published_weights_are_fine_tuned_with_all_of_it(dataset, tmp_path):
    """A net of AdaFace's form, whose norms and names are its own."""
    torch.manual_seed(0)
    net = settled(IR())
    torch.save({"state_dict": {f"model.{name}": t for name, t in net.state_dict().items()}}, tmp_path / "net.ckpt")
    options = ["finetune.freeze=['conv1.*', 'bn1.*', 'prelu.*', 'layer1.*']", "finetune.layer_decay=0.8", HEAD_ONLY]
    base = [f"data.path={dataset}", "tracking.uri=off", "train.max_steps=8", "init.head=prototypes"]
    config = load_started("debug_bigface", [*base, f"init.backbone={tmp_path / 'net.ckpt'}", *options])
    source = open_net(tmp_path / "net.ckpt", device=torch.device("cpu")).net.state_dict()
    run(config, tmp_path / "run")
    moved = changed(source, last_weights(tmp_path / "run"))
    assert not {name for name in moved if name.startswith(("conv1.", "bn1.", "prelu.", "layer1."))}
    assert {"layer2.0.conv1.weight", "layer2.0.bn1.running_var", "fc.weight"} <= moved


@pytest.mark.parametrize(
    ("recipe", "overrides", "told"),
    [
        ("bigface", ["finetune.freeze=['layer1.*']"], "give init.backbone=FILE"),
        ("attfc", ["init.backbone=x", "finetune.head_epochs=1"], "attfc has none"),
        ("moe", ["init.backbone=x", "finetune.layer_decay=0.9"], "experts lie side by side"),
    ],
)
def test_what_cannot_be_fine_tuned_so_is_refused(recipe, overrides, told):
    with pytest.raises(UserError, match=told):
        load_config(f"debug_{recipe}", overrides)


def test_a_pattern_without_a_match_is_refused_before_the_run_starts(dataset, weights):
    config = config_of(dataset, *given(weights, "finetune.freeze=['layer7.*']"))
    with pytest.raises(UserError, match=r"like layer7\.\*"):
        fitting_plan(config, open_training_data(config), 1)


def test_a_run_is_not_resumed_with_other_weights_frozen(dataset, weights, tmp_path):
    run(config_of(dataset, *given(weights, FREEZE, "train.max_steps=2")), tmp_path)
    with pytest.raises(UserError, match=r"cannot resume, finetune\.freeze differs"):
        run(config_of(dataset, *given(weights, "train.max_steps=3")), tmp_path)
