"""The train loop, its state and its checkpoints, without Ray."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import fr_core.train.loop as loop
import fr_core.train.update as update
from fr_core.config.recipes import load_config
from fr_core.data.schema import open_dataset, write_manifest
from fr_core.data.stream import batches, blocks_in_process, make_plan
from fr_core.errors import UserError
from fr_core.nets.checkpoint_files import checkpoints, read_summary, write_signed
from fr_core.nets.open import open_net
from fr_core.optim.fastface import RunWindow
from fr_core.ranks import Ranks
from fr_core.train.methods.bigface import bigface_step
from fr_core.train.metrics import newest_metrics, read_metrics
from fr_core.train.resume import changed_settings, load_checkpoint
from fr_core.train.save import take_snapshot, write_checkpoint
from fr_core.train.warm_start import set_prototypes
from tests.helpers.datasets import write_dataset
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import (
    config_of,
    interrupted,
    last_weights,
    losses,
    rank_run,
    run,
    smooth_run,
    state_and_batches,
)

GOLDEN = Path(__file__).parents[2] / "golden"


# Equality of ranks and micro-batches


def test_two_ranks_equal_one_rank_of_two_micro_batches(dataset, tmp_path):
    """Over 20 steps, both see the same halves of each batch, so that batch statistics agree."""
    smooth_run(Ranks(), config_of(dataset, "train.accumulate=2", "net.dropout=0.2"), tmp_path / "one")
    run_ranks(2, smooth_run, config_of(dataset, "net.dropout=0.2"), tmp_path / "two")
    assert len(losses(tmp_path / "one")) == 20
    assert np.allclose(losses(tmp_path / "one"), losses(tmp_path / "two"), atol=1e-4)
    ours, theirs = last_weights(tmp_path / "one"), last_weights(tmp_path / "two")
    assert torch.allclose(ours["head"], theirs["head"], atol=1e-4)
    assert torch.allclose(ours["fc.weight"], theirs["fc.weight"], atol=1e-4)


def test_two_ranks_take_the_step_of_two_micro_batches_with_the_net_as_it_is(dataset, tmp_path):
    """One step: after more steps, PReLU's kink would amplify differences of rounding.

    Running statistics are not compared: one rank moves them twice, two ranks move them by their mean.
    """
    one = ["train.max_steps=1", "optim.lr=1", "schedule={kind='constant'}"]
    run(config_of(dataset, "train.accumulate=2", *one), tmp_path / "one")
    run_ranks(2, rank_run, config_of(dataset, *one), tmp_path / "two")
    ours, theirs = last_weights(tmp_path / "one"), last_weights(tmp_path / "two")
    state, _ = state_and_batches(config_of(dataset))
    moved = [name for name, slopes in state.backbone.state_dict().items() if not torch.allclose(slopes, ours[name])]
    assert {"layer1.0.prelu.weight", "layer1.0.bn1.bias", "fc.weight"} <= set(moved)
    assert ours.keys() == theirs.keys()
    for name, weights in ours.items():
        if "running_" not in name and "num_batches" not in name:
            assert torch.allclose(weights, theirs[name], rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("sample_rate", [1.0, 0.5])
def test_accumulation_equals_the_big_batch_where_batch_norm_is_fixed(dataset, sample_rate):
    results = []
    for micro in (1, 4):
        config = config_of(dataset, f"train.accumulate={micro}", f"method.sample_rate={sample_rate}")
        state, stream = state_and_batches(config)
        state.backbone.train = lambda mode=True, net=state.backbone: type(net).train(net, False)
        trail = [bigface_step(config, config.method, state, next(stream), Ranks()).metrics["loss"] for _ in range(5)]
        results.append((trail, state.head.weight.detach(), state.backbone.fc.weight.detach()))
    (trail, head, fc), (other_trail, other_head, other_fc) = results
    assert np.allclose(trail, other_trail, atol=1e-4)
    assert torch.allclose(head, other_head, atol=1e-5)
    assert torch.allclose(fc, other_fc, atol=1e-5)


@pytest.mark.parametrize("name", ["arcface", "cosface", "partial"])
def test_golden_curves(dataset, tmp_path, name):
    """The losses of 20 steps are stored: a refactoring keeps them, a numerical change updates them on purpose."""
    overrides = {
        "arcface": ["method.margin={ scale = 16.0, m2 = 0.3, m3 = 0.0 }"],
        "cosface": [],
        "partial": [
            "method.sample_rate=0.5",
            "method.margin={ scale = 16.0, m3 = 0.2, gradient = 'straight_through' }",
        ],
    }[name]
    smooth_run(Ranks(), config_of(dataset, *overrides), tmp_path)
    stored = json.loads((GOLDEN / "losses_20_steps.json").read_text())[name]
    assert np.allclose(losses(tmp_path), stored, rtol=2e-3)


def test_the_fused_mode_trains_as_the_plain_one(dataset, tmp_path):
    smooth_run(Ranks(), config_of(dataset), tmp_path / "plain")
    smooth_run(Ranks(), config_of(dataset, "method.update=fused", "method.tile=7"), tmp_path / "fused")
    assert np.allclose(losses(tmp_path / "plain"), losses(tmp_path / "fused"), atol=1e-4)
    ours, theirs = last_weights(tmp_path / "plain"), last_weights(tmp_path / "fused")
    assert torch.allclose(ours["head"], theirs["head"], atol=1e-4)


RECURRENCE = "kind='fastface_recurrence', alpha=0.5, beta=0.5, threshold=99.0"  # every step is stationary


def test_fastface_watches_the_loss_after_the_warmup_alone(dataset, tmp_path):
    """The run's 20 steps have 8 of warm-up. Its windows of 2 steps are of the 12 others."""
    warmup = 8 / make_plan(config_of(dataset), open_dataset(dataset)).steps_per_epoch
    schedule = f"schedule={{kind='fastface', window=0.2, slope=0.99, patience=0.1, tail=0, warmup_epochs={warmup}}}"
    run(config := config_of(dataset, schedule), tmp_path)
    rows = read_metrics(tmp_path)
    assert [row["lr"] for row in rows[:8]] == pytest.approx([0.05 * (step + 1) / 8 for step in range(8)])
    watched = RunWindow(config.schedule, 12)
    for row in rows[8:]:
        assert row["lr"] == pytest.approx(0.05 * watched.factor)
        watched.observe(row["loss"])
        assert row["detector"] == pytest.approx(watched.detector)
    assert watched.cuts > 0
    assert all(row["detector"] == 1 and row["stationary"] == 0 for row in rows[:11])


