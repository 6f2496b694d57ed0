"""Launch templates: they parse, have what their schedulers require, and use real options."""

import dataclasses
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from k2jax import cli, configs
from k2jax.commands.loading import read_mesh
from k2jax.config import override, validate

FOLDER = Path(__file__).parents[2] / "docs/launch"
SHELL = sorted(FOLDER.glob("*.sh")) + sorted(FOLDER.glob("*.sbatch"))
# What each template says its devices are.
DEVICES = {"gke_jobset.yaml": 2_048, "slurm.sbatch": 64, "tpu_queued_resource.sh": 1_024}
# From `man sbatch`.
SBATCH = {
    "job-name",
    "partition",
    "nodes",
    "ntasks-per-node",
    "gpus-per-node",
    "cpus-per-task",
    "exclusive",
    "time",
    "signal",
    "requeue",
    "open-mode",
    "output",
    "error",
    "account",
    "mem",
}


def text(name: str) -> str:
    """A template, continued lines joined."""
    return re.sub(r"\\\n\s*", "", (FOLDER / name).read_text())


@pytest.mark.parametrize("file", SHELL, ids=lambda file: file.name)
def test_shell_scripts_parse(file):
    subprocess.run(["bash", "-n", str(file)], check=True)
    assert file.read_text().startswith("#!/usr/bin/env bash\n")


@pytest.mark.parametrize("name", DEVICES)
def test_the_command_in_a_template_is_a_valid_run_on_its_devices(name):
    plain = text(name).replace('"', "")
    command = re.search(r"k2jax train (.+?)( \|\| |\n\s+env:)", plain, re.DOTALL).group(1)
    command = command.replace("$((16 / NODES))", "16").replace("$NODES", "1")
    words = shlex.split(re.sub(r"\$(\w+)", r"\1", command))
    parser, options = cli._build_parser("train")
    args, rest = parser.parse_known_args(["train", *words])
    settings = cli._read_settings(rest, args, options)
    run = override(configs.load(args.config), settings)
    validate(run, settings)
    assert run.mesh.devices == DEVICES[name]
    assert args.out and run.data.path


def test_the_slurm_template_scores_the_run_on_its_devices():
    plain = text("slurm.sbatch").replace('"', "")
    command = re.search(r"k2jax evaluate (.+?) \|\| ", plain).group(1)
    words = shlex.split(re.sub(r"\$(\w+)", r"\1", command))
    parser, _ = cli._build_parser("evaluate")
    args, rest = parser.parse_known_args(["evaluate", *words])
    assert not rest and read_mesh(args).devices == DEVICES["slurm.sbatch"]
    assert args.checkpoint == re.search(r"--out (\S+)", plain).group(1).replace("$", "")


@pytest.mark.parametrize("verb", ["evaluate", "generate"])
def test_the_commands_of_the_guide_are_taken(verb):
    guide = (FOLDER.parent / "clusters.md").read_text()
    words = shlex.split(re.search(rf"srun k2jax ({verb} .+)", guide).group(1))
    parser, _ = cli._build_parser(verb)
    args, rest = parser.parse_known_args(words)
    assert not rest and read_mesh(args).devices == 64


def test_slurm_directives_exist_and_fit_the_mesh():
    found = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?", text("slurm.sbatch"), re.M))
    assert set(found) <= SBATCH
    assert int(found["nodes"]) * int(found["ntasks-per-node"]) == DEVICES["slurm.sbatch"]
    assert found["gpus-per-node"] == found["ntasks-per-node"]
    assert re.fullmatch(r"TERM@\d+", found["signal"]) and "requeue" in found


@dataclasses.dataclass
class Required:
    """A path in a JobSet, and what must be there: a type or the only right value."""

    path: str
    what: object


# Required or needed by jobset.x-k8s.io/v1alpha2, batch/v1 Job, core/v1 PodSpec, and GKE's TPUs.
REQUIRED = [
    Required("apiVersion", "jobset.x-k8s.io/v1alpha2"),
    Required("kind", "JobSet"),
    Required("metadata.name", str),
    Required("spec.failurePolicy.maxRestarts", int),
    Required("spec.replicatedJobs.0.name", str),
    Required("spec.replicatedJobs.0.replicas", int),
    Required("spec.replicatedJobs.0.template.spec.parallelism", int),
    Required("spec.replicatedJobs.0.template.spec.completions", int),
    Required("spec.replicatedJobs.0.template.spec.completionMode", "Indexed"),
    Required("spec.replicatedJobs.0.template.spec.backoffLimit", 0),
]
POD = "spec.replicatedJobs.0.template.spec.template.spec"
REQUIRED += [
    Required(f"{POD}.restartPolicy", "Never"),
    Required(f"{POD}.terminationGracePeriodSeconds", int),
    Required(f"{POD}.nodeSelector.cloud\\.google\\.com/gke-tpu-accelerator", str),
    Required(f"{POD}.nodeSelector.cloud\\.google\\.com/gke-tpu-topology", str),
    Required(f"{POD}.containers.0.name", str),
    Required(f"{POD}.containers.0.image", str),
    Required(f"{POD}.containers.0.command", list),
    Required(f"{POD}.containers.0.resources.limits.google\\.com/tpu", 4),
    Required(f"{POD}.containers.0.volumeMounts.0.mountPath", "/shared"),
    Required(f"{POD}.volumes.0.persistentVolumeClaim.claimName", str),
]


def at(node, path: str):
    for name in re.split(r"(?<!\\)\.", path):
        key = name.replace("\\.", ".")
        node = node[int(key)] if isinstance(node, list) else node[key]
    return node


@pytest.fixture(scope="module")
def jobset():
    return pytest.importorskip("yaml").safe_load((FOLDER / "gke_jobset.yaml").read_text())


@pytest.mark.parametrize("field", REQUIRED, ids=lambda field: field.path[-40:])
def test_the_jobset_has_what_its_schema_requires(jobset, field):
    found = at(jobset, field.path)
    if isinstance(field.what, type):
        assert isinstance(found, field.what)
    else:
        assert found == field.what


def test_the_jobset_does_not_start_again_after_a_mistake(jobset):
    (rule,) = at(jobset, "spec.failurePolicy.rules")
    assert rule == {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    (rule,) = at(jobset, "spec.replicatedJobs.0.template.spec.podFailurePolicy.rules")
    codes = {"containerName": at(jobset, f"{POD}.containers.0.name"), "operator": "In"}
    assert rule == {"action": "FailJob", "onExitCodes": codes | {"values": [2]}}


def test_the_jobset_has_a_host_for_every_four_chips_of_its_topology(jobset):
    job = at(jobset, "spec.replicatedJobs.0.template.spec")
    sides = at(jobset, f"{POD}.nodeSelector.cloud\\.google\\.com/gke-tpu-topology").split("x")
    x, y, z = map(int, sides)
    assert job["parallelism"] == job["completions"] == x * y * z // 4
    chips = x * y * z * at(jobset, "spec.replicatedJobs.0.replicas")
    assert chips == DEVICES["gke_jobset.yaml"]
    mounts = at(jobset, f"{POD}.containers.0.volumeMounts")
    volumes = at(jobset, f"{POD}.volumes")
    assert {mount["name"] for mount in mounts} == {volume["name"] for volume in volumes}
