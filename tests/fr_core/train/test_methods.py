"""AttFC, DCQ, F2C and Virtual FC: whole steps, several ranks, and resuming."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import fr_core.train.loop as loop
from fr_core.config.recipes import load_config
from fr_core.data.schema import open_dataset
from fr_core.data.stream import batches, blocks_in_process, make_plan
from fr_core.errors import UserError
from fr_core.nets.checkpoint_files import checkpoints, read_summary, write_signed
from fr_core.nets.open import open_net
from fr_core.ranks import Ranks
from fr_core.train.initial import initial_state, parameter_figures
from fr_core.train.methods.f2c import sides
from fr_core.train.update import buffers_to_restore
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import losses, run

METHODS = ["attfc", "dcq", "f2c", "virtual_fc"]


def config_of(grouped, method, *overrides):
    base = [f"data.path={grouped}", "tracking.uri=off", "data.lanes=8", "data.shuffle_window=256"]
    return load_config(f"debug_{method}", [*base, *overrides])


def started(config, ranks):
    plan = make_plan(config, open_dataset(config.data.path))
    state = initial_state(config, plan, ranks, torch.device("cpu"))
    return state, batches(config, plan, ranks, 0, state.total_steps, blocks_in_process)


def fixed_statistics_run(ranks, config, steps):
    """Return losses, the state of the head and a layer's weights, with batch norm in inference mode."""
    torch.set_num_threads(1)
    state, stream = started(config, ranks)
    for net in (state.backbone, state.encoder):
        if net is not None:
            net.train = lambda mode=True, net=net: type(net).train(net, False)
    found = [loop.step(config, state, next(stream), ranks).metrics["loss"] for _ in range(steps)]
    stream.close()
    return found, dict(state.head.state_dict()), state.backbone.fc.weight.detach()


def fixed_statistics_runs(ranks, configs, steps):
    return {name: fixed_statistics_run(ranks, config, steps) for name, config in configs.items()}


@pytest.mark.parametrize("method", [*METHODS, "bigface"])
def test_parameters_are_counted_without_a_net(grouped, dataset, method):
    config = config_of(dataset if method == "bigface" else grouped, method, "data.variants=2")
    state, _ = started(config, Ranks())
    found = parameter_figures(config, state.plan.dataset.manifest.identities)
    for name, module in (("backbone", state.backbone), ("classifier", state.head)):
        assert found[f"{name}_parameters"] == sum(param.numel() for param in module.parameters())


@pytest.fixture(scope="module")
def one_and_two_ranks(grouped):
    """Results of four steps of each method, on one rank and on two."""
    small = ["train.global_batch=16", "optim.lr=0.005"]
    configs = {method: config_of(grouped, method, *small) for method in METHODS}
    return [run_ranks(size, fixed_statistics_runs, configs, 4) for size in (1, 2)]


