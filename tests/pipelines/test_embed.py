import csv
import shutil

import numpy as np
import pytest

from fr_core.data.decode import decode
from fr_core.data.embeddings import open_embeddings
from fr_core.data.schema import open_dataset
from fr_core.errors import UserError
from fr_core.nets.open import open_net
from pipelines.datasets.clean import clean
from pipelines.datasets.embed import embed
from pipelines.datasets.ingest import ingest
from pipelines.datasets.merge import merge
from pipelines.datasets.split import split
from tests.helpers.commands import bigface, figures
from tests.helpers.datasets import write_dataset


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    """An untrained net's weights: what looks alike is alike to it too."""
    import torch
    from safetensors.torch import save_file

    from fr_core.nets.iresnet import IResNet

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("net") / "weights.safetensors"
    save_file(IResNet(10, 8, 1, 32, 16).state_dict(), path)
    return str(path), "iresnet10"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("small") / "shards", 240, 12, per_shard=80)


def whole(embeddings):
    return tuple(np.concatenate(parts) for parts in zip(*embeddings.by_identity(), strict=True))


@pytest.mark.parametrize("layout", ["flat", "grouped"])
def test_every_image_is_embedded_as_open_net_does(tmp_path, net, small, grouped, layout):
    root = small if layout == "flat" else grouped
    labels, ids, found = whole(embed(net[0], root, tmp_path / "out", net[1], on_ray=False))
    opened = open_dataset(root)
    rows = [row for s, g, _ in opened.row_groups.tolist() for row in opened.read_images(s, g)]
    rows.sort(key=lambda row: (row[1], row[0]))
    assert ids.tolist() == [row[0] for row in rows]
    assert labels.tolist() == [row[1] for row in rows]
    expected = open_net(*net).embed(np.stack([decode(row[2]) for row in rows]))
    assert np.allclose(found, expected, atol=1e-5)


def test_what_was_begun_goes_on_and_nothing_else_is_touched(tmp_path, net, small):
    out = tmp_path / "out"
    first = whole(embed(net[0], small, out, net[1], on_ray=False))
    (out / "embeddings-00001.parquet").unlink()
    kept = (out / "embeddings-00000.parquet").stat().st_mtime_ns
    with pytest.raises(UserError, match="1 of 3 files are missing"):
        open_embeddings(out)
    told = []
    again = whole(embed(net[0], small, out, net[1], on_ray=False, progress=lambda *counts: told.append(counts)))
    assert told == [(160, 240), (240, 240)]
    assert (out / "embeddings-00000.parquet").stat().st_mtime_ns == kept
    for one, other in zip(first, again, strict=True):
        assert np.array_equal(one, other)
    with pytest.raises(UserError, match="is not empty; --overwrite"):
        embed(net[0], small, out, net[1], flip=False, on_ray=False)
    with pytest.raises(UserError, match="is not empty"):
        embed(net[0], small, small, net[1], on_ray=False)
    shutil.copytree(small, tmp_path / "copy")
    embed(net[0], small, tmp_path / "copy", net[1], on_ray=False, overwrite=True)  # beside the shards, not over them
    assert contents(tmp_path / "copy") == contents(small)


def test_identities_come_whole_however_little_fits_in_memory(tmp_path, net, small):
    embeddings = embed(net[0], small, tmp_path / "out", net[1], on_ray=False)
    parts = list(embeddings.by_identity(in_memory=40 * 16 * 4))
    assert len(parts) > 3
    seen = [set(labels.tolist()) for labels, _, _ in parts]
    assert sum(map(len, seen)) == len(set.union(*seen)) == 12
    for one, other in zip(whole(embeddings), (np.concatenate(p) for p in zip(*parts, strict=True)), strict=True):
        assert np.array_equal(one, other)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Photos of which two lie in another's folder, one shows nobody, and one is there twice."""
    from fr_core.data.crops import encode

    root, random = tmp_path_factory.mktemp("mixed") / "people", np.random.default_rng(1)
    bases = [np.kron(random.integers(0, 255, (4, 4, 3)), np.ones((8, 8, 1))) for _ in range(5)]
    for folder in range(5):
        (root / f"p{folder}").mkdir(parents=True)
        for shot in range(8):
            person = (folder + 1) % 5 if folder < 2 and shot == 3 else folder
            image = bases[person] + random.normal(0, 12, (32, 32, 3))
            if (folder, shot) == (4, 5):
                image = np.tile(np.linspace(0, 255, 32)[:, None, None], (1, 32, 3))
            data = encode(np.clip(image, 0, 255).astype(np.uint8))
            (root / f"p{folder}" / f"{shot}.jpg").write_bytes(data)
    (root / "p3" / "9.jpg").write_bytes((root / "p3" / "0.jpg").read_bytes())
    return root


