"""The predicted time of a step: formulas by hand on round figures, and what the command says."""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from fr_core.config.recipes import load_config
from fr_core.errors import UserError
from fr_core.nets.iresnet import IResNet
from fr_core.ranks import Ranks
from fr_core.train.traffic import Exchange, gradient_bytes
from fr_core.train.work import Operator
from pipelines.experiments.cards import CARDS, Rates, card_of, rates_of
from pipelines.experiments.step_time import (
    decode_seconds,
    exchanged,
    precisions_on,
    predicted,
    reduced,
    step_parts,
    time_table,
)
from tests.helpers.commands import bigface

SWEEP = {"maps": 1e12, "weights": 5e11, "logits": 2e12}
ROUND = Rates({"float32": 2e12, "bfloat16": 4e12}, {"float32": 1e12, "bfloat16": 4e12}, SWEEP, 5e-6, 1e9, 1e-5, True)
HALF = ("bfloat16", "bfloat16")


@pytest.mark.parametrize(
    ("operator", "seconds"),
    [
        (Operator("product", "float32", 10**12, 0), 1),
        (Operator("product", "bfloat16", 10**12, 0), 0.25),
        (Operator("convolution", "float32", 10**12, 0), 0.5),
        (Operator("product", "float32", 10**9, 10**12), 1),
        (Operator("maps", "float32", 0, 10**10), 0.01),
        (Operator("weights", "float32", 0, 10**10), 0.02),
        (Operator("logits", "float32", 0, 10**10), 0.005),
        (Operator("weights", "float32", 0, 0), 5e-6),
    ],
)
def test_an_operator_takes_the_longest_of_arithmetic_memory_and_launch(operator, seconds):
    assert ROUND.seconds(operator) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("collective", "sent"), [("all_gather", 7e6), ("reduce_scatter", 7e6 / 8), ("all_reduce", 14e6 / 8)]
)
def test_a_rank_of_a_ring_sends_all_but_its_share(collective, sent):
    part = exchanged(Exchange("x", collective, 10**6, 2), 8, ROUND)
    assert part.sent == pytest.approx(2 * sent)
    assert part.seconds == pytest.approx(2 * (sent / 1e9 + 3e-5))


def test_the_sum_of_gradients_hides_behind_the_backward_pass_but_for_its_last_bucket():
    config = load_config("bigface_r50")
    count = math.ceil((gradient_bytes(config) - 2**20) / (25 * 2**20)) + 1
    sent = 2 * 7 / 8 * gradient_bytes(config) / 1e9 + count * 3e-5
    last = 2 * 7 / 8 * 25 * 2**20 / 1e9 + 3e-5
    assert reduced(config, 8, ROUND, 10).seconds == pytest.approx(last)
    assert reduced(config, 8, ROUND, 0.1).seconds == pytest.approx(sent - 0.1)
    for overlaps, hidden in ((True, 0.1), (False, 0)):
        part = reduced(config, 8, replace(ROUND, overlaps=overlaps), 0.1)
        assert part.hidden == pytest.approx(hidden)
        assert part.seconds + part.hidden == pytest.approx(sent)
    half = load_config("bigface_r50", ["train.compress_gradients=bfloat16"])
    assert reduced(half, 8, ROUND, 0).sent == pytest.approx(reduced(config, 8, ROUND, 0).sent / 2)


