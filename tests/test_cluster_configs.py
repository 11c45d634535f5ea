"""Every file in cluster/ is held against the program that reads it, and a typo in it does not pass."""

import copy
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import botocore.exceptions
import pytest
from cluster_files import (
    CLUSTER,
    HEAD_MAY,
    NOTES,
    ROOT,
    VALIDATORS,
    check_script,
    commands,
    documents,
    shell_faults,
    strict,
    unknown_variables,
)
from moto import mock_aws
from moto.core import set_initial_no_auth_action_count

FILES = sorted(
    str(path.relative_to(CLUSTER))
    for path in CLUSTER.rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
)
STRUCTURED = [name for name in FILES if name.endswith((".yaml", ".json"))]
GUIDE = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```sh\n(.*?)^```", re.DOTALL | re.MULTILINE)
SCRIPTS = ["".join(BLOCK.findall(chapter)) for chapter in GUIDE.split("\n## ")]
"""A script for each chapter: what one block sets the next ones use."""


def read(name: str) -> str:
    return (CLUSTER / name).read_text(encoding="utf-8")


def test_every_file_has_a_validator() -> None:
    assert sorted(VALIDATORS) == FILES


@pytest.mark.parametrize("name", FILES)
def test_file_is_as_its_program_reads_it(name: str) -> None:
    VALIDATORS[name](read(name))


