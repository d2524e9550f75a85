import pytest

from fr_core.config.methods import AttFC, Distill, Margin
from fr_core.config.optim import FastFace, Optimizer
from fr_core.config.recipes import load_config
from fr_core.config.sections import Section, Train
from fr_core.errors import UserError
from tune_spaces import joined
from tune_spaces.fields import (
    Choice,
    Integers,
    LogUniform,
    StepShare,
    Uniform,
    at_steps,
    check_knobs,
    grid,
    knob,
    with_values,
)

TEACHER = "method.distill.teacher=somebody"


def test_a_knob_finds_its_field():
    assert knob(AttFC, "margin.m2", Uniform(0, 1)).path == "method.margin.m2"
    assert knob(Optimizer, "lr", Uniform(0.1, 1)).path == "optim.lr"
    assert knob(Distill, "weight", Uniform(1, 2)).path == "method.distill.weight"


def test_a_field_that_does_not_exist_fails_at_once():
    class Elsewhere(Section):
        field: int = 0

    for section, field in ((AttFC, "ratio"), (AttFC, "margin.m4"), (FastFace, "gamma"), (Elsewhere, "field")):
        with pytest.raises(LookupError):
            knob(section, field, Uniform(0, 1))
    with pytest.raises(LookupError, match="not at one"):
        knob(Margin, "m2", Uniform(0, 1))


@pytest.mark.parametrize(
    ("space", "recipe", "overrides"),
    [
        *(("attfc", name, []) for name in ("attfc_r50", "attfc_r50_wf4m", "attfc_r50_wf21m", "debug_attfc")),
        *(("recurrence", name, []) for name in ("fastface_r100_ms1mv3", "fastface_r100_wf12m", "debug_fastface")),
        *(("bigface", name, []) for name in ("bigface_r50", "bigface_small", "bigface_moe", "debug_bigface", "demo")),
        ("haar", "debug_bigface", ["schedule.kind=fastface_haar"]),
        ("attfc+fastface", "debug_attfc", ["schedule.kind=fastface"]),
        ("distill", "bigface_distill_r240", []),
        ("distill", "debug_distill", [TEACHER]),
        ("quantface", "quantize_ekd", []),
        ("adaface", "adaface_r50", []),
        ("magface", "magface_r50", []),
        ("curricular", "curricularface_r50", []),
        ("elastic_arc", "elasticface_r50", []),
        ("uniface", "uniface_r50", []),
        ("subcentres", "subcentre_r50", []),
        ("ldam", "ldam_r50", []),
    ],
)
def test_every_end_of_the_spaces_is_valid(space, recipe, overrides):
    knobs = at_steps(joined(space), steps=100)
    ends = list(check_knobs(load_config(recipe, overrides), knobs))
    assert len(ends) >= 2 * len(knobs)
    assert len({end.model_dump_json() for end in ends}) >= len(ends) - len(knobs)  # one end may be the recipe's value


def test_a_knob_that_the_recipe_lacks_is_refused():
    for space, recipe, message in (
        ("attfc", "debug_bigface", "recipe has bigface: give method.kind=attfc"),
        ("fastface", "debug_attfc", "recipe has cosine: give schedule.kind=fastface"),
        ("distill", "debug_bigface", "distill_weight is a knob of method.distill.*give method.distill.teacher=REF"),
        ("quantface", "quantize_mse", "give method.loss.kind=ekd"),
    ):
        with pytest.raises(UserError, match=message):
            list(check_knobs(load_config(recipe), joined(space)))


def test_an_end_out_of_bounds_is_refused():
    wide = knob(AttFC, "size_ratio", Uniform(0.1, 1.5))
    with pytest.raises(UserError, match=r"size_ratio = 1.5.*must be at most 1"):
        list(check_knobs(load_config("debug_attfc"), [wide]))


def test_values_reach_their_fields_and_no_others():
    config = load_config("debug_attfc", ["schedule.kind=fastface"])
    knobs = joined("attfc+fastface", "m2,slope")
    turned = with_values(config, knobs, {"m2": 0.25, "slope": 0.125})
    assert (turned.method.margin.m2, turned.schedule.slope) == (0.25, 0.125)
    assert with_values(turned, knobs, {"m2": 0.2, "slope": config.schedule.slope}) == config


def test_spaces_join_and_lose_knobs():
    assert [k.name for k in joined("bigface+fastface")].count("lr") == 1
    assert [k.name for k in joined("attfc+fastface", "slope,size_ratio")] == ["slope", "size_ratio"]
    with pytest.raises(UserError, match="no space 'atfc'"):
        joined("atfc")
    with pytest.raises(UserError, match="did you mean size_ratio"):
        joined("attfc", "size_rato")


def test_a_share_of_the_steps_becomes_their_number():
    share = knob(Train, "max_steps", StepShare(0.25, 1.0))
    assert at_steps([share], 218)[0].domain == Integers(54, 218)
    assert at_steps(joined("attfc"), 218) == joined("attfc")


def test_points_of_a_grid():
    assert grid(Choice((4, 8))) == (4, 8)
    assert grid(Uniform(0, 1)) == (0, 0.5, 1)
    assert grid(LogUniform(0.01, 1)) == pytest.approx((0.01, 0.1, 1))
    assert grid(Integers(2, 3)) == [2, 3]
