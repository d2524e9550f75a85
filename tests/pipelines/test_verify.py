import pickle
import shutil

import numpy as np
import pytest
from safetensors.torch import save_file

from fr_core.errors import UserError
from fr_core.nets.iresnet import IResNet
from fr_core.verify.baselines import raw_pixels
from fr_core.verify.suites import find_sets, suite_table, verify_suite
from tests.helpers.commands import bigface, figures


@pytest.fixture
def sets(photos, tmp_path):
    """One set as a .bin, one as a folder with images/, one with the images beside the list."""
    faces = sorted(photos.rglob("*.jpg"))
    random = np.random.default_rng(0)
    chosen = random.permutation(len(faces))[:24].reshape(12, 2)
    same = [bool(faces[a].parent == faces[b].parent) for a, b in chosen]
    same[0] = True  # so that both kinds are there
    (tmp_path / "suite").mkdir()
    contents = [faces[i].read_bytes() for i in chosen.ravel()]
    (tmp_path / "suite" / "lfw.bin").write_bytes(pickle.dumps((contents, same), 2))
    lines = ["image_a,image_b,same,fold"]
    lines += [
        f"{faces[a].relative_to(photos)},{faces[b].relative_to(photos)},{int(s)},{i % 3}"
        for i, ((a, b), s) in enumerate(zip(chosen, same, strict=True))
    ]
    shutil.copytree(photos, tmp_path / "suite" / "cfp" / "images")
    shutil.copytree(photos, tmp_path / "suite" / "agedb")
    for name in ("cfp", "agedb"):
        (tmp_path / "suite" / name / "pairs.csv").write_text("\n".join(lines))
    (tmp_path / "suite" / "notes.txt").write_text("no set")
    return tmp_path / "suite"


def test_a_suite_scores_every_set_and_draws_them_together(sets, tmp_path):
    (sets / "cfp" / "images" / "person0" / "0.jpg").write_bytes(b"broken")
    results = verify_suite(raw_pixels, sets, 112, tmp_path / "out")
    assert list(results) == ["agedb", "cfp", "lfw"]
    assert np.allclose(results["lfw"].scores, results["agedb"].scores)
    assert list(results["cfp"].failed) == ["person0/0.jpg"]
    pictures = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.png")}
    own = {f"{name}/{picture}.png" for name in results for picture in ("roc", "det", "scores")}
    assert pictures == own | {"roc.png", "det.png"}
    table = suite_table(results)
    assert [row[0] for row in table[1:]] == ["agedb", "cfp", "lfw"]
    assert table[1][1] == "12"
    assert table[2][-1] == str(results["cfp"].skipped) != "0"


def test_sets_may_share_their_images_which_are_embedded_once(sets, tmp_path):
    """Pairs files beside each other, whose images lie below them; other tables are no sets."""
    suite = tmp_path / "shared"
    shutil.copytree(sets / "agedb", suite / "faces")
    rows = (suite / "faces" / "pairs.csv").read_text().replace("person", "faces/person").splitlines()
    (suite / "faces" / "pairs.csv").unlink()
    (suite / "one.csv").write_text("\n".join(rows))
    (suite / "two.csv").write_text("\n".join(rows[:1] + rows[:0:-1]))
    (suite / "masks.csv").write_text("path,tool,kind\n")
    (suite / rows[1].split(",")[0]).write_bytes(b"broken")
    seen = []

    def embed(pixels):
        seen.append(len(pixels))
        return raw_pixels(pixels)

    shutil.copytree(sets / "cfp" / "images", sets / "images")  # as `bigface split` leaves them
    shutil.copy(sets / "cfp" / "pairs.csv", sets / "pairs.csv")
    assert find_sets(sets)["pairs"] == (sets / "images", sets / "pairs.csv")
    results = verify_suite(embed, suite, 112)
    assert list(results) == ["one", "two"]
    assert seen[1] == len(results["two"].failed) == 1  # what could be read is known
    assert np.allclose(np.sort(results["one"].scores), np.sort(results["two"].scores))
    assert results["one"].skipped == results["two"].skipped > 0


def test_folders_without_sets_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        find_sets(tmp_path / "absent")
    with pytest.raises(UserError, match=r"expected NAME\.bin, NAME\.csv or NAME/pairs\.csv or NAME/pairs\.txt"):
        find_sets(tmp_path)


def test_two_sets_of_one_name_are_refused(sets):
    (sets / "cfp" / "pairs.txt").write_text("")
    with pytest.raises(UserError, match="two sets are called cfp"):
        find_sets(sets)


def test_the_command(sets, tmp_path):
    save_file(IResNet(10, 8, 1, 32, 16).state_dict(), tmp_path / "net.safetensors")
    given = ("verify", tmp_path / "net.safetensors", "--net", "iresnet10")
    for mistake in ((), ("--suite", sets, "--pairs", sets / "lfw.bin"), ("--suite", sets, "--ijb", sets)):
        with pytest.raises(UserError, match="give one of --pairs"):
            bigface(*given, *mistake)
    with pytest.raises(UserError, match="need their images' folder"):
        bigface(*given, "--pairs", sets / "cfp" / "pairs.csv")
    for name in ("cfp", "agedb"):  # one set is enough here
        shutil.rmtree(sets / name)
    said = bigface(*given, "--suite", sets, "--out", tmp_path / "out", "--json", tmp_path / "v.json")
    assert said.count("┏") == 1  # one table
    assert said.count("lfw") == 1
    found = figures(tmp_path / "v.json")
    assert found["lfw_accuracy_low"] <= found["lfw_accuracy"] <= found["lfw_accuracy_high"]
    assert (tmp_path / "out" / "results.md").read_text().splitlines()[2].startswith("| lfw | 12 | ")
