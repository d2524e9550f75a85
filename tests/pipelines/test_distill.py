"""``bigface distill``, and what is checked before such a run."""

import pytest

from fr_core.config.recipes import load_config
from fr_core.data.embeddings import FACTS
from fr_core.errors import UserError
from fr_core.train.check import checked_plan
from fr_core.train.memory import memory
from fr_core.train.metrics import read_metrics
from pipelines.experiments.plan import plan
from pipelines.train import with_absolute_paths
from tests.helpers.commands import bigface, figures
from tests.helpers.datasets import flip_a_bit, write_dataset


@pytest.fixture(scope="module")
def teacher(dataset, tmp_path_factory):
    """A run of 3 steps."""
    out = tmp_path_factory.mktemp("runs") / "teacher"
    short = ["train.max_steps=3", "tracking.uri=off"]
    bigface("train", "debug_bigface", f"data.path={dataset}", *short, "--in-process", "--out", out)
    return out


@pytest.fixture(scope="module")
def more(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("more") / "shards", 100, 5, seed=9)


def distill(dataset, out, *args):
    bigface("distill", "debug_distill", f"data.path={dataset}", "tracking.uri=off", "--in-process", "--out", out, *args)


def test_a_student_comes_nearer_to_its_teacher(dataset, teacher, more, tmp_path):
    distill(dataset, tmp_path / "net", "--teacher", teacher, "--unlabelled", more)
    bigface("embed", teacher, "--data", dataset, "--out", tmp_path / "e", "--in-process")
    bigface("embed", teacher, "--data", more, "--out", tmp_path / "f", "--in-process")
    known = f"method.distill.unlabelled.embeddings={tmp_path / 'f'}"
    distill(dataset, tmp_path / "known", "--embeddings", tmp_path / "e", "--unlabelled", more, known)
    for run in ("net", "known"):
        rows = read_metrics(tmp_path / run)
        assert len(rows) == 20
        assert rows[-1]["distill_loss"] < 0.8 * rows[0]["distill_loss"]
        assert all(r["loss"] == pytest.approx(r["margin_loss"] + 9 * r["distill_loss"], rel=1e-5) for r in rows)
        assert figures(tmp_path / run / "report.json")["steps"] == 20


def test_mistakes_before_the_run(dataset, grouped, teacher, more, tmp_path):
    for args, message in (
        ([], "no teacher: give --teacher REF or --embeddings DIR"),
        (["--teacher", tmp_path / "no"], "no such run, checkpoint or weights file"),
        (["--teacher", teacher, "net.embedding=16"], r"net\.embedding=32, or method\.distill\.adapter=true"),
        (["--teacher", teacher, "--unlabelled", grouped], "bigface reads flat ones"),
        (["--teacher", teacher, "--unlabelled", tmp_path], "the folder is empty"),
        (["--embeddings", teacher], "no embeddings; make them with: bigface embed"),
    ):
        with pytest.raises(UserError, match=message):
            distill(dataset, tmp_path / "run", *args)
    with pytest.raises(UserError, match="its method is attfc, and only bigface distils"):
        bigface("distill", "debug_attfc", f"data.path={grouped}", "--teacher", teacher)
    with pytest.raises(UserError, match="no teacher: give --teacher REF"):
        bigface("distill", "debug_bigface", f"data.path={dataset}")
    bigface("embed", teacher, "--data", more, "--out", tmp_path / "e", "--in-process")
    with pytest.raises(UserError, match="embeddings of another dataset"):
        distill(dataset, tmp_path / "run", "--embeddings", tmp_path / "e")
    assert not (tmp_path / "run").exists()


def test_unlabelled_batches_that_workers_cannot_share(dataset, teacher, more, tmp_path):
    given = [f"data.path={dataset}", f"method.distill.teacher={teacher}", f"method.distill.unlabelled.path={more}"]
    config = load_config("debug_distill", [*given, "method.distill.unlabelled.batch=6", "train.accumulate=2"])
    with pytest.raises(UserError, match=r"unlabelled\.batch = 6 is not a multiple of 2 workers × train.accumulate = 2"):
        checked_plan(config, 2)
    checked_plan(load_config("debug_distill", given), 2)
    damaged = write_dataset(tmp_path / "damaged", 100, 5)
    flip_a_bit(damaged / "shard-00000.parquet", 1000)
    with pytest.raises(UserError, match=r"damaged/shard-00000\.parquet: wrong checksum"):
        distill(dataset, tmp_path / "run", "--teacher", teacher, "--unlabelled", damaged)


def test_paths_are_those_of_any_working_directory(dataset, teacher, monkeypatch):
    monkeypatch.chdir(teacher.parent)
    fields = ("unlabelled.path=u", "unlabelled.embeddings=v", "embeddings=e")
    given = [f"data.path={dataset}", *(f"method.distill.{field}" for field in fields)]
    found = with_absolute_paths(load_config("debug_distill", given)).method.distill
    here = str(teacher.parent.resolve())
    assert found.embeddings == f"{here}/e"
    assert (found.unlabelled.path, found.unlabelled.embeddings) == (f"{here}/u", f"{here}/v")
    config = load_config("debug_distill", [f"data.path={dataset}", "method.distill.teacher=teacher"])
    assert with_absolute_paths(config).method.distill.teacher == f"{here}/teacher/checkpoints/step_00000003"


def test_the_plan_counts_teacher_and_unlabelled_images(teacher):
    plain = memory(load_config("debug_bigface"), 1000, 1)
    taught = load_config("debug_distill", [f"method.distill.teacher={teacher}"])
    parts = memory(taught, 1000, 1)
    assert parts["teacher"] == plain["backbone"] // 2
    assert parts["teacher_features"] == 3 * 32 * 8 * 32 * 32 * 4
    assert parts["total"] == plain["total"] + parts["teacher"]
    wide = load_config("debug_distill", ["method.distill.unlabelled.path=u", "method.distill.unlabelled.batch=32"])
    assert memory(wide, 1000, 1)["activations"] == pytest.approx(2 * plain["activations"], rel=0.01)
    table, advice, _ = plan(taught, 1000, 1, 24)
    assert next(row for row in table if row[0] == "teacher").count("<0.01") == 4
    assert "No teacher is counted" not in advice
    assert "No teacher is counted" in plan(wide, 1000, 1, 24)[1]


def test_embeddings_made_anew_are_not_mistaken_for_the_old(dataset, teacher, tmp_path):
    """What a run leaves beside the embeddings goes with them."""
    bigface("embed", teacher, "--data", dataset, "--out", tmp_path / "e", "--in-process")
    config = load_config("debug_distill", [f"data.path={dataset}", f"method.distill.embeddings={tmp_path / 'e'}"])
    checked_plan(config, 1)
    assert len(list((tmp_path / "e").glob("by_id-*.npy"))) == 2
    facts = (tmp_path / "e" / FACTS).read_text()
    bigface("embed", teacher, "--data", dataset, "--out", tmp_path / "e", "--in-process", "--no-flip", "--overwrite")
    assert (tmp_path / "e" / FACTS).read_text() != facts
    assert not list((tmp_path / "e").glob("by_id-*.npy"))
