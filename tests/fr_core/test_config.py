import ast
import re
from pathlib import Path

import pytest

from fr_core.config import Config, lane_count, total_steps
from fr_core.config.recipes import SHIPPED, load_config, parse_config, recipes, stored_config
from fr_core.config.reference import knob_names
from fr_core.config.words import KINDS, MENDS
from fr_core.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("recipe", recipes())
def test_recipes_load_and_say_what_they_need(recipe):
    load_config(recipe)
    header = (SHIPPED / f"{recipe}.toml").read_text().split("\n[")[0]
    for word in ("command", "hardware", "time", "expect"):
        assert f"#   {word}" in header


def test_a_stored_config_means_what_it_meant():
    """FastFace had one form, the published recurrence, and encoders had no warm-up."""
    tree = load_config("debug_attfc", ["schedule.kind=fastface_recurrence", "schedule.start=published"]).model_dump()
    assert stored_config(tree, "run").model_dump() == tree
    old = {**tree, "schedule": tree["schedule"] | {"kind": "fastface"}, "method": dict(tree["method"])}
    del old["method"]["encoder_warmup"]
    then = stored_config(old, "run")
    assert then.schedule.model_dump() == tree["schedule"]
    assert then.method.momentum_at(0) == tree["method"]["encoder_momentum"]
    new = load_config("debug_fastface", ["schedule.kind=fastface"]).model_dump()
    assert stored_config(new, "run").schedule.kind == "fastface"


def test_overrides_take_toml_values_and_bare_words():
    config = load_config(
        "debug_bigface", ["optim.lr=0.5", "data.path=a/b", "data.augment.flip=0", "schedule.kind=constant"]
    )
    assert (config.optim.lr, config.data.path, config.data.augment.flip) == (0.5, "a/b", 0.0)
    assert config.schedule.kind == "constant"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.momentun=0.9", "did you mean optim.momentum?"),
        ("trian.epochs=3", "unknown key trian: did you mean train?"),
        ("optim.lr=-1", "optim.lr=-1 must be greater than 0"),
        ("optim.lr=nan", "optim.lr=nan must be a finite number"),
        ("optim.lr=fast", "optim.lr='fast' is no number: give a number > 0, such as optim.lr=0.1"),
        ("optim.lr=0,1", "optim.lr='0,1' is no number: write optim.lr=0.1"),
        ("net.width=wide", "net.width='wide' is no whole number: give a whole number ≥ 8"),
        ("net.widths=[8, 8, 8]", "net.widths=[8, 8, 8] must be 4 whole numbers each ≥ 8"),
        ("net.widths=[8, 8, 8, 4]", "net.widths[3]=4 must be at least 8"),
        ("net.depth=51", "net.depth=51 must be 10, 18, 34"),
        ("train.recompute=maybe", "train.recompute='maybe' is neither true nor false: write train.recompute=true or"),
        ("data.path=3", "data.path=3 is no text: put it in double quotes"),
        ("data.size=112", "write net.input_size=112"),
        ("method.scale=64", "did you mean method.margin.scale? write method.margin.scale=64"),
        ("optim={kind='muon',sgd={lrr=1}}", "unknown key optim.sgd.lrr: did you mean optim.sgd.lr?"),
        ("train.foo=1", "unknown key train.foo: see bigface knobs train"),
        ("train.verify_every=true", "train: verify_every = true: this field takes neither true nor false"),
        ("schedule.warmup_epochs=-1", "schedule.warmup_epochs=-1 must be at least 0"),
        ("optim.lr.x=1", "optim.lr is a value, not a section: write optim.lr=…"),
        ("data.path={x=1}", "data.path is a value, not a section"),
        ("net=3", "net is a section, not '3': write one of its fields"),
        ("optim.lr", "not of the form key.path=value"),
        ("train.accumulate=3", "does not divide train.global_batch"),
        ("verify.pairs=p.csv", "verify.pairs needs verify.images"),
    ],
)
def test_bad_overrides_name_the_key_and_the_mend(override, message):
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        load_config("debug_bigface", [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.accumulate=2", "train.accumulate = 1"),
        ("method.clip_head=5.0", "leave method.clip_head out"),
        ("train.precision=float16", "cannot scale the loss"),
    ],
)
def test_what_the_fused_mode_cannot_do_is_refused(override, message):
    with pytest.raises(UserError, match=message):
        load_config("debug_bigface", ["method.update=fused", override])


