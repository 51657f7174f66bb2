"""The Helm chart, rendered by Helm's own engine: Kubernetes takes it, and its parts fit each other."""

import re
from pathlib import Path

import pytest
import yaml

pytest.importorskip("helm_python")
pytest.importorskip("kubernetes_validate")
pytest.importorskip("prefect_kubernetes")

import helm_python
import kubernetes_validate

from domainstudio import telemetry
from domainstudio.errors import ConfigError
from flows import pools
from services import layout, programs
from tests.unit.test_kubernetes_pool import job

DEPLOY = Path(__file__).parents[2] / "deploy"
SERVERS = "postgres", "s3", "prefect", "mlflow"
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
EXAMPLE = yaml.safe_load((DEPLOY / "cluster/worker.yaml").read_text())
COMMIT = "0123456789" * 4
LEAST = {
    "image": {"repository": "registry.example/domainstudio", "tag": COMMIT},
    "repository": "git@git.example:team/styles.git",
    "prefect": {"apiUrl": "http://prefect:4200/api"},
}


def render(values) -> dict[tuple[str, str], dict]:
    """Return the objects of the chart by kind and name."""
    with helm_python.Chart.load(DEPLOY / "chart") as chart:
        texts = chart.render(values, name="ds", namespace="styles")
    found = [
        each for name, text in texts.items() if name.endswith("yaml") for each in yaml.safe_load_all(text)
    ]
    return {(each["kind"], each["metadata"]["name"]): each for each in found}


def example(**values):
    return EXAMPLE | {"image": EXAMPLE["image"] | {"tag": COMMIT}} | values


def runs_job(found, tmp_path, **variables):
    """Return the Job of a run, as Prefect's worker makes it with the chart's defaults of the pool."""
    path = tmp_path / "job-variables.yaml"
    path.write_text(found["ConfigMap", "ds-pool"]["data"]["job-variables.yaml"])
    given = pools.read_job_variables(path)
    return job(pools.template(given, {}), **variables, image=given["image"])


@pytest.mark.parametrize("version", ["1.28", "1.37"])
def test_kubernetes_takes_every_object(version):
    found = render(example())
    assert len(found) == 9
    for each in found.values():
        kubernetes_validate.validate(each, version, strict=True)
    found["Deployment", "ds-worker"]["spec"]["replica"] = 1
    with pytest.raises(kubernetes_validate.ValidationError, match="replica"):
        kubernetes_validate.validate(found["Deployment", "ds-worker"], version, strict=True)


@pytest.mark.parametrize("values", [LEAST, example()], ids=["least", "example"])
def test_a_run_finds_what_the_chart_makes(values, tmp_path):
    found = render(values)
    pod = runs_job(found, tmp_path)["spec"]["template"]["spec"]
    worker = found["Deployment", "ds-worker"]["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert (
        container["image"] == worker["containers"][0]["image"] == f"{values['image']['repository']}:{COMMIT}"
    )
    assert ("ServiceAccount", pod["serviceAccountName"]) in found
    assert ("ServiceAccount", worker["serviceAccountName"]) in found
    claims = [
        each["persistentVolumeClaim"]["claimName"]
        for each in pod["volumes"]
        if "persistentVolumeClaim" in each
    ]
    assert {("PersistentVolumeClaim", claim) for claim in claims} == {
        key for key in found if "Claim" in key[0]
    }
    assert len(claims) == 2
    mounted = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
    assert {*mounted} == {each["name"] for each in pod["volumes"]}
    variables = found["ConfigMap", "ds"]["data"]
    assert [each["configMapRef"]["name"] for each in container["envFrom"] if "configMapRef" in each] == ["ds"]
    assert variables["DOMAINSTUDIO_DVC_CACHE"] == mounted["dvc-cache"]
    assert variables["HF_HOME"] == mounted["hub-cache"]
    assert mounted["git-key"] in variables["GIT_SSH_COMMAND"]
    assert variables["DOMAINSTUDIO_WORKSPACES"] == mounted["work"]