def test_a_step_has_the_parts_that_its_recipe_asks_for(tmp_path):
    torch.manual_seed(0)
    teacher = tmp_path / "teacher.safetensors"
    save_file(IResNet(10, 8, 1, 32, 32).state_dict(), teacher)
    taught = ["method.teacher_net=iresnet10", f"method.teacher={teacher}"]
    parts = lambda recipe, *given, size=2: step_parts(  # noqa: E731
        load_config(f"debug_{recipe}", list(given)), 1000, Ranks(0, size), HALF, rates_of(CARDS["h100"], 2, 8, 1)
    )
    common = ["backbone forward", "backbone backward", "head", "update"]
    gathers = ["all_gather: embeddings", "reduce_scatter: their gradients", "all_gather: labels"]
    ends = ["all_reduce: loss and norms", "all_reduce: gradients"]
    assert list(parts("bigface", size=1)) == common
    assert list(parts("bigface")) == [*common, *gathers, "all_gather: softmax", *ends]
    assert list(parts("attfc")) == [*common[:2], "encoder", *common[2:], gathers[0], gathers[2], *ends]
    pairs = [*common[:2], "teacher", "pairs", "update", *gathers, "all_gather: teacher's embeddings", *ends]
    assert list(parts("quantface", *taught)) == pairs
    plain, again = parts("bigface"), parts("bigface", "train.recompute=true")
    assert 0.8 < again["recomputation"].flops / plain["backbone forward"].flops < 1
    assert again["backbone backward"] == plain["backbone backward"]


def test_micro_batches_cost_the_same_arithmetic_and_more_launches():
    given = lambda *more: step_parts(  # noqa: E731
        load_config("bigface_r50", ["train.global_batch=512", *more]), 10_000, Ranks(), HALF, ROUND
    )
    whole, split = given(), given("train.accumulate=4")
    for name in ("backbone forward", "backbone backward", "head"):
        assert split[name].flops == pytest.approx(whole[name].flops, rel=1e-3)
    assert split["backbone forward"].operators == 4 * whole["backbone forward"].operators


@pytest.mark.parametrize("kind", CARDS)
def test_cards_have_figures_that_can_be(kind):
    card = CARDS[kind]
    assert card.half >= card.tf32 >= card.float32 > 0
    assert 0.1 < card.memory < 10
    assert 10 < card.gib < 200
    assert card.link > 10
    assert "data sheet" in card.source or "whitepaper" in card.source


def test_two_nodes_meet_at_the_speed_of_their_network():
    card = card_of("a100-80")
    assert rates_of(card, 8, 8, 12.5).ring == pytest.approx(0.7 * 300e9)
    assert rates_of(card, 16, 8, 12.5).ring == pytest.approx(0.8 * 12.5e9)
    assert rates_of(card, 16, 8, 1e4).ring == pytest.approx(0.7 * 300e9)


def test_float32_convolutions_take_tf32_where_a_card_has_it_and_the_recipe_allows_it():
    speed = lambda kind, tf32: rates_of(card_of(kind), 1, 8, 1, tf32).convolution["float32"]  # noqa: E731
    assert speed("a100-80", True) == pytest.approx(0.4 * 156e12)
    assert speed("a100-80", False) == pytest.approx(0.8 * 19.5e12)
    assert speed("t4", True) == speed("t4", False) == pytest.approx(0.8 * 8.1e12)


def test_checkpoints_that_are_written_beside_the_training_cost_their_copy_alone():
    def share(*given):
        config = load_config("bigface_r50", ["train.save_every=100", *given])
        return predicted(config, 10_000, 1, card_of("h100"), 8, 12.5).checkpoint_share

    beside, at_once = share(), share("train.save_beside=false")
    assert at_once / (1 - at_once) == pytest.approx(11 * beside / (1 - beside))


def test_a_kind_of_card_that_is_not_known_names_those_that_are():
    with pytest.raises(UserError, match=r"--gpu h300: no such card: give one of t4, v100-16, .*h200$"):
        card_of("h300")


def test_cards_without_bfloat16_take_float16():
    config = load_config("bigface_r50")
    assert precisions_on(config, card_of("h100"))[0] == "bfloat16"
    assert precisions_on(config, card_of("t4"))[0] == "float16"
    assert precisions_on(load_config("attfc_r50"), card_of("v100-32")) == ("float16", "float16")
    assert precisions_on(load_config("attfc_r50", ["train.precision=float32"]), card_of("h100")) == (
        "float32",
        "float32",
    )
    for given in ("train.precision=bfloat16", "method.precision=bfloat16"):
        with pytest.raises(UserError, match=r"T4 has no bfloat16: give train\.precision=auto"):
            precisions_on(load_config("bigface_r50", [given]), card_of("t4"))


