import csv
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import ray
import ray.cloudpickle as cloudpickle
import torch
from mlflow import MlflowClient

from fr_core.config.recipes import load_config
from fr_core.config.sections import Tracking
from fr_core.data.schema import open_dataset
from fr_core.data.store import to_path
from fr_core.data.stream import make_plan
from fr_core.data.synthetic import write_faces
from fr_core.errors import UserError
from fr_core.nets.checkpoint_files import checkpoints
from fr_core.ranks import Ranks
from fr_core.train.initial import initial_state
from fr_core.train.mlflow_runs import PARENT_TAG, search_mlflow
from fr_core.train.outbox import UNDELIVERED
from fr_core.train.resume import adopt_checkpoint, resume
from fr_core.verify.pairs import write_pairs
from pipelines.experiments import trial as trial_module
from pipelines.experiments import tune
from pipelines.experiments.search import Search, Trial, best, deliver_trials, verdict, winner_recipe, write_results
from pipelines.experiments.trial import MISTAKE, goes_to_scheduler, run_trial, turn
from pipelines.experiments.tune import DRIVER, claim_folder, end_tune_early, share_cluster
from pipelines.experiments.tuner import clip_to_domains, make_tuner
from pipelines.experiments.whole_files import whole_files
from pipelines.ray_start import start_ray
from pipelines.train import train
from tests.helpers.commands import bigface
from tests.helpers.datasets import write_dataset
from tune_spaces import joined
from tune_spaces.fields import Choice, Integers


def search(dataset, **more):
    config = load_config("debug_bigface", [f"data.path={dataset}", "tracking.uri=off"])
    facts = {"objective": "loss", "stop": "none", "in_process": True, "trials": 4}
    facts |= {"knobs": joined("bigface", "lr,m3"), "config": config} | more
    return Search(**facts)


def trial(name, state="finished", lr=0.1, **figures):
    return Trial(name, state, {"lr": lr, "m3": 0.2}, figures)


def checked(search, out="search"):
    return tune.check_search(search, to_path(out))


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_trials_that_run_at_once_leave_cpus_to_ray_data(workers):
    fitting = 0
    for cpus in (1, 2, 3, 4, 7, 8, 16, 33, 128):
        for gpus in (0, 1, 2, 8):
            try:
                shared = share_cluster(cpus, gpus, workers, in_process=False)
            except UserError:
                assert workers * 0.25 + DRIVER > cpus / 2 or 0 < gpus < workers
                continue
            fitting += 1
            assert shared.at_once >= 1
            assert shared.at_once * (DRIVER + workers * shared.cpus) <= cpus / 2
            assert not gpus or shared.at_once * workers <= gpus
    assert fitting > 9


def test_trials_in_one_process_have_a_cpu_each():
    assert share_cluster(4, 0, 1, in_process=True).at_once == 4
    assert share_cluster(4, 2, 1, in_process=True).at_once == 2
    with pytest.raises(UserError, match="--at-once 5: 4 trials fit"):
        share_cluster(4, 0, 1, True, most=5)


def test_searches_that_cannot_be(dataset):
    for more, message in (
        ({"objective": "accuracy"}, "give verify.images"),
        ({"stop": "asha"}, "use --stop none"),
        ({"search": "grid"}, "the grid has 9 points"),
        ({"search": "best"}, "use one of tpe, random, grid"),
        ({"workers": 2}, "--in-process runs one worker"),
    ):
        with pytest.raises(UserError, match=message):
            checked(search(dataset, **more))
    pairs = ["verify.pairs=pairs.bin"]
    moving = search(dataset, stop="pbt", search="random", objective="accuracy")
    config = load_config("debug_bigface", [f"data.path={dataset}", *pairs])
    with pytest.raises(UserError, match="m3 cannot change"):
        checked(replace(moving, config=config))
    moving = replace(moving, config=config, knobs=joined("bigface", "lr"))
    with pytest.raises(UserError, match="leave --at-once out"):
        tune.check_search(moving, to_path("search"), at_once=1)
    haar = load_config("debug_bigface", [f"data.path={dataset}", *pairs, "schedule={kind='fastface_haar',m=20}"])
    with pytest.raises(UserError, match="window cannot change"):
        checked(replace(moving, config=haar, knobs=joined("haar", "window")))
    with pytest.raises(UserError, match=r"schedule\.m sets the window"):
        checked(search(dataset, config=haar, knobs=joined("haar", "window")))
    with pytest.raises(UserError, match="a local --out"):
        checked(replace(moving, config=config), "s3://bucket/search")