@pytest.mark.parametrize("method", ["attfc", "dcq", "f2c"])
@pytest.mark.parametrize("warmup", ["true", "false"])
def test_the_encoder_follows_faster_at_first(grouped, method, warmup):
    """The reference moves one layer by hand, from the backbone's weights before each step."""
    limit = 0.3
    overrides = [f"method.encoder_warmup={warmup}", f"method.encoder_momentum={limit}"]
    state, stream = started(config := config_of(grouped, method, *overrides), Ranks())
    expected = state.encoder.fc.weight.double()
    for step in range(6):
        momentum = min(limit, (1 + step) / (10 + step)) if warmup == "true" else limit
        expected = momentum * expected + (1 - momentum) * state.backbone.fc.weight.detach().double()
        loop.step(config, state, next(stream), Ranks())
    stream.close()
    assert torch.allclose(state.encoder.fc.weight.double(), expected, atol=1e-6)
    assert not torch.allclose(state.encoder.fc.weight, state.backbone.fc.weight, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_are_one_rank(one_and_two_ranks, method):
    """With the same global batch, losses are the same, and all ranks hold the same queue, pool or anchors.

    The rate is small, so that four steps do not amplify rounding. Virtual FC's anchors do so most: they are embeddings
    of the net that they train. A change of the weights by one unit in the last place (6e-8) moves centres by 1.3e-6 at
    this rate. At the recipe's rate of 0.05 it moves them by 4e-5, with SiLU and with PReLU. The tolerance of 1e-5 is
    eight times the former.
    """
    [alone], shared = one_and_two_ranks
    losses, head, fc = alone[method]
    for other_losses, other_head, other_fc in (found[method] for found in shared):
        assert np.allclose(losses, other_losses, atol=1e-4)
        assert torch.allclose(fc, other_fc, atol=1e-5)
        for name, value in head.items():
            assert torch.allclose(value, other_head[name], atol=1e-5)


def test_three_ranks_hold_one_queue(grouped):
    config = config_of(grouped, "attfc", "train.global_batch=24", "data.lanes=6")
    alone = run_ranks(1, fixed_statistics_run, config, 4)[0]
    results = run_ranks(3, fixed_statistics_run, config, 4)
    for found, head, _ in results:
        assert np.allclose(found, alone[0], atol=1e-4)
        assert torch.equal(head["labels_S"], alone[1]["labels_S"])
        assert torch.equal(head["centres_SD"], results[0][1]["centres_SD"])


@pytest.mark.parametrize("method", METHODS)
def test_resumed_equals_uninterrupted(grouped, tmp_path, method):
    """The runs agree bit for bit; the resumed one begins in the middle of the queue."""
    config = config_of(grouped, method, "train.save_every=7", "train.max_steps=12")
    run(config, tmp_path / "whole")
    run(config, tmp_path / "whole2")
    (tmp_path / "whole2" / "checkpoints" / "step_00000012").rename(tmp_path / "gone")
    run(config, tmp_path / "whole2")
    one, other = (checkpoints(tmp_path / name)[-1] for name in ("whole", "whole2"))
    assert one.name == other.name == "step_00000012"
    for file in sorted(path.name for path in one.glob("*.safetensors")):
        ours, theirs = load_file(one / file), load_file(other / file)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), file
    assert losses(tmp_path / "whole") == losses(tmp_path / "whole2")


def test_dcq_ships_its_key_encoder(grouped, tmp_path):
    run(config_of(grouped, "dcq"), tmp_path)
    folder = checkpoints(tmp_path)[-1]
    shipped, state = load_file(folder / "backbone.safetensors"), load_file(folder / "backbone_state_00000.safetensors")
    assert not torch.equal(shipped["fc.weight"], state["weights/fc.weight"])
    assert torch.equal(open_net(tmp_path).net.fc.weight, shipped["fc.weight"])


def test_reference_order_accumulates_as_one_batch_where_batch_norm_is_fixed(grouped):
    results = []
    for micro in (1, 2):
        config = config_of(grouped, "attfc", "method.order=reference", f"train.accumulate={micro}")
        results.append(fixed_statistics_run(Ranks(), config, 5))
    (ours, head, fc), (theirs, other_head, other_fc) = results
    assert np.allclose(ours, theirs, atol=1e-4)
    assert torch.equal(head["labels_S"], other_head["labels_S"])
    assert torch.allclose(head["centres_SD"], other_head["centres_SD"], atol=1e-5)
    assert torch.allclose(fc, other_fc, atol=1e-5)


def test_f2c_pairs_and_instances(grouped):
    _, stream = started(config_of(grouped, "f2c"), Ranks())
    batch = next(stream)
    stream.close()
    x, x_labels, y, y_labels = sides(batch)
    assert x.shape == y.shape == (24, *batch.images_BHWC.shape[1:])
    pairs = torch.arange(24) % 3 < 2
    assert torch.equal(x_labels[pairs], y_labels[pairs])
    assert torch.equal(y[pairs].flatten(), batch.class_images_BKHWC[torch.arange(32) % 4 < 2, 0].flatten())
    assert torch.equal(x[pairs].flatten(), batch.images_BHWC[torch.arange(32) % 4 < 2].flatten())
    assert torch.equal(x_labels[~pairs], batch.labels_B[2::4])
    assert torch.equal(y_labels[~pairs], batch.labels_B[3::4])
    assert torch.equal(y[~pairs], batch.images_BHWC[3::4])


