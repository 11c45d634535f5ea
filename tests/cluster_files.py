"""What must hold for the files in cluster/: a validator for each, strict about names, types and values."""

import copy
import gzip
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from botocore import xform_name
from botocore.session import get_session
from botocore.validate import ParamValidator

from vsearch.serve import ServeArgs

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "cluster"
SHARED = Path(__file__).parents[2] / "shared" / "kuberay"
KUBERNETES = "1.37"

ROLES = {"decode", "embed", "index"}
GPU = "nvidia.com/gpu"
# Made by hand as docs/cluster.md says, or by cert-manager.
SECRETS = {"ray-token", "vsearch-keys", "huggingface", "vsearch-tls"}
# Free text to Kubernetes; read by the Cluster Autoscaler, Karpenter, Prometheus' usual configuration,
# cert-manager, the Pod Security admission, Kubernetes and KubeRay (ray-operator/controllers/ray/utils).
NOTES = {
    "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
    "karpenter.sh/do-not-disrupt": "true",
    "prometheus.io/scrape": "true",
    "prometheus.io/port": "8080",
    "cert-manager.io/cluster-issuer": "letsencrypt",
    "pod-security.kubernetes.io/enforce": "baseline",
    "vsearch/serves": "queries",
}
SELECTED = {
    "ray.io/is-ray-node": {"yes"},
    "app.kubernetes.io/component": {"kuberay-operator"},
    "kubernetes.io/metadata.name": {"default", "traefik", "monitoring"},
    "vsearch/serves": {"queries"},
}
# What the CRDs leave as text (ray-operator/apis/ray/v1).
SUBMISSION_MODES = {"K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"}
UPGRADES = {"NewCluster", "NewClusterWithIncrementalUpgrade", "None"}
QUANTITY = re.compile(r"\d+(m|[KMGT]i)?")


def require(held: object, said: object) -> None:
    """As assert, also where a validator is given what is wrong on purpose."""
    if not held:
        raise ValueError(str(said))


def equal(found: object, wanted: object) -> None:
    require(found == wanted, f"{found!r} is not {wanted!r}")


def documents(text: str) -> list[Any]:
    """What a YAML file holds."""
    return list(yaml.load_all(text, yaml.CSafeLoader))


# ── schemas ──────────────────────────────────────────────────────────────────────────────────────


def strict(schema: Any) -> Any:
    """The schema with every object closed to names that it does not list."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: strict(part) for name, part in schema.items()}
    properties = isinstance(closed.get("properties"), dict)
    if properties and not closed.get("x-kubernetes-preserve-unknown-fields"):
        closed.setdefault("additionalProperties", False)
    choices = closed.get("anyOf")
    if isinstance(choices, list) and any("$ref" in choice for choice in choices):
        # Serve takes any mapping where it knows a model.
        closed["anyOf"] = [choice for choice in choices if choice.get("type") != "object"]
    return closed


def check(schema: Any, value: Any) -> None:
    """Raises `jsonschema.ValidationError` for a value that is not as the schema says."""
    for error in schema.iter_errors(value):
        raise error


@cache
def crd(kind: str) -> Any:
    """Validator of a KubeRay kind, by its own custom resource definition."""
    path = SHARED / f"ray.io_{kind.lower()}s.yaml.gz"
    if not path.is_file():
        message = f"{path} is not there: it holds the definitions of KubeRay"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    with gzip.open(path) as file:
        definition = yaml.load(file, yaml.CSafeLoader)
    (version,) = (v for v in definition["spec"]["versions"] if v["name"] == "v1")
    return jsonschema.Draft202012Validator(strict(version["schema"]["openAPIV3Schema"]))


@cache
def google_instance() -> Any:
    """Validator of what Google's instances.insert takes, by the discovery document of its client."""
    import googleapiclient

    documents = Path(googleapiclient.__file__).parent / "discovery_cache" / "documents"
    schemas = json.loads((documents / "compute.v1.json").read_text(encoding="utf-8"))["schemas"]

    def translate(part: Any) -> Any:
        if isinstance(part, list):
            return [translate(item) for item in part]
        if not isinstance(part, dict):
            return part
        done = {name: translate(item) for name, item in part.items() if name != "id"}
        if isinstance(done.get("$ref"), str):
            done["$ref"] = f"#/$defs/{done['$ref']}"
        if done.get("format") == "int64" and done.get("type") == "string":
            done["type"] = ["string", "integer"]  # JSON's numbers are taken too
        return done

    parts = strict({name: translate(part) for name, part in schemas.items()})
    return jsonschema.Draft202012Validator({"$ref": "#/$defs/Instance", "$defs": parts})


@cache
def serve_schema() -> Any:
    from ray.serve.schema import ServeDeploySchema

    return jsonschema.Draft202012Validator(strict(ServeDeploySchema.model_json_schema()))


@cache
def amazon(service: str) -> Any:
    return get_session().get_service_model(service)


# ── commands ─────────────────────────────────────────────────────────────────────────────────────


def commands(script: str) -> Iterator[list[str]]:
    """The simple commands of a shell script, as words, without variables that are set for them."""
    bare = re.sub(r"(?<!\S)#.*", "", script.replace("\\\n", " "))
    lexer = shlex.shlex(bare, posix=True, punctuation_chars="();<>|&\n")
    lexer.whitespace, lexer.commenters, lexer.whitespace_split = " \t", "", True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if word and set(word) <= set("();<>|&\n"):
            yield from [words] if words else []
            words = []
        elif words or not re.fullmatch(r"(?s)[A-Z_]+=.*|sudo|export|!|if|then|do", word):
            words.append(word)


@cache
def check_script(script: str) -> int:
    """Every command of a program that is known here must exist as it is written. Returns how many."""
    checked = 0
    for program, *arguments in commands(script):
        checker = PROGRAMS.get(Path(program).name)
        if checker and arguments:
            checker(arguments)
            checked += 1
    return checked


