"""Machines that are up and machines that may come: how many workers fit them, and the wait for those that lack."""

import logging
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import requests
import yaml
from ray.autoscaler._private.kuberay.node_provider import KubernetesHttpApiClient
from ray.autoscaler._private.util import prepare_config
from ray.train import ScalingConfig
from ray.util import placement_group, placement_group_table, remove_placement_group

from fr_core.errors import UserError
from pipelines import machines, on_ray
from pipelines.experiments.trial import train_on_workers
from pipelines.machines import (
    autoscaler_config,
    await_machines,
    capacity,
    cluster_machines,
    cpus_for_one_worker_per_node,
    machines_of,
    place_workers,
    reserved,
    room,
    scale_workers,
    worker_cpus,
)
from pipelines.ray_start import start_ray

ROOT = Path(__file__).parents[2]
UP = [{"CPU": 8.0, "GPU": 1.0}]


def test_workers_leave_half_of_the_cpus_to_ray_data():
    assert [worker_cpus([{"CPU": 2}], workers) for workers in (1, 2, 4)] == [1, 0.5, 0.25]
    assert worker_cpus([{"CPU": 64}, {}], 8) == 1


def test_workers_of_a_dead_node_leave_cpus_to_ray_data_on_what_is_left():
    assert worker_cpus([{"CPU": 2}, {"CPU": 2}, {"GPU": 1}], 2) == 0.5
    assert worker_cpus([{"CPU": 16}, {"CPU": 4}], 4) == 0.5


def test_workers_that_fill_a_node_with_cards_leave_half_of_its_cpus_to_ray_data():
    """Eight workers sit on one of four nodes, not two on each."""
    assert worker_cpus([{"CPU": 8, "GPU": 8}] * 4, 8) == 0.5
    assert worker_cpus([{"CPU": 48, "GPU": 4}] * 8, 32) == 1


def test_a_worker_fits_a_machine_that_has_all_it_reserves():
    assert room([{"CPU": 4, "GPU": 1}, {"CPU": 4}, {"GPU": 8}, {"CPU": 0.5, "GPU": 2}], {"CPU": 0.5, "GPU": 1}) == 2
    assert room([{"CPU": 0.3}], {"CPU": 0.1}) == 3
    for cpus in (1, 2, 3, 7, 48):
        for nodes in (1, 2, 5):
            for workers in (1, 2, 3, 8, 32):
                assert room([{"CPU": cpus}] * nodes, {"CPU": worker_cpus([{"CPU": cpus}] * nodes, workers)}) >= workers


@pytest.fixture
def joined(monkeypatch, tmp_path):
    """A cluster of one card, joined from a machine with a home of its own."""
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(machines, "start_ray", lambda: None)
    monkeypatch.setattr(machines, "keep_no_machine", lambda: None)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": UP[0]}, {"Alive": False, "Resources": {}}])
    return tmp_path


@pytest.fixture
def pod(joined, monkeypatch):
    """A pod of the manifest's cluster: Kubernetes answers with what is in the dictionary, or with the error."""
    (joined / "namespace").write_text("faces")
    monkeypatch.setattr(machines, "NAMESPACE", joined / "namespace")
    monkeypatch.setenv("RAY_CLUSTER_NAME", "bigface-x7k2p")
    spec = yaml.safe_load((ROOT / "pipelines/cluster/rayjob.yaml").read_text())["spec"]["rayClusterSpec"]
    answer = {"metadata": {"name": "bigface-x7k2p", "namespace": "faces"}, "spec": spec}

    def get(client, path):
        assert (client._namespace, path) == ("faces", "rayclusters/bigface-x7k2p")
        if "error" in answer:
            raise answer["error"]
        return answer

    monkeypatch.setattr(KubernetesHttpApiClient, "get", get)
    return answer


def grows_as(home, config):
    (home / machines.GROWS_AS).write_text(yaml.safe_dump(config))


def test_a_cluster_that_grows_counts_the_machines_that_may_come(joined):
    """Of cluster.yaml, whose head has nothing to give: eight machines, not the sixteen of both kinds."""
    grows_as(joined, yaml.safe_load((ROOT / "cluster.yaml").read_text()))
    found = cluster_machines()
    assert capacity(found) == (8 * 48, 8 * 4)
    assert worker_cpus(found, 32) == 1
    assert cpus_for_one_worker_per_node(found) == 24.5


def test_on_kuberay_the_groups_of_the_cluster_count(pod):
    assert capacity(cluster_machines()) == (4 * 12, 4)
    (group,) = pod["spec"]["workerGroupSpecs"]
    group["maxReplicas"] = 2**31 - 1  # KubeRay's default
    assert len(cluster_machines()) == 1 + machines.COUNTED


@pytest.mark.parametrize("error", [requests.HTTPError("403"), requests.ConnectionError("away")], ids=["403", "away"])
def test_a_kuberay_cluster_that_may_not_be_read_has_the_pods_that_run(pod, error):
    pod["error"] = error
    assert cluster_machines() == UP


def test_a_kuberay_cluster_without_an_autoscaler_has_the_pods_that_run(pod):
    pod["spec"]["enableInTreeAutoscaling"] = False
    assert cluster_machines() == UP


def test_machines_of_your_own_are_those_that_are_up(joined):
    """Their config is on the head too, and tells of no machine what it has."""
    grows_as(joined, prepare_config(yaml.safe_load((ROOT / "pipelines/cluster/on_prem.yaml").read_text())))
    assert cluster_machines() == UP


def test_a_node_of_this_process_does_not_grow(pod, monkeypatch):
    grows_as(Path.home(), yaml.safe_load((ROOT / "cluster.yaml").read_text()))
    monkeypatch.delenv("RAY_ADDRESS")
    assert autoscaler_config() is None