def test_fastface_cuts_the_rate_of_the_next_step_and_is_logged(dataset, tmp_path):
    """5 of 20 steps make a stretch."""
    run(config_of(dataset, f"schedule={{{RECURRENCE}, patience=0.25}}"), tmp_path)
    rows = read_metrics(tmp_path)
    assert [row["lr"] for row in rows] == [0.05] * 7 + [0.025] * 6 + [0.0125] * 6 + [0.00625]
    assert [row["stationary"] for row in rows[:8]] == [0, 1, 2, 3, 4, 5, 0, 1]
    assert all(row["detector"] < 99 for row in rows)
    assert (tmp_path / "pictures" / "curves.png").exists()
    assert "pictures/curves.png" in json.loads((tmp_path / "report.json").read_text())["pictures"]


# Resuming


@pytest.mark.parametrize(
    "extra",
    [
        [],
        ["method.sample_rate=0.5", "net.dropout=0.3"],
        ["train.ema=0.9", "data.augment.erase=0.5"],
        ["method.update=fused", f"schedule={{{RECURRENCE}, patience=0.2}}"],
        ["schedule={kind='fastface', window=0.2, slope=0.99, patience=0.1, tail=0.5}", "schedule.warmup_epochs=0.05"],
        ["method.update=fused", "method.sample_rate=0.5", "schedule={kind='fastface_haar', m=2, threshold=9.0}"],
        ["optim={kind='lars', lr=2.0, head={lr=0.05}}"],
        ["net.kind=moe", "train.recompute=true", "train.ghost_batch=8", "train.ema=0.5"],
        ["optim={kind='adamw', head={lr=0.05}}", "train.ema=0.9"],
        [
            "net={kind='vit', depth=2, width=16, heads=2, patch=8, mask=0.2, input_size=32, embedding=32}",
            "optim={kind='muon'}",
        ],
    ],
)
def test_a_resumed_run_is_bit_identical(dataset, tmp_path, monkeypatch, extra):
    config = config_of(dataset, "train.save_every=5", "train.max_steps=12", *extra)
    run(config, tmp_path / "whole")
    interrupted(config, tmp_path / "resumed", 8, monkeypatch)
    assert [path.name for path in checkpoints(tmp_path / "resumed")] == ["step_00000005"]
    run(config, tmp_path / "resumed")
    assert losses(tmp_path / "whole") == losses(tmp_path / "resumed")
    ours, theirs = last_weights(tmp_path / "whole"), last_weights(tmp_path / "resumed")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_checkpoint_of_two_ranks_continues_on_one_and_three(dataset, tmp_path):
    """The reference is the uninterrupted run on two ranks. Batch statistics depend on the ranks: results nearly agree.

    The weights and their moving average both go on from the checkpoint.
    """
    common = ["train.global_batch=48", "data.lanes=12", "train.ema=0.5"]
    first = config_of(dataset, *common, "train.save_every=10")
    run_ranks(2, rank_run, first, tmp_path / "whole")
    start = tmp_path / "whole" / "checkpoints" / "step_00000010"
    yardstick = losses(tmp_path / "whole")[10:]
    for size in (1, 3):
        out = tmp_path / f"on{size}"
        shutil.copytree(start, out / "checkpoints" / start.name)
        run_ranks(size, rank_run, first, out)
        assert len(losses(out)) == 10
        assert np.abs(np.array(losses(out)) - yardstick).mean() < 0.5
        assert np.mean(losses(out)) < np.mean(losses(tmp_path / "whole")[:3])
        ours, theirs = last_weights(out), last_weights(tmp_path / "whole")
        assert ours["head"].shape == (40, 32)
        moved = (theirs["fc.weight"] - load_file(start / "backbone.safetensors")["fc.weight"]).norm()
        assert (ours["fc.weight"] - theirs["fc.weight"]).norm() < 0.5 * moved


