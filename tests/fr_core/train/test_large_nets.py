"""Recomputation, ghost batches, compressed gradients and mixtures of experts: whole steps, on one rank and on two."""

import copy

import pytest
import torch

import fr_core.train.loop as loop
from fr_core.config.recipes import load_config
from fr_core.data.schema import open_dataset
from fr_core.data.stream import batches, blocks_in_process, make_plan
from fr_core.errors import UserError
from fr_core.nets import iresnet
from fr_core.nets.moe import take_balance
from fr_core.nets.open import open_net
from fr_core.ranks import Ranks
from fr_core.train.check import checked_plan
from fr_core.train.initial import initial_state
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import config_of, last_weights, losses, run, state_and_batches

MOE = ["net.kind=moe", "net.experts=3", "net.balance=0.5"]
VIT = "net={kind='vit', depth=3, width=16, heads=2, patch=8, drop_path=0.4, mask=0.2, input_size=32, embedding=32}"


def trained(ranks, config, steps=2, loss_scale=None):
    """Return losses and all tensors after some steps, of a net without PReLU's kink (see tests/helpers/runs.py)."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(iresnet, "PReLU", lambda channels: torch.nn.SiLU())
        plan = make_plan(config, open_dataset(config.data.path))
        state = initial_state(config, plan, ranks, torch.device("cpu"))
    state.loss_scale = loss_scale or state.loss_scale
    stream = batches(config, plan, ranks, 0, state.total_steps, blocks_in_process)
    found_losses = [loop.step(config, state, next(stream), ranks).metrics["loss"] for _ in range(steps)]
    stream.close()
    nets = {"net": state.backbone, "average": state.average, "encoder": state.encoder}
    found = {f"{key}.{name}": t for key, net in nets.items() if net for name, t in net.state_dict().items()}
    return found_losses, found | {"loss_scale": torch.tensor(state.loss_scale)}


def same(ours, theirs, atol=0.0):
    names = ours.keys() & theirs.keys() - {"loss_scale"}
    assert len(names) == len(theirs) - 1
    return [name for name in names if not torch.allclose(ours[name].float(), theirs[name].float(), atol=atol, rtol=0)]


@pytest.mark.parametrize(
    "extra",
    [
        ["net.dropout=0.3", "train.ema=0.5"],
        ["train.precision=bfloat16", "train.accumulate=2"],
        [*MOE, "train.ghost_batch=8", "train.recompute_blocks=2"],
        ["net.se=true", "net.inner_norm=false", "net.shortcut=pool", "net.width=16", "train.precision=bfloat16"],
    ],
)
def test_recomputation_is_the_same_training(dataset, extra):
    """Results are identical bit for bit, including batch norm's statistics and their count."""
    losses, plain = trained(Ranks(), config_of(dataset, *[e for e in extra if "recompute" not in e]))
    again, recomputed = trained(Ranks(), config_of(dataset, *extra, "train.recompute=true"))
    assert losses == again
    assert same(recomputed, plain) == []
    assert recomputed["net.layer1.0.bn1.num_batches_tracked"] == plain["net.layer1.0.bn1.num_batches_tracked"] > 0


@pytest.mark.parametrize("extra", [["train.ema=0.5"], ["train.precision=bfloat16", "train.recompute_blocks=2"]])
def test_a_recomputed_transformer_skips_the_same_branches(dataset, extra):
    losses, plain = trained(Ranks(), config_of(dataset, VIT, *[e for e in extra if "recompute" not in e]))
    again, recomputed = trained(Ranks(), config_of(dataset, VIT, *extra, "train.recompute=true"))
    assert losses == again
    assert same(recomputed, plain) == []


def test_ghost_batches_of_a_transformer_are_those_of_micro_batches(dataset):
    """Both batch norms of its end. Nothing is left out at random, since micro-batches draw apart."""
    still = [VIT, "net.drop_path=0", "net.mask=0"]
    losses, ghost = trained(Ranks(), config_of(dataset, *still, "train.ghost_batch=8"))
    expected, micro = trained(Ranks(), config_of(dataset, *still, "train.accumulate=4"))
    assert losses == pytest.approx(expected, abs=1e-4)
    assert same(ghost, micro, 1e-4) == []