def check_click(command: Any, arguments: list[str]) -> None:
    """Parses a command line as the program itself would, without running it."""
    parent = None
    while hasattr(command, "resolve_command"):
        parent = command.make_context(command.name, list(arguments), parent=parent)
        rest = [*parent._protected_args, *parent.args]
        _, command, arguments = command.resolve_command(parent, rest)
    command.make_context(command.name, list(arguments), parent=parent)


def check_ray(arguments: list[str]) -> None:
    from ray.scripts.scripts import cli

    check_click(cli, arguments)


def check_serve_cli(arguments: list[str]) -> None:
    from ray.serve.scripts import cli

    check_click(cli, arguments)


def check_vsearch(arguments: list[str]) -> None:
    import typer

    from vsearch.cli import app

    group: Any = typer.main.get_command(app)
    if arguments[0] == "submit":
        rest = arguments[3:] if arguments[1] == "--address" else arguments[1:]
        require(rest[0] in ("ingest", "train", "index", "pipeline"), f"{rest[0]} is no job")
        check_vsearch(["build" if rest[0] == "pipeline" else rest[0], *rest[1:]])
        if "submit" not in group.commands:
            return
    check_click(group, arguments)


def check_aws(arguments: list[str]) -> None:
    service, operation, *rest = arguments
    if service == "s3":
        require(operation in ("mb", "rb", "cp", "rm", "sync"), f"aws s3 {operation}")
        return
    model = amazon({"s3api": "s3"}.get(service, service))
    names = {xform_name(name, "-"): name for name in model.operation_names}
    require(operation in names, f"aws {service} {operation}")
    shape = model.operation_model(names[operation]).input_shape
    known = {xform_name(name, "-") for name in (shape.members if shape else {})}
    options = {word[2:].partition("=")[0] for word in rest if word.startswith("--")}
    options -= {"query", "output", "region"}
    require(options <= known, f"aws {service} {operation} does not take {options - known}")


@cache
def uv_words(command: str) -> frozenset[str]:
    """Options and variables that uv's own help of a command names."""
    program = os.environ.get("UV") or shutil.which("uv")
    require(program, "uv is not there")
    help_of = [str(program), "help", command]
    done = subprocess.run(help_of, capture_output=True, text=True, check=True)
    return frozenset(re.findall(r"(?<![\w-])--[a-z][a-z-]+|UV_[A-Z_]+", done.stdout))


def check_uv(arguments: list[str]) -> None:
    unknown = {word for word in arguments if word.startswith("--")} - uv_words(arguments[0])
    require(not unknown, f"uv {arguments[0]} does not take {unknown}")


PROGRAMS: dict[str, Callable[[list[str]], None]] = {
    "ray": check_ray,
    "serve": check_serve_cli,
    "vsearch": check_vsearch,
    "aws": check_aws,
    "uv": check_uv,
}


@cache
def shell_faults(script: str) -> str:
    """What ShellCheck says about a script of Bash, but for files that it cannot follow (SC1091)."""
    program = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run(
        [program, "--shell=bash", "--exclude=SC1091", "-"],
        input=script,
        capture_output=True,
        text=True,
    )
    return done.stdout + done.stderr


def pinned(package: str) -> str:
    """The version of a package that pyproject.toml pins."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (version,) = re.findall(rf'"{package}==([^"]+)"', text)
    return str(version)


# ── ray up ───────────────────────────────────────────────────────────────────────────────────────


def ray_up(text: str, check_node: Callable[[dict[str, Any], dict[str, Any]], None]) -> Any:
    """A file for `ray up`, by Ray's own checks and by what they let pass."""
    import ray
    from ray._private.label_utils import validate_label_key, validate_node_labels
    from ray.autoscaler._private.util import prepare_config, validate_config

    (config,) = documents(text)
    schema = Path(ray.__file__).parent / "autoscaler" / "ray-schema.json"
    check(jsonschema.Draft7Validator(json.loads(schema.read_text())), config)
    known = json.loads(schema.read_text())["properties"]["provider"]["properties"]
    require(set(config["provider"]) <= set(known), "the provider has an unknown option")
    require(config["idle_timeout_minutes"] <= 15, "idle nodes stay long")
    require(config["max_workers"] >= 1 and config["upscaling_speed"] > 0, "no workers are started")
    equal(config["cluster_name"], "vsearch")
    equal(config["auth"], {"ssh_user": "ubuntu"})
    equal(config["head_node_type"], "head")
    home = "/home/ubuntu"
    # The same as in the image.
    mounts = {f"{home}/vsearch/{name[1:]}": name[1:] for name in _let_in() if name[0] == "!"}
    equal(config["file_mounts"], mounts | {f"{home}/.ray/auth_token": "~/.ray/auth_token"})
    equal(config["rsync_exclude"], ["**/__pycache__"])

    types = config["available_node_types"]
    equal(set(types), {"head", *ROLES})
    for name, node in types.items():
        if name == "head":
            equal(node["resources"], {"CPU": 0})
            require(set(node) == {"resources", "node_config"}, "the head has options of workers")
        else:
            validate_node_labels(node["labels"])
            require(not any(map(validate_label_key, node["labels"])), node["labels"])
            equal(node["labels"], {"vsearch/role": name})
            equal(node["min_workers"], 0)
            require(1 <= node["max_workers"] <= config["max_workers"], f"{name} is never started")
            equal(set(node["resources"]), {"CPU", "memory"} | ({"GPU"} & set(node["resources"])))
            equal("GPU" in node["resources"], name == "embed")
        check_node(config, node)

    for key in ("initialization", "setup", "head_start_ray", "worker_start_ray"):
        script = "\n".join(config[f"{key}_commands"])
        require(not shell_faults(script), shell_faults(script))
        check_script(script)
    equal(config["head_setup_commands"], [])
    (start,) = (
        c for c in commands("\n".join(config["head_start_ray_commands"])) if c[1] == "start"
    )
    options = {"--head", "--dashboard-host=127.0.0.1", "--port=6379"}
    options |= {"--autoscaling-config=~/ray_bootstrap_config.yaml"}
    require(options <= set(start), f"the head starts without {options - set(start)}")
    (join,) = (
        c for c in commands("\n".join(config["worker_start_ray_commands"])) if c[1] == "start"
    )
    require("--address=$RAY_HEAD_IP:6379" in join, "workers do not join the head")
    setup = "\n".join(config["setup_commands"])
    require("export RAY_AUTH_MODE=token PATH" in setup, "Ray would let everybody in")
    require(f"--extra {config['provider']['type']}" in setup, "the provider's packages are missing")
    require("cloud-init status --wait" in config["initialization_commands"][0], "apt is locked")
    validate_config(prepare_config(copy.deepcopy(config)))
    return config