def smooth_runs(ranks, configs):
    for out, config in configs.items():
        smooth_run(ranks, config, out)


def test_sharded_optimizer_state_equals_the_whole_and_moves_to_other_ranks(dataset, tmp_path):
    adamw = "optim={kind='adamw', head={lr=0.05}, shard_state=%s}"
    given = {shard: config_of(dataset, adamw % shard, "train.save_every=10") for shard in ("false", "true")}
    run_ranks(2, smooth_runs, {tmp_path / shard: config for shard, config in given.items()})
    ours, theirs = last_weights(tmp_path / "true"), last_weights(tmp_path / "false")
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-5) for name in ours)
    start = tmp_path / "true" / "checkpoints" / "step_00000010"
    assert len(list(start.glob("backbone_state_*"))) == 2
    shutil.copytree(start, tmp_path / "one" / "checkpoints" / start.name)
    smooth_run(Ranks(), config_of(dataset, adamw % "true"), tmp_path / "one")
    assert np.abs(np.array(losses(tmp_path / "one")) - losses(tmp_path / "true")[10:]).mean() < 0.5


def restored_rows(ranks, config, folder):
    state, _ = state_and_batches(config, ranks)
    load_checkpoint(config, state, folder, ranks)
    return state.head.weight.detach(), state.optimizers["head"].state[state.head.weight]["momentum_buffer"]


@pytest.mark.parametrize("rows", [1, 3])
def test_rows_and_momentum_of_the_class_matrix_survive_other_numbers_of_ranks(rows, dataset, tmp_path):
    given = ["train.global_batch=48", "data.lanes=12", "train.max_steps=3", f"method.subcentres={rows}"]
    config = config_of(dataset, *given)
    run_ranks(2, rank_run, config, tmp_path)
    folder = checkpoints(tmp_path)[-1]
    whole = [torch.cat(parts) for parts in zip(*run_ranks(1, restored_rows, config, folder), strict=True)]
    shared = [torch.cat(parts) for parts in zip(*run_ranks(3, restored_rows, config, folder), strict=True)]
    assert whole[0].shape == (rows * 40, 32)
    assert all(torch.equal(a, b) for a, b in zip(whole, shared, strict=True))
    assert whole[1].abs().sum() > 0


