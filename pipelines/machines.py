"""Machines of a cluster: those that are up, those that may come, and the wait for those that a run asks for."""

import os
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fr_core.errors import UserError
from pipelines.logs import log
from pipelines.ray_start import LOCAL, ray_address, start_ray

if TYPE_CHECKING:
    from ray.train import ScalingConfig

GROWS_AS = "ray_bootstrap_config.yaml"  # `ray up` leaves the autoscaler's config under this name in the head's home
CLUSTER_NAME = "RAY_CLUSTER_NAME"  # KubeRay sets this variable in each pod
NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")  # Kubernetes writes this file in each pod
COUNTED = 1000  # machines of a type at most; KubeRay's default for maxReplicas is 2,147,483,647
RESIZE_EVERY = 60.0  # seconds between looks for more machines while a range of workers trains
LOOK_EVERY = 2.0  # seconds between looks for machines that a run waits for
SAY_EVERY = 60.0  # seconds between events of a wait in which no machine comes
WAIT = 60.0  # minutes

Resources = Mapping[str, float]  # of a machine or a worker, as Ray names them: CPU, GPU, …


def cluster_machines() -> list[Resources]:
    """Return the resources of each node of the cluster.

    Of a cluster that may grow these are the head and all nodes that may come, the largest first. Elsewhere these are
    the nodes that are up.
    """
    return machines_of(autoscaler_config())


def autoscaler_config() -> dict[str, Any] | None:
    """Return the config of the cluster's autoscaler, if this machine can read it and machines may come.

    `ray up` leaves it on the head. KubeRay's autoscaler follows the RayCluster, which the head's pod may read.
    """
    import yaml

    if ray_address() == LOCAL:
        return None
    file = Path.home() / GROWS_AS
    config = yaml.safe_load(file.read_text()) if file.is_file() else _kuberay_config()
    kinds = config["available_node_types"].values() if config else ()
    return config if any(kind.get("resources") for kind in kinds) else None  # Ray counts on-premise machines itself


def _kuberay_config() -> dict[str, Any] | None:
    if CLUSTER_NAME not in os.environ or not NAMESPACE.is_file():
        return None
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
    from ray.autoscaler._private.kuberay.node_provider import KubernetesHttpApiClient
    from requests import RequestException

    try:
        cluster = KubernetesHttpApiClient(NAMESPACE.read_text()).get(f"rayclusters/{os.environ[CLUSTER_NAME]}")
    except RequestException:  # a cluster that does not grow may not be read
        return None
    return _derive_autoscaling_config_from_ray_cr(cluster) if cluster["spec"].get("enableInTreeAutoscaling") else None


def machines_of(config: dict[str, Any] | None) -> list[Resources]:
    """Return the machines that an autoscaler's config allows; without one, those that are up."""
    import ray

    if config is None:
        return [node["Resources"] for node in ray.nodes() if node["Alive"]]
    kinds = dict(config["available_node_types"])
    head = kinds.pop(config["head_node_type"])
    may_come = [
        machine
        for kind in kinds.values()
        for machine in repeat(kind.get("resources", {}), min(kind.get("max_workers", 0), COUNTED))
    ]
    may_come.sort(key=lambda machine: (machine.get("GPU", 0), machine.get("CPU", 0)), reverse=True)
    return [head.get("resources", {}), *may_come[: config["max_workers"]]]


def capacity(machines: Sequence[Resources]) -> tuple[float, float]:
    """Return the CPUs and the GPUs of all machines together."""
    cpus, gpus = (sum(machine.get(name, 0) for machine in machines) for name in ("CPU", "GPU"))
    return cpus, gpus


def room(machines: Sequence[Resources], each: Resources) -> int:
    """Return how many workers fit the machines, if each worker reserves these resources."""
    tolerance = 1e-6  # of a division; Ray counts in ten thousandths
    return sum(
        min(int(machine.get(name, 0) / amount + tolerance) for name, amount in each.items()) for machine in machines
    )


def worker_cpus(machines: Sequence[Resources], workers: int) -> float:
    """Return the CPUs that each worker reserves, so that Ray Data keeps at least half of them.

    This still holds after the largest of several machines has died. It also holds on each machine with cards, where
    every card may have a worker.
    """
    sizes = sorted(machine.get("CPU", 0) for machine in machines if machine.get("CPU", 0))
    full = [m["CPU"] / (2 * m["GPU"]) for m in machines if m.get("CPU", 0) and m.get("GPU", 0)]
    return min(1.0, sum(sizes[: max(1, len(sizes) - 1)]) / (2 * workers), *full)


def cpus_for_one_worker_per_node(machines: Sequence[Resources]) -> float:
    """Return the CPUs that a worker reserves so that a node holds one worker and a task of Ray Data.

    A worker takes a little more than half of the smallest node; nodes are meant to be alike.

    Raises:
        UserError: there is no node, or one has less than 2 CPUs.
    """
    least = min(filter(None, (machine.get("CPU", 0) for machine in machines)), default=0)
    if least < 2:
        raise UserError(f"a range of --workers needs nodes of 2 CPUs or more, one has {least:g}: give --workers N")
    return least / 2 + 0.5


