"""The cluster files against Ray's own schema and defaults, and the commands in them against our command line."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import ray
import yaml
from packaging.requirements import Requirement
from packaging.version import Version
from ray.autoscaler._private.util import prepare_config, validate_config
from typer.main import get_command

from fr_core.config.recipes import load_config
from pipelines.cli.app import app

ROOT = Path(__file__).parents[2]
AWS, ON_PREM, RAYJOB = (
    ROOT / "cluster.yaml",
    ROOT / "pipelines/cluster/on_prem.yaml",
    ROOT / "pipelines/cluster/rayjob.yaml",
)


def read(path):
    return yaml.safe_load(path.read_text())


@pytest.mark.parametrize("path", [AWS, ON_PREM], ids=["aws", "on_prem"])
def test_ray_up_takes_it(path):
    whole = prepare_config(read(path))
    validate_config(whole)
    assert whole["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert any("RAY_AUTH_MODE=token" in command for command in whole["setup_commands"])
    assert 'pip install "$HOME/bigface[tune]"' in whole["setup_commands"][0]
    assert any("RAY_JOB_STOP_WAIT_TIME_S=120" in command for command in whole["setup_commands"])
    starts = whole["head_start_ray_commands"] + whole["worker_start_ray_commands"]
    assert sum("--metrics-export-port=8080" in command for command in starts) == 2


def test_a_key_that_ray_does_not_know_is_found():
    with pytest.raises(Exception, match="idle_timeout"):
        validate_config(prepare_config(read(AWS) | {"idle_timeout": 5}))


def test_workers_come_when_asked_and_spot_machines_first():
    config = read(AWS)
    types = config["available_node_types"]
    head, spot, on_demand = types["head"], types["spot"], types["on_demand"]
    assert config["head_node_type"] == "head"
    assert head["resources"] == {"CPU": 0}
    assert spot["min_workers"] == on_demand["min_workers"] == 0
    assert spot["priority"] > on_demand["priority"]
    market = spot["node_config"].pop("InstanceMarketOptions")
    assert market == {"MarketType": "spot"}
    assert spot["node_config"] == on_demand["node_config"]
    assert all("IamInstanceProfile" in node["node_config"] for node in types.values())  # no keys on the machines


def test_on_prem_keeps_all_machines():
    whole = prepare_config(read(ON_PREM))
    assert whole["max_workers"] == len(whole["provider"]["worker_ips"])


def commands(path):
    """Those of ``bigface`` in a cluster file: the entrypoint of a job, or of the head comment."""
    text = path.read_text()
    if path == RAYJOB:
        return [shlex.split(read(path)["spec"]["entrypoint"])]
    lines = re.sub(r"\\\n#", " ", text)
    return [shlex.split(found) for found in re.findall(r"-- +(bigface .*)", lines)]


@pytest.mark.parametrize("path", [AWS, RAYJOB], ids=["aws", "rayjob"])
def test_the_command_is_one_of_ours_and_fits_the_cards(path):
    ((program, name, *arguments),) = commands(path)
    assert program == "bigface"
    command = get_command(app).commands[name]
    parsed = command.make_context(name, arguments).params
    load_config(parsed["recipe"], parsed["overrides"])
    assert parsed["out"].startswith("s3://")
    assert 1 < parsed["workers"] <= cards(path)


def cards(path):
    """Most of them at once."""
    config = read(path)
    if path == RAYJOB:
        groups = config["spec"]["rayClusterSpec"]["workerGroupSpecs"]
        each = [group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] for group in groups]
        return sum(group["maxReplicas"] * number for group, number in zip(groups, each, strict=True))
    types = config["available_node_types"].values()
    most = sum(node.get("max_workers", 0) * node["resources"].get("GPU", 0) for node in types)
    return min(most, config["max_workers"] * max(node["resources"].get("GPU", 0) for node in types))


def test_the_rayjob_is_whole():
    job = read(RAYJOB)
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    assert spec["shutdownAfterJobFinishes"]
    assert spec["ttlSecondsAfterFinished"] > 0
    cluster = spec["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    assert workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]
    assert workers["template"]["spec"]["terminationGracePeriodSeconds"] > 30  # Kubernetes' own
    templates = [cluster["headGroupSpec"]["template"], workers["template"]]
    images = {template["spec"]["containers"][0]["image"] for template in templates}
    assert len(images) == 1
    assert images.pop().endswith(f"ray{cluster['rayVersion']}")
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (ours,) = (Requirement(line) for line in asked if line.startswith("ray["))
    assert Version(cluster["rayVersion"]) in ours.specifier
    assert cluster["rayVersion"].split(".")[:2] == ray.__version__.split(".")[:2]  # what is tested here
