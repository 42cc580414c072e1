"""What must hold for manifests, whoever wrote them: each law lists what breaks it."""

from __future__ import annotations

import json
import math
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from tests.helpers.paths import ROOT

Manifest = dict[str, Any]
Law = Callable[[list[Manifest]], Iterator[str]]
CHECKS = ROOT / ".venv-checks" / "bin"
SELECTING = {"Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy", "PodMonitor"}
WRITABLE = {"/tmp", "/dev/shm", "/home/sparseserve"}


def ask(command: str, items: list[Any]) -> list[Any]:
    """What `checks.py` answers, in an environment of its own."""
    script = [str(CHECKS / "python"), "-m", "tests.helpers.deploy.checks", command]
    answered = subprocess.run(script, input=json.dumps(items), capture_output=True, text=True)
    assert answered.returncode == 0, answered.stderr
    answers: list[Any] = json.loads(answered.stdout)
    return answers


def laws() -> list[Law]:
    """All that hold without knowing what else is in the cluster."""
    return [drains, selects, connects, resolves, computes, locks, names_once, hides]


def pods(manifests: list[Manifest]) -> list[Manifest]:
    """The templates of all pods."""
    return [template for _, template in owned(manifests)]


def owned(manifests: list[Manifest]) -> Iterator[tuple[Manifest, Manifest]]:
    """Every pod template, with what makes pods of it."""
    for manifest in manifests:
        if manifest["kind"] == "Deployment":
            yield manifest, manifest["spec"]["template"]
        elif manifest["kind"] == "LeaderWorkerSet":
            group = manifest["spec"]["leaderWorkerTemplate"]
            yield from ((manifest, group[f"{role}Template"]) for role in ("leader", "worker"))


def as_pods(manifests: list[Manifest]) -> list[Manifest]:
    """The pods of groups as manifests of their own, for what does not know LeaderWorkerSets."""
    return [
        {"apiVersion": "v1", "kind": "Pod", **pod, "metadata": pod["metadata"] | {"name": name, "namespace": "apart"}}
        for pod in pods(of_kind(manifests, "LeaderWorkerSet"))
        for name in [pod["metadata"]["labels"]["app.kubernetes.io/component"]]
    ]


def containers(pod: Manifest) -> list[Manifest]:
    """All of a pod, sidecars too."""
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


def servers(manifests: list[Manifest]) -> list[tuple[Manifest, Manifest]]:
    """(pod template, container) of what runs `sparseserve serve`."""
    return [(pod, one) for pod in pods(manifests) for one in containers(pod) if one["name"] == "server"]


def of_kind(manifests: list[Manifest], kind: str) -> list[Manifest]:
    """The manifests of one kind."""
    return [manifest for manifest in manifests if manifest["kind"] == kind]


def matching(manifests: list[Manifest], selector: Manifest) -> list[Manifest]:
    """The pod templates that labels select."""
    return [pod for pod in pods(manifests) if selector.items() <= pod["metadata"]["labels"].items()]


def drains(manifests: list[Manifest]) -> Iterator[str]:
    """The kubelet waits longer than a pod needs: strictly, for else it kills what was about to end.

    A server needs its --shutdown-timeout for running answers, and as long again for vLLM's engine to end.
    """
    for pod in pods(manifests):
        grace = pod["spec"]["terminationGracePeriodSeconds"]
        for one in pod["spec"]["containers"]:
            timeouts = [int(arg.partition("=")[2]) for arg in one.get("args", []) if "--shutdown-timeout=" in arg]
            if (one["name"] == "server") != (len(timeouts) == 1):
                yield f"{one['name']} has {len(timeouts)} --shutdown-timeout"
            needed = one["lifecycle"]["preStop"]["sleep"]["seconds"] + 2 * sum(timeouts)
            if grace <= needed:
                yield f"{one['name']} needs {needed} s, of {grace} s"


def selects(manifests: list[Manifest]) -> Iterator[str]:
    """Every selector finds pods; what makes pods finds its own, and a Service those of one model."""
    for manifest in manifests:
        spec = manifest.get("spec", {})
        selector = spec.get("podSelector") or spec.get("selector") or {}
        labels = selector.get("matchLabels", selector)
        found = matching(manifests, labels)
        if manifest["kind"] in SELECTING and not labels:
            yield f"the {manifest['kind']} {manifest['metadata']['name']} says no labels"
        if manifest["kind"] == "Deployment" and found != [spec["template"]]:
            yield f"the Deployment {manifest['metadata']['name']} selects {len(found)} templates"
        if manifest["kind"] == "Service" and len(found) != 1:
            yield f"the Service {manifest['metadata']['name']} selects {len(found)} templates"
        if labels and not found:
            yield f"{manifest['kind']} {manifest['metadata']['name']} selects nothing"


def refers(manifests: list[Manifest], external: set[str]) -> Iterator[str]:
    """What pods mount or read is among the manifests, or declared to exist."""
    here = {f"{manifest['kind']} {manifest['metadata']['name']}" for manifest in manifests}
    for scaler in of_kind(manifests, "HorizontalPodAutoscaler") + of_kind(manifests, "ScaledObject"):
        target = scaler["spec"]["scaleTargetRef"]
        yield from {f"{target['kind']} {target['name']}"} - here
    for pod in pods(manifests):
        wanted = {f"ServiceAccount {pod['spec']['serviceAccountName']}"}
        for volume in pod["spec"]["volumes"]:
            if "configMap" in volume:
                wanted.add(f"ConfigMap {volume['configMap']['name']}")
            if "persistentVolumeClaim" in volume:
                wanted.add(f"PersistentVolumeClaim {volume['persistentVolumeClaim']['claimName']}")
        for variable in (variable for one in containers(pod) for variable in one.get("env", [])):
            if secret := variable.get("valueFrom", {}).get("secretKeyRef"):
                wanted.add(f"Secret {secret['name']}")
        yield from wanted - here - external
        volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
        mounted = {mount["name"] for one in containers(pod) for mount in one["volumeMounts"]}
        yield from (f"volume {name}" for name in volumes ^ mounted)