def scale_workers(workers: int | tuple[int, int]) -> "ScalingConfig":
    """Start or join Ray, and return how Ray Train places a run's workers on the cluster, as it is or may become.

    Args:
        workers: number of workers, or the least and the most. Of a range, as many run as there are cards at the time;
            without cards, as many as there are nodes.

    Raises:
        UserError: the cluster never has room for the workers.
    """
    start_ray()
    least, most = workers if isinstance(workers, tuple) else (workers, workers)
    config = autoscaler_config()
    machines = machines_of(config)
    all_cpus, gpus = capacity(machines)
    if not gpus and not all_cpus:
        raise UserError("no node of this cluster offers a CPU or a GPU: start worker nodes")
    whole = least == most or gpus
    each = reserved(worker_cpus(machines, most) if whole else cpus_for_one_worker_per_node(machines), gpus)
    check_room(least, each, machines, config)
    if config:
        keep_no_machine()
    return place_workers(workers, each)


def reserved(cpus: float, gpus: float) -> dict[str, float]:
    """Return what a worker reserves: these CPUs, and a card if the cluster has any."""
    return {"CPU": cpus, "GPU": 1} if gpus else {"CPU": cpus}


def place_workers(workers: int | tuple[int, int], each: dict[str, float]) -> "ScalingConfig":
    """Return how Ray Train places workers that each reserve these resources, as :func:`placement` says."""
    from ray.train import ScalingConfig

    return ScalingConfig(
        num_workers=workers,  # type: ignore[arg-type]  # mypy sees the class before 2.50
        use_gpu="GPU" in each,
        resources_per_worker=each,
        placement_strategy=placement(each),
        elastic_resize_monitor_interval_s=RESIZE_EVERY,  # type: ignore[call-arg]
    )


def placement(each: Resources) -> str:
    """Return Ray's strategy for workers that each reserve these resources.

    Cards of one node reach each other by NVLink or PCIe, much faster than those of two nodes. So workers with cards
    fill a node before they take another. Without cards, workers spread, because each brings a node's cores and memory.
    """
    return "PACK" if each.get("GPU") else "SPREAD"


def keep_no_machine() -> None:
    """Start the actor of Ray Data that outlives a run here, on the head. A worker would start it on its own machine.

    An autoscaler never takes the machine of such an actor.
    """
    from ray.data._internal.stats import get_or_create_stats_actor

    get_or_create_stats_actor()


def await_machines(scaling: "ScalingConfig", minutes: float = WAIT) -> None:
    """Ask the cluster for a run's machines and wait until they are free, or until the least of a range are.

    The request is a placement group. An autoscaler starts machines for it and keeps those that have come. It vanishes
    with this process, and the requests of other runs stand beside it.

    Raises:
        UserError: the machines have not come in this time.
    """
    from ray.util import placement_group, remove_placement_group

    least: int = scaling.min_workers  # type: ignore[attr-defined]  # mypy sees the class before 2.50
    each: Resources = scaling.resources_per_worker  # type: ignore[assignment]
    began, since = time.monotonic(), datetime.now().astimezone().isoformat(timespec="seconds")
    here, said = -1, 0.0
    asked = placement_group([dict(each)] * least, strategy=placement(each))
    try:
        while not asked.wait(LOOK_EVERY):
            now, before, here = time.monotonic(), here, min(least, free_room(each))
            if here > before or now - said >= SAY_EVERY:
                said = now
                facts = {"workers": least, "room_for": here, "each": _words(each), "since": since}
                log.info("waiting for machines", extra={"facts": facts})
            if now - began >= 60 * minutes:
                raise UserError(
                    f"{least} workers, and {minutes:g} minutes have brought room for {here}: give a longer --wait or "
                    "fewer --workers; `ray status` says what is missing"
                )
    finally:
        remove_placement_group(asked)
    if said:
        log.info("machines are here", extra={"facts": {"workers": least, "seconds": time.monotonic() - began}})


def free_room(each: Resources) -> int:
    """Return how many workers fit what is free on the nodes that are up, if each reserves these resources."""
    from ray._private.state import available_resources_per_node

    return room(list(available_resources_per_node().values()), each)


def check_room(workers: int, each: Resources, machines: Sequence[Resources], config: dict[str, Any] | None) -> None:
    """Refuse workers for which a cluster never has room.

    Args:
        each: resources that each worker reserves.
        machines: those that are up or may come.
        config: of the autoscaler, if machines may come.

    Raises:
        UserError: it names the number that fits, and the field to raise.
    """
    most_ever = room(machines, each)
    if most_ever >= workers:
        return
    verb = "grows to" if config else "has room for"
    found = f"{workers} workers of {_words(each)}, and this cluster {verb} {most_ever}"
    if not most_ever:
        raise UserError(f"{found}: it needs machines that have these together")
    field = "maxReplicas" if config and config["provider"]["type"] == "kuberay" else "max_workers"
    raise UserError(f"{found}: use --workers {most_ever}{f', or raise {field}' if config else ''}")


def _words(each: Resources) -> str:
    return " and ".join(f"{amount:.2g} {name}" for name, amount in each.items())
