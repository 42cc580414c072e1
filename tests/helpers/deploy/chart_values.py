"""Values for the chart: good ones, and bad ones with what the refusal says."""

from __future__ import annotations

from typing import Any

import yaml

from tests.helpers.paths import DEPLOY

Values = dict[str, Any]
QUEST = {"policy": "quest", "budget_tokens": 512}
DEMO = {"name": "demo", "model": "/models/demo", "policy": QUEST}
GROUP = DEMO | {"name": "group", "parallel": {"tensor": 2}, "multiNode": {"size": 2}}
LARGE = 2**20  # Helm writes it as 1.048576e+06 where it can
SCALED = {"kind": "hpa", "minReplicas": 1, "maxReplicas": 3, "kvUsage": 0.75}
OPTIONS = {
    "page": True,
    "enable-prefix-caching": False,
    "gpu-memory-utilization": 0.9,
    "override-generation-config": {"temperature": 0},
    "cudagraph-capture-sizes": [1, 2],
    "chat-template-content-format": "openai",
    "revision": "a b",
}


def one(**changes: Any) -> Values:
    """One model, with these keys changed."""
    return {"models": [DEMO | changes]}


def cpu(limit: Any, **changes: Any) -> Values:
    """One model that computes on so many CPUs."""
    return one(device="cpu", resources={"limits": {"cpu": limit}}, **changes)


def policy(**entry: Any) -> Values:
    """One model with this policy."""
    return one(policy=entry)


def option(name: str, value: Any) -> Values:
    """One model with this option of vLLM."""
    return one(args={name: value})


def without(key: str) -> Values:
    """One model that lacks a key."""
    return {"models": [{name: value for name, value in DEMO.items() if name != key}]}


EXAMPLES = [DEPLOY / "helm" / "examples" / f"{name}.yaml" for name in ("gpu", "cpu", "multi-node", "replicas")]
GOOD: dict[str, Values] = {path.stem: yaml.safe_load(path.read_text()) for path in EXAMPLES} | {
    "several models": {"models": [DEMO, DEMO | {"name": "other", "device": "cpu", "policy": {"policy": "dense"}}]},
    "a new claim": one(model="org/name", weights={"size": "10Gi", "storageClassName": "fast"}),
    "a hub": one(model="org/name", weights={"size": "10Gi"})
    | {"networkPolicy": {"egress": [{"ports": [{"protocol": "TCP", "port": 443}]}]}},
    "no network policy": one(model="org/name", weights={"size": "10Gi"}) | {"networkPolicy": {"enabled": False}},
    "nothing runs": {"models": [DEMO | {"replicas": 0}, GROUP | {"replicas": 0}]},
    "ranks on the CPU": cpu("4500m", parallel={"tensor": 2}),
    "threads of its own": cpu(4, env=[{"name": "OMP_NUM_THREADS", "value": "2"}]),
    "hpa": one(autoscaling=SCALED),
    "a group scaled by hpa": one(autoscaling=SCALED, parallel={"tensor": 4}, multiNode={"size": 2}),
    "no proxy": one() | {"proxy": {"enabled": False}, "monitoring": {"podMonitor": True}},
    "nobody admitted": one() | {"networkPolicy": {"gateway": [], "prometheus": []}},
    "a key": one() | {"apiKey": {"value": "not-for-everyone"}},
    "large numbers": one(policy=QUEST | {"budget_tokens": LARGE}, args={"max-model-len": LARGE}),
    "all kinds of options": one(args=OPTIONS),
}
BAD: dict[str, tuple[Values, str]] = {
    "unknown key": (one() | {"modles": []}, "'modles' not allowed"),
    "unknown key of a model": (one(replica=2), "'replica' not allowed"),
    "no models": ({}, "'/models'"),
    "no model": (without("model"), "missing property 'model'"),
    "no policy": (without("policy"), "missing property 'policy'"),
    "unknown policy": (policy(policy="qest"), "value must be one of 'dense'"),
    "budget of a policy without": (policy(policy="dense", budget_tokens=512), "'budget_tokens' not allowed"),
    "wrong type of a parameter": (policy(policy="quest", budget_tokens="many"), "/policy/budget_tokens'"),
    "wrong type": (one(replicas="three"), "got string, want integer"),
    "secret as option": (option("api-key", "sk"), "api-key"),
    "option that the chart sets": (option("tensor-parallel-size", 2), "tensor-parallel-size"),
    "option with an underscore": (option("api_key", "sk"), "api_key"),
    "keda that knows no Prometheus": (one(autoscaling=SCALED | {"kind": "keda"}), "missing property 'prometheus'"),
    "two keys": (one() | {"apiKey": {"existingSecret": "a", "value": "b"}}, "'/apiKey'"),
    "two of a name": ({"models": [DEMO, DEMO]}, "two are called demo"),
    "GPUs that pods cannot share": (one(parallel={"tensor": 3}, multiNode={"size": 2}), "cannot be shared evenly"),
}