def test_a_knob_of_another_kind_cannot_be_written():
    with pytest.raises(UserError, match=r"unknown key schedule\.power: kind cosine has no such key \(.*polynomial\)"):
        parse_config({"schedule": {"kind": "cosine", "power": 2.0}}, "test")
    with pytest.raises(
        UserError, match=r"unknown key net\.depth: kind mobilefacenet has no .*, or write net\.kind=iresnet$"
    ):
        parse_config({"net": {"kind": "mobilefacenet", "depth": 18}}, "test")


def test_unknown_recipe_names_the_nearest(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="did you mean 'bigface_small'"):
        load_config("bigface_smal")
    with pytest.raises(
        UserError, match=r"backbone are .*attfc_r50, .*bigface_r50, .*; or write net\.kind=iresnet net\.depth=50"
    ):
        load_config("resnet50")
    with pytest.raises(UserError, match="ArcFace is a margin of bigface"):
        load_config("arcface")
    (tmp_path / "mine.toml").touch()
    (tmp_path / "search").mkdir()
    (tmp_path / "search/winner.toml").touch()
    monkeypatch.chdir(tmp_path)
    for name, message in (
        ("mine", "no recipe 'mine': write mine.toml"),
        ("search", "write search/winner.toml"),
        (tmp_path, "a folder, not a recipe"),
        ("gone.toml", "gone.toml: no such file"),
        ("data.path=x", "the recipe's name is missing: write it before data.path=x"),
        ("nothing", "no recipe 'nothing': give your TOML file, or a shipped recipe such as bigface_small"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            load_config(name)
    broken = tmp_path / "broken.toml"
    broken.write_text("[net\n")
    with pytest.raises(UserError, match="not TOML"):
        load_config(broken)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learning_rate=0.1", "unknown key learning_rate: the learning rate is optim.lr: write optim.lr=0.1"),
        ("train.lr=0.1", "write optim.lr=0.1"),
        ("learnin_rate=0.1", "write optim.lr=0.1"),
        ("num_classes=93431", "the classes are counted from the shards: leave it out"),
        ("batch_size=64", "write train.global_batch=64"),
        ("weight_decay=0.5", "did you mean optim.weight_decay? write optim.weight_decay=0.5"),
        ("epochs=3", "write train.epochs=3"),
        ("backbone=r100", "write net.kind=iresnet net.depth=100"),
        ("net.kind=ir50", "unknown kind 'ir50' of net: write net.kind=iresnet net.depth=50"),
        ("net=resnet50", "unknown kind 'resnet50' of net: write net.kind=iresnet net.depth=50"),
        ("net.kind=resnet151", "net.depth=N, where N is one of 10, 18"),
        (
            "net.kind=iresnt",
            "did you mean 'iresnet'? The kinds are: iresnet, moe, mobilefacenet, ghostfacenet, vit, factory, quantised",
        ),
        ("method.kind=arcface", "write method.kind=bigface method.margin.m2=0.5 method.margin.m3=0"),
        ("method.kind=uniface", "write method.kind=bigface method.margin.kind=uniface"),
        ("method.margin.kind=arc", "unknown kind 'arc' of method.margin. The kinds are: fixed, adaface, magface"),
        ("method.kind=sphere", "unknown kind 'sphere' of method. The kinds are: bigface, attfc"),
        ("net.kind=quantised", "needs the float net that it quantises: to quantise a trained run use bigface quantize"),
        ("schedule.kind=multistep", "schedule.milestones is missing: give schedule.milestones="),
        ("data.augment=3", "data.augment is a section, not '3': write one of its fields, such as data.augment.flip="),
    ],
)
def test_words_of_other_code_are_told_bigfaces_field(override, message):
    with pytest.raises(UserError) as caught:
        load_config("debug_bigface", [override])
    assert str(caught.value).startswith("command line: ")
    assert message in str(caught.value)