def test_clean_lists_what_does_not_belong_and_merge_leaves_it_out(tmp_path, net, mixed):
    manifest = ingest(mixed, tmp_path / "shards", image_size=32, on_ray=False)
    assert manifest.images == 41
    # an untrained net's embeddings all point one way: what counts are differences from their mean
    from pipelines.datasets.clean import Limits

    found = clean(tmp_path / "shards", net[0], tmp_path / "out", net[1], Limits(0.9, 0.9, 0.9999), on_ray=False)
    with (tmp_path / "out" / "clean.csv").open() as file:
        rows = list(csv.DictReader(file))
    flips = {(row["identity"], row["other_identity"]) for row in rows if row["finding"] == "flip"}
    assert flips == {("p0", "p1"), ("p1", "p2")}
    assert [row["identity"] for row in rows if row["finding"] == "copy"] == ["p3"]
    assert found["images"] == 41
    assert (tmp_path / "out" / "clean.png").is_file()
    merged = merge([tmp_path / "shards"], tmp_path / "cleaned", without=tmp_path / "out" / "clean.csv")
    assert merged["left_out"] == len(rows)
    left = {row["sample_id"] for row in rows}
    before, after = contents(tmp_path / "shards"), contents(tmp_path / "cleaned")
    assert after == {key: value for key, value in before.items() if str(key) not in left}


@pytest.mark.parametrize("layout", ["dataset", "grouped"])
def test_a_person_whose_images_are_all_left_out_is_no_class(tmp_path, layout, request):
    source = request.getfixturevalue(layout)
    names, before = open_dataset(source).identity_names(), contents(source)
    gone = [key for key, (name, _) in before.items() if name == names[3]]
    (tmp_path / "list.csv").write_text("\n".join(["sample_id,identity", *(f"{key},{names[3]}" for key in gone)]))
    found = merge([source], tmp_path / "rest", without=tmp_path / "list.csv")
    assert (found["identities_left_out"], found["joined"], found["left_out"]) == (1, 0, len(gone))
    with_images = [name for name, count in zip(names, open_dataset(source).identity_counts(), strict=True) if count]
    assert open_dataset(tmp_path / "rest").identity_names() == [name for name in with_images if name != names[3]]
    assert contents(tmp_path / "rest") == {key: value for key, value in before.items() if key not in gone}
    with (tmp_path / "rest" / "identity_map.csv").open() as file:
        assert [row["identity"] for row in csv.DictReader(file) if not row["becomes"]] == [names[3]]


def contents(root):
    opened = open_dataset(root)
    names = opened.identity_names()
    rows = [row for s, g, _ in opened.row_groups.tolist() for row in opened.read_images(s, g)]
    assert opened.manifest.images == len(rows)
    assert np.array_equal(np.bincount([row[1] for row in rows], minlength=len(names)), opened.identity_counts())
    return {row[0]: (names[row[1]], row[2]) for row in rows}


@pytest.mark.parametrize("layout", ["flat", "grouped"])
def test_merged_identities_stay_apart_unless_told(tmp_path, layout):
    a = write_dataset(tmp_path / "a", 300, 10, layout=layout)
    b = write_dataset(tmp_path / "b", 200, 10, seed=1, layout=layout)
    figures = merge([a, b], tmp_path / "apart")
    assert (figures["images"], figures["identities"], figures["shared_names"]) == (500, 20, 10)
    assert (figures["joined"], figures["left_out"], figures["identities_left_out"]) == (0, 0, 0)
    one, two, both = contents(a), contents(b), contents(tmp_path / "apart")
    assert sorted(both.values()) == sorted(
        [(f"{name}@a", jpeg) for name, jpeg in one.values()] + [(f"{name}@b", jpeg) for name, jpeg in two.values()]
    )
    said = bigface("merge", a, b, "--out", tmp_path / "told", "--in-process")
    assert "10 names are in several of the datasets" in said
    assert "--same-names joins them" in said
    assert merge([a, b], tmp_path / "one", same_names=True)["joined"] == 10
    assert {name for name, _ in contents(tmp_path / "one").values()} == {f"id{i}" for i in range(10)}
    for row in range(2):  # all shard has images of both
        opened = open_dataset(tmp_path / "apart")
        assert {image[1] < 10 for image in opened.read_images(row, 0)} == {True, False}


def test_overlap_is_found_by_the_centres(tmp_path, net, photos):
    for name, shots in (("a", "012"), ("b", "34")):
        for path in photos.rglob("*.jpg"):
            if path.stem in shots and not (name == "a" and path.parent.name == "person0"):
                new = tmp_path / name / f"{name}{path.parent.name}" / path.name
                new.parent.mkdir(parents=True, exist_ok=True)
                new.write_bytes(path.read_bytes())
        ingest(tmp_path / name, tmp_path / f"{name}_shards", on_ray=False)
    found = merge(
        [tmp_path / "a_shards", tmp_path / "b_shards"], tmp_path / "out", model=net[0], net=net[1], overlap=0.99,
        on_ray=False,
    )  # fmt: skip
    with (tmp_path / "out" / "identity_map.csv").open() as file:
        becomes = {row["identity"]: row["becomes"] for row in csv.DictReader(file)}
    assert found["joined"] == 5
    assert all(becomes[f"bperson{i}"] == f"aperson{i}" for i in range(1, 6))
    assert becomes["bperson0"] == "bperson0"
    assert contents(tmp_path / "out")[0][0].startswith("aperson")


