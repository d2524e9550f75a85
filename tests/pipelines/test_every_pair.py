"""Every method with a schedule that watches and one that does not, with and without masks; pairs that are refused."""

from itertools import combinations, product

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fr_core.config.recipes import load_config
from fr_core.data.schema import open_dataset
from fr_core.data.stream import batches, blocks_in_process, make_plan
from fr_core.errors import UserError
from fr_core.nets.iresnet import IResNet
from fr_core.ranks import Ranks
from fr_core.train.loop import remaining_batches, resume_or_init, step
from fr_core.train.update import metrics_of
from tests.helpers.datasets import write_dataset

# Recipe, what else it takes, and the layout that it reads.
METHODS = {
    "bigface": ("debug_bigface", (), "flat"),
    "partial_fc": ("debug_bigface", ("method.sample_rate=0.5",), "flat"),
    "distill": ("debug_distill", ("method.distill.teacher_net=iresnet10", "method.distill.teacher={teacher}"), "flat"),
    "quantface": ("debug_quantface", ("method.teacher_net=iresnet10", "method.teacher={teacher}"), "flat"),
    "attfc": ("debug_attfc", (), "grouped"),
    "dcq": ("debug_dcq", ("method.queue_size=24",), "grouped"),
    "f2c": ("debug_f2c", ("method.pool_size=24",), "grouped"),
    "virtual_fc": ("debug_virtual_fc", ("method.anchors=24",), "grouped"),
}
SCHEDULES = {
    "cosine": ["schedule.kind=cosine"],
    "fastface": ["schedule={kind='fastface',window=0.4,patience=0.9,tail=0}"],
}
MASKS = {"plain": 0.0, "masked": 1.0}
STEPS = 5

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Two layouts of 96 images of 24 people, and a teacher."""
    root = tmp_path_factory.mktemp("pairs")
    for layout in ("flat", "grouped"):
        write_dataset(root / layout, 96, 24, layout=layout)
    save_file(IResNet(10, 8, 1, 32, 32).state_dict(), root / "teacher.safetensors")
    return root


def config_of(places, method, *overrides):
    recipe, own, layout = METHODS[method]
    base = [f"data.path={places / layout}", "tracking.uri=off", "data.check_sha256=false", "train.global_batch=16"]
    base += [f"train.max_steps={STEPS}", "data.lanes=4"]
    return load_config(recipe, [*base, *(o.format(teacher=places / "teacher.safetensors") for o in own), *overrides])


def first_images(config):
    """[B, H, W, C] and the class images beside them."""
    plan = make_plan(config, open_dataset(config.data.path))
    stream = batches(config, plan, Ranks(), 0, 1, blocks_in_process)
    batch = next(stream)
    stream.close()
    return batch.images_BHWC, batch.class_images_BKHWC


def pairs_in(run):
    """Each two values of a run, with whose values they are."""
    return set(combinations(enumerate(run), 2))


def pairwise(*factors):
    """Of all runs as many as together have each pair of values of any two factors: always the one with most new."""
    runs = list(product(*factors))
    missing, chosen = set().union(*map(pairs_in, runs)), []
    while missing:
        chosen.append(max(runs, key=lambda run: len(pairs_in(run) & missing)))
        missing -= pairs_in(chosen[-1])
    return chosen


def test_each_two_values_are_in_a_run_and_no_run_is_in_vain():
    for factors in ((METHODS, SCHEDULES, MASKS), ("ab", "cde", "fg", "hij")):
        runs = pairwise(*factors)
        for one, other in combinations(range(len(factors)), 2):
            assert {(run[one], run[other]) for run in runs} == set(product(factors[one], factors[other]))
        assert all(pairs_in(run) - set().union(*map(pairs_in, runs[:number])) for number, run in enumerate(runs))
    assert len(pairwise(METHODS, SCHEDULES, MASKS)) == len(METHODS) * 2


@pytest.mark.parametrize(("method", "schedule", "masks"), pairwise(METHODS, SCHEDULES, MASKS))
def test_every_pair_trains(places, tmp_path, method, schedule, masks):
    config = config_of(places, method, *SCHEDULES[schedule], f"data.masks.ratio={MASKS[masks]}")
    state = resume_or_init(config, tmp_path, Ranks(), blocks_in_process)
    stream = remaining_batches(config, state, Ranks(), blocks_in_process)
    steps = [metrics_of(state, step(config, state, batch, Ranks())) for batch in stream]
    assert len(steps) == STEPS
    assert np.isfinite([metrics["loss"] for metrics in steps]).all()
    rates = [metrics["lr"] for metrics in steps]
    if schedule == "fastface":
        assert all(np.isfinite(metrics["detector"]) for metrics in steps)
        assert rates[0] == rates[-1]  # what the loss has not cut stays
    else:
        assert "detector" not in steps[0]
        assert rates == sorted(rates, reverse=True)
        assert rates[0] > rates[-1]


@pytest.mark.parametrize("method", METHODS)
def test_masks_are_on_what_the_method_trains_on(places, method):
    """All faces and all class images where all are to be masked, and nothing else changes."""
    plain, masked = (first_images(config_of(places, method, f"data.masks.ratio={ratio}")) for ratio in (0, 1))
    for ours, theirs in zip(plain, masked, strict=True):
        assert ours.shape == theirs.shape
        assert (ours != theirs).flatten(-3).any(-1).all()
        assert torch.equal(ours[..., :8, :, :], theirs[..., :8, :, :])  # above the eyes


REFUSED = {
    "masks without training": ("quantface", ["train.epochs=0", "data.masks.ratio=0.3"], "leave data.masks out"),
    "fastface without training": (
        "quantface",
        ["train.epochs=0", *SCHEDULES["fastface"]],
        'leave schedule.kind = "fastface" out',
    ),
    "a rate for a matrix that is none": ("attfc", ["optim.head.lr=0.1"], "attfc has none"),
    "a batch that f2c cannot share out": ("f2c", ["train.global_batch=30", "data.lanes=10"], "must be a multiple of 4"),
    "verification of nothing": ("bigface", ["train.verify_every=5"], "verify_every needs verify.pairs"),
    "images without pairs": ("bigface", ["verify.images=lfw"], "verify.images needs verify.pairs"),
    "queues and micro-batches": ("attfc", ["train.accumulate=2"], "train.accumulate = 1"),
    "two views of grouped shards": ("f2c", ["data.views=2"], "f2c reads grouped ones"),
    "an average of a key encoder": ("dcq", ["train.ema=0.9"], "leave train.ema out"),
    "distillation without a matrix": ("attfc", ["method.distill.teacher=run"], "unknown key"),
    "prototypes of no matrix": ("virtual_fc", ["init.backbone=run", "init.head=prototypes"], "virtual_fc has none"),
}


@pytest.mark.parametrize(("method", "overrides", "mend"), REFUSED.values(), ids=REFUSED.keys())
def test_what_would_be_ignored_is_refused_in_one_line(places, method, overrides, mend):
    with pytest.raises(UserError, match=mend) as caught:
        config_of(places, method, *overrides)
    assert "\n" not in str(caught.value)


def test_a_run_too_short_for_fastface_is_refused(places, tmp_path):
    config = config_of(places, "bigface", "schedule.kind=fastface")
    with pytest.raises(UserError, match=r"window = 0\.05 of 5 steps after the warm-up .*: raise schedule\.window"):
        resume_or_init(config, tmp_path, Ranks(), blocks_in_process)