def test_a_momentum_encoder_leaves_nothing_out(grouped):
    config = load_config("debug_attfc", [f"data.path={grouped}", VIT, "data.lanes=8", "data.shuffle_window=256"])
    state, stream = state_and_batches(config)
    loop.step(config, state, next(stream), Ranks())
    stream.close()
    assert (state.backbone.tower.drop_path, state.backbone.mask) == (0.4, 0.2)
    assert (state.encoder.tower.drop_path, state.encoder.mask) == (0, 0)


def test_recomputation_beside_a_momentum_encoder(grouped):
    config = load_config("debug_attfc", [f"data.path={grouped}", "data.lanes=8", "data.shuffle_window=256"])
    recomputing = config.model_copy(update={"train": config.train.model_copy(update={"recompute": True})})
    losses, plain = trained(Ranks(), config)
    again, recomputed = trained(Ranks(), recomputing)
    assert losses == again
    assert same(recomputed, plain) == []
    assert any(name.startswith("encoder.") for name in plain)


def test_blocks_run_twice_where_they_are_recomputed(dataset):
    """The stem, outside of the blocks, runs once."""
    config = config_of(dataset, "train.recompute=true", "train.accumulate=2")
    plan = make_plan(config, open_dataset(dataset))
    state = initial_state(config, plan, Ranks(), torch.device("cpu"))
    seen = []
    for name in ("conv1", "layer1.0.conv1", "layer4.0.conv2"):
        state.backbone.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: seen.append(name))
    stream = batches(config, plan, Ranks(), 0, 1, blocks_in_process)
    loop.step(config, state, next(stream), Ranks())
    assert [seen.count(name) for name in ("conv1", "layer1.0.conv1", "layer4.0.conv2")] == [2, 4, 4]


def test_ghost_batches_are_the_statistics_of_micro_batches(dataset):
    """Losses, weights and running statistics agree after two steps of four groups of 8."""
    losses, ghost = trained(Ranks(), config_of(dataset, "train.ghost_batch=8", *MOE))
    expected, micro = trained(Ranks(), config_of(dataset, "train.accumulate=4", *MOE))
    whole, _ = trained(Ranks(), config_of(dataset, *MOE))
    assert losses == pytest.approx(expected, abs=1e-4)
    assert abs(whole[1] - losses[1]) > 1e-3
    # The gate may differ: the balance term of a whole batch is not the mean over its parts.
    assert [name for name in same(ghost, micro, 1e-4) if "gate" not in name] == []


def test_a_ghost_batch_that_does_not_fit_is_refused(dataset, grouped):
    config = config_of(dataset, "train.ghost_batch=8")
    checked_plan(config, 4)
    with pytest.raises(UserError, match=r"train.ghost_batch = 8 does not divide the 4 images"):
        checked_plan(config, 8)
    with pytest.raises(UserError, match=r"does not divide the 16 images"):
        checked_plan(config_of(dataset, "train.ghost_batch=12", "train.accumulate=2"), 1)
    f2c = load_config("debug_f2c", [f"data.path={grouped}", "train.ghost_batch=16"])
    checked_plan(f2c, 1)  # trains on 48 images: 16 divides them
    with pytest.raises(UserError, match=r"does not divide the 24 images"):
        checked_plan(f2c, 2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["train.recompute_blocks=2"], "needs train.recompute = true"),
        (["net={kind='mobilefacenet'}", "train.recompute=true"], "is for residual nets"),
        (["train.compress_gradients=float16"], "needs the loss scale"),
        (["net.kind=moe", "net.experts=2", "net.active=3"], "net.active = 3 is more than net.experts = 2"),
        (["train.ghost_batch=1"], "must be at least 2"),
    ],
)
def test_what_does_not_fit_together(dataset, given, message):
    with pytest.raises(UserError, match=message):
        config_of(dataset, *given)


def on_two_ranks(ranks, configs, overflowing):
    return [trained(ranks, config) for config in configs], trained(ranks, overflowing, 1, 2.0**40)


