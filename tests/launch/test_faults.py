"""Two processes that meet with everything that ends runs, again and again, and still train as if left alone."""

import contextlib
import dataclasses
import http.server
import ipaddress
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mmx.train.checkpoint import CHECKPOINTS
from mmx.train.goodput import WAYS
from mmx.train.lock import LOCK
from mmx.train.metrics import read_metrics
from mmx.train.watchdog import HUNG, STACKS
from tests.launch.programs import ENVIRONMENT, REPOSITORY
from tests.words import prepare_words

CONFIG = """
from mmx.config import CheckpointConfig, DataConfig, MeshConfig, OptimizerConfig, Phase, Run, TrainConfig
from tests.tiny import tiny
from tests.words import VOCAB_SIZE


def get_config():
    return Run(
        model=tiny(vocab_size=VOCAB_SIZE, num_layers=2, layer_pattern=("lightning", "softmax")),
        mesh=MeshConfig(fsdp=-1),
        data=DataConfig(path={data!r}, sequence_length=32, batch_size=4, heldout_sequences=0),
        optimizer=OptimizerConfig(peak_lr=1e-3, schedule=(Phase("linear", 1.0, steps=5), Phase("constant", 1.0))),
        train=TrainConfig(steps=10**6, log_every=1, hang_seconds=25),
        checkpoint=CheckpointConfig(every=3, keep=3),
    )
"""
# Fields that tell the time, not the training.
CLOCK = ("tokens_per_second", "data_wait", "goodput", "starts", "time", *(f"seconds_{way}" for way in WAYS))


@dataclasses.dataclass
class Pair:
    """Two processes of a run, under launch.local."""

    launcher: subprocess.Popen
    workdir: Path
    output: Path
    chance: random.Random

    @property
    def processes(self) -> list[int]:
        """Their numbers in the system, process 0 of the run first."""
        children = Path(f"/proc/{self.launcher.pid}/task/{self.launcher.pid}/children").read_text().split()
        return [int(child) for child in children]

    @property
    def one(self) -> int:
        return self.chance.choice(self.processes)

    def send(self, number: signal.Signals, *processes: int) -> None:
        for process in processes:
            os.kill(process, number)

    def wait(self) -> tuple[int, str]:
        """The launcher's status and all that was printed."""
        status = self.launcher.wait(timeout=300)
        return status, self.output.read_text()


def listening_addresses(process: int) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    """Where a process takes connections, as the kernel tells."""
    sockets = set()
    for handle in Path(f"/proc/{process}/fd").iterdir():
        with contextlib.suppress(OSError):
            sockets.add(os.readlink(handle))
    addresses = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{process}/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == "0A" and f"socket:[{rest[5]}]" in sockets:
                # Words of 32 bits, each in the byte order of the machine.
                packed = bytes.fromhex(local.partition(":")[0])
                words = (packed[start : start + 4][::-1] for start in range(0, len(packed), 4))
                address = ipaddress.ip_address(b"".join(words))
                addresses.append(getattr(address, "ipv4_mapped", None) or address)
    return addresses


