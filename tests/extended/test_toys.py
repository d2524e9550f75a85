"""Tests of everything that docs/extending.md adds. Only tests/test_extending.py runs them, on the extended sources."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

import fr_core
import fr_core.train.loop as loop
from fr_core.config.methods import BigFace
from fr_core.data.sources import list_source
from fr_core.errors import UserError
from fr_core.heads.sharded_fc import ShardedFC
from fr_core.nets.checkpoint_files import checkpoints
from fr_core.nets.open import open_net
from fr_core.ranks import Ranks
from fr_core.train.resume import load_checkpoint
from pipelines.datasets.ingest import ingest
from pipelines.nets.export import export
from tests.helpers import runs
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import losses, rank_run, run, state_and_batches
from tune_spaces import joined
from tune_spaces.fields import with_values

BY_LENGTH = "method.margin={kind='length', scale=16.0, momentum=0.5}"
MEAN = "margin.mean_length"


def config_of(shards, *overrides):
    return runs.config_of(shards, "train.global_batch=24", "train.max_steps=6", *overrides)


def npair_of(shards, *overrides):
    return config_of(shards, "method={kind='npair'}", "data.lanes=4", "data.shuffle_window=256", *overrides)


def restored(ranks, config, folder):
    """Return the margin's buffer on this rank, after it loaded a checkpoint."""
    state, stream = state_and_batches(config, ranks)
    stream.close()
    load_checkpoint(config, state, folder, ranks)
    return state.head.state_dict()[MEAN]


def test_these_are_the_extended_sources():
    assert Path(fr_core.__file__).is_relative_to(Path.cwd())


# The margin


def test_the_margin_is_its_formula():
    """The reference is the whole matrix in float64, with a running mean over two steps."""
    method = BigFace.model_validate({"margin": {"kind": "length", "scale": 16.0, "m3": 0.3, "momentum": 0.5}})
    head = ShardedFC(11, 8, method, Ranks(), seed=0)
    random, mean = torch.Generator().manual_seed(0), None
    for _ in range(2):
        x = torch.randn(6, 8, generator=random).mul_(torch.rand(6, 1, generator=random) + 0.5).requires_grad_()
        labels = torch.tensor([0, 10, 4, 4, 7, 5])
        loss = head(x, labels)
        loss.backward()
        y = x.detach().double().requires_grad_()
        length = y.detach().norm(dim=1)
        mean = length.mean() if mean is None else 0.5 * mean + 0.5 * length.mean()
        logits = F.normalize(y) @ F.normalize(head.weight.detach().double()).T
        margin = F.one_hot(labels, 11) * (0.3 * (length / mean).clamp(max=2))[:, None]
        expected = F.cross_entropy(16 * (logits - margin), labels)
        expected.backward()
        assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-5)
        assert torch.allclose(x.grad.double(), y.grad, atol=1e-5)
    assert float(head.margin.mean_length) == pytest.approx(float(mean), rel=1e-6)


def test_a_dropped_step_takes_the_margins_buffer_back(dataset):
    config = config_of(dataset, BY_LENGTH)
    state, stream = state_and_batches(config)
    loop.step(config, state, next(stream), Ranks())
    before = state.head.margin.mean_length.clone()
    state.backbone.conv1.weight.register_hook(lambda gradient: gradient * torch.inf)
    loop.step(config, state, next(stream), Ranks())
    stream.close()
    assert state.bad_steps == 1
    assert torch.equal(state.head.margin.mean_length, before)
    assert before > 0


