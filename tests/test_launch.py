"""The ways to launch a run: what they tell pretrain.py, SLURM, Kubernetes, Cloud TPU and JAX exists there."""

import ast
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import jax
import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(file for file in (ROOT / "experiments" / "launch").iterdir() if file.suffix != ".py")
SCRIPTS = [file for file in FILES if file.suffix == ".sh"]
# SLURM's own, of which JAX's detection has no need.
NOT_FOR_JAX = {"SLURM_CPUS_PER_TASK", "SLURM_RESTART_COUNT", "SLURM_STEP_NUM_TASKS"}
# Stands in for Python: says what it was started with, and fails in one process or waits for a signal.
STAND_IN = """#!/bin/bash
[[ $1 == -c ]] && echo 1234 && exit
echo "$JAX_PLATFORMS $JAX_LOCAL_DEVICE_IDS $*" >>"$RECORD"
[[ "$*" == *" $FAILS" ]] && exit 3
[[ $SLEEPS ]] || exit 0
[[ $DEAF ]] && trap '' TERM ||
trap 'echo stopped >>"$RECORD"; exit 75' TERM
for ((i = 0; i < 300; i++)); do sleep 0.1; done
"""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_are_shell_and_can_be_run(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    assert os.access(script, os.X_OK)
    assert re.search(r"^set -e?uo pipefail$", script.read_text(), re.MULTILINE)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", script], check=True)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_each_says_what_to_edit_and_how_to_start_and_runs_pretrain_with_options_that_it_has(file: Path) -> None:
    text = file.read_text()
    assert re.search(r"^# Edit: ", text, re.MULTILINE)
    start = re.search(r"^# Start.*: (.*)$", text, re.MULTILINE)
    assert start is not None
    run = text[text.index("pretrain.py", start.end()) :]
    if file.suffix == ".sh":
        assert '"$@"' in run
    # Of what a user types and what the file adds; gcloud and sbatch have options of their own.
    used = set(re.findall(r"(?:^|\s)(?:- )?--([a-z-]+)", start[1]))
    used |= set(re.findall(r"(?:^|\s)(?:- )?--([a-z-]+)", run)) if file.name in ("local.sh", "jobset.yaml") else set()
    assert {option.replace("-", "_") for option in used} <= options()


def test_slurm_starts_again_what_can_go_on(tmp_path: Path) -> None:
    for name, does in {"srun": 'echo "$1" >&2; exit $CODE', "scontrol": 'echo "$@"'}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / name).chmod(0o755)
    own = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "8"}
    again = set[int]()
    for code in (0, 1, 2, 75, 130, 134, 135, 137, 139, 143):
        environment = os.environ | own | {"CODE": str(code)}
        script = ROOT / "experiments" / "launch" / "slurm.sh"
        done = subprocess.run([script], env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (code, "--cpus-per-task=8\n")  # which srun doesn't take over
        again |= {code} if done.stdout == "requeue 7\n" else set()
    assert again == {75, 130, 134, 135, 137, 139, 143}  # as docs/reliability.md says


def options() -> set[str]:
    """The fields of pretrain.py's Config."""
    tree = ast.parse((ROOT / "experiments" / "pretrain.py").read_text())
    config = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Config")
    return {
        node.target.id for node in config.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


@pytest.mark.parametrize("file", [*FILES, ROOT / "jaxlm" / "distributed.py"], ids=lambda file: file.name)
def test_the_variables_are_those_that_jax_reads(file: Path) -> None:
    names = r"\b(?:OMPI|SLURM|TPU|MEGASCALE|KUBERNETES|JOB|JAX)_[A-Za-z_]+\b"
    source = Path(jax.__file__).parent / "_src"
    files = [
        source / "distributed.py",
        source / "cloud_tpu_init.py",
        source / "config.py",
        *source.glob("clusters/*.py"),
    ]
    read = set(re.findall(names, "\n".join(file.read_text() for file in files))) | {"JAX_PLATFORMS"}
    assert set(re.findall(names, file.read_text())) - NOT_FOR_JAX <= read


def test_the_jobset_agrees_with_itself() -> None:
    yaml: Any = pytest.importorskip("yaml")  # flax brings it
    jobset = yaml.safe_load((ROOT / "experiments" / "launch" / "jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    name, spec = jobset["metadata"]["name"], jobset["spec"]
    assert spec["network"]["enableDNSHostnames"] is True
    [workers] = spec["replicatedJobs"]
    job = workers["template"]["spec"]
    assert (workers["replicas"], job["completionMode"], job["backoffLimit"]) == (1, "Indexed", 0)
    pod = job["template"]["spec"]
    assert (pod["restartPolicy"], pod["terminationGracePeriodSeconds"]) == ("Never", 120)
    [container] = pod["containers"]
    option, coordinator, processes, process = container["args"][:4]
    assert (option, process) == ("--join", "$(JOB_COMPLETION_INDEX)")
    assert job["parallelism"] == job["completions"] == int(processes)
    host, port = coordinator.split(":")
    assert host == f"{name}-{workers['name']}-0-0.{spec['network']['subdomain']}"
    assert container["ports"] == [{"containerPort": int(port)}]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    [rule] = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] >= 1


def local(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
    """Starts local.sh with what stands in for Python."""
    stand_in = tmp_path / "python"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    own = {
        "PYTHON": str(stand_in),
        "RECORD": str(tmp_path / "record"),
        "FAILS": "none",
        "SLEEPS": "",
        "DEAF": "",
        **environment,
    }
    with (tmp_path / "stderr").open("wb") as stderr:
        return subprocess.Popen(
            [ROOT / "experiments" / "launch" / "local.sh", *arguments], env=clean | own, stderr=stderr
        )


def test_local_starts_as_many_as_asked_and_passes_options_on(tmp_path: Path) -> None:
    assert local(tmp_path, "3", "--name", "two words").wait(30) == 0
    assert sorted((tmp_path / "record").read_text().splitlines()) == [
        f"cpu {i} experiments/pretrain.py --name two words --join 127.0.0.1:1234 3 {i}" for i in range(3)
    ]


def test_local_ends_all_when_one_fails(tmp_path: Path) -> None:
    begun = time.monotonic()
    assert local(tmp_path, "3", FAILS="1", SLEEPS="yes", GRACE="1").wait(30) == 3
    assert time.monotonic() - begun < 30
    assert len((tmp_path / "record").read_text().splitlines()) == 3


def test_local_passes_a_signal_on_and_waits(tmp_path: Path) -> None:
    process = local(tmp_path, "2", SLEEPS="yes")
    record = tmp_path / "record"
    wait_for(record, lines=2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 75
    assert record.read_text().count("stopped") == 2


def test_local_kills_at_the_second_signal(tmp_path: Path) -> None:
    process = local(tmp_path, "1", SLEEPS="yes", DEAF="yes")
    record = tmp_path / "record"
    wait_for(record, lines=1)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 130


def wait_for(record: Path, lines: int) -> None:
    deadline = time.monotonic() + 30
    while not record.exists() or record.read_text().count("\n") < lines:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)  # for the stand-ins to set their traps


def test_local_says_how_it_is_used(tmp_path: Path) -> None:
    assert local(tmp_path, "--steps").wait(30) == 2
    assert "usage: " in (tmp_path / "stderr").read_text()
