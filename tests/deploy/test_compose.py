"""docker-compose.yaml for one machine: hardened, bound to this machine, and of one piece with the chart."""

import importlib.util
import re
import subprocess

import pytest
import yaml

from tests.deploy.dockerfiles import DEPLOY
from tests.programs import program

COMPOSE = yaml.safe_load((DEPLOY / "docker-compose.yaml").read_text())
SERVICES = COMPOSE["services"]


def test_every_service_is_hardened():
    for name, service in SERVICES.items():
        assert service["cap_drop"] == ["ALL"], name
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), name
        if name in ("prepare", "vllm", "sidecar"):
            assert service["user"] == "10001:10001"
            assert service["read_only"]
            assert service["security_opt"] == ["no-new-privileges:true"]
        assert not service["image"].endswith(":latest")


def test_the_order_of_starts():
    assert SERVICES["vllm"]["depends_on"] == {"prepare": {"condition": "service_completed_successfully"}}
    assert SERVICES["prepare"]["depends_on"] == {"volumes": {"condition": "service_completed_successfully"}}
    assert {name for name, service in SERVICES.items() if service.get("profiles") == ["monitoring"]} == {
        "prometheus",
        "grafana",
    }


def test_mounts_and_volumes_exist():
    for service in SERVICES.values():
        for mount in service.get("volumes", []):
            source = mount.split(":")[0] if not mount.startswith("${") else None
            if source is None:
                continue
            if source.startswith("."):
                assert (DEPLOY / source).is_file(), source
            else:
                assert source in COMPOSE["volumes"], source
        assert set(service.get("secrets", [])) <= set(COMPOSE["secrets"])


def test_the_override_for_cpus_names_services_that_are_there():
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!reset", lambda loader, node: None)
    override = yaml.load((DEPLOY / "docker-compose.cpu.yaml").read_text(), Loader)
    assert set(override["services"]) <= set(SERVICES)
    assert (DEPLOY.parent / override["services"]["prepare"]["build"]["dockerfile"]).is_file()


def test_arguments_are_those_of_the_programs():
    from allocator.cli.main import main

    for name in ("prepare", "sidecar"):
        service = SERVICES[name]
        with pytest.raises(SystemExit):
            main([service["entrypoint"][1], "--help"])
        flags = {argument.partition("=")[0] for argument in service["command"] if argument.startswith("--")}
        assert flags <= help_flags(service["entrypoint"][1])


def test_the_sidecar_knows_what_is_served():
    (folder,) = [a.removeprefix("--out=") for a in SERVICES["prepare"]["command"] if a.startswith("--out=")]
    assert f"--prepared={folder}" in SERVICES["sidecar"]["command"]
    assert f"model:{folder}:ro" in SERVICES["sidecar"]["volumes"]
    assert "prepare" in SERVICES["sidecar"]["depends_on"]


def help_flags(verb):
    import argparse
    from importlib import import_module

    parser = argparse.ArgumentParser()
    import_module(f"allocator.cli.{verb}").add_arguments(parser)
    lines = (line.strip() for line in parser.format_help().splitlines())
    return {flag for line in lines if line[:1] == "-" for flag in re.findall(r"--[\w-]+", line.partition("  ")[0])}


def test_alerts_are_the_charts(tmp_path):
    spec = importlib.util.spec_from_file_location("compose_alerts", DEPLOY / "compose" / "alerts.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    alerts = DEPLOY / "compose" / "alerts.yaml"
    assert alerts.read_text() == module.alerts(), "run: python deploy/compose/alerts.py"
    done = subprocess.run([program("promtool"), "check", "rules", alerts], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_prometheus_asks_with_the_labels_that_alerts_and_dashboard_use(tmp_path):
    config = (DEPLOY / "compose" / "prometheus.yaml").read_text()
    moved = config.replace("/etc/prometheus/alerts.yaml", str(DEPLOY / "compose" / "alerts.yaml"))
    (tmp_path / "prometheus.yaml").write_text(moved)
    command = [program("promtool"), "check", "config", tmp_path / "prometheus.yaml"]
    assert subprocess.run(command, capture_output=True).returncode == 0
    used = set(re.findall(r"(\w+)=~?\"compose", (DEPLOY / "compose" / "alerts.yaml").read_text()))
    for job in yaml.safe_load(config)["scrape_configs"]:
        assert used <= set(job["static_configs"][0]["labels"])
        (target,) = job["static_configs"][0]["targets"]
        name, port = target.split(":")
        assert any(str(port) in argument for argument in SERVICES[name]["command"])