def _check_enums(shape: Any, value: Any) -> None:
    if shape.type_name == "structure":
        for name, part in value.items():
            _check_enums(shape.members[name], part)
    elif shape.type_name == "list":
        for part in value:
            _check_enums(shape.member, part)
    elif getattr(shape, "enum", None):
        require(value in shape.enum, f"{value} is no {shape.name}")


def _aws_node(config: dict[str, Any], node: dict[str, Any]) -> None:
    machine = node["node_config"]
    shape = amazon("ec2").operation_model("RunInstances").input_shape
    report = ParamValidator().validate({**machine, "MinCount": 1, "MaxCount": 1}, shape)
    require(not report.has_errors(), report.generate_report())
    _check_enums(shape, machine)
    head = "labels" not in node
    equal(machine["IamInstanceProfile"], {"Name": f"vsearch-{'head' if head else 'worker'}"})
    spot = machine.get("InstanceMarketOptions", {}).get("MarketType")
    equal(spot, None if head else "spot")
    (group,) = machine["SecurityGroupIds"]
    require(re.fullmatch(r"sg-[0-9a-f]{17}", group), group)
    image = r"resolve:ssm:/aws/service/(canonical/ubuntu|deeplearning/ami)/\S*24\.04/\S+/ami-id"
    require(re.fullmatch(image, machine["ImageId"]), machine["ImageId"])
    equal("deeplearning" in machine["ImageId"], "GPU" in node["resources"])
    equal(machine["MetadataOptions"], {"HttpTokens": "required", "HttpPutResponseHopLimit": 1})
    (disk,) = machine["BlockDeviceMappings"]
    equal(disk["DeviceName"], "/dev/sda1")
    require(disk["Ebs"]["Encrypted"] and disk["Ebs"]["DeleteOnTermination"], "the disk stays")
    require(disk["Ebs"]["VolumeSize"] >= 100, "too small for the packages")


def aws(text: str) -> None:
    config = ray_up(text, _aws_node)
    provider = config["provider"]
    require(provider["region"] in get_session().get_available_regions("ec2"), provider["region"])
    equal(provider, {"type": "aws", "region": provider["region"], "cache_stopped_nodes": False})


@cache
def _google(machine: str) -> None:
    """An instance resource, as JSON."""
    check(google_instance(), json.loads(machine))


def _gcp_node(config: dict[str, Any], node: dict[str, Any]) -> None:
    from ray.autoscaler._private.gcp.config import get_node_type
    from ray.autoscaler._private.gcp.node import GCPNodeType

    machine, provider = node["node_config"], config["provider"]
    _google(json.dumps(machine))
    equal(get_node_type(machine), GCPNodeType.COMPUTE)
    head = "labels" not in node
    project, zone = provider["project_id"], provider["availability_zone"]
    (account,) = machine["serviceAccounts"]
    name = f"vsearch-{'head' if head else 'worker'}"
    equal(account["email"], f"{name}@{project}.iam.gserviceaccount.com")
    equal(account["scopes"], ["https://www.googleapis.com/auth/cloud-platform"])
    (interface,) = machine["networkInterfaces"]
    network = f"projects/{project}/regions/{provider['region']}/subnetworks/vsearch"
    equal(interface["subnetwork"], network)
    equal(interface["accessConfigs"], [{"name": "External NAT", "type": "ONE_TO_ONE_NAT"}])
    size = re.fullmatch(r"(n2-standard|n2-highmem|g2-standard)-(\d+)", machine["machineType"])
    require(size, machine["machineType"])
    assert size is not None
    gpu = "GPU" in node["resources"]
    equal(size[1] == "g2-standard", gpu)
    require(head or int(size[2]) == node["resources"]["CPU"], "cores are not those of the machine")
    (disk,) = machine["disks"]
    require(disk["boot"] and disk["autoDelete"] and disk["type"] == "PERSISTENT", disk)
    made = disk["initializeParams"]
    equal(made["diskType"], f"zones/{zone}/diskTypes/pd-balanced")
    require(made["diskSizeGb"] >= 100, "too small for the packages")
    family = "accelerator-2404-amd64-with-nvidia-580" if gpu else "2404-lts-amd64"
    owner = "ubuntu-os-accelerator-images" if gpu else "ubuntu-os-cloud"
    equal(made["sourceImage"], f"projects/{owner}/global/images/family/ubuntu-{family}")
    require(all(machine["shieldedInstanceConfig"].values()), "shielded in part")
    equal(len(machine["shieldedInstanceConfig"]), 3)
    spot = {
        "provisioningModel": "SPOT",
        "instanceTerminationAction": "DELETE",
        "onHostMaintenance": "TERMINATE",
        "automaticRestart": False,
    }
    equal(machine.get("scheduling"), None if head else spot)


def gcp(text: str) -> None:
    provider = ray_up(text, _gcp_node)["provider"]
    equal(set(provider), {"type", "region", "availability_zone", "project_id"})
    require(re.fullmatch(r"[a-z]+-[a-z]+\d", provider["region"]), provider["region"])
    require(re.fullmatch(provider["region"] + "-[a-z]", provider["availability_zone"]), "zone")
    require(re.fullmatch(r"[a-z][a-z0-9-]{4,28}[a-z0-9]", provider["project_id"]), "project")


# ── IAM ──────────────────────────────────────────────────────────────────────────────────────────


