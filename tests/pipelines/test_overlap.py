import csv
import tarfile

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fr_core.data.crops import encode
from fr_core.data.schema import open_dataset
from fr_core.nets.iresnet import IResNet
from fr_core.verify.pairs import Pairs
from pipelines.datasets.ingest import ingest
from pipelines.datasets.overlap import is_name, overlap, people_of_pairs
from tests.helpers.commands import bigface
from tests.helpers.machine import REAL_DATA, needs_real_data

PEOPLE = 12


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    """An untrained net's weights: what looks alike is alike to it too."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("net") / "weights.safetensors"
    save_file(IResNet(10, 8, 1, 32, 64).state_dict(), path)
    return str(path), "iresnet10"


def face(person, shot):
    """One texture for a person, with a little noise in each shot."""
    own = np.random.default_rng(person).integers(0, 255, (6, 6, 3)).astype(np.float32)
    noise = np.random.default_rng(1000 * person + shot).normal(0, 6, (32, 32, 3))
    return encode((cv2.resize(own, (32, 32)) + noise).clip(0, 255).astype(np.uint8))


def write(folder, person, shots):
    folder.mkdir(parents=True)
    for shot in shots:
        (folder / f"{shot}.jpg").write_bytes(face(person, shot))


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Twelve people to train on; the verification set shows four of them under numbers, and one other by name."""
    root = tmp_path_factory.mktemp("sets")
    for person in range(PEOPLE):
        write(root / "train" / f"Ann_Lee-{chr(97 + person) * 3}", person, range(3))
    for person in (1, 4, 5, 9, 20, 21):
        write(root / "verify" / str(person), person, range(3, 6))
    write(root / "verify" / "ann lee GGG", 30, range(2))  # the name of person 6, another face
    ingest(root / "train", root / "shards", image_size=32, on_ray=False)
    return root


def test_people_are_found_by_face_and_by_name(sets, net, tmp_path):
    figures = overlap(sets / "shards", sets / "verify", net[0], tmp_path, net[1], least=0.99, on_ray=False)
    with (tmp_path / "overlap.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = {(row["identity"][-1], row["person"], row["by"]) for row in rows}
    assert found == {
        *(("b", "1", "face"), ("e", "4", "face"), ("f", "5", "face"), ("j", "9", "face"), ("g", "ann lee GGG", "name"))
    }
    assert figures == {"people": 7, "identities": 5, "by_name": 1, "by_face": 4, "images": 15}


def test_the_next_command_leaves_them_out(sets, net, tmp_path):
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("image_a,image_b,same\n1/3.jpg,1/4.jpg,1\n1/3.jpg,20/3.jpg,0\n20/4.jpg,20/3.jpg,1\n")
    options = ("--model", net[0], "--net", net[1], "--least", 0.99, "--images", sets / "verify", "--in-process")
    printed = bigface("overlap", sets / "shards", pairs, *options, "--out", tmp_path / "out")
    command = printed.splitlines()[-1].removeprefix("leave them out: bigface ").replace("NEW", str(tmp_path / "new"))
    bigface(*command.split(), "--in-process")
    assert open_dataset(tmp_path / "new").manifest.images == 3 * (PEOPLE - 1)


def test_same_pairs_join_images_whose_folders_tell_nothing():
    left, right = np.array([0, 2, 0, 4]), np.array([1, 3, 2, 1])
    pairs = Pairs([f"{i}.jpg" for i in range(5)], left, right, np.array([True, True, False, True]), np.zeros(4, int))
    people = people_of_pairs(pairs)
    assert people[0] == people[1] == people[4]
    assert people[2] == people[3]
    assert len(set(people)) == 2


def test_numbers_are_no_names():
    assert all(map(is_name, ("Ann_Lee", "ann lee")))
    assert not any(map(is_name, ("n000123", "m.0abc", "7", "id_12")))


@needs_real_data
def test_planted_people_are_found_by_a_real_net(tmp_path):
    """Half of the images of 15 of 30 people are in the training set, the other half and 15 others to verify on."""
    people: dict[str, list[bytes]] = {}
    with tarfile.open(REAL_DATA / "faces" / "dev.tar") as tar:
        for member in tar:
            images = people.setdefault(member.name.split("/")[-2], []) if member.isfile() else []
            if member.isfile() and len(images) < 8:
                images.append(tar.extractfile(member).read())
    several = [name for name, images in sorted(people.items()) if len(images) == 8][:30]
    for number, name in enumerate(several):
        for place, part in (("train", slice(0, 4)), ("verify", slice(4, 8))):
            if number < 15 or (place == "train") == (number % 2 == 0):
                (tmp_path / place / name).mkdir(parents=True)
                for i, image in enumerate(people[name][part]):
                    (tmp_path / place / name / f"{i}.jpg").write_bytes(image)
    ingest(tmp_path / "train", tmp_path / "shards", on_ray=False)
    teacher = str(REAL_DATA / "teacher" / "mobilefacenet_y1.safetensors")
    overlap(tmp_path / "shards", tmp_path / "verify", teacher, tmp_path / "out", "mobilefacenet", on_ray=False)
    with (tmp_path / "out" / "overlap.csv").open() as file:
        found = {(row["identity"], row["person"]) for row in csv.DictReader(file)}
    assert all(identity == person for identity, person in found)
    assert len(found) >= 14