def test_a_folder_belongs_to_one_search(dataset, tmp_path, monkeypatch):
    assert claim_folder(search(dataset), tmp_path, resume=False, at_once=2) == 2
    mistake = tmp_path / "trials/a" / MISTAKE
    mistake.parent.mkdir()
    mistake.write_text("a folder that is there by now")
    assert claim_folder(search(dataset), tmp_path, resume=True, at_once=3) == 2
    assert not mistake.exists()
    with pytest.raises(UserError, match="runs 2 trials at once, only 1 fit here"):
        claim_folder(search(dataset), tmp_path, resume=True, at_once=1)
    with pytest.raises(UserError, match="runs 2 trials at once, --at-once 3"):
        claim_folder(search(dataset), tmp_path, resume=True, at_once=3, asked=True)
    with pytest.raises(UserError, match="--resume continues"):
        claim_folder(search(dataset), tmp_path, resume=False, at_once=2)
    with pytest.raises(UserError, match="seed differ"):
        claim_folder(search(dataset, seed=1), tmp_path, resume=True, at_once=2)
    with pytest.raises(UserError, match="holds no search"):
        claim_folder(search(dataset), tmp_path / "other", resume=True, at_once=2)
    monkeypatch.setattr(os, "getuid", lambda: (tmp_path / "search.json").stat().st_uid + 1)
    with pytest.raises(UserError, match="another user's"):
        claim_folder(search(dataset), tmp_path, resume=True, at_once=2)


def test_every_end_of_a_domain_is_a_run_that_can_be(grouped, dataset):
    """60 steps: the shortest of the windows to search, a share of them, would have one."""
    config = load_config("debug_bigface", [f"data.path={dataset}", "tracking.uri=off", "schedule.kind=fastface"])
    steps = config.model_copy(update={"train": config.train.model_copy(update={"max_steps": 60})})
    with pytest.raises(UserError, match=r"schedule\.window = 0\.02 of 60 steps"):
        checked(replace(search(dataset), knobs=joined("fastface", "window"), config=steps))
    config = load_config("debug_attfc", [f"data.path={grouped}", "tracking.uri=off"])
    few = replace(search(grouped), config=config)
    with pytest.raises(UserError, match="no identity"):
        checked(replace(few, knobs=[replace(joined("attfc", "class_images")[0], domain=Integers(2, 16))]))


def test_an_objective_that_the_pairs_do_not_resolve(small):
    config = load_config(small[0], [*small[1:], "tracking.uri=off"])
    checked(Search(joined("bigface", "lr"), config, in_process=True))
    with pytest.raises(UserError, match=r"no objective tar_at_far_1e-4: .*pairs.csv has pairs for tar_at_far_1e-1"):
        checked(Search(joined("bigface", "lr"), config, objective="tar_at_far_1e-4", in_process=True))


def test_a_search_that_goes_on_judges_by_what_it_saw(dataset, tmp_path):
    """Tune pickles its scheduler as it was at first, and its callbacks' states as they are."""
    made = make_tuner(
        search(dataset, stop="asha"), tmp_path, partial(run_trial, launch={}), {"CPU": 1.0}, 1, (2, 8), resume=False
    )
    inside = made._local_tuner.__getstate__()
    [judge, ended] = inside["_tune_config"].scheduler, *inside["_run_config"].callbacks
    judge.set_search_properties("loss", "min")
    for name in ("a", "b", "c"):
        judge._brackets[0].on_result(SimpleNamespace(trial_id=name), 2, -float(ord(name)))
    again = cloudpickle.loads(cloudpickle.dumps(inside))
    [judge_again, ended_again] = again["_tune_config"].scheduler, *again["_run_config"].callbacks
    judge_again._brackets = []
    ended_again.set_state(cloudpickle.loads(cloudpickle.dumps(ended.get_state())))
    assert judge_again._brackets[0].debug_str() == judge._brackets[0].debug_str()
    assert "nan" not in judge._brackets[0].debug_str().split("Iter 2.000: ")[1]