def allows(policy: Any, action: str, resource: str, context: dict[str, str] | None = None) -> bool:
    """Whether an identity policy of Allow statements allows a request.

    As AWS documents the evaluation: https://docs.aws.amazon.com/IAM/latest/UserGuide/
    reference_policies_evaluation-logic.html. An operator that is not known here raises.
    """
    return any(_allowed(part, action, resource, context or {}) for part in policy["Statement"])


def _allowed(statement: Any, action: str, resource: str, context: dict[str, str]) -> bool:
    equal(statement["Effect"], "Allow")
    if not any(fnmatchcase(action.lower(), name.lower()) for name in _listed(statement["Action"])):
        return False
    if not any(fnmatchcase(resource, name) for name in _listed(statement["Resource"])):
        return False
    for operator, wanted in statement.get("Condition", {}).items():
        require(operator in ("StringEquals", "StringEqualsIfExists", "ArnEquals"), operator)
        for key, values in wanted.items():
            if key not in context and operator.endswith("IfExists"):
                continue
            if context.get(key) not in _listed(values):
                return False
    return True


def _listed(value: Any) -> list[str]:
    listed = value if isinstance(value, list) else [value]
    require(all(isinstance(item, str) for item in listed), f"{value} is no text")
    return listed


def _iam(policy: Any) -> None:
    """The grammar of IAM, and whether actions exist, by cfn-lint; quiet when all is well."""
    from cfnlint.api import ManualArgs, lint

    resource = {"Type": "AWS::IAM::ManagedPolicy", "Properties": {"PolicyDocument": policy}}
    template = {"AWSTemplateFormatVersion": "2010-09-09", "Resources": {"Policy": resource}}
    faults = lint(json.dumps(template), config=ManualArgs(include_checks=["I"]))
    require(not faults, "; ".join(fault.message[:200] for fault in faults))


ACCOUNT = "111122223333"
HERE = f"arn:aws:ec2:eu-central-1:{ACCOUNT}"
OWN = {"aws:ResourceTag/ray-cluster-name": "vsearch"}
FOREIGN = {"aws:ResourceTag/ray-cluster-name": "other"}
LAUNCH = {
    "aws:RequestTag/ray-cluster-name": "vsearch",
    "ec2:InstanceProfile": f"arn:aws:iam::{ACCOUNT}:instance-profile/vsearch-worker",
}
AT_LAUNCH = {"ec2:CreateAction": "RunInstances", "aws:RequestTag/ray-cluster-name": "vsearch"}
TO_EC2 = {"iam:PassedToService": "ec2.amazonaws.com"}
UBUNTU = "arn:aws:ssm:eu-central-1::parameter/aws/service/canonical/ubuntu/server/24.04/x/ami-id"
DLAMI = "arn:aws:ssm:eu-central-1::parameter/aws/service/deeplearning/ami/x86_64/x/ami-id"
PARTS = ("key-pair", "network-interface", "security-group", "spot-instances-request", "subnet")

Request = tuple[str, str, dict[str, str]]
# What Ray's node provider asks for on the head, resource by resource, as AWS authorises it.
HEAD_MAY: list[Request] = [
    ("ec2:DescribeInstances", "*", {}),
    ("ssm:GetParameters", UBUNTU, {}),
    ("ssm:GetParameters", DLAMI, {}),
    ("ec2:RunInstances", f"{HERE}:instance/*", LAUNCH),
    ("ec2:RunInstances", "arn:aws:ec2:eu-central-1::image/ami-1", {}),
    *(("ec2:RunInstances", f"{HERE}:{part}/x", {}) for part in (*PARTS, "volume")),
    ("ec2:CreateTags", f"{HERE}:instance/i-1", AT_LAUNCH),
    ("ec2:CreateTags", f"{HERE}:instance/i-1", OWN),
    ("ec2:CreateTags", f"{HERE}:instance/i-1", OWN | {"aws:RequestTag/ray-node-status": "up"}),
    ("ec2:TerminateInstances", f"{HERE}:instance/i-1", OWN),
    ("iam:PassRole", f"arn:aws:iam::{ACCOUNT}:role/vsearch-worker", TO_EC2),
]
HEAD_MAY_NOT: list[Request] = [
    ("ec2:TerminateInstances", f"{HERE}:instance/i-1", {}),
    ("ec2:TerminateInstances", f"{HERE}:instance/i-1", FOREIGN),
    ("ec2:TerminateInstances", f"arn:aws:ec2:eu-central-1:{'9' * 12}:instance/i-1", OWN),
    ("ec2:StopInstances", f"{HERE}:instance/i-1", OWN),
    ("ec2:CreateTags", f"{HERE}:instance/i-1", FOREIGN),
    ("ec2:CreateTags", f"{HERE}:instance/i-1", {"aws:RequestTag/ray-cluster-name": "vsearch"}),
    ("ec2:CreateTags", f"{HERE}:instance/i-1", OWN | {"aws:RequestTag/ray-cluster-name": "a"}),
    ("ec2:CreateTags", f"{HERE}:volume/vol-1", OWN),
    ("ec2:RunInstances", f"{HERE}:instance/*", {}),
    ("ec2:RunInstances", f"{HERE}:instance/*", LAUNCH | {"aws:RequestTag/ray-cluster-name": "a"}),
    ("ec2:RunInstances", f"{HERE}:instance/*", LAUNCH | {"ec2:InstanceProfile": "admin"}),
    ("ec2:AuthorizeSecurityGroupIngress", f"{HERE}:security-group/sg-1", OWN),
    ("iam:PassRole", f"arn:aws:iam::{ACCOUNT}:role/admin", TO_EC2),
    ("iam:PassRole", f"arn:aws:iam::{ACCOUNT}:role/vsearch-head", TO_EC2),
    (
        "iam:PassRole",
        f"arn:aws:iam::{ACCOUNT}:role/vsearch-worker",
        {"iam:PassedToService": "lambda.amazonaws.com"},
    ),
    ("ssm:GetParameters", f"arn:aws:ssm:eu-central-1:{ACCOUNT}:parameter/password", {}),
    ("s3:GetObject", "arn:aws:s3:::my-archive/corpus/corpus.json", {}),  # by the other policy
]
BUCKET = "arn:aws:s3:::my-archive"
WRITES = (
    "s3:PutObject",
    "s3:DeleteObject",
    "s3:AbortMultipartUpload",
    "s3:ListMultipartUploadParts",
)
WORKER_MAY: list[Request] = [
    ("s3:ListBucket", BUCKET, {}),
    ("s3:GetObject", f"{BUCKET}/videos/a.mp4", {}),
    ("s3:GetObject", f"{BUCKET}/corpus/corpus.json", {}),
    *((action, f"{BUCKET}/corpus/frames/a.parquet", {}) for action in WRITES),
]
WORKER_MAY_NOT: list[Request] = [
    *((action, f"{BUCKET}/videos/a.mp4", {}) for action in WRITES),
    *((action, f"{BUCKET}/other/a.mp4", {}) for action in ("s3:GetObject", *WRITES)),
    ("s3:GetObject", f"{BUCKET}/corpus2/a", {}),
    ("s3:ListBucket", "arn:aws:s3:::other", {}),
    ("s3:DeleteBucket", BUCKET, {}),
    ("s3:PutBucketPolicy", BUCKET, {}),
    ("ec2:DescribeInstances", "*", {}),
    ("ec2:RunInstances", f"{HERE}:instance/*", LAUNCH),
    ("iam:PassRole", f"arn:aws:iam::{ACCOUNT}:role/vsearch-worker", TO_EC2),
]


