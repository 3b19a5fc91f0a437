"""The script for several hosts runs on one, and the Slurm and Kubernetes files that start it fit its mesh."""

import json
import math
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

import decodax
from decodax.scripts import generate_pod
from decodax.sharding.membership import Membership, read_membership
from decodax.sharding.mesh import read_mesh_shape
from tests.sharding.small_model import write_small_model

pytestmark = pytest.mark.slow

PODS = Path(generate_pod.__file__).parent / "pods"


def test_prompts_become_lines_of_json(tmp_path: Path, capsys: Any):
    folder = write_small_model(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("def f(x):\n\nimport os\nclass A:\n")
    arguments = ["--model", str(folder), "--prompts", str(tmp_path / "prompts.txt"), "--batch", "2"]
    generate_pod.main([*arguments, "--output", str(tmp_path / "out.jsonl"), "--max-new-tokens", "5"])
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    prompts = ["def f(x):", "import os", "class A:"]
    expected = decodax.generate(decodax.load(folder), prompts, max_new_tokens=5)
    assert found == [
        {"prompt": prompt, "text": text, "finish_reason": reason}
        for prompt, text, reason in zip(prompts, expected.text or (), expected.finish_reasons, strict=True)
    ]
    assert "3 of 3 prompts" in capsys.readouterr().err


def devices_of(mesh: str) -> int:
    return math.prod(read_mesh_shape(mesh).values())


def test_the_slurm_job_starts_a_mesh_of_its_gpus():
    file = PODS / "slurm_gpu.sbatch"
    checked = subprocess.run(["bash", "-n", file], capture_output=True, text=True, timeout=60)
    assert (checked.returncode, checked.stderr) == (0, "")
    text = file.read_text()
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", text, re.MULTILINE))
    command = shlex.split(text[text.index("python -m") :].replace("\\\n", " "))
    assert command[:3] == ["python", "-m", generate_pod.__name__]
    options = generate_pod.parser().parse_args(command[3:])
    assert options.distributed == "auto"
    assert asked["ntasks-per-node"] == "1"
    assert devices_of(options.mesh) == int(asked["nodes"]) * int(asked["gpus-per-node"])
    assert read_mesh_shape(options.mesh)["tensor"] == int(asked["gpus-per-node"])


def test_the_jobset_starts_a_mesh_of_its_chips():
    document = yaml.safe_load((PODS / "jobset_tpu.yaml").read_text())
    assert (document["apiVersion"], document["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (replicated,) = document["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"] == ["python", "-m", generate_pod.__name__]
    options = generate_pod.parser().parse_args(container["args"])
    assert options.distributed == "auto"
    hosts = job["parallelism"]
    chips = hosts * container["resources"]["limits"]["google.com/tpu"]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    assert job["completions"] == hosts and replicated["replicas"] == 1
    assert devices_of(options.mesh) == chips == math.prod(map(int, topology.split("x")))
    labels = {
        "jobset.sigs.k8s.io/jobset-name": document["metadata"]["name"],
        "jobset.sigs.k8s.io/replicatedjob-name": replicated["name"],
    }
    environ = {"JOB_COMPLETION_INDEX": "3"}  # what Kubernetes adds by itself
    for entry in container["env"]:
        path = entry.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath", "")
        environ[entry["name"]] = entry["value"] if "value" in entry else labels[path.split("'")[1]]
    port = container["ports"][0]["containerPort"]
    source = "Kubernetes' indexed job and DECODAX_* variables"
    assert read_membership(environ) == Membership(f"decodax-hosts-0-0.decodax:{port}", hosts, 3, None, source)
