import json

import pytest

from fr_core.config.recipes import load_config
from fr_core.data.schema import open_dataset
from fr_core.errors import UserError
from pipelines.experiments.plan import batch_text, duration, main_memory, plan
from tests.helpers.commands import bigface

R50 = ["train.global_batch=384"]


def test_what_fits_and_what_does_not():
    _, advice, figures = plan(load_config("bigface_r50", R50), 1000, 1, 24)
    assert figures["fits"] == 1
    assert "It fits" in advice
    _, advice, figures = plan(load_config("bigface_r50", R50), 2_000_000, 1, 24)
    assert figures["fits"] == 0
    assert "method.update=fused" in advice
    _, advice, _ = plan(load_config("bigface_r50", R50), 1000, 1, 10)
    assert "train.recompute=true" in advice
    assert plan(load_config("bigface_r50", [*R50, "train.recompute=true"]), 1000, 1, 10)[2]["fits"] == 1
    mobile = ["net={kind='mobilefacenet'}", "train.global_batch=4096"]
    _, advice, _ = plan(load_config("bigface_r50", mobile), 1000, 1, 24)
    assert "train.accumulate=" in advice
    _, advice, _ = plan(load_config("bigface_r50", R50), 40_000_000, 1, 24)
    assert "Partial FC" in advice or "cards" in advice


def test_a_rate_that_only_a_class_matrix_asks_for_does_not_keep_from_planning():
    """The columns of full FC have a class matrix, whose rate LARS does not say."""
    table, _, figures = plan(load_config("debug_attfc", ["optim.kind=lars"]), 1000, 1, 24)
    assert figures["fits"] == 1
    assert "full FC, plain" in table[0]


def test_workers_that_share_no_lanes_are_refused_as_training_refuses_them():
    config = load_config("debug_bigface", ["train.global_batch=192"])
    with pytest.raises(UserError, match="3 workers do not divide the run's 64 lanes; use 2 or 4"):
        plan(config, 1000, 3, 24)


@pytest.mark.parametrize(("rate", "time"), [(2500, "a second"), (100, "26 seconds"), (10, "4.3 minutes")])
def test_short_times_are_told_in_seconds(rate, time):
    assert (
        f"20 steps, about {time} at"
        in duration(load_config("debug_bigface", ["train.global_batch=128"]), 3000, rate)[0]
    )


def test_the_advice_holds():
    config = load_config("bigface_r50", [*R50, "method.update=fused"])
    assert plan(config, 2_000_000, 1, 24)[2]["fits"] == 1


def test_attfc_fits_where_the_class_matrix_does_not():
    """A million people on one 24 GiB card at batch 384; the knobs are the method's own."""
    table, _, figures = plan(load_config("attfc_r50"), 1_029_950, 1, 24)
    assert figures["fits"] == 1
    assert figures["centres_gib"] < 0.4
    assert table[-1][:2] == ("fits", "yes")
    many = "method.class_images=5"
    assert "train.recompute=true" in plan(load_config("attfc_r50", [many]), 1_029_950, 1, 17)[1]
    advice = plan(load_config("attfc_r50", [many, "train.recompute=true"]), 1_029_950, 1, 9)[1]
    assert "method.order=reference" in advice


def test_ghost_batches_are_kept_whole():
    given = ["train.ghost_batch=96", "train.recompute=true"]
    advice = plan(load_config("bigface_r50", [*R50, *given]), 1_029_950, 1, 8)[1]
    assert "train.accumulate=8" not in advice  # 48 images at once
    with pytest.raises(UserError, match="does not divide"):
        plan(load_config("bigface_r50", [*R50, "train.ghost_batch=100"]), 1000, 1, 24)


def test_a_batch_that_the_cards_cannot_share():
    with pytest.raises(UserError, match="not a multiple"):
        plan(load_config("bigface_r50", R50), 1000, 7, 24)


@pytest.mark.parametrize("recipe", ["attfc", "dcq", "f2c", "virtual_fc"])
def test_methods_with_class_images_are_planned_as_bigface_is(recipe):
    config = load_config(f"debug_{recipe}")
    table, _, figures = plan(config, 1000, 2, 24)
    names = [row[0] for row in table]
    assert names[0] == "part"
    assert f"{config.method.centres(1000, config.train.global_batch):,} class centres" in names
    assert ("encoder" in names) == (recipe != "virtual_fc")
    pixels, images = 3 * config.net.input_size**2, config.train.global_batch // 2
    count, encoded = config.method.facts.class_images, int(images * config.method.facts.encoded)
    assert figures["class_images_gib"] == pytest.approx(pixels * (count * images + 4 * encoded) / 2**30)
    kept = [figures[f"{name}_gib"] for name in ("backbone", "backbone_optimizer", "activations", "class_images")]
    assert figures["total_gib"] > sum(kept)
    assert f"{images} images on each card, with {count} class image" in batch_text(config, 2)