def connects(manifests: list[Manifest]) -> Iterator[str]:
    """Ports are open where Services, monitors, probes and network policies expect them."""
    for service in of_kind(manifests, "Service"):
        for pod in matching(manifests, service["spec"]["selector"]):
            yield from (
                f"{port['targetPort']} of a Service" for port in _missing(pod, service["spec"]["ports"], "targetPort")
            )
            sidecars = {port["name"] for one in pod["spec"].get("initContainers", []) for port in one.get("ports", [])}
            named = {port["targetPort"] for port in service["spec"]["ports"]}
            yield from (f"{name} of a Service, a sidecar's: only Kubernetes 1.33 finds it" for name in named & sidecars)
    for monitor in of_kind(manifests, "PodMonitor"):
        for pod in matching(manifests, monitor["spec"]["selector"]["matchLabels"]):
            yield from (
                f"{end['port']} of a monitor" for end in _missing(pod, monitor["spec"]["podMetricsEndpoints"], "port")
            )
    for pod, server in servers(manifests):
        probes = [server[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness", "readiness")]
        yield from (f"{probe['port']} of a probe" for probe in _missing(pod, probes, "port"))
        admitted = [
            port
            for policy in of_kind(manifests, "NetworkPolicy")
            for rule in policy["spec"].get("ingress", [])
            for port in rule.get("ports", [])
        ]
        yield from (f"{port['port']} of a network policy" for port in _missing(pod, admitted, "port"))


def resolves(manifests: list[Manifest]) -> Iterator[str]:
    """DNS is reached wherever it is: in pods, which may listen on 5353, and in a node's own cache, which is no pod."""
    for pod in pods(manifests):
        rules = [
            rule
            for policy in of_kind(manifests, "NetworkPolicy")
            if pod in matching(manifests, policy["spec"]["podSelector"]["matchLabels"])
            for rule in policy["spec"]["egress"]
        ]
        anywhere = [port for rule in rules if "to" not in rule for port in rule["ports"]]
        ways = {(protocol, port) for protocol in ("UDP", "TCP") for port in (53, 5353)}
        if rules:
            yield from (f"{way} is cut off" for way in ways - {(port["protocol"], port["port"]) for port in anywhere})


def computes(manifests: list[Manifest]) -> Iterator[str]:
    """Where CPUs compute and are limited, a server has no more threads than CPUs: vLLM takes all of the node's."""
    for _, server in servers(manifests):
        limits = server.get("resources", {}).get("limits", {})
        if "cpu" in limits and "nvidia.com/gpu" not in limits:
            env = {variable["name"]: variable.get("value") for variable in server["env"]}
            ranks = [int(arg.partition("=")[2]) for arg in server["args"] if "-parallel-size=" in arg]
            if env.get("VLLM_CPU_OMP_THREADS_BIND") != "nobind":
                yield "threads are bound to cores that others may have"
            if not 1 <= int(env["OMP_NUM_THREADS"]) * math.prod(ranks) <= _cpus(limits["cpu"]):
                yield f"{env['OMP_NUM_THREADS']} threads for {limits['cpu']} CPUs and ranks {ranks}"


def _cpus(quantity: Any) -> float:
    return int(quantity[:-1]) / 1000 if str(quantity).endswith("m") else float(quantity)


def _missing(pod: Manifest, wanted: list[Manifest], key: str) -> list[Manifest]:
    ports = [port for one in containers(pod) for port in one.get("ports", [])]
    known = {port["containerPort"] for port in ports} | {port["name"] for port in ports}
    return [one for one in wanted if one[key] not in known]


def locks(manifests: list[Manifest]) -> Iterator[str]:
    """Pods hold no rights, and can write where the server must."""
    for pod in pods(manifests):
        context = pod["spec"]["securityContext"]
        if not context["runAsNonRoot"] or context["seccompProfile"] != {"type": "RuntimeDefault"}:
            yield f"the pod runs as {context}"
        if pod["spec"]["automountServiceAccountToken"]:
            yield "the pod has a token for the API of Kubernetes"
        for one in containers(pod):
            held = one["securityContext"]
            if (
                held["allowPrivilegeEscalation"]
                or not held["readOnlyRootFilesystem"]
                or held["capabilities"] != {"drop": ["ALL"]}
            ):
                yield f"{one['name']} holds {held}"
            writable = {mount["mountPath"] for mount in one["volumeMounts"] if not mount.get("readOnly")}
            if one["name"] != "proxy" and not writable >= WRITABLE:
                yield f"{one['name']} cannot write in {WRITABLE - writable}"


def names_once(manifests: list[Manifest]) -> Iterator[str]:
    """No variable comes twice in a container: server-side apply would refuse it."""
    for one in (one for pod in pods(manifests) for one in containers(pod)):
        times = Counter(variable["name"] for variable in one.get("env", []))
        yield from (f"{name} in {one['name']}" for name in times if times[name] > 1)


def hides(manifests: list[Manifest]) -> Iterator[str]:
    """Keys and tokens come from Secrets."""
    for one in (one for pod in pods(manifests) for one in containers(pod)):
        for variable in one.get("env", []):
            if "value" in variable and any(word in variable["name"] for word in ("KEY", "TOKEN", "SECRET", "PASSWORD")):
                yield f"{variable['name']} in {one['name']}"
        yield from (arg for arg in one.get("args", []) if "key" in arg.partition("=")[0] or "token=" in arg)
