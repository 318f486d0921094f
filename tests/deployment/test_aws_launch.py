"""`ray up infra/deploy/ray/aws.yaml` as far as the machines, by Ray's own code, on a simulated AWS (moto)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT

PROFILE = "distillation-s3"
"""What aws.yaml gives its workers, made by the user beforehand."""


def launched(cluster: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The instance that Ray starts for each node type; the account has networks, and nothing of Ray's."""
    import boto3
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler._private.util import prepare_config, validate_config

    ec2 = boto3.client("ec2")
    image = ec2.describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
    boto3.client("iam").create_instance_profile(InstanceProfileName=PROFILE)
    for node in cluster["available_node_types"].values():
        assert node["node_config"]["ImageId"] == "ami-REPLACE"
        node["node_config"]["ImageId"] = image
    cluster = prepare_config(cluster)
    validate_config(cluster)
    cluster = bootstrap_aws(AWSNodeProvider.fillout_available_node_types_resources(cluster))
    provider = AWSNodeProvider(cluster["provider"], cluster["cluster_name"])
    instances = {}
    for name, node in cluster["available_node_types"].items():
        tags = {
            "ray-node-name": name,
            "ray-node-type": "worker",
            "ray-launch-config": "",
            "ray-user-node-type": name,
        }
        (identity,) = provider.create_node(node["node_config"], tags, 1)
        (reservation,) = ec2.describe_instances(InstanceIds=[identity])["Reservations"]
        instances[name] = {**reservation["Instances"][0], "resources": node["resources"]}
    return instances


@pytest.mark.slow
def test_a_head_on_demand_and_gpu_workers_on_spot_are_launched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moto = pytest.importorskip("moto")
    from ray.autoscaler._private.aws import config

    monkeypatch.setenv("HOME", str(tmp_path))  # Ray writes the key of the machines to ~/.ssh
    (tmp_path / ".ssh").mkdir()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setattr(config.time, "sleep", lambda seconds: None)  # for AWS to spread a new role
    with moto.mock_aws(config={"iam": {"load_aws_managed_policies": True}}):
        instances = launched(yaml.safe_load((ROOT / "infra/deploy/ray/aws.yaml").read_text()))
    head, worker = instances["head"], instances["gpu_spot"]
    assert "InstanceLifecycle" not in head
    assert worker["InstanceLifecycle"] == "spot"
    assert worker["IamInstanceProfile"]["Arn"].endswith(f"/{PROFILE}")
    assert head["resources"] == {"CPU": 0, "GPU": 0}
    assert worker["resources"]["GPU"] == 1
    assert worker["resources"]["CPU"] == 4