def test_schedulers_hear_of_figures_alone():
    launch = {"judged": True, "objectives": ["accuracy"]}
    assert goes_to_scheduler({"step": 4, "accuracy": 0.5}, launch, 8)
    assert not goes_to_scheduler({"step": 4}, launch, 8)  # a checkpoint for a drained node
    assert not goes_to_scheduler({"step": 8, "accuracy": 0.5}, launch, 8)
    assert not goes_to_scheduler({"step": 4, "accuracy": 0.5}, launch | {"judged": False}, 8)


def test_a_trial_reports_the_means_of_its_folds(dataset, tmp_path, monkeypatch):
    config = load_config("debug_bigface", [f"data.path={dataset}", "tracking.uri=off", "train.max_steps=4"])
    folded = search(dataset, config=config, objective="accuracy", stop="asha", folds=2)
    folds = tune.folds_of_search(folded, tmp_path)
    assert tune.check_search(folded, tmp_path, folds=folds)[0].config.data.path == str(dataset)
    trained, reports = [], []

    def train(config, out, launch, total):
        trained.append((config.data.path, config.verify.pairs, out.name, config.optim.lr))
        return {"accuracy": 0.5 + 0.2 * len(trained), "steps": total}

    monkeypatch.setattr(trial_module, "train_in_process", train)
    monkeypatch.setattr(ray.tune, "get_context", lambda: SimpleNamespace(get_trial_name=lambda: "t"))
    monkeypatch.setattr(ray.tune, "get_checkpoint", lambda: None)
    monkeypatch.setattr(ray.tune, "report", reports.append)
    launch = {
        **{
            "config": config.model_dump(mode="json"),
            "origin": {},
            "knobs": joined("bigface", "lr"),
            "trials": str(tmp_path),
        },
        **{"steps_per_epoch": 8, "in_process": True, "judged": True, "objectives": ["accuracy"], "folds": folds},
    }
    run_trial({"lr": 0.07}, launch)
    assert trained == [(str(f.train), str(f.pairs), f"t-fold{n}", 0.07) for n, f in enumerate(folds)]
    assert reports == [
        {"accuracy": pytest.approx(0.7), "step": 4},
        {"accuracy": pytest.approx(0.8), "steps": 4, "step": 8, "done": True},
    ]


def test_folds_that_cannot_be(dataset, tmp_path):
    for more, message in (
        ({"folds": 2, "stop": "pbt"}, "--stop pbt moves checkpoints"),
        ({"folds": 60}, "too few for 60 folds"),
    ):
        with pytest.raises(UserError, match=message):
            tune.folds_of_search(search(dataset, **more), tmp_path)
    with pytest.raises(UserError, match="is a URL: give a local --out"):
        tune.folds_of_search(search(dataset, folds=2), to_path("s3://bucket/search"))


def test_mutations_stay_in_their_domains():
    knobs = joined("bigface+attfc", "mask_ratio,lr,encoder_momentum")
    given = {"mask_ratio": 0.72, "lr": 0.004, "encoder_momentum": 0.985}
    assert clip_to_domains(knobs, given) == {"mask_ratio": 0.6, "lr": 0.005, "encoder_momentum": 0.99}


def test_time_is_over_only_when_tune_listens():
    heard = threading.Event()
    with end_tune_early(0) as came:
        signal.signal(signal.SIGUSR1, lambda *_: heard.set())
        assert heard.wait(10)
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
    assert came == []