def test_two_ranks(dataset):
    """A mixture with recomputation on two ranks equals two micro-batches on one. Compressed gradients nearly agree."""
    deep = [*MOE, "train.recompute=true", "net.dropout=0.2"]
    plain = config_of(dataset)
    bfloat16 = config_of(dataset, "train.compress_gradients=bfloat16")
    float16 = config_of(dataset, "train.precision=float16", "train.compress_gradients=float16")
    results = run_ranks(2, on_two_ranks, [config_of(dataset, *deep), plain, bfloat16], float16)
    losses, one = trained(Ranks(), config_of(dataset, *deep, "train.accumulate=2"))
    start = trained(Ranks(), plain, 0)[1]
    for rank, ((mixture, whole, compressed), (lost, dropped)) in enumerate(results):
        assert mixture[0] == pytest.approx(losses, abs=1e-4)
        weights = [name for name in same(mixture[1], one, 1e-4) if "running" not in name and "tracked" not in name]
        assert weights == []
        moved = {name: whole[1][name] - start[name] for name in start if name.endswith("weight")}
        off = {name: compressed[1][name] - whole[1][name] for name in moved}
        total = sum(float(m.square().sum()) for m in moved.values()) ** 0.5
        assert 0 < sum(float(o.square().sum()) for o in off.values()) ** 0.5 < 0.01 * total
        assert lost[0] > 0
        assert dropped["loss_scale"] == 2.0**39, rank  # the sum overflowed: no rank moved
        assert torch.equal(dropped["net.fc.weight"], start["net.fc.weight"])
    ours, theirs = (result[0][2][1] for result in results)
    assert (
        same(
            {n: t for n, t in ours.items() if "running" not in n}, {n: theirs[n] for n in theirs if "running" not in n}
        )
        == []
    )


@pytest.mark.parametrize("method", ["bigface", "virtual_fc"])
def test_the_balance_term_is_trained_whatever_the_method(dataset, grouped, method):
    """The gate prefers one expert at first; only a heavy balance term evens it out."""
    path = dataset if method == "bigface" else grouped
    config = load_config(f"debug_{method}", [f"data.path={path}", "data.lanes=8", "data.shuffle_window=256", *MOE])
    found = []
    for balance in (0.0, 30.0):
        net = config.net.model_copy(update={"balance": balance})
        heavy = config.model_copy(update={"net": net})
        plan = make_plan(heavy, open_dataset(path))
        state = initial_state(heavy, plan, Ranks(), torch.device("cpu"))
        with torch.no_grad():
            state.backbone.layer4.gate.bias[0] = 1.0
        stream = batches(heavy, plan, Ranks(), 0, 6, blocks_in_process)
        for batch in stream:
            loop.step(heavy, state, batch, Ranks())
        found.append(float(take_balance(state.backbone).detach()))
    assert found[0] > 1.3
    assert found[1] < found[0] - 0.2


def test_a_mixture_is_verified_resumed_and_opened(dataset, tmp_path):
    config = config_of(dataset, *MOE, "train.max_steps=3", "train.ema=0.5")
    run(config, tmp_path)
    longer = config.model_copy(update={"train": config.train.model_copy(update={"max_steps": 5})})
    assert run(longer, tmp_path)["steps"] == 5
    net = open_net(tmp_path).net
    assert len(net.layer4.experts) == 3
    copy.deepcopy(net)
    warm = config_of(dataset, f"init.backbone={tmp_path}", *MOE)
    state = loop.resume_or_init(warm, tmp_path / "none", Ranks(), blocks_in_process)
    assert torch.equal(state.backbone.layer4.gate.weight, net.layer4.gate.weight)


@pytest.mark.soak
def test_compiled_blocks_train_and_verify_as_plain_ones(dataset, tmp_path):
    """Compilers fuse operators, which rounds otherwise: the losses of four steps differ by float32's rounding."""
    found = {}
    for compiled in ("off", "on"):
        out = tmp_path / compiled
        run(config_of(dataset, f"train.compile={compiled}", "train.max_steps=4", "train.ema=0.5"), out)
        found[compiled] = losses(out), last_weights(out)
    (plain, weights), (compiled, others) = found.values()
    assert plain == pytest.approx(compiled, rel=1e-3)
    assert list(weights) == list(others)
    assert plain != compiled  # else nothing was compiled


def test_nothing_is_compiled_on_a_cpu_unasked(dataset):
    for asked, expected in (("auto", False), ("on", True)):
        state, stream = state_and_batches(config_of(dataset, f"train.compile={asked}"))
        stream.close()
        assert all((block._compiled_call_impl is not None) == expected for block in state.backbone.blocks())