def refused(name: str, text: str) -> bool:
    try:
        VALIDATORS[name](text)
    except pytest.skip.Exception:
        raise
    except Exception:
        return True
    return False


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to each value below."""
    pairs = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in pairs:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


def damaged(whole: Any, path: tuple[Any, ...], change: Callable[[Any, Any], None]) -> Any:
    """A copy in which `change(owner, key)` was applied at a path."""
    whole = copy.deepcopy(whole)
    owner = whole
    for key in path[:-1]:
        owner = owner[key]
    change(owner, path[-1])
    return whole


def misspell(owner: Any, key: Any) -> None:
    """A letter is typed twice."""
    owner[key + key[-1]] = owner.pop(key)


def mistype(owner: Any, key: Any) -> None:
    owner[key] = "wrong" if isinstance(owner[key], dict | list) else {"wrong": "type"}


def changes_of(path: tuple[Any, ...]) -> list[Callable[[Any, Any], None]]:
    return [mistype] if isinstance(path[-1], int) else [misspell, mistype]


def unshared(text: str) -> list[Any]:
    """The documents of a file, without anchors: a change is made in one place."""
    return [json.loads(json.dumps(document)) for document in documents(text)]


def dumped(*parts: Any) -> str:
    """The text of a file: JSON is YAML."""
    return "\n---\n".join(map(json.dumps, parts))


@pytest.mark.parametrize("name", STRUCTURED)
def test_no_misspelt_key_and_no_wrong_type_passes(name: str) -> None:
    parts = unshared(read(name))
    assert not refused(name, dumped(*parts)), "what is not damaged is refused"
    passed = [
        (change.__name__, *path)
        for path in places(parts)
        if len(path) > 1  # not a whole document
        for change in changes_of(path)
        if not refused(name, dumped(*damaged(parts, path, change)))
    ]
    assert passed == []


def test_no_typo_in_the_embedded_serve_config_passes() -> None:
    name = "kubernetes/service.yaml"
    service, *others = unshared(read(name))
    (config,) = documents(service["spec"]["serveConfigV2"])

    def embed(text: str) -> str:
        spec = service["spec"] | {"serveConfigV2": text}
        return dumped(service | {"spec": spec}, *others)

    assert not refused(name, embed(dumped(config)))
    passed = [
        (change.__name__, *path)
        for path in places(config)
        for change in changes_of(path)
        if not refused(name, embed(dumped(damaged(config, path, change))))
    ]
    assert passed == []


WRONG = [
    ("aws.yaml", "c7i.4xlarge", "c7i.4xlrage"),
    ("aws.yaml", "MarketType: spot", "MarketType: sport"),
    ("aws.yaml", "VolumeType: gp3", "VolumeType: gp33"),
    ("aws.yaml", "eu-central-1", "eu-centre-1"),
    ("aws.yaml", "HttpTokens: required", "HttpTokens: require"),
    ("aws.yaml", "vsearch/role: decode", "vsearch/role: decod"),
    ("aws.yaml", "vsearch/role: decode", "ray.io/role: decode"),
    ("aws.yaml", "resources: {CPU: 0}", "resources: {CPU: 4}"),
    ("aws.yaml", "--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0"),
    ("aws.yaml", "--metrics-export-port", "--metric-export-port"),
    ("aws.yaml", "ray stop", "ray stopp"),
    ("aws.yaml", "--no-dev", "--no-devs"),
    ("aws.yaml", "RAY_AUTH_MODE=token", "RAY_AUTH_MODE=tokem"),
    ("aws.yaml", "resolve:ssm:/aws/service/canonical", "resolve:ssm:/aws/servce/canonical"),
    ("gcp.yaml", "provisioningModel: SPOT", "provisioningModel: SPOTS"),
    ("gcp.yaml", "type: PERSISTENT", "type: PERSISTANT"),
    ("gcp.yaml", "n2-standard-16", "n2-standard-8"),
    ("gcp.yaml", "subnetworks/vsearch", "subnetwork/vsearch"),
    ("gcp.yaml", "vsearch-worker@my-project", "vsearch-head@my-project"),
    ("gcp.yaml", "europe-west4-a/diskTypes", "europe-west4-b/diskTypes"),
    ("gcp.yaml", "--extra gcp", "--extra aws"),
    ("aws-iam-head.json", "ec2:TerminateInstances", "ec2:TerminateInstance"),
    ("aws-iam-head.json", "role/vsearch-worker", "role/*"),
    ("aws-iam-head.json", "aws:ResourceTag/ray-cluster-name", "aws:ResourceTag/ray-cluster"),
    ("aws-iam-head.json", '"StringEquals": {"iam:Pass', '"StringEqual": {"iam:Pass'),
    ("aws-iam-worker.json", "my-archive/corpus/*", "my-archive/*"),
    ("aws-iam-worker.json", "s3:DeleteObject", "s3:DeleteObjects"),
    ("aws-iam-worker.json", "2012-10-17", "2012-10-18"),
    ("serve.yaml", "EveryNode", "EachNode"),
    ("serve.yaml", "vsearch.serve:build_app", "vsearch.serve:buildapp"),
    ("serve.yaml", "part_replicas: 2", "part_replicas: 0"),
    ("serve.yaml", "name: Gateway", "name: Gatewy"),
    ("serve.yaml", "keys: /etc/vsearch/keys.json", "no_auth: true"),
    ("kubernetes/ingest.yaml", "--corpus", "--korpus"),
    ("kubernetes/ingest.yaml", "vsearch ingest", "vsearch injest"),
    ("kubernetes/ingest.yaml", "K8sJobMode", "K8SJobMode"),
    ("kubernetes/ingest.yaml", "version: v2", "version: v3"),
    ("kubernetes/ingest.yaml", "memory: 8Gi", "memory: 8Gb"),
    ("kubernetes/ingest.yaml", 'num-cpus: "0"', 'num-cpus: "2"'),
    ("kubernetes/ingest.yaml", "mode: token", "mode: tokens"),
    ("kubernetes/ingest.yaml", "vsearch/role: embed", "vsearch/role: embedd"),
    ("kubernetes/train.yaml", "ray-token", "ray-tokens"),
    ("kubernetes/train.yaml", "rayVersion: 2.60.0", "rayVersion: 2.6.0"),
    ("kubernetes/index.yaml", "backoffLimit: 0", "backoffLimit: -1"),
    ("kubernetes/cluster.yaml", "name: huggingface", "name: hugingface"),
    ("kubernetes/cluster.yaml", "drop: [ALL]", "drop: [ALLL]"),
    ("kubernetes/service.yaml", "type: NewCluster", "type: NewClustr"),
    ("kubernetes/service.yaml", "mountPath: /etc/vsearch", "mountPath: /etc/vserch"),
    ("kubernetes/service.yaml", "vsearch-serve-svc", "vsearch-serve-service"),
    ("kubernetes/service.yaml", "pathType: Prefix", "pathType: Prefixx"),
    ("kubernetes/service.yaml", "host: search.example.com", "host: serch.example.com"),
    ("kubernetes/base.yaml", "policyTypes: [Ingress]", "policyTypes: [Ingres]"),
    ("kubernetes/base.yaml", "port: 8265", "port: 8256"),
    ("kubernetes/base.yaml", "enforce: baseline", "enforce: basline"),
    ("grafana.json", "ray_vsearch_rows", "ray_vsearch_row"),
    ("grafana.json", "ray_data_output_rows", "ray_data_output_row"),
    ("grafana.json", '"reqps"', '"reqs"'),
    ("Dockerfile", "FROM python:3.12.12-slim-trixie\n", "FROM python:latest\n"),
    ("Dockerfile", "FROM python:3.12.12-slim-trixie\n", "FROM python:3.12-slim-trixie\n"),
    ("Dockerfile", "USER 1000:1000", "USER root"),
    ("Dockerfile", "USER 1000:1000", "USR 1000:1000"),
    ("Dockerfile", "uv==0.13.9", "uv"),
    ("Dockerfile", "uv sync", "uv sink"),
    ("Dockerfile", "--no-install-project", "--no-install-projects"),
    ("Dockerfile", "COPY vsearch ", "COPY vserch "),
    ("Dockerfile", "COPY vsearch ./vsearch", "COPY . ./vsearch"),
    ("Dockerfile", "COPY pyproject", "ADD https://example.com/x.tar.gz /x\nCOPY pyproject"),
    ("Dockerfile", "UV_LINK_MODE", "UV_LINK_MODES"),
    ("Dockerfile", "ENV UV_LINK", "ENV HF_TOKEN=hf_x\nENV UV_LINK"),
    (
        "Dockerfile",
        "WORKDIR /vsearch",
        "RUN apt-get update && apt-get install -y git\nWORKDIR /vsearch",
    ),
    ("Dockerfile", "NVIDIA_DRIVER_CAPABILITIES", "NVIDIA_DRIVER_CAPABILITES"),
    ("Dockerfile.dockerignore", "!vsearch", "!vserch"),
    ("Dockerfile.dockerignore", "\n*\n", "\n"),
    ("Dockerfile.dockerignore", "!LICENSE", "!LICENSE\n!keys.json"),
]


@pytest.mark.parametrize(("name", "right", "wrong"), WRONG)
def test_no_wrong_value_passes(name: str, right: str, wrong: str) -> None:
    text = read(name)
    assert right in text
    assert refused(name, text.replace(right, wrong, 1))


def test_each_file_is_damaged_by_hand_too() -> None:
    assert {name for name, _, _ in WRONG} == set(FILES)


def test_a_strict_schema_is_closed_at_every_depth() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "object", "properties": {"b": {}}}}}
    closed = strict(schema)
    assert closed["additionalProperties"] is False
    assert closed["properties"]["a"]["additionalProperties"] is False
    assert "additionalProperties" not in schema
    kept = strict({"properties": {}, "x-kubernetes-preserve-unknown-fields": True})
    assert "additionalProperties" not in kept


# ── Ray's own provider, and IAM, against moto ────────────────────────────────────────────────────


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """An empty account of moto."""
    for name in ("AWS_ENDPOINT_URL", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("HOME", str(tmp_path))  # Ray writes a key there
    with mock_aws():
        yield


def test_ray_brings_an_aws_cluster_up_and_down(account: None) -> None:
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler._private.util import prepare_config

    config = prepare_config(*documents(read("aws.yaml")))
    ec2 = boto3.client("ec2", config["provider"]["region"])
    vpc = ec2.describe_vpcs()["Vpcs"][0]["VpcId"]
    group = ec2.create_security_group(GroupName="own", Description="-", VpcId=vpc)["GroupId"]
    iam = boto3.client("iam")
    for name in ("vsearch-head", "vsearch-worker"):
        iam.create_instance_profile(InstanceProfileName=name)
    declared = {}
    for name, node in config["available_node_types"].items():
        node["node_config"]["SecurityGroupIds"] = [group]
        declared[name] = node.pop("resources")

    # What the machines have: the resources that are declared must fit, so that work is placed.
    filled = AWSNodeProvider.fillout_available_node_types_resources(config)
    for name, node in filled["available_node_types"].items():
        there = node["resources"]
        config["available_node_types"][name]["resources"] = declared[name]
        if name == "head":
            continue
        assert declared[name]["CPU"] == there["CPU"]
        assert declared[name].get("GPU") == there.get("GPU")
        assert 0.8 * there["memory"] < declared[name]["memory"] <= there["memory"]

    ready = AWSNodeProvider.bootstrap_config(config)
    names = {found["GroupName"] for found in ec2.describe_security_groups()["SecurityGroups"]}
    assert names == {"default", "own"}  # none of Ray's, which would be open to the world
    provider = AWSNodeProvider(ready["provider"], ready["cluster_name"])
    asked: set[str] = set()
    for resource in (provider.ec2, provider.ec2_fail_fast):
        resource.meta.client.meta.events.register(
            "before-call.ec2", lambda model, **_: asked.add(f"ec2:{model.name}")
        )
    for name, node in ready["available_node_types"].items():
        provider.create_node(node["node_config"], {"ray-user-node-type": name}, 1)
    nodes = provider.non_terminated_nodes({})
    assert len(nodes) == 4
    provider.set_node_tags(nodes[0], {"ray-node-status": "up-to-date"})
    machines = [
        machine
        for reservation in ec2.describe_instances()["Reservations"]
        for machine in reservation["Instances"]
    ]
    spot = {machine["InstanceType"]: machine.get("InstanceLifecycle") for machine in machines}
    head = ready["available_node_types"]["head"]["node_config"]["InstanceType"]
    assert spot.pop(head) is None and set(spot.values()) == {"spot"}
    for machine in machines:
        assert {"Key": "ray-cluster-name", "Value": "vsearch"} in machine["Tags"]
    provider.terminate_nodes(nodes)
    assert provider.non_terminated_nodes({}) == []
    # The policy of the head speaks of all that Ray asked for.
    assert asked == {action for action, _, _ in HEAD_MAY if action.startswith("ec2:")}


@set_initial_no_auth_action_count(8)
def test_a_worker_reaches_its_corpus_and_nothing_else(account: None) -> None:
    trust = {
        "Version": "2012-10-17",
        "Statement": {
            "Effect": "Allow",
            "Principal": {"Service": "ec2.amazonaws.com"},
            "Action": "sts:AssumeRole",
        },
    }
    iam, admin = boto3.client("iam"), boto3.client("s3", "us-east-1")
    role = iam.create_role(RoleName="vsearch-worker", AssumeRolePolicyDocument=json.dumps(trust))
    policy = read("aws-iam-worker.json")
    iam.put_role_policy(RoleName="vsearch-worker", PolicyName="corpus", PolicyDocument=policy)
    for bucket in ("my-archive", "other"):
        admin.create_bucket(Bucket=bucket)
    for key in ("videos/a.mp4", "private/a.txt"):
        admin.put_object(Bucket="my-archive", Key=key, Body=b"x")
    admin.put_object(Bucket="other", Key="corpus/a", Body=b"x")
    got = boto3.client("sts", "us-east-1").assume_role(
        RoleArn=role["Role"]["Arn"], RoleSessionName="worker"
    )["Credentials"]
    credentials = {
        "aws_access_key_id": got["AccessKeyId"],
        "aws_secret_access_key": got["SecretAccessKey"],
        "aws_session_token": got["SessionToken"],
    }
    s3 = boto3.client("s3", "us-east-1", **credentials)

    s3.put_object(Bucket="my-archive", Key="corpus/corpus.json", Body=b"{}")
    s3.copy_object(
        Bucket="my-archive",
        Key="corpus/b",
        CopySource={"Bucket": "my-archive", "Key": "corpus/corpus.json"},
    )
    assert s3.get_object(Bucket="my-archive", Key="corpus/corpus.json")["Body"].read() == b"{}"
    assert s3.get_object(Bucket="my-archive", Key="videos/a.mp4")["Body"].read() == b"x"
    assert s3.list_objects_v2(Bucket="my-archive", Prefix="corpus/")["KeyCount"] == 2
    s3.delete_object(Bucket="my-archive", Key="corpus/b")

    ec2 = boto3.client("ec2", "us-east-1", **credentials)
    refused = [
        lambda: s3.get_object(Bucket="my-archive", Key="private/a.txt"),
        lambda: s3.put_object(Bucket="my-archive", Key="videos/b.mp4", Body=b"x"),
        lambda: s3.delete_object(Bucket="my-archive", Key="videos/a.mp4"),
        lambda: s3.get_object(Bucket="other", Key="corpus/a"),
        lambda: s3.put_object(Bucket="other", Key="corpus/b", Body=b"x"),
        lambda: s3.list_objects_v2(Bucket="other"),
        lambda: s3.delete_bucket(Bucket="my-archive"),
        lambda: s3.put_bucket_policy(Bucket="my-archive", Policy="{}"),
        lambda: ec2.describe_instances(),
    ]
    for request in refused:
        with pytest.raises(botocore.exceptions.ClientError) as error:
            request()
        assert error.value.response["Error"]["Code"] in ("AccessDenied", "UnauthorizedOperation")


# ── the guide ────────────────────────────────────────────────────────────────────────────────────


def test_the_guide_names_commands_that_exist() -> None:
    assert sum(map(check_script, SCRIPTS)) >= 45
    for script in SCRIPTS:
        said = shell_faults(script)
        assert not said, said


def test_a_typo_in_a_command_is_found() -> None:
    known = "\n".join(SCRIPTS)
    for right, wrong in [
        ("ray up", "ray upp"),
        ("ray get-auth-token", "ray get-auth-tokens"),
        ("aws iam create-role", "aws iam create-rolle"),
        ("--role-name", "--rolename"),
        ("vsearch search", "vsearch serch"),
        ("submit ingest", "submit injest"),
        ("--corpus", "--korpus"),
    ]:
        assert right in known
        with pytest.raises(Exception):  # noqa: B017  # each program has its own
            check_script(known.replace(right, wrong, 1))


def test_what_the_comments_and_the_guide_name_exists() -> None:
    for name in [*FILES, ""]:
        text = read(name) if name else GUIDE
        assert unknown_variables(text) == set(), name
        for path in re.findall(r"(?<![\w/.-])(?:cluster|docs|jobs|vsearch|tests)/[\w./-]*\w", text):
            known = (ROOT / path).exists() or path in NOTES or path == "vsearch/role"
            assert known, f"{name or 'the guide'} names {path}"
        for path in re.findall(r"\]\((?!http|#)([^)#]+)", text) if not name else []:
            assert (ROOT / "docs" / path).exists(), path


@pytest.mark.parametrize("name", FILES)
def test_the_guide_speaks_of_every_file(name: str) -> None:
    if name.startswith("kubernetes/"):
        assert f"cluster/{name}" in GUIDE
    else:
        assert name in GUIDE or name in ("grafana.json", "Dockerfile.dockerignore")


def test_variables_that_nothing_reads_are_found() -> None:
    assert unknown_variables("RAY_AUTH_MODE HF_TOKEN UV_LINK_MODE") == set()
    assert unknown_variables("RAY_AUTH_MOD HF_TOKENS UV_LINKS VSEARCH_X") == {
        *("RAY_AUTH_MOD", "HF_TOKENS", "UV_LINKS", "VSEARCH_X")
    }


def test_commands_are_found_in_scripts() -> None:
    script = 'A=$(aws sts x --y) && sudo ray up \\\n  "a b" | tee c; X=1 serve status # ray no'
    found = list(commands(script))
    assert ["aws", "sts", "x", "--y"] in found
    assert ["ray", "up", "a b"] in found
    assert ["serve", "status"] in found
    assert not any("no" in words for words in found)
