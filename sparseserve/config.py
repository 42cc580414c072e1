"""The policy that users ask for: a name or a file, changed by environment variables and `--set`.

A policy file maps patterns of model names to policies; the first pattern that matches wins:

    models:
      meta-llama/Llama-3.1-8B-Instruct: {policy: tidal, budget_tokens: 1024, reselect_layer: 13}
      Qwen/*: {policy: quest}

Precedence: `--policy` over SPARSESERVE_POLICY for the name or file; for a key, `--set budget_tokens=512` over
SPARSESERVE_SET_BUDGET_TOKENS=512 over the file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic.json_schema import models_json_schema

from sparseserve import environment
from sparseserve.errors import MISSING, ConfigError, policy_errors
from sparseserve.policies import POLICIES, Policy

ADDITIONAL_CONFIG = "sparseserve"  # the key of our settings in vLLM's additional_config
WORKERS = {device: f"sparseserve.plugin.worker_{device}.Sparse{device.upper()}Worker" for device in ("cpu", "cuda")}
SEE_POLICIES = "see `sparseserve policies`"
SEE_SCHEMA = "see `sparseserve policies --schema`"


@dataclass(frozen=True, slots=True)
class PolicySource:
    """All that was asked for, before the model is known."""

    models: Mapping[str, Mapping[str, Any]]  # pattern -> {"policy": name, **hyper-parameters}
    file: str = ""  # the policy file, "" for a policy given by name
    overrides: Mapping[str, tuple[Any, str]] = field(default_factory=dict)  # key -> (value, what gave it)

    def policy(self, model_name: str) -> Policy:
        """The policy for a model, with the overrides."""
        pattern = self._pattern(model_name)
        values = {**self.models[pattern], **{key: value for key, (value, _) in self.overrides.items()}}
        return _build(values, lambda key: self._where(pattern, key))

    def locate(self, error: ConfigError, model_name: str) -> ConfigError:
        """The error, with what gave its key the value."""
        problem = error.problem
        where = self._where(self._pattern(model_name), problem.key)
        return ConfigError(
            problem.key, problem.value, problem.allowed, choices=problem.choices, remedy=problem.remedy, where=where
        )

    def _pattern(self, model_name: str) -> str:
        names = [model_name, Path(model_name).name] if Path(model_name).exists() else [model_name]
        for pattern in self.models:
            if any(fnmatchcase(name, pattern) for name in names):
                return pattern
        raise ConfigError(
            "model",
            model_name,
            allowed=f"a name that matches one of the patterns {', '.join(self.models)}",
            choices=list(self.models),
            remedy='add a pattern under models; "*" matches every model',
            where=self.file,
        )

    def _where(self, pattern: str, key: str) -> str:
        if key in self.overrides:
            return self.overrides[key][1]
        return f'{self.file}, model "{pattern}"' if self.file else ""


def find_policy(spec: str | None, sets: Sequence[str], env: Mapping[str, str]) -> PolicySource:
    """Read what was asked for; a policy given by name is checked at once, one in a file once the model is known."""
    spec = spec or env.get(environment.POLICY)
    if not spec:
        raise ConfigError("policy", MISSING, choices=list(POLICIES), remedy="give --policy NAME or --policy FILE")
    overrides = _from_env(env) | dict(map(_from_flag, sets))
    if "policy" in overrides:
        value, where = overrides["policy"]
        remedy = f"give --policy {value}, or {environment.POLICY}={value}"
        raise ConfigError("policy", value, "a hyper-parameter of a policy", remedy=remedy, where=where)
    if spec not in POLICIES and _is_file(spec):
        return PolicySource(read_policy_file(spec), spec, overrides)
    source = PolicySource({"*": {"policy": spec}}, overrides=overrides)
    source.policy("*")
    return source


def load_policy(spec: str | None, sets: Sequence[str], env: Mapping[str, str], model_name: str) -> Policy:
    """The policy for a model: `spec` is a policy's name or a policy file, `sets` are KEY=VALUE."""
    return find_policy(spec, sets, env).policy(model_name)