def _policy(text: str, may: list[Request], may_not: list[Request]) -> None:
    policy = json.loads(text)
    equal(set(policy), {"Version", "Statement"})
    for statement in policy["Statement"]:
        require(re.fullmatch(r"[A-Za-z]+", statement["Sid"]), statement["Sid"])
        known = {"Sid", "Effect", "Action", "Resource", "Condition"}
        require(set(statement) <= known, set(statement) - known)
    for request in may:
        require(allows(policy, *request), f"{request} is refused")
    for request in may_not:
        require(not allows(policy, *request), f"{request} is allowed")
    _iam(policy)


def iam_head(text: str) -> None:
    _policy(text, HEAD_MAY, HEAD_MAY_NOT)


def iam_worker(text: str) -> None:
    _policy(text, WORKER_MAY, WORKER_MAY_NOT)


# ── Serve ────────────────────────────────────────────────────────────────────────────────────────


def serve(text: str) -> Any:
    """A Serve config, by Serve's own schema made strict and by the application's arguments."""
    from ray.serve.schema import ServeDeploySchema

    (config,) = documents(text)
    check(serve_schema(), config)
    ServeDeploySchema.model_validate(config)
    (application,) = config["applications"]
    arguments = ServeArgs.model_validate(application["args"], strict=True)
    require(arguments.keys and not arguments.no_auth, "everybody is let in")
    module, _, name = application["import_path"].partition(":")
    require(callable(getattr(importlib.import_module(module), name)), application["import_path"])
    equal(application["name"], "vsearch")
    equal(application["route_prefix"], "/")
    (gateway,) = application["deployments"]
    equal(gateway["name"], "Gateway")
    scaling = gateway["autoscaling_config"]
    require(
        1 < scaling["min_replicas"] <= scaling["initial_replicas"] <= scaling["max_replicas"],
        "one gateway that goes away must not be the only one",
    )
    wanted = {"upscale_delay_s", "downscale_delay_s", "target_ongoing_requests"}
    require(wanted <= set(scaling), "the pace of scaling is left to chance")
    options = {"ray_actor_options", "graceful_shutdown_timeout_s"}
    require(options <= set(gateway), "an option of the gateway is missing")
    require("num_cpus" in gateway["ray_actor_options"], "the gateway asks for no cores")
    equal(config["proxy_location"], "EveryNode")
    require(config["logging_config"]["log_level"] in ("INFO", "WARNING"), "an unknown level")
    equal(config["logging_config"]["encoding"], "JSON")
    require(config["http_options"]["request_timeout_s"] >= 60, "videos would be cut off")
    equal(config["http_options"]["port"], 8000)
    return config


def serve_on_machines(text: str) -> None:
    equal(serve(text)["http_options"]["host"], "127.0.0.1")


# ── Kubernetes ───────────────────────────────────────────────────────────────────────────────────


def _walk(node: Any) -> Iterator[tuple[str, Any]]:
    """Every (name, value) below."""
    if isinstance(node, dict):
        for name, value in node.items():
            yield name, value
            yield from _walk(value)
    elif isinstance(node, list):
        for value in node:
            yield from _walk(value)


def _named(document: Any, *names: str) -> Iterator[Any]:
    return (value for name, value in _walk(document) if name in names)


def _quantities(amounts: dict[str, Any]) -> None:
    for name, amount in amounts.items():
        require(name in {"cpu", "memory", "ephemeral-storage", GPU}, f"{name} is no resource")
        require(QUANTITY.fullmatch(str(amount)), f"{amount} of {name}")
    require({"cpu", "memory"} <= set(amounts), "cores or memory are left out")


