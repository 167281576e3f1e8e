"""Several processes take the same checkpoint, also when only one of them sees that the newest is damaged."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ports import free_port

ROOT = Path(__file__).parents[2]
NOT_OURS = ("OMPI_", "SLURM_", "TPU_", "MEGASCALE_", "KUBERNETES_", "JOB_COMPLETION_", "JAX_", "NPROC")


@pytest.mark.slow
def test_two_processes_agree_on_the_older_one(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(NOT_OURS)}
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    where, script = f"127.0.0.1:{free_port()}", str(ROOT / "tests/faults/several.py")
    folder = str(tmp_path / "checkpoints")
    running = [
        subprocess.Popen(
            [sys.executable, script, where, "2", str(process), folder],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    try:
        ended = [process.communicate(timeout=150) for process in running]
    finally:
        for process in running:
            process.kill()
            process.communicate()
    assert [process.returncode for process in running] == [0, 0], ended
    for out, _ in ended:
        # Gloo says things too.
        found = [json.loads(line) for line in out.splitlines() if line.startswith("[") and "peer" not in line]
        assert found == [[1, True], [".lock", "1", "2", "2.damaged-1"]]
    first, second = (err for _, err in ended)
    assert first.count("checkpoint 2 is damaged and not used") == first.count("checkpoint 2 is now 2.damaged-1") == 1
    assert "damaged" not in second
