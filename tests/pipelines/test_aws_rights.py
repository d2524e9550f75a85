"""The rights on AWS that docs/clusters.md lists, against what Ray asks of a stand-in for AWS."""

import re
from pathlib import Path

import boto3
import botocore.client
import pytest
import yaml
from moto import mock_aws
from ray.autoscaler._private.aws.config import bootstrap_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config

ROOT = Path(__file__).parents[2]


def listed(who):
    """The rights in the row of the table on the page."""
    (row,) = re.findall(rf"^\| {who} \|(.*)\|$", (ROOT / "docs/clusters.md").read_text(), re.MULTILINE)
    return {f"ec2:{name}" for name in re.findall(r"`ec2:(\w+)`", row)}


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """The calls so far, by name."""
    for name, value in {"ACCESS_KEY_ID": "name", "SECRET_ACCESS_KEY": "secret", "DEFAULT_REGION": "us-west-2"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # the key for SSH goes there
    calls, call = set(), botocore.client.BaseClient._make_api_call

    def recorded(client, name, arguments):
        calls.add(f"{client.meta.service_model.service_name}:{name}")
        return call(client, name, arguments)

    with mock_aws():
        boto3.client("ec2").create_security_group(GroupName="bigface", Description="of the test")
        for role in ("head", "worker"):
            boto3.client("iam").create_instance_profile(InstanceProfileName=f"bigface-{role}")
        monkeypatch.setattr(botocore.client.BaseClient, "_make_api_call", recorded)
        yield calls


@pytest.mark.soak
def test_ray_asks_for_no_right_that_the_page_lacks(asked):
    ec2 = boto3.client("ec2")
    machine = ec2.describe_images()["Images"][0]["ImageId"]
    group = ec2.describe_security_groups(GroupNames=["bigface"])["SecurityGroups"][0]["GroupId"]
    text = (ROOT / "cluster.yaml").read_text().replace("ACCOUNT", "123456789012").replace("sg-BIGFACE", group)
    config = prepare_config(yaml.safe_load(text.replace("ami-HEAD", machine).replace("ami-CARDS", machine)))
    asked.clear()
    config = bootstrap_aws(AWSNodeProvider.fillout_available_node_types_resources(config))
    start_and_end(config, "head")
    assert asked == listed("you, for `ray up`")
    asked.clear()
    start_and_end(config, "spot")
    assert asked == listed(r"`bigface-head`, the head's role")
    assert listed(r"`bigface-worker`, the workers' role") == set()


def start_and_end(config, kind):
    """What the launcher does with the head, and the head's autoscaler with a worker."""
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    provider.create_node(config["available_node_types"][kind]["node_config"], {"ray-user-node-type": kind}, 1)
    nodes = provider.non_terminated_nodes({"ray-user-node-type": kind})
    assert len(nodes) == 1
    provider.set_node_tags(nodes[0], {"ray-node-status": "up-to-date"})
    provider.terminate_nodes(nodes)