def to_dict(policy: Policy) -> dict[str, Any]:
    """The policy as JSON-able values, as it travels in vLLM's `additional_config`."""
    return {"policy": policy.name, **policy.model_dump(mode="json")}


def from_dict(values: Mapping[str, Any]) -> Policy:
    """The policy that `to_dict` wrote."""
    return _build(values, lambda key: "additional_config.sparseserve")


def policy_file_schema() -> dict[str, Any]:
    """JSON Schema of a policy file."""
    refs, schema = models_json_schema([(cls, "validation") for cls in POLICIES.values()])
    definitions = schema["$defs"]
    entries = []
    for name, cls in POLICIES.items():
        ref = refs[(cls, "validation")]
        entries.append(ref)
        entry = definitions[ref["$ref"].rpartition("/")[2]]
        entry["properties"] = {"policy": {"const": name, "description": cls.description}} | entry["properties"]
        entry["required"] = ["policy", *entry.get("required", [])]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "sparseserve policy file",
        "type": "object",
        "additionalProperties": False,
        "required": ["models"],
        "properties": {
            "models": {
                "type": "object",
                "description": "patterns of model names; the first that matches wins",
                "additionalProperties": {"oneOf": entries},
            }
        },
        "$defs": definitions,
    }


def read_policy_file(path: str) -> dict[str, dict[str, Any]]:
    """The models of a policy file."""
    content = _read_yaml(path)
    models = content.get("models", MISSING) if isinstance(content, dict) else MISSING
    if not isinstance(models, dict) or not models:
        raise ConfigError("models", models, "patterns of model names, each a policy", remedy=SEE_SCHEMA, where=path)
    for key in content.keys() - {"models"}:
        raise ConfigError(key, content[key], choices=["models"], remedy="remove or rename the key", where=path)
    for pattern, entry in models.items():
        if not isinstance(pattern, str) or not isinstance(entry, dict):
            raise ConfigError(f"models.{pattern}", entry, "keys such as policy: quest", remedy=SEE_SCHEMA, where=path)
    return models


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key written twice, of which PyYAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is written twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _read_yaml(path: str) -> Any:
    try:
        return yaml.load(Path(path).read_text(), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        allowed = f"a policy file, or one of {', '.join(POLICIES)}"
        raise ConfigError("policy", path, allowed, remedy=f"check the path ({error})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else path
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError("policy file", problem, "YAML", remedy="correct the line", where=where) from None


def _is_file(spec: str) -> bool:
    return "/" in spec or Path(spec).suffix in {".yaml", ".yml", ".json"} or Path(spec).is_file()


def _from_flag(text: str) -> tuple[str, tuple[Any, str]]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError("--set", text, "KEY=VALUE", remedy="write for example --set budget_tokens=512")
    return key.strip().replace("-", "_"), (_scalar(key, value, "--set"), "--set")


def _from_env(env: Mapping[str, str]) -> dict[str, tuple[Any, str]]:
    names = [name for name in env if name.startswith(environment.SET)]
    return {
        (key := name.removeprefix(environment.SET).lower()): (_scalar(key, env[name], name), name) for name in names
    }


def _scalar(key: str, text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(key, text, "a YAML value", remedy="quote it", where=where) from None


def _build(values: Mapping[str, Any], where: Callable[[str], str]) -> Policy:
    name = values.get("policy", MISSING)
    if name not in POLICIES:
        raise ConfigError("policy", name, choices=list(POLICIES), remedy=SEE_POLICIES, where=where("policy"))
    cls = POLICIES[name]
    try:
        return cls.model_validate({key: value for key, value in values.items() if key != "policy"})
    except ValidationError as error:
        raise policy_errors(error, cls, where) from None