def test_a_run_that_is_over_keeps_its_report(dataset, tmp_path):
    run(config_of(dataset, "train.max_steps=4"), tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    report["figures"]["peak_memory_mib"] = 12345.0
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert run(config_of(dataset, "train.max_steps=4"), tmp_path) == report["figures"]
    assert run(config_of(dataset, "train.max_steps=5"), tmp_path)["peak_memory_mib"] != 12345


def test_a_run_that_was_moved_goes_on_in_a_new_run_of_mlflow(dataset, tmp_path, mlflow_database):
    from mlflow import MlflowClient

    client, ids = {}, {}
    for place, steps in (("here", 4), ("there", 8)):
        if place == "there":
            shutil.copytree(tmp_path / "here" / "run", tmp_path / "there" / "run")
        (tmp_path / place).mkdir(exist_ok=True)
        shutil.copy(mlflow_database, tmp_path / place)
        config = load_config("debug_bigface", [f"data.path={dataset}", f"train.max_steps={steps}"])
        run(config, tmp_path / place / "run")
        client[place] = MlflowClient(f"sqlite:///{tmp_path / place}/mlflow.db")
        ids[place] = json.loads((tmp_path / place / "run" / "run.json").read_text())["run_id"]
    assert ids["here"] != ids["there"]
    new = client["there"].get_run(ids["there"])
    assert (new.info.status, new.data.params["train.max_steps"]) == ("FINISHED", "8")
    assert [m.step for m in client["there"].get_metric_history(ids["there"], "curves/loss")] == list(range(1, 9))


def test_a_run_that_is_tracked_from_its_middle_on_has_its_first_steps_in_mlflow(dataset, tmp_path, mlflow_database):
    from mlflow import MlflowClient

    shutil.copy(mlflow_database, tmp_path)
    given = ["debug_bigface", [f"data.path={dataset}"]]
    run(load_config(given[0], [*given[1], "train.max_steps=4", "tracking.uri=off"]), tmp_path / "run")
    run(load_config(given[0], [*given[1], "train.max_steps=8"]), tmp_path / "run")
    run_id = json.loads((tmp_path / "run" / "run.json").read_text())["run_id"]
    history = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").get_metric_history(run_id, "curves/loss")
    assert [(m.step, m.value) for m in history] == [
        (row["step"], row["loss"]) for row in read_metrics(tmp_path / "run")
    ]
    assert len(history) == 8


def test_other_settings_are_not_resumed_silently(dataset, tmp_path):
    run(config_of(dataset, "train.max_steps=2"), tmp_path)
    for change in ("net.width=16", "seed=1", "method.margin.scale=8.0", "train.global_batch=40", "train.ema=0.5"):
        with pytest.raises(UserError, match=change.split("=")[0].replace("train.ema", "train.ema on") + " differs"):
            run(config_of(dataset, change), tmp_path)
    with pytest.raises(UserError, match=r"seed differs: 0 there, 1 now .others differ too, such as net.width: another"):
        run(config_of(dataset, "net.width=16", "seed=1"), tmp_path)
    with pytest.raises(UserError, match=r"schedule.kind differs: .* there, fastface now; use another"):
        run(config_of(dataset, "schedule={kind='fastface', window=0.2}"), tmp_path)
    for kind, change in (("optim", "optim={kind='muon'}"), ("schedule", "schedule={kind='fastface', window=0.2}")):
        with pytest.raises(UserError, match=f"{kind}.kind differs"):
            run(config_of(dataset, change), tmp_path)
    others = write_dataset(tmp_path / "others", 1500, 40, seed=1)
    with pytest.raises(UserError, match="the data differs"):
        run(config_of(others), tmp_path)
    run(config_of(dataset, "train.max_steps=4", "optim.lr=0.01", "schedule.kind=constant"), tmp_path)
    assert checkpoints(tmp_path)[-1].name == "step_00000004"


def test_a_resumed_run_scales_its_loss_as_its_own_precision_needs(dataset, tmp_path):
    for steps, precision in enumerate(["float32", "float16", "float16", "float32"], 1):
        run(config_of(dataset, f"train.max_steps={steps}", f"train.precision={precision}"), tmp_path)
        scale = read_summary(checkpoints(tmp_path)[-1])["loss_scale"]
        assert (scale > 1) == (precision == "float16"), (steps, precision)


def test_a_run_beyond_the_new_end_is_refused_and_other_changes_are_named(dataset, tmp_path):
    long = config_of(dataset, "train.epochs=50", "train.max_steps=6")
    run(long, tmp_path)
    with pytest.raises(
        UserError, match=r"beyond the run's end at step 4 \(train.epochs=2 .was 50., train.max_steps=4 "
    ):
        run(config_of(dataset, "train.max_steps=4"), tmp_path)
    assert checkpoints(tmp_path)[-1].name == "step_00000006"
    assert changed_settings(long, tmp_path) == []
    other = config_of(dataset, "train.epochs=50", "train.max_steps=8", "optim.lr=0.02", "verify.pairs=/x.bin")
    assert changed_settings(other, tmp_path) == ["optim.lr=0.02 (was 0.05)", "train.max_steps=8 (was 6)"]


def test_dropped_steps_are_counted_also_over_a_resume(dataset, tmp_path):
    wild = "optim.lr=1e9"
    steps = run(config_of(dataset, wild, "train.max_steps=4"), tmp_path)["dropped_steps"]
    assert steps > 0
    assert run(config_of(dataset, wild, "train.max_steps=6"), tmp_path)["dropped_steps"] == steps + 2


def test_checkpoints_of_older_versions_lack_newer_knobs(dataset, tmp_path):
    run(config_of(dataset, "train.max_steps=2"), tmp_path)
    [folder] = checkpoints(tmp_path)
    summary = read_summary(folder)
    for section, name in (("data", "variant_strength"), ("data", "views"), ("net", "stem_stride"), ("optim", "head")):
        del summary["config"][section][name]
    del summary["data"], summary["unlabelled"], summary["seconds"]
    write_signed(folder, summary)
    run(config_of(dataset, "train.max_steps=3"), tmp_path)
    assert checkpoints(tmp_path)[-1].name == "step_00000003"


def test_the_newest_row_is_read_from_the_end(dataset, tmp_path):
    assert newest_metrics(tmp_path) is None
    run(config_of(dataset, "train.max_steps=2"), tmp_path)
    rows = read_metrics(tmp_path)
    path = tmp_path / "metrics.csv"
    header, first, second = path.read_text().splitlines()
    path.write_text("\n".join([header, *[first] * 500, second, second[: len(second) // 2]]))
    assert newest_metrics(tmp_path) == rows[-1]
    path.write_text(header + "\n")
    assert newest_metrics(tmp_path) is None


# Checkpoints


def test_only_whole_checkpoints_count_and_only_the_newest_stay(dataset, tmp_path):
    run(config_of(dataset, "train.save_every=4", "train.keep=2"), tmp_path)
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000016", "step_00000020"]
    newest = tmp_path / "checkpoints" / "step_00000020"
    cut = newest / "head_00000.safetensors"
    cut.write_bytes(cut.read_bytes()[:-4])
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000016"]
    (tmp_path / "checkpoints" / "step_00000030").mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000016"]


def test_flipped_bytes_are_named(dataset, tmp_path):
    config = config_of(dataset, "train.max_steps=2")
    run(config, tmp_path)
    path = checkpoints(tmp_path)[-1] / "backbone.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(UserError, match=r"backbone\.safetensors: wrong checksum"):
        run(config.model_copy(update={"train": config.train.model_copy(update={"max_steps": 4})}), tmp_path)


def test_an_unwritable_run_folder_is_a_mistake_of_the_user(dataset, tmp_path):
    config = config_of(dataset)
    state, _ = state_and_batches(config)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write checkpoint"):
        write_checkpoint(take_snapshot(config, state, Ranks()), tmp_path / "file", Ranks())


def test_a_run_opens_as_a_net(dataset, tmp_path):
    run(config_of(dataset, "train.max_steps=3", "train.ema=0.5"), tmp_path)
    images = np.random.default_rng(0).integers(0, 255, (4, 32, 32, 3), np.uint8)
    by_run = open_net(tmp_path).embed(images)
    by_checkpoint = open_net(checkpoints(tmp_path)[-1]).embed(images)
    bare = open_net(checkpoints(tmp_path)[-1] / "backbone.safetensors", "iresnet10").embed(images)
    assert np.array_equal(by_run, by_checkpoint)
    assert np.array_equal(by_run, bare)
    assert np.allclose(np.linalg.norm(by_run, axis=1), 1, atol=1e-5)


# Numbers that are not finite


def poison(monkeypatch, steps):
    """Make the images of some steps NaN, which reaches the whole net and its batch norm."""
    original = loop.step

    def step(config, state, batch, ranks):
        with pytest.MonkeyPatch.context() as patch:
            if state.step in steps:
                patch.setattr(update, "normalised", lambda images, std: torch.full((len(images), 3, 32, 32), torch.nan))
            return original(config, state, batch, ranks)

    monkeypatch.setattr(loop, "step", step)


def test_a_single_bad_step_leaves_no_trace(dataset, tmp_path, monkeypatch):
    config = config_of(dataset)
    state, stream = state_and_batches(config)
    bigface_step(config, config.method, state, next(stream), Ranks())
    before = {name: value.clone() for name, value in state.backbone.state_dict().items()}
    head = state.head.weight.detach().clone()
    batch = next(stream)
    with torch.no_grad():
        original = state.backbone.conv1.weight.clone()
        state.backbone.conv1.weight.fill_(torch.inf)
    reading = bigface_step(config, config.method, state, batch, Ranks())
    with torch.no_grad():
        state.backbone.conv1.weight.copy_(original)
    assert not reading.good
    assert not np.isfinite(reading.metrics["loss"])
    assert (state.bad_steps, state.step) == (1, 2)
    after = state.backbone.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(state.head.weight, head)
    bigface_step(config, config.method, state, next(stream), Ranks())
    assert state.bad_steps == 0


def test_a_streak_of_bad_steps_stops_and_names_the_last_good_checkpoint(dataset, tmp_path, monkeypatch):
    poison(monkeypatch, range(12, 100))
    with pytest.raises(
        UserError, match=r"not finite for 4 steps up to step 16: the last good checkpoint is .*step_00000010"
    ):
        run(config_of(dataset, "train.max_bad_steps=4"), tmp_path)
    weights = last_weights(tmp_path)
    assert all(value.isfinite().all() for value in weights.values() if value.is_floating_point())


def test_a_short_streak_is_survived(dataset, tmp_path, monkeypatch):
    poison(monkeypatch, {5, 6, 13})
    figures = run(config_of(dataset, "train.max_bad_steps=3"), tmp_path)
    assert figures["steps"] == 20
    assert sum(not np.isfinite(loss) for loss in losses(tmp_path)) == 3


def test_float16_scales_its_loss_and_recovers_from_overflow(dataset):
    config = config_of(dataset, "train.precision=float16")
    state, stream = state_and_batches(config)
    state.loss_scale = 2.0**40
    for _ in range(4):
        bigface_step(config, config.method, state, next(stream), Ranks())
    assert state.loss_scale < 2.0**40
    plain = config_of(dataset)
    other, stream = state_and_batches(plain)
    state, again = state_and_batches(config)
    state.loss_scale = 2.0**6
    pairs = [
        (bigface_step(config, config.method, state, a, Ranks()), bigface_step(plain, plain.method, other, b, Ranks()))
        for a, b, _ in zip(again, stream, range(3), strict=False)
    ]
    half, whole = ([reading.metrics for reading in readings] for readings in zip(*pairs, strict=True))
    assert np.allclose([a["loss"] for a in half], [b["loss"] for b in whole], rtol=0.02)
    assert np.allclose([a["grad_norm"] for a in half], [b["grad_norm"] for b in whole], rtol=0.1)


def test_clipping_bounds_the_update(dataset):
    for knob in ("optim.clip=0.001", "method.clip_head=0.001"):
        config = config_of(dataset, knob, "optim.momentum=0", "optim.weight_decay=0", "optim.lr=1.0")
        state, stream = state_and_batches(config)
        part = state.backbone if "optim.clip" in knob else state.head
        before = [p.detach().clone() for p in part.parameters()]
        bigface_step(config, config.method, state, next(stream), Ranks())
        moved = torch.cat([(p.detach() - b).ravel() for p, b in zip(part.parameters(), before, strict=True)])
        assert float(moved.norm()) == pytest.approx(0.001, rel=1e-2)


# Warm starts and averages


def test_the_moving_average_is_what_is_saved(dataset, tmp_path):
    config = config_of(dataset, "train.ema=0.9", "train.max_steps=5")
    state, stream = state_and_batches(config)
    expected = {name: p.detach().clone() for name, p in state.backbone.named_parameters()}
    for step, batch in enumerate(stream):
        bigface_step(config, config.method, state, batch, Ranks())
        decay = min(0.9, (1 + step) / (10 + step))
        for name, p in state.backbone.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * p.detach()
    saved = load_file(
        write_checkpoint(take_snapshot(config, state, Ranks()), tmp_path, Ranks()) / "backbone.safetensors"
    )
    assert all(torch.allclose(saved[name], value, atol=1e-5) for name, value in expected.items())


def test_warm_start_from_a_run_and_from_bare_weights(dataset, tmp_path):
    run(config_of(dataset, "train.max_steps=3"), tmp_path / "first")
    weights = last_weights(tmp_path / "first")
    bare = tmp_path / "bare.safetensors"
    save_file({name: value for name, value in weights.items() if name != "head"}, bare)
    for source in (tmp_path / "first", bare):
        config = config_of(dataset, f"init.backbone={source}", "seed=5")
        state = loop.resume_or_init(config, tmp_path / "none", Ranks(), blocks_in_process)
        assert torch.equal(state.backbone.fc.weight, weights["fc.weight"])
        assert not torch.equal(state.head.weight, weights["head"])
    for change, message in (
        ("net.width=16", "weights do not fit the net"),
        ("net.depth=18", "not an iresnet18: change"),
    ):
        with pytest.raises(UserError, match=message) as error:
            loop.resume_or_init(
                config_of(dataset, f"init.backbone={bare}", change), tmp_path / "none", Ranks(), blocks_in_process
            )
        assert len(str(error.value)) < 250 + len(str(bare))


def prototype_rows(ranks, config):
    state, _ = state_and_batches(config, ranks)
    stream = batches(config, state.plan, ranks, 0, state.plan.steps_per_epoch, blocks_in_process)
    set_prototypes(config, state, stream, ranks)
    return state.head.weight.detach()


def test_prototypes_are_mean_embeddings_whatever_the_ranks(dataset):
    config = config_of(dataset, "data.augment.flip=0", "train.precision=float32")
    state, _ = state_and_batches(config)
    sums = torch.zeros(40, 32)
    state.backbone.eval()
    for batch in batches(config, state.plan, Ranks(), 0, state.plan.steps_per_epoch, blocks_in_process):
        x = (batch.images_BHWC.permute(0, 3, 1, 2).float() - 127.5) / 127.5
        with torch.no_grad():
            sums.index_add_(0, batch.labels_B, torch.nn.functional.normalize(state.backbone(x)))
    expected = 0.01 * 32**0.5 * torch.nn.functional.normalize(sums)
    for size in (1, 2):
        assert torch.allclose(torch.cat(run_ranks(size, prototype_rows, config)), expected, atol=1e-4)


def test_finetuning_from_prototypes_starts_ahead(dataset, tmp_path):
    run(config_of(dataset, "train.max_steps=90", "train.epochs=3"), tmp_path / "first")
    warm = ["init.backbone=" + str(tmp_path / "first"), "optim.lr=0.001", "train.max_steps=2"]
    run(config_of(dataset, *warm), tmp_path / "random")
    run(config_of(dataset, *warm, "init.head=prototypes"), tmp_path / "prototypes")
    assert losses(tmp_path / "prototypes")[0] < losses(tmp_path / "random")[0] - 1


def rows_of(ranks, config):
    state = loop.resume_or_init(config, Path("none"), ranks, blocks_in_process)
    return state.head.weight.detach()


def runs_and_rows(ranks, firsts, later):
    """Train some runs to their end. Then return the rows that later runs start with."""
    for out, config in firsts.items():
        run(config, out, ranks)
    ranks.gather_objects(None)  # wait until all ranks have left the last run
    return {case: rows_of(ranks, config) for case, config in later.items()}


def test_known_identities_keep_their_rows_whatever_the_ranks(tmp_path):
    """The old head is in one file or in two, and each identity has one row or three."""
    dataset = write_dataset(tmp_path / "shards", 320, 40)
    shutil.copytree(dataset, tmp_path / "other")
    opened = open_dataset(dataset)
    names = [
        "new" if i % 10 == 9 else f"id{(i + 7) % 40}" for i in range(40)
    ]  # some names are new, the others in another order
    write_manifest(tmp_path / "other", opened.manifest, names, opened.identity_counts())
    given = {variants: [f"data.variants={variants}", "train.max_steps=5"] for variants in (1, 3)}
    cases = {(files, variants): tmp_path / f"{files}_{variants}" for files in (1, 2) for variants in given}
    warm = {case: [*given[case[1]], f"init.backbone={first}"] for case, first in cases.items()}
    firsts = [
        {first: config_of(dataset, *given[variants]) for (files, variants), first in cases.items() if files == ranks}
        for ranks in (1, 2)
    ]
    later = {case: config_of(tmp_path / "other", *start, "init.head=names") for case, start in warm.items()}
    run_ranks(1, runs_and_rows, firsts[0], {})
    found = {2: run_ranks(2, runs_and_rows, firsts[1], later)}
    found[1] = run_ranks(1, runs_and_rows, {}, later)
    for case, first in cases.items():
        shape = (40, case[1])
        old = last_weights(first)["head"].unflatten(0, shape)
        fresh = rows_of(Ranks(), config_of(tmp_path / "other", *warm[case], "init.head=prototypes"))
        for ranks, parts in found.items():
            rows = torch.cat([part[case] for part in parts]).unflatten(0, shape)
            for label, name in enumerate(names):
                expected = fresh.unflatten(0, shape)[label].clone()
                if name != "new":
                    expected[0] = old[int(name[2:])][0]  # the other variants are different warps in every run
                assert torch.allclose(rows[label], expected, atol=1e-4), (case, ranks, label)


def test_classes_of_more_rows_begin_with_those_that_are_known(dataset, tmp_path):
    """The others stay random, so that they still differ. Classes of fewer rows are refused."""
    run(config_of(dataset, "method.subcentres=2", "train.max_steps=3"), tmp_path / "first")
    later = [f"init.backbone={tmp_path / 'first'}", "seed=5"]
    rows = rows_of(Ranks(), config_of(dataset, *later, "init.head=names", "method.subcentres=3")).unflatten(0, (40, 3))
    prototypes = rows_of(Ranks(), config_of(dataset, *later, "init.head=prototypes", "method.subcentres=3"))
    random = rows_of(Ranks(), config_of(dataset, *later, "method.subcentres=3")).unflatten(0, (40, 3))
    assert torch.equal(rows[:, :2], last_weights(tmp_path / "first")["head"].unflatten(0, (40, 2)))
    assert torch.equal(rows[:, 2], random[:, 2])
    assert torch.equal(prototypes.unflatten(0, (40, 3))[:, 1:], random[:, 1:])
    assert not torch.allclose(prototypes.unflatten(0, (40, 3))[:, 0], random[:, 0])
    with pytest.raises(UserError, match=r"each class has 2 rows there: set method\.subcentres = 2, or give init\.head"):
        rows_of(Ranks(), config_of(dataset, *later, "init.head=names"))


def test_a_head_that_knows_nobody_or_is_not_there_starts_no_run_by_names(dataset, tmp_path):
    run(config_of(dataset, "train.max_steps=1"), tmp_path / "first")
    shutil.copytree(dataset, tmp_path / "other")
    opened = open_dataset(dataset)
    write_manifest(tmp_path / "other", opened.manifest, [f"x{i}" for i in range(40)], opened.identity_counts())
    by_names = [f"init.backbone={tmp_path / 'first'}", "init.head=names"]
    with pytest.raises(UserError, match="no identity there has the name"):
        rows_of(Ranks(), config_of(tmp_path / "other", *by_names))
    with pytest.raises(UserError, match="no identity there has the name"):
        rows_of(Ranks(), config_of(tmp_path / "other", *by_names, "data.variants=3"))
    weights = tmp_path / "first" / "bare.safetensors"
    shutil.copy(checkpoints(tmp_path / "first")[-1] / "backbone.safetensors", weights)
    with pytest.raises(UserError, match="no checkpoint there"):
        rows_of(Ranks(), config_of(tmp_path / "other", f"init.backbone={weights}", "init.head=names"))