def wait_until(condition: Callable[[], object], pair: Pair, seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert pair.launcher.poll() is None, pair.output.read_text()
        assert time.monotonic() < deadline, pair.output.read_text()
        time.sleep(0.002)


def last_step(workdir: Path) -> int:
    return max((row["step"] for row in read_metrics(workdir) if "loss" in row), default=0)


# Faults of a running pair. Each ends it and checks how it ended.


def kill_one(pair: Pair) -> None:
    pair.send(signal.SIGKILL, pair.one)
    status, printed = pair.wait()
    assert status != 0
    assert "stopping the others" in printed


def kill_both(pair: Pair) -> None:
    pair.send(signal.SIGKILL, *pair.processes)
    assert pair.wait()[0] == 128 + signal.SIGKILL


def kill_while_saving(pair: Pair) -> None:
    wait_until(lambda: any((pair.workdir / CHECKPOINTS).glob("*.orbax-checkpoint-tmp")), pair)
    time.sleep(pair.chance.uniform(0, 0.02))
    kill_one(pair)


def terminate_all(pair: Pair) -> None:
    pair.launcher.terminate()
    require_saved(pair, "SIGTERM")


def preempt_one(pair: Pair) -> None:
    pair.send(signal.SIGTERM, pair.one)
    require_saved(pair, "SIGTERM")


def notice_of_maintenance(pair: Pair) -> None:
    Metadata.notice = "TERMINATE_ON_HOST_MAINTENANCE"
    try:
        printed = require_saved(pair, "SIGTERM")
    finally:
        Metadata.notice = "NONE"
    assert "this machine will be stopped (maintenance-event: TERMINATE_ON_HOST_MAINTENANCE)" in printed


def require_saved(pair: Pair, by: str) -> str:
    status, printed = pair.wait()
    assert status == 0, printed
    assert f"stopped by {by}: saved step" in printed, printed
    step = int(printed.rsplit("saved step ", 1)[1].split()[0])
    assert (pair.workdir / CHECKPOINTS / str(step)).is_dir()
    assert not (pair.workdir / LOCK).exists()
    return printed


def freeze_one(pair: Pair) -> None:
    frozen = pair.one
    pair.send(signal.SIGSTOP, frozen)
    status, printed = pair.wait()
    assert status == HUNG, printed
    assert "hung " in printed
    assert "the stacks of all threads are in" in printed
    stacks = list((pair.workdir / STACKS).glob("process-*.txt"))
    assert any("in run_to_end" in path.read_text() and "Thread 0x" in path.read_text() for path in stacks)


def fill_disk(pair: Pair) -> None:
    """No file can grow any more: what a full disk looks like to a writer, in the middle of a file."""
    for process in pair.processes:
        resource.prlimit(process, resource.RLIMIT_FSIZE, (4096, 4096))
    status, printed = pair.wait()
    assert status != 0
    assert "the disk is full" in printed, printed


def second_run(pair: Pair) -> None:
    """Another run on the same workdir is sent away, and the first goes on."""
    flags = (f"--config={pair.workdir.parent / 'config.py'}", f"--workdir={pair.workdir}")
    intruder = subprocess.run(
        [sys.executable, "-m", "launch.pretrain", *flags],
        env=ENVIRONMENT,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert intruder.returncode == 1
    assert f"{pair.workdir} is in use by process {pair.processes[0]} of" in intruder.stderr
    before = last_step(pair.workdir)
    wait_until(lambda: last_step(pair.workdir) > before, pair)
    kill_one(pair)


# Faults of what lies on the disk, between two starts.


def newest(workdir: Path) -> Path | None:
    """The newest checkpoint, if there is one before it."""
    steps = sorted(int(path.name) for path in (workdir / CHECKPOINTS).iterdir() if path.name.isdigit())
    return workdir / CHECKPOINTS / str(steps[-1]) if len(steps) > 1 else None


def flip_bit(victim: Path, chance: random.Random) -> None:
    content = bytearray(victim.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    victim.write_bytes(content)


def truncate(victim: Path, chance: random.Random) -> None:
    os.truncate(victim, chance.randrange(victim.stat().st_size))


RUNNING = (
    *(kill_one, kill_one, kill_both, kill_while_saving, kill_while_saving, terminate_all, preempt_one, preempt_one),
    *(notice_of_maintenance, freeze_one, fill_disk, fill_disk, second_run),
)
RESTING = (flip_bit, flip_bit, flip_bit, flip_bit, truncate, truncate, truncate, truncate)


class Metadata(http.server.BaseHTTPRequestHandler):
    """A machine's metadata server."""

    notice = "NONE"

    def do_GET(self) -> None:
        values = {"maintenance-event": self.notice, "preempted": "FALSE"}
        self.send_response(200)
        self.send_header("Metadata-Flavor", "Google")
        self.end_headers()
        self.wfile.write(values[self.path.rpartition("/")[2]].encode())

    def log_message(self, *_) -> None:
        pass


@contextlib.contextmanager
def metadata_server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


class Course:
    """Starts of one run."""

    def __init__(self, folder: Path, server: str, chance: random.Random):
        self._folder, self._chance = folder, chance
        (folder / "config.py").write_text(CONFIG.format(data=str(prepare_words(folder / "words"))))
        self._environment = ENVIRONMENT | {
            "GCE_METADATA_HOST": server,
            "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        self._starts = 0

    def start(self, workdir: Path, *flags: str) -> Pair:
        self._starts += 1
        output = self._folder / f"output-{self._starts}.txt"
        command = [sys.executable, "-m", "launch.local", "--processes=2", "--cpu_devices=1", "--grace_seconds=2", "--"]
        arguments = ["pretrain", f"--config={self._folder / 'config.py'}", f"--workdir={workdir}", *flags]
        with output.open("w") as file:
            launcher = subprocess.Popen(
                [*command, *arguments], cwd=REPOSITORY, env=self._environment, stdout=file, stderr=subprocess.STDOUT
            )
        return Pair(launcher, workdir, output, self._chance)


def training(workdir: Path) -> list[dict]:
    """What a run's metrics say about the training, without what they say about the clock."""
    rows = [row for row in read_metrics(workdir) if "loss" in row]
    return [{name: value for name, value in row.items() if name not in CLOCK} for row in rows]


@pytest.mark.slow
def test_every_step_is_as_if_nothing_had_happened(tmp_path):
    seed = int(os.environ.get("FAULT_SEED", random.SystemRandom().randrange(10**6)))
    print(f"seed of the faults: FAULT_SEED={seed}")
    chance = random.Random(seed)
    running, resting = list(RUNNING), list(RESTING)
    chance.shuffle(running)
    chance.shuffle(resting)
    injected = []
    workdir = tmp_path / "disturbed"
    with metadata_server() as server:
        course = Course(tmp_path, server, chance)
        for fault in running:
            # Far enough that two checkpoints are new: some of those that are there may be damaged below.
            wanted = last_step(workdir) + 8 + chance.randrange(6)
            pair = course.start(workdir)
            wait_until(lambda wanted=wanted: last_step(workdir) >= wanted, pair)
            # The coordination service, and each process's end of the collectives: for this host alone.
            addresses = [address for process in pair.processes for address in listening_addresses(process)]
            assert len(addresses) >= 3
            assert all(address.is_loopback for address in addresses), addresses
            time.sleep(chance.uniform(0, 0.1))
            print(f"step {last_step(workdir)}: {fault.__name__}")
            fault(pair)
            injected.append(fault)
            if resting and (checkpoint := newest(workdir)):
                victims = json.loads((checkpoint / "checksums.json").read_text())["files"]
                victim = checkpoint / chance.choice([name for name, entry in victims.items() if entry["bytes"]])
                fault = resting.pop()
                print(f"  {fault.__name__} {victim.relative_to(workdir)}")
                fault(victim, chance)
                injected.append(fault)
                damaged = workdir / f"{CHECKPOINTS}-damaged" / checkpoint.name
        steps = last_step(workdir) + 5
        status, printed = course.start(workdir, f"--config.train.steps={steps}").wait()
        assert status == 0, printed
        alone = tmp_path / "undisturbed"
        flags = (f"--config.train.steps={steps}", f"--config.checkpoint.every={steps}")
        status, printed = course.start(alone, *flags).wait()
        assert status == 0, printed
    assert len(injected) >= 20
    assert damaged.is_dir()
    assert [row["step"] for row in training(workdir)] == list(range(1, steps + 1))
    assert training(workdir) == training(alone)
    progress = [
        json.loads((x / CHECKPOINTS / str(steps) / "progress" / "metadata").read_text()) for x in (workdir, alone)
    ]
    assert progress[0] == progress[1]
    last = read_metrics(workdir)[-1]
    assert last["starts"] == len(RUNNING) + 1
    assert last["seconds_lost"] > 0
