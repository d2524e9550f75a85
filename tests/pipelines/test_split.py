import csv
import shlex
from functools import partial

import pytest

from fr_core.config.recipes import load_config
from fr_core.data.schema import open_dataset
from fr_core.errors import UserError
from fr_core.verify.pair_lists import read_pairs
from pipelines.cli import data
from pipelines.datasets import split as split_module
from pipelines.datasets.split import MIN_HELD_OUT, cut_folds, held_out_count, interval_of, split
from tests.helpers.commands import bigface, figures
from tests.helpers.datasets import write_dataset


def images_of(root):
    """(identity, JPEG) of every image of a dataset."""
    dataset = open_dataset(root)
    names = dataset.identity_names()
    rows = [row for shard, group, _ in dataset.row_groups.tolist() for row in dataset.read_images(shard, group)]
    return sorted((names[label], jpeg) for _, label, jpeg, _ in rows)


@pytest.mark.parametrize(
    ("people", "share", "held_out"),
    [(50, 0.1, 5), (50, 0.08, 4), (100, 0.29, 29), (50, 0.5, 25), (50, None, 20), (30, None, 15), (1000, None, 100)],
)
def test_as_many_people_are_held_out_as_asked(people, share, held_out):
    assert held_out_count(people, share, "shards") == held_out


def test_so_few_people_that_no_pairs_come_of_them_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"--share 0.02 of 50 people holds out 1, .*: use --share 0.08 or more"):
        held_out_count(50, 0.02, "shards")
    for people in (8, 51, 333, 12345):  # the share that the message names is enough
        with pytest.raises(UserError) as error:
            held_out_count(people, 0, "shards")
        named = float(str(error.value).split("use --share ")[1].split()[0])
        assert held_out_count(people, named, "shards") >= MIN_HELD_OUT
    with pytest.raises(UserError, match="more than half of the 50 people"):
        held_out_count(50, 0.6, "shards")
    shards = write_dataset(tmp_path / "shards", 70, 7)
    with pytest.raises(UserError, match="too few to split: 8 are needed"):
        split(shards, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="lies inside"):
        split(write_dataset(tmp_path / "enough", 90, 9), tmp_path / "enough" / "sub")
    assert not (tmp_path / "enough" / "sub").exists()
    assert data.PEOPLE_TO_SPLIT == 2 * MIN_HELD_OUT


def test_folds_hold_everybody_out_once_and_are_equal_in_both_layouts(tmp_path):
    held = {}
    for layout in ("flat", "grouped"):
        shards = write_dataset(tmp_path / layout, 100, 25, layout=layout)
        folds = cut_folds(shards, tmp_path / f"{layout}-folds", 3, pairs_per_fold=5)
        names, counts = open_dataset(shards).identity_names(), open_dataset(shards).identity_counts()
        held[layout] = [set(names) - set(open_dataset(fold.train).identity_names()) for fold in folds]
        several = {name for name, count in zip(names, counts, strict=True) if count > 1}
        assert set().union(*held[layout]) == several != set(names)
        assert sum(map(len, held[layout])) == len(several)
        for fold, people in zip(folds, held[layout], strict=True):
            pairs = read_pairs(fold.pairs)
            assert {path.split("/")[0] for path in pairs.paths} <= people
            assert sum(images.is_dir() for images in fold.images.iterdir()) == len(people)
            kept = [row for row in images_of(shards) if row[0] not in people]
            assert images_of(fold.train) == kept
    assert held["flat"] == held["grouped"]


def test_folds_are_cut_once_and_again_after_a_stop(tmp_path, monkeypatch):
    shards = write_dataset(tmp_path / "shards", 100, 25)
    cut, whole = partial(cut_folds, shards, tmp_path / "folds", 2), split_module.hold_out

    def stopped(dataset, held_out_N, out, *more):
        if out.name == "fold-1":
            raise KeyboardInterrupt
        return whole(dataset, held_out_N, out, *more)

    monkeypatch.setattr(split_module, "hold_out", stopped)
    with pytest.raises(KeyboardInterrupt):
        cut(pairs_per_fold=5)
    monkeypatch.setattr(split_module, "hold_out", whole)
    [first, second] = cut(pairs_per_fold=5)
    written = first.pairs.stat().st_mtime_ns
    cut(pairs_per_fold=5)
    assert first.pairs.stat().st_mtime_ns == written
    monkeypatch.setattr(split_module, "hold_out", stopped)
    with pytest.raises(KeyboardInterrupt):
        cut(pairs_per_fold=6)
    monkeypatch.setattr(split_module, "hold_out", whole)
    cut(pairs_per_fold=5)  # not the folds of which one is of the other cut
    assert [len(read_pairs(fold.pairs).same) for fold in (first, second)] == [5 * 2 * 6] * 2  # 12 people make 6 parts


def test_too_few_people_for_folds_are_refused(tmp_path):
    shards = write_dataset(tmp_path / "shards", 70, 7)
    with pytest.raises(UserError, match=r"7 people with two images or more are too few for 2 folds: 8 are needed"):
        cut_folds(shards, tmp_path / "folds", 2)
    assert not (tmp_path / "folds").exists()
    enough = write_dataset(tmp_path / "enough", 100, 25)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine.txt").touch()
    with pytest.raises(UserError, match="is not empty"):
        cut_folds(enough, tmp_path / "used", 2)


def test_few_people_have_a_wide_interval():
    assert [round(100 * interval_of(people)) for people in (5, 20, 100)] == [13, 7, 3]


@pytest.mark.parametrize("layout", ["flat", "grouped"])
def test_both_layouts_lose_no_image_and_the_end_names_the_next_command(tmp_path, layout):
    shards = write_dataset(tmp_path / "my shards", 300, 50, layout=layout, points=True)
    out = tmp_path / "my parts"
    printed = bigface("split", shards, "--out", out, "--share", 0.1, "--pairs", 20, "--json", tmp_path / "s.json")
    train = open_dataset(out / "train")
    assert train.manifest.layout == layout
    held = [(path.parent.name, path.read_bytes()) for path in (out / "verify" / "images").rglob("*.jpg")]
    assert sorted([*images_of(out / "train"), *held]) == images_of(shards)
    found = figures(tmp_path / "s.json")
    pairs = read_pairs(out / "verify" / "pairs.csv")
    assert (found["held_out_identities"], found["folds"], found["pairs"]) == (5, 2, 80) == (5, 2, len(pairs.same))
    assert found["distinct_pairs"] == len({frozenset(pair) for pair in zip(pairs.left, pairs.right, strict=True)})
    with (out / "verify" / "landmarks.csv").open() as file:
        points = [row["path"] for row in csv.DictReader(file)]
    assert 0 < len(points) < len(held)
    assert all((out / "verify" / "images" / path).is_file() for path in points)
    lines = printed.splitlines()
    assert f"held out: 5 people, {len(held)} images; 80 pairs" in lines[-3]
    assert "warning: 5 people give a wide 95 % interval, about ±13 points" in lines[-2]
    words = shlex.split(lines[-1][lines[-1].index("bigface train") :])
    recipe = {"flat": "bigface_small", "grouped": "debug_attfc"}[layout]  # 45 people fill no queue of attfc_r50
    assert words[:3] == ["bigface", "train", recipe]
    config = load_config(recipe, words[3:])
    assert config.method.facts.layout == layout
    assert config.data.path == str(out / "train")
    assert (str(config.verify.images), str(config.verify.pairs)) == (
        str(out / "verify" / "images"),
        str(out / "verify" / "pairs.csv"),
    )