def test_nothing_runs_as_root_or_writes_outside_its_volumes(tmp_path):
    found = render(example())
    pods = [
        found["Deployment", "ds-worker"]["spec"]["template"]["spec"],
        runs_job(found, tmp_path)["spec"]["template"]["spec"],
    ]
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 1000
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for each in [*pod.get("initContainers", []), *pod["containers"]]:
            rights = {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert each["securityContext"] == rights
            assert {"/work", "/tmp"} <= {mount["mountPath"] for mount in each["volumeMounts"]}
    assert not pods[1]["automountServiceAccountToken"]  # of runs
    assert not [kind for kind, _ in found if kind.startswith("Cluster")]
    assert "secrets" not in {
        name for rule in found["Role", "ds-worker"]["rules"] for name in rule["resources"]
    }
    assert found["RoleBinding", "ds-worker"]["subjects"][0]["name"] == pods[0]["serviceAccountName"]


def test_a_run_is_queued_placed_and_pulled_as_the_values_say(tmp_path):
    manifest = runs_job(render(example()), tmp_path, labels={})
    assert (
        "kueue.x-k8s.io/queue-name" not in manifest["metadata"]["labels"]
    )  # a deployment may leave the queue
    manifest = runs_job(render(example()), tmp_path)
    assert manifest["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    assert manifest["metadata"]["labels"]["kueue.x-k8s.io/priority-class"] == "research"
    pod = manifest["spec"]["template"]["spec"]
    assert pod["priorityClassName"] == "training" and pod["affinity"] == EXAMPLE["runs"]["affinity"]
    assert pod["imagePullSecrets"] == [{"name": "registry"}]
    plain = runs_job(render(LEAST), tmp_path)
    assert not {"priorityClassName", "affinity"} & {*plain["spec"]["template"]["spec"]}
    assert not [name for name in plain["metadata"]["labels"] if "kueue" in name]


def test_caches_are_given_or_do_without(tmp_path):
    cache = {"dvc": {"existingClaim": "team-cache"}, "hub": {"enabled": False}}
    found = render(LEAST | {"cache": cache, "git": {"secret": ""}})
    assert not [name for kind, name in found if kind == "PersistentVolumeClaim"]
    volumes = {
        each["name"]: each for each in runs_job(found, tmp_path)["spec"]["template"]["spec"]["volumes"]
    }
    assert volumes["dvc-cache"]["persistentVolumeClaim"] == {"claimName": "team-cache"}
    assert volumes["hub-cache"]["emptyDir"] == volumes["git-key"]["emptyDir"] == {}
    assert "GIT_SSH_COMMAND" not in found["ConfigMap", "ds"]["data"]


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"image": {"repository": "r", "tag": "latest"}}, "/image/tag"),
        ({"image": {"tag": COMMIT}}, "/image/repository"),
        ({"repository": "https://ada:secret@git.example/r"}, "/repository"),
        ({"runs": {"gpu": 1}}, "gpu"),
        ({"prefect": {"apiUrl": "prefect:4200"}}, "/prefect/apiUrl"),
    ],
)
def test_values_that_cannot_work_are_refused(values, told):
    with pytest.raises(helm_python.HelmValuesError, match=told):
        render(LEAST | values)


def test_a_pool_keeps_its_own_defaults_until_others_are_given(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("image: domainstudio:1\ncpu: '2'\n")
    first = pools.template(pools.read_job_variables(path), {})
    kept = pools.template(None, first)
    assert kept == first and kept["variables"]["properties"]["image"]["default"] == "domainstudio:1"
    changed = pools.template({"image": "domainstudio:2"}, first)["variables"]["properties"]
    assert (changed["image"]["default"], changed["cpu"]["default"]) == ("domainstudio:2", "8")
    path.write_text("imgae: domainstudio:1\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml.* no variable imgae; it has .*image"):
        pools.read_job_variables(path)


def test_the_example_secrets_have_the_names_and_keys_that_the_chart_expects():
    secrets = {
        each["metadata"]["name"]: each
        for each in yaml.safe_load_all((DEPLOY / "cluster/secrets.example.yaml").read_text())
    }
    for each in secrets.values():
        kubernetes_validate.validate(each, "1.37", strict=True)
    values = yaml.safe_load((DEPLOY / "chart/values.yaml").read_text())
    assert {*secrets} == {values["secret"]["name"], values["git"]["secret"]}
    assert values["secret"]["prefectAuthKey"] in secrets[values["secret"]["name"]]["stringData"]
    assert {"ssh-privatekey", "known_hosts"} == {*secrets[values["git"]["secret"]]["stringData"]}


def strings(value) -> set[str]:
    """Return every string in a value, at any depth."""
    if isinstance(value, dict | list):
        parts = [*value.values()] if isinstance(value, dict) else value
        return {text for part in parts for text in strings(part)}
    return {value} if isinstance(value, str) else set()


def test_the_servers_values_name_the_secrets_and_the_version_that_are_there():
    secrets = [*yaml.safe_load_all((DEPLOY / "cluster/servers.secrets.example.yaml").read_text())]
    for each in secrets:
        kubernetes_validate.validate(each, "1.37", strict=True)
    values = {name: yaml.safe_load((DEPLOY / f"cluster/{name}.yaml").read_text()) for name in SERVERS}
    assert {each["metadata"]["name"] for each in secrets} <= strings([*values.values()])
    [installed] = re.findall(r"^prefect==(.*)$", (DEPLOY / "../constraints.txt").read_text(), re.MULTILINE)
    assert values["prefect"]["global"]["prefect"]["image"]["prefectTag"].startswith(f"{installed}-")
    assert {each["name"]: each["owner"] for each in values["postgres"]["databases"]} == programs.DATABASES
    assert {each["name"] for each in values["s3"]["allInOne"]["s3"]["createBuckets"]} == {*layout.BUCKETS}
    variables = {**COMPOSE["mlflow"]["environment"]}
    given = {each["name"] for each in values["mlflow"]["env"]}
    given |= {*next(each for each in secrets if each["metadata"]["name"] == "mlflow-server")["stringData"]}
    assert {*variables} - {"HEALTH", "MLFLOW_BACKEND_STORE_URI"} - {*telemetry.OFF} <= given
    assert values["mlflow"]["mlflow"]["backendStoreUri"] == variables["MLFLOW_BACKEND_STORE_URI"]
