"""Overrides keep what they do not name, in both spellings and in any order."""

from itertools import permutations

import pytest

from fr_core.config import Config
from fr_core.config.nets import IResNetNet
from fr_core.config.overrides import overridden
from fr_core.config.recipes import load_config
from fr_core.config.reference import all_knobs
from fr_core.errors import UserError

OPTIM = """[optim]
lr = 0.3
weight_decay = 0.02
momentum = 0.5
clip = 1.0
reference_batch = 64
shard_state = true
head = { lr = 0.2 }
"""


@pytest.fixture
def recipe_of(tmp_path):
    """Returns the path of a recipe with this text."""

    def write(text):
        path = tmp_path / "mine.toml"
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize(
    "spellings",
    [
        (
            ["schedule={kind='fastface', patience=0.1}"],
            ["schedule.kind=fastface", "schedule.patience=0.1"],
            ["schedule=fastface", "schedule.patience=0.1"],
            ["schedule={patience=0.1}", "schedule.kind=fastface"],
            ["schedule={kind='constant', patience=0.2}", "schedule={kind='fastface', patience=0.1}"],
        ),
        (
            ["optim={kind='adamw', beta1=0.8, head={momentum=0.5, lr=0.1}}"],
            ["optim=adamw", "optim.beta1=0.8", "optim.head={momentum=0.5}", "optim.head.lr=0.1"],
        ),
        (
            ["method={kind='attfc', margin={m2=0.3}}"],
            ["method.kind=attfc", "method={margin={m2=0.3}}"],
            ["method.kind=attfc", "method.margin.m2=0.3"],
        ),
        (["net={depth=18}"], ["net.depth=18"], ["net.depth=50", "net={kind='iresnet', depth=18}"]),
    ],
)
def test_both_spellings_mean_the_same_in_any_order_of_kind_and_fields(spellings):
    first, *others = (load_config("bigface_small", spelling) for spelling in spellings)
    assert all(other == first for other in others)
    for spelling in spellings[:2]:
        assert all(load_config("bigface_small", order) == first for order in permutations(spelling))


def test_a_table_keeps_the_fields_that_it_does_not_name():
    own = load_config("bigface_small")
    config = load_config(
        "bigface_small",
        ["schedule={kind='fastface', patience=0.1}", "method={margin={m3=0.3}}", "data.augment={shift=0}"],
    )
    assert (config.schedule.warmup_epochs, config.schedule.patience) == (own.schedule.warmup_epochs, 0.1)
    assert own.schedule.warmup_epochs > 0  # which is the default
    assert (config.method.margin.scale, config.method.margin.m3) == (own.method.margin.scale, 0.3)
    assert config.data.augment == own.data.augment.model_copy(update={"shift": 0.0})
    milestones = load_config("bigface_r240_wf42m", ["schedule={factor=0.5}"]).schedule.milestones
    assert milestones == load_config("bigface_r240_wf42m").schedule.milestones


def test_the_last_override_of_a_field_counts():
    given = ["schedule={kind='cosine', final_ratio=0.1}", "schedule.final_ratio=0.2"]
    assert load_config("debug_bigface", given).schedule.final_ratio == 0.2
    assert load_config("debug_bigface", given[::-1]).schedule.final_ratio == 0.1
    assert load_config("debug_bigface", given[:1], given[1:]).schedule.final_ratio == 0.2


@pytest.mark.parametrize(
    ("text", "override", "kept", "default"),
    [
        (OPTIM, "optim.kind=muon", "clip shard_state head", "lr reference_batch weight_decay momentum"),
        (OPTIM, "optim.kind=adamw", "clip shard_state head", "lr reference_batch weight_decay"),
        (OPTIM, "optim.kind=lars", "weight_decay clip shard_state head", "lr reference_batch momentum"),
        (
            OPTIM + "kind = 'lars'",
            "optim.kind=sgd",
            "weight_decay clip shard_state head",
            "lr reference_batch momentum",
        ),
        (OPTIM, "optim.kind=sgd", "lr weight_decay momentum clip reference_batch shard_state head", ""),
        (
            "[schedule]\nkind = 'multistep'\nmilestones = [3, 4]\nwarmup_epochs = 2",
            "schedule.kind=cosine",
            "warmup_epochs",
            "final_ratio",
        ),
        (
            "[schedule]\nkind = 'fastface_recurrence'\nthreshold = 0.3",
            "schedule.kind=fastface_haar",
            "",
            "threshold window",
        ),
        ("[schedule]\nfinal_ratio = 0.3\nwarmup_epochs = 2", "schedule.kind=constant", "warmup_epochs", ""),
        ("[net]\ndepth = 18\nwidth = 16\ninput_size = 64", "net.kind=moe", "depth width input_size", "experts"),
        ("[net]\ndepth = 18\nembedding = 64\ninput_size = 64", "net.kind=mobilefacenet", "input_size", "embedding"),
        (
            "[method]\nkind = 'attfc'\nmargin = { m2 = 0.1 }\nencoder_momentum = 0.5\nprecision = 'float32'\ntile = 7",
            "method.kind=dcq",
            "precision tile",
            "margin encoder_momentum",
        ),
        (
            "[method]\nprecision = 'bfloat16'\ntile = 7\nmargin = { m3 = 0.1 }",
            "method.kind=attfc",
            "",
            "precision tile",
        ),
    ],
)
def test_a_new_kind_takes_over_what_means_the_same_in_both_kinds(recipe_of, text, override, kept, default):
    name = override.partition(".")[0]
    before = getattr(load_config(recipe_of(text)), name)
    after = getattr(load_config(recipe_of(text), [override]), name)
    for field in kept.split():
        assert getattr(after, field) == getattr(before, field) != type(after)().model_dump()[field]
    for field in default.split():
        assert getattr(after, field) == getattr(type(after)(), field)


