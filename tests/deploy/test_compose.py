"""The laws of deploy/compose.yaml and of the systemd unit, and the judgement of the tools that read them."""

from __future__ import annotations

import configparser
import ipaddress
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from tests.helpers.deploy.compose import FILE, GPU_FILE, SERVICES, VARIABLE, mounts
from tests.helpers.deploy.observability import DASHBOARDS
from tests.helpers.paths import DEPLOY

CHECKS = DEPLOY.parent / ".venv-checks"
UNIT = DEPLOY / "systemd" / "sparseserve.service"
every_service = pytest.mark.parametrize("service", SERVICES.values(), ids=SERVICES.keys())


def check(*command: str | Path) -> str:
    """What a tool that must be content still says on stderr; skips where it is missing."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stderr


@pytest.mark.parametrize("path", [FILE, GPU_FILE], ids=lambda path: path.name)
def test_the_file_is_of_the_compose_specification(path: Path) -> None:
    """The schema that check-jsonschema brings with it."""
    found = [*CHECKS.glob("lib/*/site-packages/check_jsonschema/builtin_schemas/vendor/compose-spec.json")]
    if not found:
        pytest.skip("check-jsonschema of deploy/checks.lock is not in .venv-checks: run make test")
    schema = json.loads(found[0].read_text())
    errors = Draft202012Validator(schema).iter_errors(yaml.safe_load(path.read_text()))
    assert [f"{error.json_path}: {error.message}" for error in errors] == []


@every_service
def test_services_are_reached_from_this_machine_alone(service: dict[str, Any]) -> None:
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


def test_only_nginx_leads_to_the_server() -> None:
    assert "ports" not in SERVICES["sparseserve"] and "ports" in SERVICES["nginx"]


@every_service
def test_services_come_back_and_may_do_little(service: dict[str, Any]) -> None:
    assert service["restart"] == "unless-stopped"
    assert service["read_only"] and service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]


def test_no_other_service_is_given_the_servers_address() -> None:
    (pool,) = yaml.safe_load(FILE.read_text())["networks"]["default"]["ipam"]["config"]
    address = ipaddress.ip_address(SERVICES["sparseserve"]["networks"]["default"]["ipv4_address"])
    subnet, others = (ipaddress.ip_network(pool[key]) for key in ("subnet", "ip_range"))
    assert address in subnet and address not in others and others.subnet_of(subnet)  # type: ignore[arg-type]  # both are IPv4


@every_service
def test_images_of_others_are_pinned(service: dict[str, Any]) -> None:
    assert re.search(r"@sha256:[0-9a-f]{64}$", service["image"]) or service["image"] == "sparseserve:cpu"


@every_service
def test_what_is_mounted_is_here(service: dict[str, Any]) -> None:
    volumes = yaml.safe_load(FILE.read_text())["volumes"]
    assert all(path.exists() for path in mounts(service).values())
    named = [volume.split(":")[0] for volume in service.get("volumes", []) if not volume.startswith(".")]
    assert set(named) <= set(volumes)
    assert all(volume.endswith(":ro") for volume in service.get("volumes", []) if volume.startswith("."))


def test_what_must_be_given_is_in_the_example_and_has_no_default() -> None:
    example = (DEPLOY / "compose" / "env.example").read_text()
    for name, kind, _ in VARIABLE.findall(FILE.read_text()):
        assert kind == "?" and re.search(rf"^{name}=$", example, re.MULTILINE)
    for name, *_ in VARIABLE.findall(GPU_FILE.read_text()):
        assert re.search(rf"^# {name}=", example, re.MULTILINE)


@pytest.mark.parametrize("path", [FILE, GPU_FILE], ids=lambda path: path.name)
def test_running_answers_have_time_to_end(path: Path) -> None:
    """vLLM waits once for them and once for its engine."""
    server = SERVICES["sparseserve"] | yaml.safe_load(path.read_text())["services"]["sparseserve"]
    (drain,) = (int(flag.split("=")[1]) for flag in server["command"] if flag.startswith("--shutdown-timeout="))
    assert int(server["stop_grace_period"].removesuffix("s")) > 2 * drain


def test_grafana_finds_prometheus_and_the_dashboards() -> None:
    inside = mounts(SERVICES["grafana"])
    provisioning = inside["/etc/grafana/provisioning"]
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())["datasources"]
    port = re.search(r":(\d+)$", SERVICES["prometheus"]["ports"][0])
    assert source["type"] == "prometheus" and port and source["url"] == f"http://prometheus:{port[1]}"
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "sparseserve.yaml").read_text())["providers"]
    assert {path.stem for path in inside[provider["options"]["path"]].glob("*.json")} == set(DASHBOARDS)


def test_prometheus_takes_what_is_mounted(tmp_path: Path) -> None:
    """Its configuration names the rules as they lie in the container."""
    for target, path in mounts(SERVICES["prometheus"]).items():
        shutil.copy(path, tmp_path / Path(target).name)
    check("promtool", "check", "config", tmp_path / "prometheus.yml")


@pytest.fixture
def unit() -> configparser.SectionProxy:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment, method-assign]  # as its documentation says
    parser.read(UNIT)
    return parser["Service"]


def test_systemd_knows_every_word_of_the_unit_and_finds_it_hardened(tmp_path: Path) -> None:
    """With a program that exists here."""
    text = UNIT.read_text().replace("/opt/sparseserve/bin/sparseserve", sys.executable)
    (tmp_path / UNIT.name).write_text(text)
    assert not check("systemd-analyze", "verify", tmp_path / UNIT.name)
    check("systemd-analyze", "security", "--offline=yes", "--threshold=40", tmp_path / UNIT.name)  # of 100, 0 is best


def test_the_unit_restarts_and_waits_for_the_drain(unit: configparser.SectionProxy) -> None:
    assert unit["Restart"] == "always" and unit["User"] != "root"
    drain = re.search(r"--shutdown-timeout (\d+)", unit["ExecStart"])
    assert drain and int(unit["TimeoutStopSec"]) > 2 * int(drain[1])


def test_the_unit_sees_gpus(unit: configparser.SectionProxy) -> None:
    """Each of these denies devices; the last did so before it was meant to."""
    assert not {"PrivateDevices", "DevicePolicy", "DeviceAllow", "ProtectClock"} & set(unit)


def test_the_unit_takes_its_words_from_the_example(unit: configparser.SectionProxy) -> None:
    example = UNIT.with_name("server.env.example").read_text()
    names = re.findall(r"\$(\w+)", unit["ExecStart"])
    assert names and all(re.search(rf"^{name}=", example, re.MULTILINE) for name in [*names, "VLLM_API_KEY"])