def _ray_cluster(document: Any, spec: Any) -> None:
    """The part of a KubeRay resource that describes a cluster, by Ray's autoscaler and its options."""
    from ray.autoscaler._private.kuberay import autoscaling_config
    from ray.scripts.scripts import start

    derived = autoscaling_config._derive_autoscaling_config_from_ray_cr(
        {"metadata": document["metadata"], "spec": spec}
    )
    equal(spec["rayVersion"], pinned("ray"))
    equal(spec["authOptions"], {"mode": "token", "secretName": "ray-token"})
    require(spec["enableInTreeAutoscaling"], "nothing scales")
    equal(spec["autoscalerOptions"]["version"], "v2")
    equal(spec["autoscalerOptions"]["idleTimeoutSeconds"], 300)
    amounts = spec["autoscalerOptions"]["resources"]
    equal(amounts["requests"], amounts["limits"])
    _quantities(amounts["limits"])
    head, groups = spec["headGroupSpec"], spec["workerGroupSpecs"]
    equal(derived["available_node_types"]["headgroup"]["resources"]["CPU"], 0)
    options = {name.lstrip("-") for option in start.params for name in option.opts}
    for group in (head, *groups):
        require(set(group["rayStartParams"]) <= options, group["rayStartParams"])
        (container,) = group["template"]["spec"]["containers"]
        equal(container["name"], "ray-head" if group is head else "ray-worker")
        equal(container["image"], f"registry.example.com/vsearch:{_version()}")
        equal(container["resources"]["requests"], container["resources"]["limits"])
        account = group["template"]["spec"]["serviceAccountName"]
        equal(account, "vsearch-head" if group is head else "vsearch-worker")
        volumes = {volume["name"] for volume in group["template"]["spec"].get("volumes", [])}
        equal(volumes, {mount["name"] for mount in container.get("volumeMounts", [])})
        _quantities(container["resources"]["limits"])
        require("ephemeral-storage" in container["resources"]["limits"], "disks fill up unseen")
        require("securityContext" in container, "a container is not locked")
    for locked in _named(spec, "securityContext"):
        require(locked["runAsNonRoot"] and not locked["allowPrivilegeEscalation"], "root")
        equal(locked["capabilities"], {"drop": ["ALL"]})
        equal(locked["seccompProfile"], {"type": "RuntimeDefault"})
    for group in groups:
        equal(set(group["labels"]), {"vsearch/role"})
        require(group["labels"]["vsearch/role"] == group["groupName"], group["labels"])
        require(group["groupName"] in ROLES, group["groupName"])
        require(group["minReplicas"] <= group["maxReplicas"] >= 1, "a group that never starts")
        pod = group["template"]["spec"]
        gpu = GPU in pod["containers"][0]["resources"]["limits"]
        equal(gpu, group["groupName"] == "embed")
        taint = {"key": GPU, "operator": "Exists", "effect": "NoSchedule"}
        equal(pod.get("tolerations"), [taint] if gpu else None)


def _version() -> str:
    import tomllib

    return str(
        tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    )


def _ray_job(document: Any) -> None:
    spec = document["spec"]
    require(spec["submissionMode"] in SUBMISSION_MODES, spec["submissionMode"])
    require(spec["shutdownAfterJobFinishes"], "the cluster stays when the job is done")
    require(0 < spec["ttlSecondsAfterFinished"] <= 3600, "the cluster stays long")
    require(spec["activeDeadlineSeconds"] > spec["preRunningDeadlineSeconds"] > 0, "deadlines")
    require(0 <= spec["backoffLimit"] <= 3, "each retry is a new cluster")
    equal(check_script(spec["entrypoint"]), 1)
    require(spec["entrypoint"].split()[1] == document["metadata"]["name"], "another job's name")
    for group in spec["rayClusterSpec"]["workerGroupSpecs"]:
        if group["groupName"] == "embed":  # from zero only what is asked for comes
            require(
                f"--gpus {group['maxReplicas']}" in spec["entrypoint"], "GPUs are not asked for"
            )
    notes = spec["rayClusterSpec"]["headGroupSpec"]["template"]["metadata"]["annotations"]
    equal(notes["cluster-autoscaler.kubernetes.io/safe-to-evict"], "false")
    _ray_cluster(document, spec["rayClusterSpec"])


def _ray_service(document: Any) -> None:
    spec = document["spec"]
    require(spec["upgradeStrategy"]["type"] in UPGRADES, spec["upgradeStrategy"])
    require(spec["excludeHeadPodFromServeSvc"], "queries would go to the head")
    require(spec["rayClusterDeletionDelaySeconds"] >= 60, "requests would be cut off")
    config = serve(spec["serveConfigV2"])
    equal(config["http_options"]["host"], "0.0.0.0")
    _ray_cluster(document, spec["rayClusterConfig"])
    groups = spec["rayClusterConfig"]["workerGroupSpecs"]
    require(all(group["minReplicas"] >= 2 for group in groups), "one node holds all of it")
    for group in (spec["rayClusterConfig"]["headGroupSpec"], *groups):
        pod = group["template"]["spec"]
        equal(pod["volumes"], [{"name": "keys", "secret": {"secretName": "vsearch-keys"}}])
        (mount,) = pod["containers"][0]["volumeMounts"]
        folder = str(Path(config["applications"][0]["args"]["keys"]).parent)
        equal(mount, {"name": "keys", "mountPath": folder, "readOnly": True})
    for spread in _named(spec, "topologySpreadConstraints"):
        equal([part["topologyKey"] for part in spread], ["kubernetes.io/hostname"])


def _ray_only_cluster(document: Any) -> None:
    _ray_cluster(document, document["spec"])


def _ingress(document: Any) -> None:
    spec = document["spec"]
    equal([rule["host"] for rule in spec["rules"]], spec["tls"][0]["hosts"])
    equal(spec["ingressClassName"], "traefik")
    (path,) = spec["rules"][0]["http"]["paths"]
    equal((path["path"], path["pathType"]), ("/", "Prefix"))
    # KubeRay names the service after the RayService.
    service = {"name": "vsearch-serve-svc", "port": {"number": 8000}}
    equal(path["backend"], {"service": service})
    require(document["metadata"]["annotations"], "nobody makes the certificate")


def _network_policy(document: Any) -> None:
    spec = document["spec"]
    equal(spec["policyTypes"], ["Ingress"])
    equal(spec["podSelector"], {"matchLabels": {"ray.io/is-ray-node": "yes"}})
    inside, *outside = spec["ingress"]
    equal(inside, {"from": [{"podSelector": {}}]})
    for rule in outside:
        equal(set(rule), {"from", "ports"})
        require(all("namespaceSelector" in source for source in rule["from"]), "a whole cluster")
        ports = {port["port"] for port in rule["ports"]}
        require(ports <= {8000, 8080, 8265, 52365}, ports)  # Serve, metrics, dashboard, agent