def test_main_memory_is_that_of_the_images_between_the_strands(grouped, dataset):
    """By hand: 308,736 slots and a window between two images, times five between six, and five windows."""
    config = load_config("attfc_r50")
    line, figures = main_memory(config, 1_029_950, 21_170_000, 2, None)
    held = 5 * (308_736 + 16_384) + 5 * 16_384
    assert figures == {"encoded_gib": held * 6144 / 2**30, "decoded_gib": 2.0}
    assert "9.77 GiB of images in chunks of 6 (data.spread), 2.00 GiB of decoded ones" in line
    assert main_memory(config, 1_029_950, None, 2, None)[1] == figures
    near = load_config("attfc_r50", ["data.spread=16384", "data.decoded_mib=0"])
    fewer = main_memory(near, 1_029_950, None, 2, None)[1]
    assert fewer == {"encoded_gib": (5 * 32_768 + 5 * 16_384) * 6144 / 2**30, "decoded_gib": 0}
    most = load_config("attfc_r50", ["method.size_ratio=1"])
    bounded = main_memory(most, 10**7, None, 2, None)[1]["encoded_gib"]
    assert bounded == (5 * (2**19 + 16_384) + 5 * 16_384) * 6144 / 2**30
    manifest = open_dataset(grouped).manifest
    whole = main_memory(load_config("debug_attfc"), 60, 600, 1, manifest)[1]
    assert whole["encoded_gib"] == 2 * sum(shard.bytes for shard in manifest.shards) / 2**30
    assert whole["decoded_gib"] == 600 * 3 * 32 * 32 / 2**30
    assert main_memory(load_config("bigface_r50"), 1000, 10_000, 1, open_dataset(dataset).manifest) == ("", {})


def test_the_command_says_the_main_memory_of_grouped_shards(grouped, dataset, tmp_path):
    shown = bigface("plan", "debug_attfc", f"data.path={grouped}", "--json", tmp_path / "p.json")
    assert "GiB of images in chunks of 6" in shown
    assert json.loads((tmp_path / "p.json").read_text())["figures"]["encoded_gib"] > 0
    assert "chunks" not in bigface("plan", "debug_bigface", f"data.path={dataset}")


def test_hours_are_told_where_the_user_has_measured_a_rate():
    config = load_config("bigface_r50", ["train.global_batch=100", "train.epochs=3"])
    line, figures = duration(config, 360_050, 100)
    assert figures == {"steps": 3 * 3600, "hours": 3}
    assert "10,800 steps, about 3.0 hours at 100 images/s" in line
    assert "about 6 minutes" in duration(config, 360_050, 3000)[0]
    line, figures = duration(config, 360_050, None)
    assert figures == {"steps": 10_800}
    assert "give --images-per-second" in line
    assert duration(config, None, 100)[1] == {}
    warmup = load_config("bigface_r50", ["train.global_batch=100", "train.epochs=3", "schedule.warmup_epochs=3"])
    for images in (None, 360_050):
        with pytest.raises(UserError, match=r"schedule\.warmup_epochs = 3 leaves no step .* after 3 epochs"):
            duration(warmup, images, None)
    with pytest.raises(UserError, match="99 images are fewer than a batch of 100"):
        duration(config, 99, None)


def test_identities_are_those_of_the_data(dataset, tmp_path):
    data = ["debug_bigface", f"data.path={dataset}", "train.max_steps=10"]
    output = bigface("plan", *data, "--workers", 2, "--images-per-second", 50, "--json", tmp_path / "p.json")
    found = json.loads((tmp_path / "p.json").read_text())["figures"]
    assert (found["identities"], found["cards"], found["steps"]) == (40, 2, 10)
    assert (found["global_batch"], found["images_per_card"]) == (32, 16)
    assert found["hours"] == pytest.approx(10 * 32 / 50 / 3600)
    assert "debug_bigface: 40 identities, 2 × 24 GiB" in output
    assert "figure" not in output  # the table stands once
    with pytest.raises(UserError, match=r"give --identities N, or data\.path=SHARDS"):
        bigface("plan", "debug_bigface")


def test_the_command(tmp_path):
    output = bigface("plan", "bigface_r50", "--identities", 1_029_950, "--json", tmp_path / "p.json")
    assert "not yet checked on a card" in " ".join(output.split())
    assert json.loads((tmp_path / "p.json").read_text())["figures"]["total_gib"] > 4