def test_kinds_share_exactly_the_fields_that_the_page_of_knobs_describes_alike():
    described = {}  # section -> kind -> field -> what is said of it
    for knob in all_knobs():
        if knob.section and [place for place, _ in knob.choices] == [knob.section]:
            fields = described.setdefault(knob.section, {}).setdefault(knob.choices[-1][1], {})
            fields[knob.name.rpartition(".")[2]] = (knob.type, knob.bounds, knob.default, knob.description)
    assert {"net", "method", "optim", "schedule"} <= set(described)
    for section in ("net", "method", "optim", "schedule"):
        for old, new in permutations(described[section], 2):
            written = {section: {"kind": old} | dict.fromkeys(described[section][old], "written")}
            tree = overridden(Config, written, {section: {"kind": new}})[section]
            both = described[section][old].items() & described[section][new].items()
            assert tree == {"kind": new} | dict.fromkeys((field for field, _ in both), "written"), (old, new)


def test_a_loss_is_a_choice_like_any_other():
    own, loss = load_config("debug_quantface").method.loss, "relative_similarity"
    for override in (f"method.loss={loss}", f"method.loss.kind={loss}", f"method={{loss={{kind='{loss}'}}}}"):
        config = load_config("debug_quantface", [override])
        assert (config.method.loss.kind, config.method.loss.pool) == (loss, own.pool)
    assert load_config("debug_quantface", ["method.loss.pool=100", "method.loss=ekd"]).method.loss.pool == 100
    assert load_config("debug_quantface", ["method.loss=mse"]).method.loss.kind == "mse"


def test_a_net_can_be_put_in_the_recipes_place(recipe_of):
    recipe = recipe_of("[net]\nwidths = [8, 16, 24, 32]\ndropout = 0.5")
    net = IResNetNet(depth=18, width=16)
    assert load_config(recipe, net=net).net == net
    assert load_config(recipe, ["net.depth=34"], net=net).net == net.model_copy(update={"depth": 34})


def test_a_field_that_the_chosen_kind_lacks_is_refused_where_it_was_given(recipe_of):
    lacks = "unknown key schedule.power: kind cosine has no such key (kinds with it: polynomial): leave it out"
    mend = "or write schedule.kind=polynomial"
    recipe = recipe_of("[schedule]\nkind = 'polynomial'\n")
    typed, setting = ["schedule.power=3"], ["schedule.kind=cosine"]
    for source, given in (
        ("command line", ([*typed, *setting],)),
        ("command line", ([*setting, *typed],)),
        ("command line", ([*typed, *setting], ["seed=1"], "--setting a")),
        ("--setting a", (typed, setting, "--setting a")),
        ("--setting a", ([], [*typed, *setting], "--setting a")),
    ):
        with pytest.raises(UserError) as caught:
            load_config(recipe, *given)
        assert str(caught.value) == f"{source}: {lacks}, {mend}"
    load_config(recipe, [*typed, "schedule.kind=polynomial"])


def test_a_mistyped_field_of_the_recipe_is_not_dropped_with_the_old_kind(recipe_of):
    recipe = recipe_of("[schedule]\nkind = 'multistep'\nmilestones = [3]\nwarmup_epoch = 1\n")
    with pytest.raises(UserError, match=r"mine\.toml: unknown key schedule\.warmup_epoch: "):
        load_config(recipe, ["schedule.kind=cosine"])


def test_none_takes_a_value_of_the_recipe_away():
    config = load_config("bigface_distill_r240", ["optim.head.lr=none", "method.distill=none"])
    assert config.optim.head.lr is None
    assert config.method.distill is None
    with pytest.raises(UserError, match=r"optim.lr.*none"):
        load_config("demo", ["optim.lr=none"])
    assert load_config("demo", ["data.path='none'"]).data.path == "none"