def test_methods_without_a_class_matrix_keep_the_fixed_margin():
    with pytest.raises(UserError, match=r"^command line: method\.margin\.kind='adaface' must be fixed$"):
        load_config("attfc_r50", ["method.margin.kind=adaface"])


def test_a_new_kind_of_margin_keeps_the_recipes_scale():
    given = load_config("debug_bigface", ["method.margin.kind=magface"]).method.margin
    assert (given.kind, given.scale, given.low_margin) == ("magface", 16.0, 0.45)


def test_no_word_of_other_code_is_a_field_at_its_place():
    assert not set(MENDS) & set(Config.model_fields)
    assert not set(KINDS) & {"bigface", "attfc", "dcq", "f2c", "virtual_fc", "quantface", "multistep", "polynomial"}
    for word in MENDS:
        with pytest.raises(UserError, match=f"unknown key {word}: "):
            load_config("debug_bigface", [f"{word}=1"])


def test_what_a_mend_says_can_be_written():
    for words in (["method.kind=bigface", "method.margin.m2=0.5", "method.margin.m3=0"], ["optim.lr=0.1"]):
        load_config("debug_bigface", words)
    load_config("bigface_r50", ["net={kind='quantised', net={kind='iresnet', depth=50}}", "init.backbone=RUN"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[optim]\nlearning_rate = 0.1\n", "the learning rate is optim.lr: write lr = 0.1 under [optim]"),
        ('net = "resnet50"\n', 'write kind = "iresnet" and depth = 50 under [net]'),
        ('checkpoint = "my run"\n', 'write backbone = "my run" under [init]'),
        ('[schedule]\nkind = "step"\n', "schedule = {kind='multistep', milestones=[10, 15]} above the first [section]"),
        ("[optim]\nlr = -1\n", "optim.lr = -1 must be greater than 0"),
    ],
)
def test_a_mistake_in_a_file_is_mended_in_the_file(text, message, tmp_path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text(text)
    with pytest.raises(UserError, match=re.escape(message)):
        load_config(recipe)


def test_a_setting_is_blamed_for_its_own_mistakes():
    for overrides, setting, blamed in (
        (["optim.lr=0.1"], ["lr=0.1"], "--setting a: unknown key lr"),
        (["lr=0.1"], ["optim.lr=0.1"], "command line: unknown key lr"),
    ):
        with pytest.raises(UserError, match=f"^{blamed}"):
            load_config("debug_bigface", overrides, setting, "--setting a")


def test_the_guilty_one_is_named(tmp_path):
    """A mistake in the recipe's file is the file's, one in an override is the command line's."""
    recipe = tmp_path / "mine.toml"

    def blamed(text, *overrides):
        recipe.write_text(text)
        with pytest.raises(UserError) as caught:
            load_config(recipe, overrides)
        return str(caught.value).partition(": ")[0]

    assert blamed("[optim]\nlr = -1\n") == str(recipe)
    assert blamed("[optim]\nlr = -1\n", "train.epochs=3") == str(recipe)
    assert blamed("[optim]\nlr = -1\n", "optim.lr=-2") == "command line"
    assert blamed("[optim]\nlr = 1\n", "optim.lr=-2") == "command line"
    assert blamed("[train]\nglobal_batch = 32\n", "train.accumulate=3") == "command line"
    assert blamed("[train]\nglobal_batch = 32\naccumulate = 3\n", "optim.lr=1") == str(recipe)
    assert blamed("[net]\ndepth = 18\n", "net.kind=mobilefacenet", "net.depth=34") == "command line"
    assert blamed("[optim]\nlr = -1\n", "optim={momentum=0.5}") == str(recipe)
    assert blamed("[net]\nkind = 'cnn'\n", "net={depth=18}") == str(recipe)
    assert blamed("learning_rate = 0.1\n", "optim.lr=1") == str(recipe)


def test_lanes_are_the_largest_divisor_up_to_64():
    batch = lambda n: parse_config({"train": {"global_batch": n}}, "test")  # noqa: E731
    assert [lane_count(batch(n)) for n in (384, 128, 96, 100, 7, 67)] == [64, 64, 48, 50, 7, 1]


def test_methods_with_class_images_get_a_lane_for_24_images_of_the_batch_within_16_and_64():
    """So the recipes of AttFC keep the 16 lanes that they always had, and 64 workers share a batch of 1,536."""
    batch = lambda n: parse_config({"method": {"kind": "attfc"}, "train": {"global_batch": n}}, "test")  # noqa: E731
    assert [lane_count(batch(n)) for n in (7, 48, 100, 256, 384, 400)] == [7, 16, 10, 16, 16, 16]
    assert [lane_count(batch(n)) for n in (768, 1024, 1536, 2048, 4096, 3 * 4096)] == [32, 32, 64, 64, 64, 64]
    names = [name for name in recipes() if name.startswith("attfc_")]
    assert {lane_count(load_config(name)) for name in names} == {16}
    assert {lane_count(load_config(name, ["train.global_batch=1536"])) for name in names} == {64}


def test_total_steps():
    config = parse_config({"train": {"epochs": 3, "max_steps": 20}}, "test")
    assert [total_steps(config, per_epoch) for per_epoch in (5, 10)] == [15, 20]


def readers(module):
    """All nodes of a config's module, without its rules and validators."""
    waiting = [module]
    while waiting:
        node = waiting.pop()
        yield node
        for child in ast.iter_child_nodes(node):
            function = isinstance(child, ast.FunctionDef)
            if not (
                function
                and (child.name.endswith("_rules") or "validator" in ast.dump(ast.Module(child.decorator_list, [])))
            ):
                waiting.append(child)


def test_no_dead_knobs():
    """Each field is read as an attribute outside its declaration, its validators, the rules and the table of words."""
    read = set()
    for path in [*ROOT.glob("fr_core/**/*.py"), *ROOT.glob("pipelines/**/*.py")]:
        if path.name in ("mends.py", "words.py"):
            continue
        module = ast.parse(path.read_text())
        for node in readers(module) if path.parent.name == "config" else ast.walk(module):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                read.add(node.attr)
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                read.add(node.value)  # model_dump(include={"lr", …})
    sections = {"kind"}
    dead = [path for path in knob_names() if path.split(".")[-1] not in read | sections]
    assert dead == []


def test_config_survives_json():
    config = load_config("debug_bigface", ["schedule.kind=multistep", "schedule.milestones=[1, 2.5]"])
    assert Config.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("net", "least"),
    [("net.stem_stride=2", 33), ("net.stem_stride=1", 49), ("net={kind='mobilefacenet',input_size=64}", 49)],
)
def test_progressive_sizes_end_in_the_same_feature_map(net, least):
    import torch

    from fr_core.nets.build import build_net

    given = ["net.input_size=64", net] if "kind" not in net else [net]
    for size, fits in ((least - 1, False), (least, True), (63, True), (64, False)):
        override = f"data.progressive={{size={size},share=0.5}}"
        if not fits:
            with pytest.raises(UserError, match=f"feature map allows {least} to 63"):
                load_config("debug_bigface", [*given, override])
            continue
        module = build_net(load_config("debug_bigface", [*given, override]).net).eval()
        assert module(torch.zeros(1, 3, size, size)).shape == module(torch.zeros(1, 3, 64, 64)).shape
