"""launch/jobset.yaml and launch/slurm.sbatch: well-formed, and what they start saves when told to leave and goes on."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from mmx.pod.accelerators import find_accelerator
from tests.launch.programs import REPOSITORY

JOBSET = yaml.safe_load((REPOSITORY / "launch" / "jobset.yaml").read_text())
SCHEMA = json.loads((REPOSITORY / "tests" / "launch" / "jobset_schema.json").read_text())
TYPES = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}
# Says that it was told to leave, as a launcher does, and ends with 0; ends with 7 by itself if there is a file fail.
LAUNCHER = """#!/usr/bin/env bash
echo "$0" "$@" >>calls
[ ! -e fail ] || exit 7
trap 'echo saved >>calls; exit 0' TERM
for _ in {1..400}; do sleep 0.05; done
"""


def problems(value, schema: dict, where: str = "") -> list[str]:
    """What of a value the schema does not allow: objects are closed, as the server's strict validation has it."""
    schema = SCHEMA["definitions"][schema["$ref"]] if "$ref" in schema else schema
    if "enum" in schema:
        return [] if value in schema["enum"] else [f"{where}: {value!r}"]
    if not isinstance(value, TYPES[schema["type"]]) or (isinstance(value, bool) and schema["type"] != "boolean"):
        return [f"{where}: {value!r} is no {schema['type']}"]
    if isinstance(value, list):
        return [p for i, item in enumerate(value) for p in problems(item, schema["items"], f"{where}[{i}]")]
    if not isinstance(value, dict):
        return []
    found = [f"{where}: lacks {name}" for name in schema.get("required", ()) if name not in value]
    for name, item in value.items():
        inner = schema["values"] if "values" in schema else schema["properties"].get(name)
        found += [f"{where}: unknown {name}"] if inner is None else problems(item, inner, f"{where}.{name}")
    return found


def container() -> dict:
    [job] = JOBSET["spec"]["replicatedJobs"]
    [one] = job["template"]["spec"]["template"]["spec"]["containers"]
    return one


def test_jobset_fits_its_schema():
    assert problems(JOBSET, SCHEMA) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [(("spec", "replicatedjobs"), []), (("spec", "suspend"), "no"), (("apiVersion",), "jobset.x-k8s.io/v1")],
)
def test_schema_sees_mistakes(path, value):
    broken = json.loads(json.dumps(JOBSET))
    inner = broken
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    assert len(problems(broken, SCHEMA)) == 1


def test_jobset_has_as_many_hosts_as_its_slices():
    [job] = JOBSET["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    slice_ = find_accelerator("v5p-1024")
    assert spec["parallelism"] == spec["completions"] == slice_.hosts
    selector = spec["template"]["spec"]["nodeSelector"]
    x, y, z = map(int, selector["cloud.google.com/gke-tpu-topology"].split("x"))
    assert x * y * z == slice_.chips
    assert container()["resources"]["limits"]["google.com/tpu"] * slice_.hosts == slice_.chips


def programs(folder: Path, **scripts: str) -> dict[str, str]:
    """An environment in which these programs come first."""
    for name, script in scripts.items():
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    return os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


def calls(folder: Path, count: int) -> list[str]:
    """Lines of the file calls, once there are that many."""
    limit = time.time() + 20
    while not (folder / "calls").exists() or len((folder / "calls").read_text().splitlines()) < count:
        assert time.time() < limit
        time.sleep(0.02)
    return (folder / "calls").read_text().splitlines()


@pytest.mark.parametrize("fails", [False, True])
def test_jobset_starts_again_after_a_preemption(tmp_path, fails):
    command = [*container()["command"], *container()["args"]]
    if fails:
        (tmp_path / "fail").touch()
    process = subprocess.Popen(command, cwd=tmp_path, env=programs(tmp_path, python=LAUNCHER))
    [line] = calls(tmp_path, 1)
    assert "-m launch.pretrain --distributed --config=configs/minimax_text_01.py" in line
    if not fails:
        process.send_signal(signal.SIGTERM)
        assert calls(tmp_path, 2)[1] == "saved"
    assert process.wait(timeout=20) == (7 if fails else 143)


def test_shell_files_parse():
    for path in [*(REPOSITORY / "launch").glob("*.sh"), REPOSITORY / "launch" / "slurm.sbatch"]:
        subprocess.run(["bash", "-n", str(path)], check=True)


@pytest.mark.parametrize("fails", [False, True])
def test_slurm_saves_and_goes_back_into_the_queue(tmp_path, fails):
    srun = LAUNCHER.replace("trap", "echo $$ >pid; trap")
    scancel = '#!/usr/bin/env bash\necho scancel "$@" >>calls\nkill -TERM "$(cat pid)"\n'
    scontrol = '#!/usr/bin/env bash\necho scontrol "$@" >>calls\n'
    environment = programs(tmp_path, srun=srun, scancel=scancel, scontrol=scontrol)
    if fails:
        (tmp_path / "fail").touch()
    process = subprocess.Popen(
        ["bash", str(REPOSITORY / "launch" / "slurm.sbatch"), "--config=configs/text_1b.py", "--workdir=/shared/run"],
        cwd=tmp_path,
        env=environment | {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "42"},
    )
    [line] = calls(tmp_path, 1)
    assert line.endswith("-m launch.pretrain --distributed --config=configs/text_1b.py --workdir=/shared/run")
    if not fails:
        while not (tmp_path / "pid").exists():
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert calls(tmp_path, 4)[1:] == ["scancel --signal=TERM 42", "saved", "scontrol requeue 42"]
    assert process.wait(timeout=20) == (7 if fails else 143)
