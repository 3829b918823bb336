"""What `deploy/` has for the server agrees with the server: flags, ports, paths, and the time that draining takes."""

import re
import shlex
import shutil
import subprocess
import sys
import tomllib

import pytest
import yaml

from helpers import ROOT
from infer.serve import __main__ as command
from infer.serve.server import GRACE_SECONDS

DEPLOY = ROOT / "deploy"
SHUTDOWN = GRACE_SECONDS + command.STOP_SECONDS  # seconds after --drain-seconds, at most


@pytest.fixture(scope="module")
def manifest():
    """The objects of the manifest by kind."""
    objects = list(yaml.safe_load_all((DEPLOY / "serve.yaml").read_text()))
    return {one["kind"]: one for one in objects}


def read_flags(words):
    """The flags of a command line `python -m infer.serve ...`, checked as the server checks them."""
    assert words[1:3] == ["-m", "infer.serve"] and words[0].endswith("python")
    args = command.parser().parse_args(words[3:])
    command.read_settings(args)
    return args


def test_the_manifest_runs_the_server(manifest):
    pod = manifest["Deployment"]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    args = read_flags(container["command"])
    assert args.host == "0.0.0.0" and args.checkpoint.startswith("gs://")
    assert [port["containerPort"] for port in container["ports"]] == [args.port]
    hook = container["lifecycle"]["preStop"]["exec"]["command"]
    assert pod["terminationGracePeriodSeconds"] > float(hook[1]) + args.drain_seconds + SHUTDOWN
    assert command.KEY in [variable["name"] for variable in container["env"]]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = eval(topology.replace("x", "*"))
    assert container["resources"]["limits"] == container["resources"]["requests"] == {"google.com/tpu": chips}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_probes_and_metrics_are_endpoints(manifest):
    source = (ROOT / "infer/serve/app.py").read_text()
    [container] = manifest["Deployment"]["spec"]["template"]["spec"]["containers"]
    ports = {port["name"] for port in container["ports"]}
    probes = [container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "readiness", "liveness")]
    for probe in (*probes, *manifest["PodMonitoring"]["spec"]["endpoints"]):
        assert f'Route("{probe["path"]}"' in source and probe["port"] in ports


def test_objects_select_the_pods(manifest):
    deployment = manifest["Deployment"]["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    selectors = (deployment["selector"]["matchLabels"], manifest["Service"]["spec"]["selector"],
                 manifest["PodMonitoring"]["spec"]["selector"]["matchLabels"])  # fmt: skip
    assert all(selector == labels for selector in selectors)
    assert manifest["Service"]["spec"]["ports"][0]["targetPort"] == "http"


def unit_values(name: str) -> list[str]:
    """The values of a key of the systemd unit, with continued lines joined."""
    text = (DEPLOY / "llava-serve.service").read_text().replace("\\\n", " ")
    return re.findall(rf"^{name}=(.*)$", text, re.M)


def test_the_unit_runs_the_server_and_waits_for_it():
    [line] = unit_values("ExecStart")
    args = read_flags(shlex.split(line.replace("${LLAVA_CHECKPOINT}", "DIR").replace("$LLAVA_FLAGS", "--slots 8")))
    [timeout] = unit_values("TimeoutStopSec")
    assert float(timeout) > args.drain_seconds + SHUTDOWN
    assert unit_values("EnvironmentFile") == ["/etc/llava/serve.env"]


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="a machine without systemd")
def test_systemd_accepts_the_unit(tmp_path):
    text = (DEPLOY / "llava-serve.service").read_text()
    unit = tmp_path / "llava-serve.service"
    unit.write_text(text.replace("/opt/llava/bin/python", sys.executable))
    run = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")


def test_the_image_has_the_packages_and_their_extras():
    text = (DEPLOY / "Dockerfile").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {name.rstrip("*") for name in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert set(re.findall(r"^COPY (\w+) \1$", text, re.M)) == packages
    extras = {name for names in re.findall(r"EXTRAS=([\w,]+)", text) for name in names.split(",")}
    assert extras == {"tpu", "serve"} and extras <= set(project["project"]["optional-dependencies"])
