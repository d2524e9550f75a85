"""The cluster files against the schemas of Ray and KubeRay, and the commands in them against our command line."""

import copy
import re
import shlex
import subprocess
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from typer.main import get_command

from fr_core.config.recipes import load_config
from pipelines.cli.app import app

ROOT = Path(__file__).parents[2]
PLACE = ROOT / "pipelines/cluster"
AWS, ON_PREM, RAYJOB, DOCKERFILE, SLURM = (
    ROOT / "cluster.yaml",
    *(PLACE / name for name in ("on_prem.yaml", "rayjob.yaml", "Dockerfile", "slurm.sbatch")),
)


def fields(**types):
    """A JSON schema of an object with these fields and no others."""
    schemas = {name: {"type": kind} if isinstance(kind, str) else kind for name, kind in types.items()}
    return {"type": "object", "properties": schemas, "additionalProperties": False}


# The fields of KubeRay 1.6's RayJob that the manifest uses; the rest of a pod is Kubernetes' own.
POD = fields(spec=fields(
    serviceAccountName="string", automountServiceAccountToken="boolean", restartPolicy={"enum": ["Never"]},
    terminationGracePeriodSeconds="integer", tolerations="array", containers="array", volumes="array",
))  # fmt: skip
START = {"type": "object", "additionalProperties": {"type": "string"}}
WORKERS = fields(
    groupName="string", replicas="integer", minReplicas="integer", maxReplicas="integer",
    rayStartParams=START, template=POD,
)  # fmt: skip
CLUSTER = fields(
    rayVersion="string", enableInTreeAutoscaling="boolean",
    autoscalerOptions=fields(version={"enum": ["v1", "v2"]}, idleTimeoutSeconds="integer"),
    authOptions=fields(mode={"enum": ["token", "disabled"]}), gcsFaultToleranceOptions=fields(redisAddress="string"),
    headGroupSpec=fields(rayStartParams=START, template=POD),
    workerGroupSpecs={"type": "array", "items": WORKERS},
)  # fmt: skip
JOB = fields(
    entrypoint="string", backoffLimit="integer", shutdownAfterJobFinishes="boolean", ttlSecondsAfterFinished="integer",
    rayClusterSpec=CLUSTER,
)  # fmt: skip


def read(path):
    return yaml.safe_load(path.read_text())


@pytest.mark.parametrize("path", [AWS, ON_PREM], ids=["aws", "on_prem"])
def test_ray_up_takes_it(path):
    whole = prepare_config(read(path))
    validate_config(whole)
    assert whole["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "RAY_AUTH_MODE=token" in str(whole["setup_commands"] + whole["docker"].get("run_options", []))
    starts = whole["head_start_ray_commands"] + whole["worker_start_ray_commands"]
    assert sum("--metrics-export-port=8080" in command for command in starts) == 2
    assert "--block" not in str(starts)  # `ray up` waits for each command to end


@pytest.mark.parametrize("path", [AWS, ON_PREM], ids=["aws", "on_prem"])
def test_no_environment_and_no_run_is_mounted(path):
    """Ray hashes all that is mounted, whatever rsync leaves out, and restarts the head when the hash differs."""
    mounted = set(read(path)["file_mounts"].values()) - {"~/.ray/auth_token"}
    assert mounted <= {"dist"}
    assert "rsync_exclude" not in read(path)


def test_all_install_the_same_ray():
    pinned = re.search(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    assert pinned == ray.__version__  # what is tested here
    named = {path.name: set(re.findall(r"ray[:=]?(\d+\.\d+\.\d+)", path.read_text())) for path in PLACE.iterdir()}
    named["cluster.yaml"] = set(re.findall(r"bigface:ray(\d+\.\d+\.\d+)", AWS.read_text()))
    found = {name: versions for name, versions in named.items() if versions}
    assert found == {name: {pinned} for name in ("cluster.yaml", "rayjob.yaml", "Dockerfile")}
    assert read(RAYJOB)["spec"]["rayClusterSpec"]["rayVersion"] == pinned
    assert "-c ~/bigface/constraints.txt" in str(read(ON_PREM)["setup_commands"])
    assert not prepare_config(read(AWS))["setup_commands"]  # of Ray's defaults, which install another Ray


def test_what_a_job_needs_to_save_is_set_where_it_works():
    """Seconds before `ray job stop` kills, on each head; seconds of a drain only where Ray starts with --block."""
    assert "ENV RAY_JOB_STOP_WAIT_TIME_S=120" in DOCKERFILE.read_text()
    assert "RAY_JOB_STOP_WAIT_TIME_S=120" in ON_PREM.read_text()
    drains = [path.name for path in (AWS, *PLACE.iterdir()) if "RAY_GRACEFUL_SHUTDOWN_DRAIN" in path.read_text()]
    assert drains == [RAYJOB.name]


def test_setting_up_again_changes_nothing_more(tmp_path):
    own = [command for command in read(ON_PREM)["setup_commands"] if ".bigface" in command]
    assert len(own) == 2
    (tmp_path / ".bashrc").write_text("# of the user\n")
    for _ in range(3):
        for command in own:
            subprocess.run(["bash", "-c", command], env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}, check=True)
    assert (tmp_path / ".bashrc").read_text() == "# of the user\n. ~/.bigface\n"
    shown = 'cd; . ~/.bashrc; echo "$PATH $RAY_AUTH_MODE"'
    environment = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    told = subprocess.run(["bash", "-c", shown], env=environment, capture_output=True, text=True, check=True).stdout
    assert told == f"{tmp_path}/venv/bin:/usr/bin:/bin token\n"


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
    for node in types.values():
        assert "IamInstanceProfile" in node["node_config"]  # no keys on the machines
        assert node["node_config"]["SecurityGroupIds"]  # Ray's own opens port 22 to the world


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
    jsonschema.validate(job["spec"], JOB)
    spec = job["spec"]
    assert spec["shutdownAfterJobFinishes"]
    assert spec["ttlSecondsAfterFinished"] > 0
    cluster = spec["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    assert workers["replicas"] == workers["minReplicas"] == 0  # KubeRay submits the job when all replicas run
    assert cluster["enableInTreeAutoscaling"]
    seconds = workers["template"]["spec"]["terminationGracePeriodSeconds"]
    (container,) = workers["template"]["spec"]["containers"]
    environment = {one["name"]: one["value"] for one in container["env"]}
    assert 30 < int(environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]) < seconds  # 30 are Kubernetes' own
    templates = [cluster["headGroupSpec"]["template"], workers["template"]]
    images = {template["spec"]["containers"][0]["image"] for template in templates}
    assert images == {read(AWS)["docker"]["image"]}


def test_workers_on_kubernetes_have_none_of_the_rights_of_the_autoscaler():
    """KubeRay gives them to the account of the head."""
    cluster = read(RAYJOB)["spec"]["rayClusterSpec"]
    head, *groups = (group["template"]["spec"] for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]])
    for pod in groups:
        assert pod["serviceAccountName"] != head["serviceAccountName"]
        assert pod["automountServiceAccountToken"] is False
    made = set(re.findall(r"kubectl create serviceaccount (\S+)", RAYJOB.read_text()))
    assert made == {pod["serviceAccountName"] for pod in [head, *groups]}


def test_a_field_that_kuberay_does_not_know_is_found():
    spec = copy.deepcopy(read(RAYJOB)["spec"])
    spec["rayClusterSpec"]["workerGroupSpecs"][0]["maxReplica"] = 4
    with pytest.raises(jsonschema.ValidationError, match="maxReplica"):
        jsonschema.validate(spec, JOB)