def test_the_margins_buffer_goes_with_a_run_to_other_numbers_of_workers(dataset, tmp_path):
    config = config_of(dataset, BY_LENGTH, "train.save_every=3")
    run_ranks(2, rank_run, config, tmp_path / "two")
    [first, last] = checkpoints(tmp_path / "two")
    saved = load_file(first / "head_00000.safetensors")[MEAN]
    assert saved > 0
    assert MEAN not in load_file(first / "head_00001.safetensors")
    for size in (1, 3):
        assert all(torch.equal(mean, saved) for mean in run_ranks(size, restored, config, first))
    shutil.copytree(first, tmp_path / "one" / "checkpoints" / first.name)
    run(config, tmp_path / "one")
    assert len(losses(tmp_path / "one")) == 3
    [_, ours] = checkpoints(tmp_path / "one")
    ours, theirs = (load_file(folder / "head_00000.safetensors")[MEAN] for folder in (ours, last))
    assert not torch.equal(theirs, saved)
    assert float(ours) == pytest.approx(float(theirs), rel=0.2)  # batch statistics differ with the ranks


# The backbone


def test_the_backbone_trains_opens_and_is_exported(dataset, tmp_path):
    pytest.importorskip("onnxruntime")
    net = "net={kind='patchnet', width=8, input_size=32, embedding=32}"
    config = config_of(dataset, net, "data.variants=2", "train.ema=0.5")
    run(config, tmp_path / "run")
    assert len(losses(tmp_path / "run")) == 6
    assert np.isfinite(losses(tmp_path / "run")).all()
    opened = open_net(tmp_path / "run")
    images = np.random.default_rng(0).integers(0, 255, (4, 32, 32, 3), np.uint8)
    bare = open_net(checkpoints(tmp_path / "run")[-1] / "backbone.safetensors")
    assert np.array_equal(opened.embed(images), bare.embed(images))
    assert type(opened.net).__name__ == "PatchNet"
    shrinking = config_of(dataset, net, "data.progressive={size=28, share=0.5}")
    run(shrinking, tmp_path / "progressive")
    assert export(str(tmp_path / "run"), tmp_path / "net.onnx")["least_cosine"] > 1 - 1e-5
    assert np.allclose(open_net(tmp_path / "net.onnx").embed(images), opened.embed(images), atol=1e-5)


# The method


def test_the_method_resumes_bit_for_bit(grouped, tmp_path):
    config = npair_of(grouped, "train.save_every=3")
    run(config, tmp_path / "whole")
    [first, last] = checkpoints(tmp_path / "whole")
    assert not list(last.glob("head_*"))
    shutil.copytree(first, tmp_path / "resumed" / "checkpoints" / first.name)
    run(config, tmp_path / "resumed")
    assert losses(tmp_path / "resumed") == losses(tmp_path / "whole")[3:]


def first_steps(ranks, config):
    """Return losses with batch norm in inference mode, which do not depend on the number of ranks."""
    state, stream = state_and_batches(config, ranks)
    state.backbone.train = lambda mode=True, net=state.backbone: type(net).train(net, False)
    found = [loop.step(config, state, next(stream), ranks).metrics["loss"] for _ in range(3)]
    stream.close()
    return found


def test_two_ranks_of_the_method_are_one(grouped):
    config = npair_of(grouped, "optim.lr=0.005")
    alone = first_steps(Ranks(), config)
    assert alone[0] != alone[1]
    for found in run_ranks(2, first_steps, config):
        assert found == pytest.approx(alone, rel=1e-4)


# The source


def test_the_source_is_ingested(photos, tmp_path):
    people = shutil.copytree(photos, tmp_path / "people")
    file = people / "people.json"
    listed = {folder.name: [f"{folder.name}/{photo.name}" for photo in folder.iterdir()] for folder in photos.iterdir()}
    file.write_text(json.dumps(listed))
    manifest = ingest(file, tmp_path / "shards", image_size=32, on_ray=False)
    assert (manifest.images, manifest.identities) == (30, 6)
    file.write_text('{"a": ["../a.jpg"]}')
    with pytest.raises(UserError, match="leads out of"):
        list_source(file)
    file.write_text("[1]\n")
    with pytest.raises(UserError, match="expected the images of each person in JSON"):
        list_source(file)


# The space


def test_the_space_searches_the_methods_field(grouped):
    [knob] = joined("npair")
    assert with_values(npair_of(grouped), [knob], {"scale": 32.0}).method.scale == 32