def _plain(document: Any) -> None:
    require(set(document) <= {"apiVersion", "kind", "metadata", "automountServiceAccountToken"}, "")


def _budget(document: Any) -> None:
    equal(document["spec"]["maxUnavailable"], 1)
    equal(document["spec"]["selector"], {"matchLabels": {"vsearch/serves": "queries"}})


KINDS: dict[str, Callable[[Any], None]] = {
    "RayJob": _ray_job,
    "RayService": _ray_service,
    "RayCluster": _ray_only_cluster,
    "Ingress": _ingress,
    "NetworkPolicy": _network_policy,
    "Namespace": _plain,
    "ServiceAccount": _plain,
    "PodDisruptionBudget": _budget,
}


def kubernetes(text: str, kinds: Iterable[str]) -> None:
    """Manifests: by the definitions of KubeRay and Kubernetes, strictly, and by what they leave open."""
    resources = documents(text)
    equal([resource["kind"] for resource in resources], list(kinds))
    for document in resources:
        kind, metadata = document["kind"], document["metadata"]
        equal(metadata.get("namespace"), None if kind == "Namespace" else "vsearch")
        require(re.fullmatch(r"[a-z]([a-z0-9-]{0,45}[a-z0-9])?", metadata["name"]), "name")
        if document["apiVersion"] == "ray.io/v1":
            check(crd(kind), document)
            # The definitions of KubeRay leave it open.
            _core(json.dumps({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata}))
        else:
            _core(json.dumps(document))
        KINDS[kind](document)
        for notes in (*_named(document, "annotations"), metadata.get("labels", {})):
            require(all(NOTES.get(name) == value for name, value in notes.items()), notes)
        for selected in _named(document, "matchLabels"):
            found = selected.items()
            require(all(value in SELECTED.get(name, ()) for name, value in found), selected)
        for pod in _named(document, "template"):
            labels = pod.get("metadata", {}).get("labels", {})
            require(all(NOTES.get(name) == value for name, value in labels.items()), labels)
        for secret in (*_named(document, "secretName"), *_secret_keys(document)):
            require(secret in SECRETS, f"{secret} is made nowhere")
        for variables in _named(document, "env"):
            require(
                all("valueFrom" in variable for variable in variables), "a value, not a reference"
            )


@cache
def _core(document: str) -> None:
    """A resource of Kubernetes itself, as JSON."""
    kubernetes_validate.validate(json.loads(document), KUBERNETES, strict=True)


def _secret_keys(document: Any) -> Iterator[str]:
    for reference in _named(document, "secretKeyRef"):
        equal(reference, {"name": "huggingface", "key": "token", "optional": True})
        yield reference["name"]


def one_job(text: str) -> None:
    kubernetes(text, ["RayJob"])


def one_cluster(text: str) -> None:
    kubernetes(text, ["RayCluster"])


def query_service(text: str) -> None:
    kubernetes(text, ["RayService", "PodDisruptionBudget", "Ingress"])


def base(text: str) -> None:
    kubernetes(text, ["Namespace", "ServiceAccount", "ServiceAccount", "NetworkPolicy"])
    namespace, head, worker, _ = documents(text)
    equal(namespace["metadata"]["labels"], {"pod-security.kubernetes.io/enforce": "baseline"})
    equal(namespace["metadata"]["name"], "vsearch")
    equal(
        (head["metadata"]["name"], worker["metadata"]["name"]), ("vsearch-head", "vsearch-worker")
    )
    equal(head.get("automountServiceAccountToken"), None)
    equal(worker.get("automountServiceAccountToken"), False)


# ── the image ────────────────────────────────────────────────────────────────────────────────────


def dockerfile(text: str) -> None:
    """By hadolint, which runs ShellCheck on each RUN, and by what it lets pass."""
    program = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([program, "--no-color", "-"], input=text, capture_output=True, text=True)
    require(done.returncode == 0 and not done.stdout, done.stdout + done.stderr)
    lines = [
        line.strip()
        for line in re.sub(r"(?m)^\s*#.*\n", "", text).replace("\\\n", " ").splitlines()
        if line.strip()
    ]
    instructions = [
        (word.upper(), rest) for word, _, rest in (line.partition(" ") for line in lines)
    ]
    for word, rest in instructions:
        if word == "FROM":
            require(re.fullmatch(r"python:3\.12\.\d+-slim-[a-z]+( AS build)?", rest), rest)
        elif word in ("COPY", "ADD"):
            require(word == "COPY", "ADD does more than copy")
            _copied(rest)
        elif word == "RUN":
            check_script(rest)
            for package in re.findall(r"pip install (.*)", rest):
                require(re.fullmatch(r"--no-cache-dir uv==[\d.]+", package), "not pinned")
            for name in re.findall(r"apt-get install (.*)", rest):
                require("--no-install-recommends" in name and "/var/lib/apt/lists" in rest, name)
        elif word in ("ENV", "ARG"):
            require(
                not re.search(r"(?i)secret|token|password|key", rest), f"{rest} is in the image"
            )
            equal(unknown_variables(rest), set())
        else:
            require(word in ("USER", "WORKDIR"), f"{word} is not expected")
    equal([rest for word, rest in instructions if word == "USER"], ["1000:1000"])
    require("useradd --create-home --uid 1000" in text, "the user of the image does not exist")
    require(all(instructions[-2:][i][0] == w for i, w in enumerate(("USER", "WORKDIR"))), "root")
    require(text.count("uv sync") == 2 and text.count("--no-dev --extra gcp") == 2, "packages")
    equal(_values(instructions, "PATH"), ["/vsearch/.venv/bin:$PATH"])
    equal(_values(instructions, "NVIDIA_VISIBLE_DEVICES"), ["all"])
    equal(_values(instructions, "NVIDIA_DRIVER_CAPABILITIES"), ["compute,utility"])
    equal(_values(instructions, "UV_LINK_MODE"), ["copy"])
    equal(_values(instructions, "UV_PYTHON_DOWNLOADS"), ["never"])
    folders = [rest for word, rest in instructions if word == "WORKDIR"]
    equal(folders, ["/vsearch", "/home/ray"])


