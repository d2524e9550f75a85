"""Margins with a state, in runs: dropped steps, resumed runs, micro-batches."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

import fr_core.train.loop as loop
from fr_core.nets.checkpoint_files import checkpoints
from fr_core.ranks import Ranks
from fr_core.train.resume import load_checkpoint
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import config_of, losses, run, state_and_batches

STATEFUL = {
    "adaface": "method.margin.kind=adaface",
    "curricular": "method.margin.kind=curricular",
    "uniface": "method.margin.kind=uniface",
}
MARGINS = STATEFUL | {
    "magface": "method.margin.kind=magface",
    "elastic": "method.margin={kind='elastic_arc', plus='paper'}",
}


def margin_config(dataset, name, *overrides):
    return config_of(dataset, MARGINS[name], "train.global_batch=32", "train.max_steps=6", *overrides)


def stepped(config, ranks, bad=None):
    """Return the losses of three steps and the margin's buffers, with a gradient that is not finite in step ``bad``."""
    state, stream = state_and_batches(config, ranks)
    found = []
    for step in range(3):
        handle = None
        if step == bad:
            handle = state.backbone.conv1.weight.register_hook(lambda gradient: gradient * torch.inf)
        before = {name: buffer.clone() for name, buffer in state.head.margin.named_buffers()}
        found.append(loop.step(config, state, next(stream), ranks).metrics["loss"])
        if handle:
            handle.remove()
            assert all(torch.equal(buffer, before[name]) for name, buffer in state.head.margin.named_buffers())
    stream.close()
    return found, {name: buffer.clone() for name, buffer in state.head.margin.named_buffers()}, state.dropped_steps


def restored(ranks, config, folder):
    state, stream = state_and_batches(config, ranks)
    stream.close()
    load_checkpoint(config, state, folder, ranks)
    return {name: buffer.clone() for name, buffer in state.head.margin.named_buffers()}


@pytest.mark.parametrize("name", STATEFUL)
def test_a_dropped_step_leaves_no_trace_in_the_margins_state(dataset, name):
    config = margin_config(dataset, name)
    _, state, dropped = stepped(config, Ranks(), bad=1)
    assert dropped == 1
    assert all(float(buffer) != 0 for buffer in state.values())


@pytest.mark.parametrize("name", MARGINS)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(dataset, tmp_path, name):
    config = margin_config(dataset, name, "train.save_every=3")
    run(config, tmp_path / "whole")
    first, last = checkpoints(tmp_path / "whole")
    shutil.copytree(first, tmp_path / "resumed" / "checkpoints" / first.name)
    run(config, tmp_path / "resumed")
    assert losses(tmp_path / "resumed") == losses(tmp_path / "whole")[3:]
    ours, theirs = (
        load_file(folder / "head_00000.safetensors") for folder in (last, checkpoints(tmp_path / "resumed")[-1])
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("name", STATEFUL)
def test_the_margins_state_goes_to_other_numbers_of_ranks(dataset, tmp_path, name):
    config = margin_config(dataset, name, "train.max_steps=3", "train.save_every=3")
    run(config, tmp_path / "one")
    (folder,) = checkpoints(tmp_path / "one")
    saved = load_file(folder / "head_00000.safetensors")
    for state in run_ranks(2, restored, config, folder):
        assert state
        assert all(torch.equal(buffer, saved[f"margin.{key}"]) for key, buffer in state.items())


@pytest.mark.parametrize("name", MARGINS)
def test_two_micro_batches_and_partial_fc_train(dataset, name):
    """AdaFace's and CurricularFace's averages move once for each micro-batch."""
    config = margin_config(dataset, name, "train.accumulate=2", "method.sample_rate=0.5")
    found, state, dropped = stepped(config, Ranks())
    assert dropped == 0
    assert found[-1] < found[0]
    whole = stepped(margin_config(dataset, name, "method.sample_rate=0.5"), Ranks())[1]
    assert all(not torch.equal(state[key], whole[key]) for key in state)