def ended_at_once(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_search_that_is_asked_ends_as_when_time_is_over(number):
    heard = threading.Event()
    before = signal.signal(number, ended_at_once)
    with end_tune_early(None) as came:
        ours = signal.getsignal(number)
        os.kill(os.getpid(), number)
        signal.signal(signal.SIGUSR1, lambda *_: heard.set())
        assert heard.wait(10)
        signal.signal(number, ours)  # as Tune does
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert came == [number]
    assert signal.signal(number, before) is ended_at_once


def test_the_best_and_the_pareto_front(dataset):
    trials = [
        trial("a", loss=2.0, seconds=1.0),
        trial("b", loss=1.0, seconds=3.0),
        trial("c", loss=2.5, seconds=2.0),
        trial("d", "stopped", loss=0.1, seconds=0.1),
    ]
    assert [t.name for t in best(search(dataset), trials)] == ["b", "a", "c"]
    assert [t.name for t in best(search(dataset, against="seconds"), trials)] == ["b", "a"]
    assert verdict(search(dataset), trials).startswith("**Best: b, loss 1**, with lr 0.1, m3 0.2. ")
    assert verdict(search(dataset), []) == "**No best trial.** 0 of 0 trials finished; searched for min loss."


def test_the_winner_is_a_recipe(dataset, tmp_path):
    for recipe in ("debug_attfc", "quantize_ekd", "fastface_r100_ms1mv3", "bigface_distill_r240"):
        config = load_config(recipe)
        path = tmp_path / "winner.toml"
        path.write_text(winner_recipe(config, "accuracy 0.9", "a", 4, tmp_path, moved=True))
        assert load_config(path) == config
    trials = [trial("a", loss=2.0, lr=0.05), trial("b", loss=1.0, lr=0.07), trial("c", "failed")]
    files = write_results(search(dataset), trials, tmp_path)
    assert load_config(tmp_path / "winner.toml").optim.lr == 0.07
    assert [path.name for path in files] == ["trials.csv", "winner.toml", "parallel.png", "importance.png"]
    assert (tmp_path / "trials.csv").read_text().splitlines()[3].startswith("c,failed,0.1,0.2")


def test_a_trial_goes_on_from_a_donor(dataset, tmp_path):
    """At the donor's step and weights, in its own folder and under its own name in MLflow."""
    config = load_config("debug_bigface", [f"data.path={dataset}", "tracking.uri=off", "train.save_every=2"])
    short = config.model_copy(update={"train": config.train.model_copy(update={"max_steps": 2, "global_batch": 8})})
    train(short, tmp_path / "donor", in_process=True)
    [donor] = checkpoints(tmp_path / "donor")
    adopt_checkpoint(donor, tmp_path / "own", "mine")
    [taken] = checkpoints(tmp_path / "own")
    assert taken.name == "step_00000002"
    assert (taken / "backbone.safetensors").read_bytes() == (donor / "backbone.safetensors").read_bytes()
    state = initial_state(short, make_plan(short, open_dataset(dataset)), Ranks(), torch.device("cpu"))
    assert resume(short, state, tmp_path / "own", Ranks())
    assert (state.step, state.run_id) == (2, "mine")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A recipe with its overrides: 8 steps on 12 identities, 20 others to verify on."""
    root = tmp_path_factory.mktemp("faces")
    write_dataset(root / "shards", 96, 12)
    write_faces(root, 20, 2, workers=1)
    write_pairs(root, 1)
    pairs = [f"verify.images={root / 'images'}", f"verify.pairs={root / 'pairs.csv'}"]
    steps = ["train.max_steps=8", "train.global_batch=16", "train.keep=9"]
    return ["debug_bigface", f"data.path={root / 'shards'}", *steps, *pairs]


@pytest.mark.soak
@pytest.mark.ray
def test_no_more_trials_train_than_have_turns():
    """Of six drivers, as Tune starts them after a failure, two at a time; also where one dies in its turn."""

    start_ray()

    @ray.remote(num_cpus=0, max_retries=0)
    def trial(number):
        with turn("search", 2):
            began = time.time()
            time.sleep(0.5)
            if number == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return began, time.time()

    times = []
    for waiting in [trial.remote(number) for number in range(6)]:
        with suppress(ray.exceptions.RayError):
            times.append(ray.get(waiting))
    assert len(times) == 5
    assert all(sum(a <= began < b for a, b in times) <= 2 for began, _ in times)


@pytest.mark.soak
@pytest.mark.ray
def test_a_population_larger_than_the_machine_outlives_a_trial_that_fails(small, tmp_path, monkeypatch):
    """One rate makes the loss infinite; those that wait for its trial go on without it."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    rate = replace(joined("bigface", "lr")[0], domain=Choice((0.1, 0.05, 1e30)))
    config = load_config(small[0], [*small[1:], "tracking.uri=off", "train.max_bad_steps=1"])
    own = {"search": "random", "stop": "pbt", "seed": 3, "in_process": True}
    trials, _ = tune.tune(Search([rate], config, trials=4, **own), tmp_path / "search")
    assert len(trials) == 4
    assert {trial.state for trial in trials} == {"finished", "failed"}
    assert all(trial.figures["steps"] == 8 for trial in trials if trial.state == "finished")


@pytest.mark.soak
@pytest.mark.ray
@pytest.mark.parametrize(
    ("options", "pictures"),
    [
        (["--only", "m3", "--search", "grid", "--stop", "none", "--trials", 3], {"parallel", "importance"}),
        (
            ["--only", "lr", "--stop", "none", "--against", "seconds", "--trials", 4],
            {"parallel", "pareto", "importance"},
        ),
        (["--only", "lr", "--search", "random", "--stop", "median", "--trials", 4], {"parallel", "importance"}),
    ],
)
def test_other_ways_to_search(small, tmp_path, monkeypatch, options, pictures):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "search"
    bigface(
        "tune", "bigface", *small, "tracking.uri=off", "--in-process", *options, "--out", out, "--json", out / "json"
    )
    trials = json.loads((out / "json").read_text())["trials"]
    assert len(trials) == options[-1]
    assert {trial["state"] for trial in trials} <= {"finished", "stopped"}
    assert {path.stem for path in out.glob("*.png")} <= pictures
    assert "parallel" in {path.stem for path in out.glob("*.png")}
    load_config(out / "winner.toml")
    if "grid" in options:
        assert sorted(trial["values"]["m3"] for trial in trials) == pytest.approx([0.1, 0.3, 0.5])
    assert (out / "pareto.png").exists() == ("--against" in options)


@pytest.mark.soak
@pytest.mark.ray
def test_a_search_of_two_workers_a_trial(small, tmp_path):
    """Ray Data into Ray Train inside Ray Tune, one trial after the other: none waits for what another holds."""
    options = ["--only", "lr", "--trials", 3, "--workers", 2, "--stop", "median", "--out", tmp_path / "search"]
    bigface("tune", "bigface", *small, "tracking.uri=off", *options, "--json", tmp_path / "tune.json")
    trials = json.loads((tmp_path / "tune.json").read_text())["trials"]
    assert [trial["state"] in ("finished", "stopped") for trial in trials] == [True] * 3
    finished = [trial for trial in trials if trial["state"] == "finished"]
    assert finished
    assert all(trial["figures"]["workers"] == 2 for trial in finished)


def test_what_trials_could_not_tell_mlflow_is_delivered_at_the_end(small, tmp_path, mlflow_database):
    (tmp_path / "search" / "trials").mkdir(parents=True)
    shutil.copy(mlflow_database, tmp_path / "search" / "trials")
    config = load_config(small[0], [*small[1:], "train.max_steps=2"])
    run = tmp_path / "search" / "trials" / "one"
    train(config, run, in_process=True)
    uri = f"sqlite:///{run.parent}/mlflow.db"
    letter = ["metrics", [["late", 7.0, 1, 2]]]
    (run / UNDELIVERED).write_text(json.dumps(letter) + "\n")
    told = config.model_copy(update={"tracking": Tracking(uri=uri)})
    deliver_trials([Trial("one", "finished", {}, {})], told, tmp_path / "search")
    run_id = json.loads((run / "run.json").read_text())["run_id"]
    found = MlflowClient(uri).get_run(run_id)
    assert (found.data.metrics["late"], found.info.status) == (7.0, "FINISHED")
    assert not (run / UNDELIVERED).exists()


def test_tunes_state_is_whole_whenever_a_search_is_killed(tmp_path):
    files, path = whole_files(), tmp_path / "state.json"
    for text in (b"first", b"second"):
        before = path.read_bytes() if path.exists() else None
        stream = files.open_output_stream(str(path))
        stream.write(text)
        stream.flush()
        assert (path.read_bytes() if path.exists() else None) == before
        stream.close()
        assert path.read_bytes() == text
    assert list(tmp_path.iterdir()) == [path]
    assert pickle.loads(pickle.dumps(files)).open_input_stream(str(path)).read() == b"second"


def steps_of(run):
    with (run / "metrics.csv").open() as file:
        return [int(row["step"]) for row in csv.DictReader(file)]


@pytest.mark.soak
@pytest.mark.ray
def test_a_search_that_was_killed_goes_on(small, tmp_path, monkeypatch, mlflow_database):
    """Killed with its process group, in its second trial; the first is not run again."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shutil.copy(mlflow_database, tmp_path)
    out = tmp_path / "search"
    options = ["--only", "lr,m3", "--trials", 2, "--in-process", "--at-once", 1, "--out", out]
    command = [str(word) for word in ("tune", "bigface", *small, *options)]
    process = subprocess.Popen([sys.executable, "-m", "pipelines.cli", *command], start_new_session=True)
    while len({path.parents[2] for path in out.glob("trials/*/checkpoints/*/checkpoint.json")}) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    saved = {path: path.stat().st_mtime_ns for path in out.glob("trials/*/checkpoints/*/checkpoint.json")}
    first = (next(out.glob("trials/*/report.json"))).parent
    bigface(*command, "--resume", "--json", tmp_path / "tune.json")
    assert {path: path.stat().st_mtime_ns for path in saved} == saved
    found = {trial["name"]: trial for trial in json.loads((tmp_path / "tune.json").read_text())["trials"]}
    assert {path.name for path in (out / "trials").iterdir()} == set(found)
    assert [trial["state"] in ("finished", "stopped") for trial in found.values()] == [True] * 2
    assert found[first.name]["state"] == "finished"
    for name, one in found.items():
        reached = int(one["figures"]["step"])
        assert reached == 8 or one["state"] == "stopped"
        assert steps_of(out / "trials" / name)[:reached] == list(range(1, reached + 1))
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = {run.info.run_name: run for run in search_mlflow(f"sqlite:///{tmp_path}/mlflow.db", "bigface", "")}
    parent = runs.pop("search")
    assert parent.info.status == "FINISHED"
    accuracies = [trial["figures"]["accuracy"] for trial in found.values() if trial["state"] == "finished"]
    assert parent.data.metrics == {"accuracy": max(accuracies)}
    assert parent.data.tags["recipe"] == "debug_bigface"
    assert "winner.toml" in {file.path for file in client.list_artifacts(parent.info.run_id)}
    statuses = {"finished": "FINISHED", "stopped": "KILLED"}
    assert {name: run.info.status for name, run in runs.items()} == {n: statuses[t["state"]] for n, t in found.items()}
    assert {run.data.tags[PARENT_TAG] for run in runs.values()} == {parent.info.run_id}
    winner = load_config(out / "winner.toml")
    names = [trial["values"]["lr"] for trial in found.values() if trial["state"] == "finished"]
    assert winner.optim.lr in names
    bigface("train", out / "winner.toml", "train.max_steps=1", "--in-process", "--out", tmp_path / "winner")


@pytest.mark.soak
@pytest.mark.ray
def test_a_population_hands_weights_on(small, tmp_path, monkeypatch):
    """Two trials of different rates have the same weights at some step only where one went on from the other."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = ["--only", "lr", "--trials", 2, "--search", "random", "--stop", "pbt", "--in-process"]
    bigface("tune", "bigface", *small, "train.max_steps=4", "tracking.uri=off", *options, "--out", tmp_path)
    seen = {}
    for path in sorted(tmp_path.glob("trials/*/checkpoints/*/checkpoint.json")):
        summary = json.loads(path.read_text())
        seen.setdefault(summary["files"]["backbone.safetensors"]["sha256"], []).append(path)
    [(one, other)] = [both for both in seen.values() if len(both) == 2]
    assert one.parents[2] != other.parents[2]
    assert one.parent.name == other.parent.name == "step_00000002"
    for run in (tmp_path / "trials").iterdir():
        assert steps_of(run) == [1, 2, 3, 4]
        assert (run / "report.json").is_file()
