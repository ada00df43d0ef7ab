"""A disk that is full, for real: the run ends with one sentence and the last good checkpoint is intact."""

import json
import shutil
import subprocess
import sys

import pytest

from mmx.train.checksums import find_damage
from mmx.train.metrics import read_metrics
from tests.launch.programs import ENVIRONMENT, REPOSITORY, run
from tests.words import prepare_words

CONFIG = """
from mmx.config import CheckpointConfig, DataConfig, Run, TrainConfig
from tests.tiny import tiny
from tests.words import VOCAB_SIZE


def get_config():
    return Run(
        model=tiny(vocab_size=VOCAB_SIZE, num_layers=2, layer_pattern=("lightning", "softmax")),
        data=DataConfig(path={data!r}, sequence_length=32, batch_size=4, heldout_sequences=0),
        train=TrainConfig(steps=12, log_every=1),
        checkpoint=CheckpointConfig(every=2, keep=9),
    )
"""
# A file system of its own, in a namespace that ends with the command; what is on it is copied to a disk with room.
SMALL_DISK = """
mount -t tmpfs -o size={kilobytes}k none {workdir} || exit 77
{command}
status=$?
cp -r {workdir}/. {copy}
exit $status
"""


@pytest.mark.slow
def test_full_disk_ends_the_run_and_spares_what_is_saved(tmp_path):
    config, workdir, copy = tmp_path / "config.py", tmp_path / "small", tmp_path / "copy"
    config.write_text(CONFIG.format(data=str(prepare_words(tmp_path / "words"))))
    workdir.mkdir()
    copy.mkdir()
    command = f"{sys.executable} -m launch.pretrain --config={config} --workdir={workdir}"
    script = SMALL_DISK.format(kilobytes=2000, workdir=workdir, command=command, copy=copy)
    if shutil.which("unshare") is None:
        pytest.skip("no unshare on this machine")
    result = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script],
        cwd=REPOSITORY,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if "unshare" in result.stderr or result.returncode == 77:
        pytest.skip(f"this machine lets nobody mount: {result.stderr}")
    assert result.returncode == 1, result.stdout + result.stderr
    assert "error: the disk is full" in result.stderr.splitlines()[-1], result.stderr

    saved = sorted(int(path.name) for path in (copy / "checkpoints").iterdir() if path.name.isdigit())
    assert 0 < len(saved) < 6
    for step in saved:
        assert find_damage(copy / "checkpoints" / str(step)) == []
    # With room again the run goes on from there.
    result = run("pretrain", f"--config={config}", f"--workdir={copy}")
    assert result.returncode == 0, result.stderr
    assert f"resuming from step {saved[-1]}" in result.stdout
    assert [row["step"] for row in read_metrics(copy) if "loss" in row] == list(range(1, 13))
    assert json.loads((copy / "checkpoints" / "12" / "progress" / "metadata").read_text())["step"] == 12
