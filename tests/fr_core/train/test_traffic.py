"""The bytes that a plan counts against those of real gloo processes, and of real checkpoints."""

from collections import Counter

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from fr_core.config.recipes import load_config
from fr_core.data.schema import open_dataset
from fr_core.nets.checkpoint_files import checkpoints
from fr_core.nets.iresnet import IResNet
from fr_core.ranks import Ranks
from fr_core.train.methods import step
from fr_core.train.traffic import buckets, checkpoint_bytes, exchanges, gradient_bytes
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import run, state_and_batches

WIDTH = 16  # of the teacher's embedding; the students have 32
FLAT = {
    "bigface": [],
    "fused": ["method.update=fused"],
    "sampled": ["method.sample_rate=0.3"],
    "uniface": ["method.margin.kind=uniface"],
    "curricular, accumulated": ["method.margin.kind=curricular", "train.accumulate=2"],
    "accumulated": ["train.accumulate=2", "train.compress_gradients=bfloat16"],
    "mobilefacenet": ["net={kind='mobilefacenet', input_size=32}"],
    "moe": ["net={kind='moe', depth=10, width=8, input_size=32, embedding=32, experts=2}"],
    "distill": [
        "method.distill.teacher=TEACHER",
        "method.distill.teacher_net=iresnet10",
        "method.distill.adapter=true",
    ],
}
TAUGHT = ["method.teacher=TEACHER", "method.teacher_net=iresnet10"]
PAIRS = {"quantface": [], "quantface, cross-entropy": ["method.cross_entropy={weight=0.1}"]}
GROUPED = {
    "attfc": [],
    "attfc, accumulated": ["method.order=reference", "train.accumulate=2"],
    "dcq": [],
    "f2c": [],
    "virtual_fc": ["method.class_images=2"],
}


def configs(dataset, grouped, folder):
    """Configs by name, of every method."""
    torch.manual_seed(0)
    teacher = folder / "teacher.safetensors"
    save_file(IResNet(10, 8, 1, 32, WIDTH).state_dict(), teacher)
    given = [
        *((name, "debug_bigface", dataset, own) for name, own in FLAT.items()),
        *((name, "debug_quantface", dataset, TAUGHT + own) for name, own in PAIRS.items()),
        *((name, f"debug_{name.partition(',')[0]}", grouped, own) for name, own in GROUPED.items()),
    ]
    common = ["tracking.uri=off", "data.lanes=4", "data.shuffle_window=256", "train.precision=float32"]
    return {
        name: load_config(
            recipe, [f"data.path={path}", *common, *(word.replace("TEACHER", str(teacher)) for word in own)]
        )
        for name, recipe, path, own in given
    }


class Reduced:
    """Takes the place of ``dist.all_reduce``, and adds up the bytes that it is given."""

    def __init__(self):
        self.bytes, self.all_reduce = 0, dist.all_reduce

    def __call__(self, tensor, *args, **kwargs):
        self.bytes += tensor.nbytes
        return self.all_reduce(tensor, *args, **kwargs)


def handed_in_a_step(ranks, given):
    """Bytes that this rank hands to collectives in a second step, by config, and those of DDP's buckets."""
    found = {}
    for name, config in given.items():
        state, stream = state_and_batches(config, ranks)
        step(config, state, next(stream), ranks)
        ranks.handed.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, "all_reduce", reduced := Reduced())
            step(config, state, next(stream), ranks)
        stream.close()
        found[name] = dict(ranks.handed), reduced.bytes - ranks.handed["all_reduce"]
    return found


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.soak)])
def test_a_step_hands_to_collectives_what_was_counted(size, dataset, grouped, tmp_path):
    """To the byte, for every method, and what DDP sums besides."""
    given = configs(dataset, grouped, tmp_path)
    for handed in run_ranks(size, handed_in_a_step, given):
        for name, config in given.items():
            counted = Counter()
            for exchange in exchanges(config, Ranks(0, size), WIDTH):
                counted[exchange.collective] += exchange.times * exchange.bytes
            assert handed[name] == (dict(counted), gradient_bytes(config)), name


def test_one_rank_exchanges_nothing(dataset, grouped, tmp_path):
    assert all(exchanges(config, Ranks(), WIDTH) == [] for config in configs(dataset, grouped, tmp_path).values())


def test_gradients_travel_in_buckets_of_25_mib_after_a_small_one():
    assert [buckets(size * 2**20) for size in (0, 1, 2, 26, 27, 126)] == [1, 1, 2, 2, 3, 6]


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("bigface", []),
        ("bigface", ["train.ema=0.9", "optim={kind='adamw', head={lr=0.1}}", "method.subcentres=2"]),
        ("attfc", []),
        ("dcq", ["train.precision=float32"]),
        ("virtual_fc", []),
    ],
)
def test_a_checkpoint_has_the_tensors_that_were_counted(recipe, overrides, dataset, grouped, tmp_path):
    path = dataset if recipe == "bigface" else grouped
    given = [f"data.path={path}", "tracking.uri=off", "train.max_steps=1", "train.precision=float32", *overrides]
    config = load_config(f"debug_{recipe}", given)
    run(config, tmp_path)
    files = [load_file(path) for path in checkpoints(tmp_path)[-1].glob("*.safetensors")]
    not_counted = ("labels_S", "optimizer/step/")  # labels of a queue, and AdamW's count of steps for each tensor
    sizes = [x.nbytes for file in files for name, x in file.items() if not name.startswith(not_counted)]
    identities = open_dataset(path).manifest.identities
    assert sum(sizes) == checkpoint_bytes(config, identities, Ranks(), "float32")