@pytest.mark.parametrize("cause", ["weights", "gradient"])
@pytest.mark.parametrize("method", [*METHODS, "attfc reference"])
def test_a_bad_step_leaves_no_trace(grouped, method, cause):
    """Infinite weights make loss, centres and statistics non-finite; an overflow in float16 only the gradient."""
    method, *order = method.split()
    config = config_of(grouped, method, *(f"method.order={name}" for name in order))
    state, stream = started(config, Ranks())
    loop.step(config, state, next(stream), Ranks())
    kept = dict(state.head.state_dict()) | {f"own {i}": b for i, b in enumerate(buffers_to_restore(state))}
    kept = {name: value.clone() for name, value in kept.items()}
    if cause == "weights":
        with torch.no_grad():
            for net in (state.backbone, state.encoder):
                if net is not None:
                    net.conv1.weight.fill_(torch.inf)
    else:
        state.backbone.conv1.weight.register_hook(lambda gradient: gradient * torch.inf)
    reading = loop.step(config, state, next(stream), Ranks())
    stream.close()
    assert state.bad_steps == 1
    assert np.isfinite(reading.metrics["loss"]) == (cause == "gradient")
    found = dict(state.head.state_dict()) | {f"own {i}": b for i, b in enumerate(buffers_to_restore(state))}
    if method == "f2c":  # keeps the centres that it wrote
        assert all(found.pop(name).isfinite().all() and kept.pop(name) is not None for name in state.head.state_dict())
    assert all(torch.equal(value, found[name]) for name, value in kept.items())


def test_another_number_of_variants_is_another_run(grouped, tmp_path):
    run(config_of(grouped, "attfc", "data.variants=2", "train.max_steps=2", "train.save_every=1"), tmp_path)
    with pytest.raises(UserError, match=r"data.variants differs: 2 there, 3 now"):
        run(config_of(grouped, "attfc", "data.variants=3", "train.max_steps=4"), tmp_path)


def test_grouped_runs_of_versions_with_another_order_are_not_resumed(grouped, tmp_path):
    run(config_of(grouped, "attfc", "train.max_steps=2"), tmp_path)
    [folder] = checkpoints(tmp_path)
    summary = read_summary(folder)
    del summary["spread"]
    write_signed(folder, summary)
    with pytest.raises(UserError, match=r"data.spread differs: 0 there, 32 now"):
        run(config_of(grouped, "attfc", "train.max_steps=3"), tmp_path)


def test_mistakes(grouped):
    with pytest.raises(UserError, match="cannot hold a batch of 32"):
        started(config_of(grouped, "attfc", "method.size_ratio=0.3"), Ranks())
    with pytest.raises(UserError, match=r"takes 16 other images of a person, but no identity"):
        started(config_of(grouped, "attfc", "method.class_images=16"), Ranks())
    with pytest.raises(UserError, match="the whole batch's centres in the queue first"):
        config_of(grouped, "attfc", "train.accumulate=2")
    with pytest.raises(UserError, match="writes its centres once per batch"):
        config_of(grouped, "f2c", "train.accumulate=2")
    with pytest.raises(UserError, match="cannot hold the 24 faces that a batch of 32 writes"):
        started(config_of(grouped, "f2c", "method.pool_size=20"), Ranks())
    with pytest.raises(UserError, match=r"method.anchors = 20 is less than a batch of 32"):
        started(config_of(grouped, "virtual_fc", "method.anchors=20"), Ranks())
    with pytest.raises(UserError, match="dcq ships its key encoder"):
        config_of(grouped, "dcq", "train.ema=0.9")
    with pytest.raises(UserError, match='"prototypes" is for a class matrix; dcq has none'):
        config_of(grouped, "dcq", "init.head=prototypes", "init.backbone=x")


def test_parts_of_a_margin_that_are_not_given_are_the_methods():
    given = load_config("bigface_r50", ["method.kind=attfc", "method.margin.scale=10"]).method.margin
    assert (given.scale, given.m2, given.m3) == (10, 0.5, 0)
    given = load_config("bigface_r50", ["method={kind='dcq', margin={m3=0.1}}"]).method.margin
    assert (given.scale, given.m2, given.m3) == (50, 0, 0.1)
