import contextlib
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fr_core.data.labels import read_labels
from fr_core.data.sources import list_source
from fr_core.errors import UserError
from tests.helpers.packed import make_zip

ROWS = [(f"p {n}/{i}.jpg", str(n)) for n in range(3) for i in range(3)]
BOM = "\ufeff"


def written(tmp_path, line, before="", name="list.txt", encoding="utf-8"):
    path = tmp_path / name
    text = before + "".join(line(i, *row) + "\n" for i, row in enumerate(ROWS))
    path.write_text(text, encoding=encoding)
    return path


@pytest.mark.parametrize(
    ("before", "line"),
    [
        ("", lambda i, path, who: f"{path} {who}"),
        ("", lambda i, path, who: f"{who} {path}"),
        ("", lambda i, path, who: f"{path}\t{who}"),
        ("", lambda i, path, who: f"{path},{who}"),
        ("", lambda i, path, who: f"{i}\t{float(who):.6f}\t{path}"),  # MXNet
        ("", lambda i, path, who: f"1\t{path}\t{who}"),  # insightface
        ("", lambda i, path, who: f"{path} 0 {who} 0"),  # MagFace
        ("photo,who\n", lambda i, path, who: f"{path},{who}"),
        ("# of 2024\n# path, person\n", lambda i, path, who: f"{path},{who}"),
        (f"{BOM}identity;score;path\n", lambda i, path, who: f"{who};.5;{path}"),
        ("file_name,label\n", lambda i, path, who: f'"{path}", {who}'),
        ("id,label,name,image\n", lambda i, path, who: f"{i},{who},{who},{path}"),
        ("Image Path;Person-Name\n", lambda i, path, who: f"{path};{who}"),
        ("", lambda i, path, who: f'{{"file_name": "{path}", "label": {who}}}'),  # Hugging Face's metadata.jsonl
        ("path identity\n", lambda i, path, who: f"{path.replace(' ', '_')} {who}"),
    ],
)
def test_lists_in_any_form(tmp_path, before, line):
    found = read_labels(written(tmp_path, line, before))
    assert [(path.replace("_", " "), who) for path, who in found] == ROWS


def test_a_list_in_utf16_as_windows_saves_it(tmp_path):
    assert read_labels(written(tmp_path, lambda i, path, who: f"{path}\t{who}", encoding="utf-16")) == ROWS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a.jpg 1 2\nb.jpg 1 3\nc.jpg 2 2\nd.jpg 2 3\n",
            "the identity may be column 2 or 3; give the file a header",
        ),
        ("path,label,name\na.jpg,1,x\nb.jpg,1,y\nc.jpg,2,x\n", "the identity may be column label or name; keep one"),
        ("a.jpg b.jpg 1\nc.jpg d.jpg 0\n", "several columns name images"),
        ("path,score\na.jpg,1\n", "no column identity; rename one of its columns path, score"),
        ("a.jpg,1\nb.jpg,1,2\n", "line 2: expected a path and an identity"),
        ("path,identity\na.jpg,\n", "line 2: expected a path and an identity"),
        ('{"path": "a.jpg", "id": 1}\n{"path": "b.jpg"}\n', "line 2: no JSON object with the fields of the first"),
        (b"a.jpg \xff\n", "byte 6 is not UTF-8; save the file as UTF-8"),
        ("a.jpg 1\n".encode("utf-16-le"), "UTF-16 without its mark; save the file as UTF-8"),
        ('[{"path": "a.jpg", "id": 1}]', "a JSON list; write one JSON object on each line"),
    ],
)
def test_a_list_that_may_mean_two_things_or_nothing_is_refused(tmp_path, text, message):
    (tmp_path / "list.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message):
        read_labels(tmp_path / "list.txt")


@pytest.mark.parametrize(
    "form",
    [
        lambda path: f"/data/elsewhere/faces/{path}",
        lambda path: "C:\\faces\\" + path.replace("/", "\\"),
        lambda path: path.replace(".jpg", ".png"),
        lambda path: path.replace("person", "Person-"),
        lambda path: f"./{path}",
    ],
)
def test_paths_of_another_place_system_or_format_are_found(photos, tmp_path, form):
    whole = list_source(photos)
    rows = zip(whole.paths, whole.labels.tolist(), strict=True)
    (tmp_path / "list.csv").write_text("path,identity\n" + "".join(f"{form(path)},{who}\n" for path, who in rows))
    listing = list_source(photos, tmp_path / "list.csv")
    assert listing.paths == whole.paths
    assert listing.labels.tolist() == whole.labels.tolist()
    told = f"{len(whole.paths)} paths of list.csv were found by their ends below"
    assert [note.startswith(told) for note in listing.notes] == ([] if form("a") == "./a" else [True])


def test_a_list_of_an_archive_and_of_an_image_folder_of_the_hub_name_the_mend(tmp_path):
    files = {f"train/{i}.jpg": b"a" for i in range(4)}
    archive = make_zip(tmp_path / "a.zip", files)
    with pytest.raises(UserError, match=r"a\.zip: leave --labels out if its folders are people, else unpack it"):
        list_source(archive, tmp_path / "list.txt")
    (tmp_path / "hub" / "train").mkdir(parents=True)
    for name, data in files.items():
        (tmp_path / "hub" / name).write_bytes(data)
    table = tmp_path / "hub" / "train" / "metadata.csv"
    table.write_text("file_name,label\n" + "".join(f"{i}.jpg,{i // 2}\n" for i in range(4)))
    with pytest.raises(UserError, match=r"all images lie in one folder, train: give --labels \S+metadata\.csv"):
        list_source(tmp_path / "hub")
    assert list_source(tmp_path / "hub", table).names == ["0", "1"]


def test_a_line_that_repeats_another_is_counted(photos, tmp_path):
    (tmp_path / "list.txt").write_text("person0/0.jpg a\nperson0/1.jpg a\nperson1/0.jpg b\nperson0/1.jpg a\n")
    listing = list_source(photos, tmp_path / "list.txt")
    assert len(listing.paths) == 3
    assert listing.passed == {"lines that repeat another": 1}


@pytest.mark.fuzz
@given(st.text(alphabet="ab./\\jpg019 \t,;\n\"'é\ufeff-", max_size=200))
def test_any_list_is_read_or_refused(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("fuzz") / "list.txt"
    path.write_text(text)
    with contextlib.suppress(UserError):
        assert all(name and who for name, who in read_labels(path))


def test_a_circle_of_links_does_not_keep_a_search_from_ending(photos, tmp_path):
    people = shutil.copytree(photos, tmp_path / "people")
    (people / "person0" / "up").symlink_to(people)
    (tmp_path / "list.txt").write_text("x/person0/0.jpg a\nx/person0/1.jpg a\nx/person1/0.jpg b\n")
    assert list_source(people, tmp_path / "list.txt").paths == ["person0/0.jpg", "person0/1.jpg", "person1/0.jpg"]