def test_more_workers_than_cards_are_refused(joined):
    assert scale_workers(1).resources_per_worker == {"CPU": 1, "GPU": 1}
    with pytest.raises(UserError) as refused:
        scale_workers(2)
    assert str(refused.value) == "2 workers of 1 CPU and 1 GPU, and this cluster has room for 1: use --workers 1"


def test_more_workers_than_a_cluster_grows_to_are_refused_with_the_field_to_raise(joined):
    grows_as(joined, yaml.safe_load((ROOT / "cluster.yaml").read_text()))
    assert scale_workers(32).use_gpu
    with pytest.raises(UserError) as refused:
        scale_workers((33, 64))
    assert str(refused.value) == (
        "33 workers of 1 CPU and 1 GPU, and this cluster grows to 32: use --workers 32, or raise max_workers"
    )


def test_more_workers_than_replicas_may_come_are_refused_with_the_field_to_raise(pod):
    assert scale_workers(4).use_gpu
    with pytest.raises(UserError, match="grows to 4: use --workers 4, or raise maxReplicas"):
        scale_workers(5)


def test_a_trial_is_placed_as_the_head_says(joined, monkeypatch, tmp_path):
    """A trial's driver may stand on a worker's machine, which knows of no machines that may come."""
    placed = []
    monkeypatch.setattr("ray.tune.integration.ray_train.TuneReportCallback", object)  # works in a trial alone
    monkeypatch.setattr(on_ray, "train_on_ray", lambda config, out, scaling, *_: placed.append(scaling))
    launch = {"workers": 8, "each": reserved(1, 32), "at_once": 1}
    train_on_workers(None, tmp_path, launch, 10)
    assert (placed[0].num_workers, placed[0].resources_per_worker) == (8, {"CPU": 1, "GPU": 1})


@pytest.mark.parametrize(("cards", "together"), [(8, "PACK"), (0, "SPREAD")], ids=["cards", "no cards"])
def test_workers_with_cards_sit_together_and_others_spread(cards, together, monkeypatch):
    """The request for machines says the same as Ray Train's own."""
    scaling = place_workers(8, reserved(1, cards))
    assert scaling.placement_strategy == together
    asked, removed = [], []

    def group(bundles, strategy):
        asked.append((bundles, strategy))
        return SimpleNamespace(wait=lambda seconds: True)

    monkeypatch.setattr(ray.util, "placement_group", group)
    monkeypatch.setattr(ray.util, "remove_placement_group", removed.append)
    await_machines(scaling)
    assert asked == [([reserved(1, cards)] * 8, together)]
    assert len(removed) == 1


def test_cards_without_a_cpu_are_refused(joined, monkeypatch):
    monkeypatch.setattr(machines, "machines_of", lambda _: [{"GPU": 4}, {"CPU": 4}])
    with pytest.raises(UserError, match="room for 0: it needs machines that have these together"):
        scale_workers(1)


def test_a_cluster_with_nothing_to_give_is_refused(joined, monkeypatch):
    monkeypatch.setattr(machines, "machines_of", lambda _: [{"memory": 1}])
    with pytest.raises(UserError, match="no node of this cluster offers a CPU or a GPU: start worker nodes"):
        scale_workers(1)


def heard(caplog):
    return [(record.message, record.facts) for record in caplog.records if record.name == "bigface"]


@pytest.mark.ray
def test_a_run_waits_until_its_machines_are_free(caplog, monkeypatch):
    """Another one holds all CPUs, and ends when it hears that somebody waits."""
    start_ray()
    monkeypatch.setattr(machines, "LOOK_EVERY", 0.2)
    (machine,) = machines_of(None)
    other = placement_group([{"CPU": machine["CPU"]}])
    assert other.wait(60)
    free = logging.Handler()
    free.emit = lambda record: remove_placement_group(other)
    machines.log.addHandler(free)
    with caplog.at_level(logging.INFO, "bigface"):
        await_machines(ScalingConfig(num_workers=2, resources_per_worker={"CPU": machine["CPU"] / 2}))
    (waiting, facts), *_, (here, last) = heard(caplog)
    assert (waiting, here) == ("waiting for machines", "machines are here")
    assert (facts["workers"], facts["room_for"], facts["each"]) == (2, 0, f"{machine['CPU'] / 2:.2g} CPU")
    assert facts["since"][10] == "T"
    assert last["workers"] == 2
    caplog.clear()
    await_machines(ScalingConfig(num_workers=2, resources_per_worker={"CPU": machine["CPU"] / 2}))
    assert heard(caplog) == []  # they were free at once


@pytest.mark.ray
def test_the_lasting_actor_of_ray_data_starts_before_a_worker_needs_it():
    start_ray()
    machines.keep_no_machine()
    ray.get_actor("datasets_stats_actor", "_dataset_stats_actor")  # raises where there is none


@pytest.mark.ray
def test_a_wait_that_is_over_asks_for_nothing_more(caplog, monkeypatch):
    start_ray()
    monkeypatch.setattr(machines, "LOOK_EVERY", 0.2)
    with caplog.at_level(logging.INFO, "bigface"), pytest.raises(UserError) as over:
        await_machines(ScalingConfig(num_workers=(3, 4), resources_per_worker={"CPU": 1e4}), minutes=0.01)
    assert str(over.value) == (
        "3 workers, and 0.01 minutes have brought room for 0: give a longer --wait or fewer --workers; `ray status` "
        "says what is missing"
    )
    assert [event for event, _ in heard(caplog)] == ["waiting for machines"]  # nothing came: no event more
    while {group["state"] for group in placement_group_table().values()} != {"REMOVED"}:
        time.sleep(0.1)
