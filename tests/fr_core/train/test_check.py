"""The same checks of config, data and workers run in the launcher and in the loop."""

from itertools import pairwise

import pytest

from fr_core.config.methods import DCQ, F2C, AttFC, BigFace, QuantFace, VirtualFC
from fr_core.config.recipes import load_config, recipes
from fr_core.data.schema import open_dataset
from fr_core.data.stream import blocks_in_process
from fr_core.errors import UserError
from fr_core.ranks import Ranks
from fr_core.train.check import check_warmup, checked_plan, trained_people
from fr_core.train.loop import train_loop
from pipelines.train import train
from tests.helpers.runs import config_of, state_and_batches

MISTAKES = {  # workers, overrides, message
    "no data": (1, ["data.path="], "data.path is not set"),
    "flat shards": (1, ["method.kind=attfc"], "holds flat shards; attfc reads grouped ones"),
    "a batch that two cannot share": (2, ["train.global_batch=33", "data.lanes=11"], "2 workers|lanes"),
    "ghosts that do not fill a share": (2, ["train.ghost_batch=12"], "train.ghost_batch = 12 does not divide the 16"),
    "a stretch too short to decide": (1, ["schedule={kind='fastface_haar', window=0.01}"], "is less than 2"),
    "a warm-up to the end": (1, ["schedule.warmup_epochs=2"], "schedule.warmup_epochs = 2 leaves no step after"),
    "pairs that are not there": (1, ["verify.pairs=/none.csv", "verify.images=/none"], "/none.csv"),
    "a net made of nothing": (1, ["net={kind='quantised', net={kind='iresnet'}}"], "made of a trained net"),
    "a rate that SGD cannot take": (1, ["optim.kind=adamw"], "whose rate is not that of adamw: give optim.head.lr"),
    "another such rate": (1, ["optim.kind=lars"], "whose rate is not that of lars: give optim.head.lr"),
    "more workers than identities": (41, ["train.global_batch=41", "data.lanes=41"], "41 workers for 40 identities"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_loop_refuses_what_the_command_line_refuses(dataset, tmp_path, mistake):
    workers, overrides, message = MISTAKES[mistake]
    config = config_of(dataset, *overrides)
    with pytest.raises(UserError, match=message) as launched:
        train(config, tmp_path / "run", workers)
    with pytest.raises(UserError, match=message) as looped:
        train_loop(config, tmp_path / "run", Ranks(0, workers), blocks_in_process, lambda metrics, saved: None)
    assert str(launched.value).split(": ")[-1] == str(looped.value).split(": ")[-1]
    assert not (tmp_path / "run").exists()


def test_a_warm_up_leaves_a_step_to_the_schedule(dataset):
    """The dataset has 46 steps an epoch; a run of 20 steps may warm up for 19 of them."""
    plan = checked_plan(config_of(dataset, f"schedule.warmup_epochs={19.9 / 46}"), 1)
    assert plan.steps_per_epoch == 46
    with pytest.raises(UserError, match=r"the run ends after 0\.435 epochs: give fewer, such as .*=0\.043"):
        checked_plan(config_of(dataset, f"schedule.warmup_epochs={20 / 46}"), 1)
    checked_plan(config_of(dataset, "schedule.warmup_epochs=0.043"), 1)
    for recipe in recipes():
        config = load_config(recipe)
        check_warmup(config, config.train.epochs)
    check_warmup(load_config("debug_quantface", ["train.epochs=0"]), 0)


def write_pairs(folder, *names):
    """Writes small files, and a list that pairs the images of each person and of neighbouring people."""
    for name in names:
        for shot in "ab":
            (folder / "images" / name).mkdir(parents=True, exist_ok=True)
            (folder / "images" / name / f"{shot}.jpg").touch()
    rows = [f"{name}/a.jpg,{name}/b.jpg,1" for name in names]
    rows += [f"{one}/a.jpg,{other}/a.jpg,0" for one, other in pairwise(names)]
    (folder / "pairs.csv").write_text("\n".join(["image_a,image_b,same", *rows]))
    return f"verify.pairs={folder / 'pairs.csv'}"


def test_a_folder_without_the_pairs_images_is_refused_before_training(dataset, tmp_path):
    pairs = write_pairs(tmp_path / "held", "x", "y")
    checked_plan(config_of(dataset, pairs, f"verify.images={tmp_path / 'held' / 'images'}"), 1)
    with pytest.raises(UserError, match=r"none of the 3 pairs .* no .*held/x/a.jpg: give verify.images=.*held/images$"):
        checked_plan(config_of(dataset, pairs, f"verify.images={tmp_path / 'held'}"), 1)
    with pytest.raises(UserError, match="give the folder that the pairs' paths"):
        checked_plan(config_of(dataset, pairs, f"verify.images={dataset}"), 1)


def test_weights_that_are_not_there_are_refused_before_training(dataset):
    with pytest.raises(UserError, match=r"init\.backbone: /nope: no such run, checkpoint or weights file"):
        checked_plan(config_of(dataset, "init.backbone=/nope"), 1)


def test_people_who_are_trained_on_and_verified_are_counted(dataset, tmp_path):
    pairs = write_pairs(tmp_path / "held", "id3", "id7", "nobody")
    assert trained_people(config_of(dataset, pairs, "verify.images=x"), open_dataset(dataset)) == (2, 3)
    (tmp_path / "flat.csv").write_text("image_a,image_b,same\na.jpg,b.jpg,1\na.jpg,c.jpg,0\n")
    flat = config_of(dataset, "verify.images=x", f"verify.pairs={tmp_path / 'flat.csv'}")
    assert trained_people(flat, open_dataset(dataset)) == (0, 0)
    assert trained_people(config_of(dataset), open_dataset(dataset)) == (0, 0)


FACTS = {  # layout, images trained and encoded per image of a batch, multiple, micro-batches, encoder, centres of 100
    BigFace: ("flat", 1, 0, 1, True, "none", 0),
    AttFC: ("grouped", 1, 2, 1, False, "kept", 24),
    DCQ: ("grouped", 1, 1, 1, True, "shipped", 8192),
    F2C: ("grouped", 1.5, 1.5, 4, False, "kept", 8192),
    VirtualFC: ("grouped", 2, 0, 1, False, "none", 8192),
    QuantFace: ("flat", 1, 0, 1, False, "none", 0),
}


@pytest.mark.parametrize("section", FACTS, ids=lambda section: section.__name__)
def test_every_method_states_its_facts(section):
    method = section()
    facts = method.facts
    found = (facts.layout, facts.trained, facts.encoded, facts.batch_multiple, facts.whole_batch is None, facts.encoder)
    assert (*found, method.centres(100, 8)) == FACTS[section]


@pytest.mark.parametrize("method", ["bigface", "attfc", "dcq", "f2c", "virtual_fc"])
def test_what_a_state_holds_is_what_the_section_says(dataset, grouped, method):
    shards = dataset if method == "bigface" else grouped
    config = load_config(f"debug_{method}", [f"data.path={shards}", "tracking.uri=off", "data.lanes=8"])
    plan = checked_plan(config, 1)
    state, stream = state_and_batches(config)
    batch = next(stream)
    stream.close()
    facts = config.method.facts
    assert plan.dataset.manifest.layout == facts.layout
    assert batch.class_images_BKHWC.shape[1] == facts.class_images
    assert (state.encoder is not None) == (facts.encoder != "none")
    assert state.ships_encoder == (facts.encoder == "shipped")
    centres = config.method.centres(plan.dataset.manifest.identities, config.train.global_batch)
    assert [len(centre) for centre in state.head.state_dict().values() if centre.ndim == 2][:1] in ([centres], [40])