def test_what_cannot_be_merged_is_refused(tmp_path, dataset, grouped):
    with pytest.raises(UserError, match="different form cannot be merged: flat 32 px, grouped 32 px"):
        merge([dataset, grouped], tmp_path / "out")
    with pytest.raises(UserError, match="--without is for one dataset"):
        merge([dataset, dataset], tmp_path / "out", without=tmp_path / "list.csv")
    with pytest.raises(UserError, match="is not empty"):
        merge([dataset], grouped)
    (tmp_path / "list.csv").write_text("path\n1.jpg\n")
    with pytest.raises(UserError, match="a column sample_id of whole numbers"):
        merge([dataset], tmp_path / "out", without=tmp_path / "list.csv")
    (tmp_path / "list.csv").write_text("sample_id,identity\n3,id3\n1500,id4\n")
    with pytest.raises(UserError, match="1 of the 2 listed samples are not in"):
        merge([dataset], tmp_path / "out", without=tmp_path / "list.csv")
    (tmp_path / "list.csv").write_text("sample_id,identity\n3,somebody\n")
    with pytest.raises(UserError, match="sample 3 is 'somebody' in the list, 'id3' in the dataset"):
        merge([dataset], tmp_path / "other", without=tmp_path / "list.csv")
    ids = "\n".join(["sample_id", *map(str, range(1500))])
    (tmp_path / "list.csv").write_text(ids)
    with pytest.raises(UserError, match="no images are left"):
        merge([dataset], tmp_path / "another", without=tmp_path / "list.csv")


def test_of_three_datasets_a_person_is_one_by_name_and_by_centre(tmp_path, net, photos):
    parts = {"a": ("0", "y"), "b": ("12", "x"), "c": ("34", "x")}  # the same people, called otherwise in a
    for folder, (shots, prefix) in parts.items():
        for path in photos.rglob("*.jpg"):
            if path.stem in shots:
                new = tmp_path / folder / f"{prefix}{path.parent.name}" / path.name
                new.parent.mkdir(parents=True, exist_ok=True)
                new.write_bytes(path.read_bytes())
        if folder == "a":
            for path in list((tmp_path / "a").rglob("*.jpg")):
                (path.parent / "again.jpg").write_bytes(path.read_bytes())
        ingest(tmp_path / folder, tmp_path / f"{folder}_shards", on_ray=False)
    shards = [tmp_path / f"{folder}_shards" for folder in parts]
    found = merge(shards, tmp_path / "out", True, net[0], net[1], 0.99, on_ray=False)
    assert found["identities"] == 6
    assert {name for name, _ in contents(tmp_path / "out").values()} == {f"yperson{i}" for i in range(6)}


def test_split_holds_identities_out_with_pairs_of_them(tmp_path, dataset):
    from fr_core.verify.pair_lists import read_pairs

    found = split(dataset, tmp_path / "out", share=0.5, pairs_per_fold=6)
    train = contents(tmp_path / "out" / "train")
    held = {path.parent.name for path in (tmp_path / "out" / "verify" / "images").rglob("*.jpg")}
    assert held.isdisjoint(name for name, _ in train.values())
    assert len(held) == found["held_out_identities"] == 20
    assert found["images"] + found["held_out_images"] == 1500
    assert found["identities"] == 20
    pairs = read_pairs(tmp_path / "out" / "verify" / "pairs.csv")
    assert len(pairs.same) == 120
    assert {path.split("/")[0] for path in pairs.paths} <= held
    with pytest.raises(UserError, match="is not empty"):
        split(dataset, tmp_path / "out")
    with pytest.raises(UserError, match=r"6 people with two images or more are too few to split: 8 are needed"):
        split(write_dataset(tmp_path / "few", 60, 6), tmp_path / "other")


def test_the_commands(tmp_path, net, small):
    shards = str(small)
    given = ["--net", net[1], "--in-process", "--json", str(tmp_path / "out.json")]
    bigface("clean", shards, "--model", net[0], "--out", str(tmp_path / "clean"), *given)
    assert figures(tmp_path / "out.json")["images"] == 240
    (made,) = (tmp_path / "clean" / "embeddings").iterdir()
    before = [path.stat().st_mtime_ns for path in sorted(made.glob("*.parquet"))]
    bigface("embed", net[0], "--data", shards, "--out", str(made), *given)
    assert figures(tmp_path / "out.json")["embedding"] == 16
    assert [path.stat().st_mtime_ns for path in sorted(made.glob("*.parquet"))] == before
    for command in (
        ["embed", net[0], "--data", shards],
        ["merge", shards],
        ["split", shards],
        ["clean", shards, "--model", net[0]],
    ):
        with pytest.raises(UserError, match="this option takes a local path"):
            bigface(*command, "--out", "s3://bucket/out")


@pytest.mark.soak
@pytest.mark.ray
def test_ray_actors_write_what_this_process_does(tmp_path, net, small):
    here = whole(embed(net[0], small, tmp_path / "here", net[1], on_ray=False))
    there = whole(embed(net[0], small, tmp_path / "there", net[1]))
    for one, other in zip(here, there, strict=True):
        assert np.allclose(one, other, atol=1e-5)
