"""The Kubernetes manifests against their schemas, and the Dockerfile."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from clusters import LAUNCH, ROOT
from kubeflow_trainer_api import models
from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from noprop_dist.cards import load_card
from noprop_dist.train import main


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Group(Strict):
    """The fields of KubeRay's groups of pods that rayjob.yaml uses (ray-operator/apis/ray/v1/raycluster_types.go)."""

    rayStartParams: dict[str, str]
    template: dict[str, Any]


class Workers(Group):
    groupName: str
    replicas: PositiveInt
    minReplicas: PositiveInt
    maxReplicas: PositiveInt


class Cluster(Strict):
    rayVersion: str
    headGroupSpec: Group
    workerGroupSpecs: list[Workers] = Field(min_length=1)


class Submitter(Strict):
    backoffLimit: int


class RayJobSpec(Strict):
    """The fields of a KubeRay RayJob that rayjob.yaml uses (ray-operator/apis/ray/v1/rayjob_types.go)."""

    entrypoint: str
    backoffLimit: int
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]
    shutdownAfterJobFinishes: Literal[True]
    ttlSecondsAfterFinished: PositiveInt  # works with shutdownAfterJobFinishes alone
    submitterConfig: Submitter
    submitterPodTemplate: dict[str, Any]
    rayClusterSpec: Cluster


class RayJob(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: dict[str, Any]
    spec: RayJobSpec


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((LAUNCH / "kubernetes" / name).read_text()))


def check(schema: str, value: dict[str, Any]) -> None:
    """Against Kubernetes' own model: of the right types, and no field that it does not know (those it would drop)."""
    assert getattr(models, schema).from_dict(value).to_dict() == value


def pods() -> dict[str, dict[str, Any]]:
    spec = RayJob.model_validate(documents("rayjob.yaml")[0]).spec
    runtime, _ = documents("trainjob.yaml")
    (node,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    return {
        "submitter": spec.submitterPodTemplate,
        "head": spec.rayClusterSpec.headGroupSpec.template,
        "worker": spec.rayClusterSpec.workerGroupSpecs[0].template,
        "node": node["template"]["spec"]["template"],
    }


@pytest.mark.parametrize("name", ["submitter", "head", "worker", "node"])
def test_pods_are_valid_not_root_and_leave_time_to_save(name):
    pod = pods()[name]
    check("IoK8sApiCoreV1PodTemplateSpec", pod)
    spec, (container,) = pod["spec"], pod["spec"]["containers"]
    assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] == 1000
    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    if name in ("worker", "node"):
        assert spec["terminationGracePeriodSeconds"] >= 120
    if name != "submitter":
        (mount,), (volume,) = container["volumeMounts"], spec["volumes"]
        assert mount["name"] == volume["name"] and "persistentVolumeClaim" in volume


def test_trainjob_and_its_runtime_are_valid_and_belong_together():
    runtime, job = documents("trainjob.yaml")
    check("TrainerV1alpha1TrainingRuntime", runtime)
    check("TrainerV1alpha1TrainJob", job)
    assert job["spec"]["runtimeRef"] == {"kind": runtime["kind"], "name": runtime["metadata"]["name"]}
    assert job["apiVersion"] == runtime["apiVersion"] == "trainer.kubeflow.org/v1alpha1"
    (node,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    assert node["template"]["metadata"]["labels"]["trainer.kubeflow.org/trainjob-ancestor-step"] == "trainer"
    assert node["name"] == node["template"]["spec"]["template"]["spec"]["containers"][0]["name"] == "node"


def test_the_commands_in_the_manifests_are_ones_that_the_trainer_takes(monkeypatch, capsys):
    """Card and settings go through the real command's dry run, with as many ranks as the manifest starts."""
    monkeypatch.chdir(ROOT)
    trainer = documents("trainjob.yaml")[1]["spec"]["trainer"]
    entrypoint = documents("rayjob.yaml")[0]["spec"]["entrypoint"].split()
    assert trainer["command"][:3] == ["torchrun", "-m", "noprop_dist.train"]
    assert entrypoint[:2] == ["python", "launch/ray_train.py"] and entrypoint[3] == "--workers"
    for ranks, words in (
        (str(trainer["numNodes"] * trainer["numProcPerNode"]), [*trainer["command"][3:], *trainer["args"]]),
        (entrypoint[4], [entrypoint[2], *entrypoint[5:]]),
    ):
        main([*words, "--dry-run", "--ranks", ranks])
        assert f" {int(ranks) - 1} " in capsys.readouterr().out, "the last rank's row"
        assert words[words.index("--run.name") + 1] == "noprop"
        assert words[words.index("--run.stop_exit_code") + 1] == "143"


def test_hadolint_finds_nothing_in_the_dockerfile():
    result = subprocess.run([Path(sys.executable).parent / "hadolint", ROOT / "Dockerfile"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_the_image_holds_what_its_dockerfile_and_the_manifests_name():
    """Every COPY finds its files in the build context, which .dockerignore cuts down to them."""
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    copied = {word for line in lines if line.startswith("COPY ") and "--from" not in line for word in line.split()[1:-1]}
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == kept and all((ROOT / name).exists() for name in copied)
    assert load_card(ROOT / "configs/digits/dt.yaml") and 'CMD ["configs/digits/dt.yaml"]' in lines
    assert "USER 1000" in lines and 'ENTRYPOINT ["/work/launch/torchrun.sh"]' in lines