def _values(instructions: list[tuple[str, str]], name: str) -> list[str]:
    said = " ".join(rest for word, rest in instructions if word == "ENV")
    return re.findall(rf"(?:^|\s){name}=(\S+)", said)


def _copied(arguments: str) -> None:
    words = arguments.split()
    if words[0].startswith("--"):
        equal(words, ["--from=build", "/vsearch/.venv", "/vsearch/.venv"])
        return
    *sources, target = words
    require(target.startswith("./"), target)
    for source in sources:
        require((ROOT / source).exists(), f"{source} is not there")
        require(f"!{source}" in _let_in(), f"{source} is kept from the builder")


def _let_in() -> list[str]:
    text = (CLUSTER / "Dockerfile.dockerignore").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def dockerignore(text: str) -> None:
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    first, *others, last = lines
    equal((first, last), ("*", "**/__pycache__"))
    copied = re.findall(r"^COPY (?!--)(.*) \S+$", (CLUSTER / "Dockerfile").read_text(), re.M)
    equal(sorted(others), sorted(f"!{name}" for line in copied for name in line.split()))


# ── the dashboard ────────────────────────────────────────────────────────────────────────────────


def _closed(**properties: Any) -> dict[str, Any]:
    required = list(properties)
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


_TEXT, _NUMBER = {"type": "string", "minLength": 1}, {"type": "integer", "minimum": 0}
_SOURCE = _closed(type={"const": "prometheus"}, uid={"const": "${datasource}"})
_UNITS = ["reqps", "s", "percent", "percentunit", "bytes", "short"]
_DEFAULTS = _closed(unit={"enum": _UNITS}, min={"const": 0})
_TARGET = _closed(refId={"pattern": "^[A-Z]$", **_TEXT}, expr=_TEXT, legendFormat=_TEXT)
# The part of Grafana's model that is used here (its panel and dashboard kinds are open to all names).
DASHBOARD = _closed(
    title=_TEXT,
    uid={"const": "vsearch"},
    tags={"type": "array", "items": _TEXT},
    schemaVersion={"const": 39},
    version=_NUMBER,
    editable={"type": "boolean"},
    refresh={"type": "string", "pattern": r"^\d+[smh]$"},
    time=_closed(**{"from": {"type": "string", "pattern": "^now-"}, "to": {"const": "now"}}),
    templating=_closed(
        list={
            "type": "array",
            "items": _closed(
                name={"const": "datasource"},
                label=_TEXT,
                type={"const": "datasource"},
                query={"const": "prometheus"},
            ),
        }
    ),
    panels={
        "type": "array",
        "items": _closed(
            id=_NUMBER,
            type={"const": "timeseries"},
            title=_TEXT,
            datasource=_SOURCE,
            gridPos=_closed(h=_NUMBER, w=_NUMBER, x=_NUMBER, y=_NUMBER),
            fieldConfig=_closed(defaults=_DEFAULTS, overrides={"type": "array", "maxItems": 0}),
            targets={"type": "array", "items": _TARGET, "minItems": 1},
        ),
    },
)


def grafana(text: str) -> None:
    import inspect

    from vsearch.serve import _measurements

    board = json.loads(text)
    check(jsonschema.Draft202012Validator(DASHBOARD), board)
    ours = inspect.getsource(_measurements)
    for expression in _named(board, "expr"):
        names = re.findall(r"\b(?:ray|autoscaler)_\w+", expression)
        require(names, expression)
        for name in names:
            own = re.fullmatch(r"ray_(vsearch_\w+?)(?:_total|_bucket)?", name)
            require(f'"{own[1]}"' in ours if own else name in _metrics_of_ray(), name)
        require(expression.count("(") == expression.count(")"), expression)


@cache
def _metrics_of_ray() -> set[str]:
    """The metrics that Ray's own dashboards show."""
    from ray.dashboard.modules.metrics import dashboards

    found: set[str] = set()
    for path in Path(next(iter(dashboards.__path__))).glob("*.py"):
        found |= set(re.findall(r"\b(?:ray|autoscaler)_\w+", path.read_text(encoding="utf-8")))
    return found


# ── variables ────────────────────────────────────────────────────────────────────────────────────

VARIABLE = re.compile(r"\b(?:RAY|HF|UV|AWS|NVIDIA|KUBERAY|VSEARCH)_[A-Za-z][A-Za-z_]*\b")
# Read by the NVIDIA container runtime, which is no Python package.
ELSEWHERE = {"NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES"}


def unknown_variables(text: str) -> set[str]:
    """Environment variables in a text that the program of their prefix does not know."""
    return {name for name in VARIABLE.findall(text) if not _known_variable(name)}


@cache
def _known_variable(name: str) -> bool:
    if name in ELSEWHERE:
        return True
    if name.startswith("UV_"):
        return name in uv_words("sync")
    packages = {"RAY": "ray", "HF": "huggingface_hub", "AWS": "botocore", "VSEARCH": "vsearch"}
    package = packages.get(name.partition("_")[0])
    if package is None:
        return False
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent
    found = subprocess.run(["grep", "-rqwF", "--include=*.py", name, folder], check=False)
    return found.returncode == 0


VALIDATORS: dict[str, Callable[[str], Any]] = {
    "Dockerfile": dockerfile,
    "Dockerfile.dockerignore": dockerignore,
    "aws-iam-head.json": iam_head,
    "aws-iam-worker.json": iam_worker,
    "aws.yaml": aws,
    "gcp.yaml": gcp,
    "grafana.json": grafana,
    "serve.yaml": serve_on_machines,
    "kubernetes/base.yaml": base,
    "kubernetes/cluster.yaml": one_cluster,
    "kubernetes/index.yaml": one_job,
    "kubernetes/ingest.yaml": one_job,
    "kubernetes/service.yaml": query_service,
    "kubernetes/train.yaml": one_job,
}
