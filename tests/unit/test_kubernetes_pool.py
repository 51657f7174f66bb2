"""The Kubernetes work pool: the Job that a worker makes of it fits Kubernetes' own schema."""

from pathlib import Path
from uuid import uuid4

import pytest
import yaml

kubernetes_validate = pytest.importorskip("kubernetes_validate")
pytest.importorskip("prefect_kubernetes")

TEMPLATE = yaml.safe_load(Path("deploy/kubernetes-pool.yaml").read_text(encoding="utf-8"))


def job(template=TEMPLATE, **variables) -> dict:
    """Return the manifest that Prefect's worker would send, once Kubernetes' schema has taken it."""
    from prefect.client.schemas.objects import FlowRun
    from prefect.utilities.templating import apply_values
    from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration

    known = template["variables"]["properties"]
    defaults = {name: each["default"] for name, each in known.items() if "default" in each}
    values = {**defaults, "image": "domainstudio:1", **variables}
    filled = apply_values(template["job_configuration"], values, remove_notset=True)
    configuration = KubernetesWorkerJobConfiguration(**filled)
    configuration.prepare_for_flow_run(FlowRun(flow_id=uuid4(), name="swift-otter"))
    kubernetes_validate.validate(configuration.job_manifest, "1.30", strict=True)
    return configuration.job_manifest


def test_a_run_gets_what_a_training_needs():
    manifest = job(
        gpu_count=2,
        node_selector={"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"},
        env={"DOMAINSTUDIO_GPU_CLASS": "h100"},
    )
    assert manifest["spec"]["backoffLimit"] == 0
    pod = manifest["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert container["image"] == "domainstudio:1"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 2
    assert container["resources"]["requests"]["ephemeral-storage"] == "100Gi"
    assert {"name": "DOMAINSTUDIO_GPU_CLASS", "value": "h100"} in container["env"]
    assert {"secretRef": {"name": "domainstudio", "optional": True}} in container["envFrom"]
    assert {"name": "shared-memory", "mountPath": "/dev/shm"} in container["volumeMounts"]
    assert pod["volumes"][-1]["emptyDir"] == {"medium": "Memory", "sizeLimit": "16Gi"}
    assert pod["tolerations"][0]["key"] == "nvidia.com/gpu"
    assert pod["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}


def test_without_a_gpu_it_is_valid_too():
    manifest = job(gpu_count=0, memory="4Gi", tolerations=[])
    assert manifest["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 0


def test_the_check_finds_a_misplaced_field():
    template = yaml.safe_load(yaml.safe_dump(TEMPLATE))
    template["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]["parallelism"] = 1
    with pytest.raises(kubernetes_validate.ValidationError, match="parallelism"):
        job(template)


def test_deployments_name_variables_that_the_pool_knows():
    given = yaml.safe_load(Path("prefect.yaml").read_text(encoding="utf-8"))["deployments"]
    pods = [each["work_pool"] for each in given if each["work_pool"]["name"] == "cluster"]
    assert len(pods) == 5
    known = set(TEMPLATE["variables"]["properties"])
    assert all(set(pool["job_variables"]) <= known for pool in pods)