def test_a_run_on_small_images_first_is_faster_and_decodes_as_many():
    whole = predicted(load_config("bigface_r50"), 10_000, 1, card_of("a100-80"), 8, 12.5)
    small = load_config("bigface_r50", ["data.progressive={size=98,share=0.5}"])
    mixed = predicted(small, 10_000, 1, card_of("a100-80"), 8, 12.5)
    assert 0.8 * whole.seconds < mixed.seconds < 0.95 * whole.seconds
    assert mixed.parts == whole.parts
    assert mixed.decoded_per_second * mixed.seconds == pytest.approx(whole.decoded_per_second * whole.seconds)


def test_class_images_masks_and_changes_ask_for_more_cores():
    attfc = predicted(load_config("attfc_r50"), 100_000, 2, card_of("h100"), 8, 12.5)
    assert attfc.decoded_per_second == pytest.approx(3 * attfc.images_per_second)
    assert attfc.cores == pytest.approx(attfc.decoded_per_second * decode_seconds(load_config("attfc_r50")))
    needs = lambda *given: decode_seconds(load_config("bigface_r50", list(given)))  # noqa: E731
    assert needs("data.augment.flip=0") == needs() == 1 / 2800
    assert needs("data.augment.light=0.1") == pytest.approx(1 / 2800 + 1 / 8400)
    assert needs("data.masks.ratio=0.5") == pytest.approx(1 / 2800 + 0.5 / 1900)


def test_the_command_predicts_a_step_and_the_hours(tmp_path):
    asked = ["attfc_r50", "--identities", 1_029_950, "--images", 21_170_000, "--gpus", 16, "--gpu", "h100"]
    output = " ".join(bigface("plan", *asked, "--json", tmp_path / "p.json", "train.global_batch=1536").split())
    found = json.loads((tmp_path / "p.json").read_text())["figures"]
    assert "attfc_r50: 1,029,950 identities, 16 × H100 SXM, 79.1 GiB" in output
    assert "No card has checked this: expect a factor of 1.5 either way" in output
    assert "16 × H100 SXM" in output
    parts = [value for name, value in found.items() if name.startswith("ms_") and name != "ms_step"]
    assert sum(parts) == pytest.approx(found["ms_step"])
    assert found["predicted_images_per_second"] == pytest.approx(1536e3 / found["ms_step"])
    rate = found["predicted_images_per_second"] * (1 - found["checkpoint_share"])
    assert found["hours"] == pytest.approx(found["steps"] * 1536 / rate / 3600)
    slower = tmp_path / "slow.json"
    bigface("plan", *asked, "--network", 1, "--json", slower, "train.global_batch=1536")
    assert json.loads(slower.read_text())["figures"]["ms_step"] > found["ms_step"]


def test_the_memory_of_a_kind_of_card_can_be_overridden_and_a_measured_rate_counts():
    given = ["debug_bigface", "--identities", 100, "--images", 6400, "--gpu", "t4"]
    output = " ".join(bigface("plan", *given, "train.max_steps=100", "train.precision=auto").split())
    assert "1 × T4, 15 GiB" in output
    assert '"auto" is counted as float16' in output
    measured = bigface("plan", *given, "--gpu-gib", 7.5, "--images-per-second", 10, "train.max_steps=100")
    assert "1 × T4, 7.5 GiB" in measured
    assert "at 10 images/s" in measured


def test_a_table_adds_up():
    step = predicted(load_config("debug_bigface"), 100, 2, card_of("h100"), 8, 12.5)
    header, *rows, last = time_table(step)
    assert {len(row) for row in (header, *rows, last)} == {8}
    assert sum(float(row[1]) for row in rows) == pytest.approx(float(last[1]), abs=0.01 * len(rows))
