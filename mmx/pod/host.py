"""The part that runs on each host of a pod: starts a launcher detached, keeps its log, says how it is, stops it.

  python -m mmx.pod.host start [--env=NAME=VALUE] [--logs=gs://...] -- LAUNCHER [FLAGS]
  python -m mmx.pod.host status | stop [--kill [--restarting]] | logs [--lines=N] [--follow]

Everything lies in ~/mmx-run: ``command.json``, ``pids.json``, ``log`` (all attempts, one behind the other), ``exit``
(the status of the last one) and ``stopped`` (somebody asked for it). Standard library only: it has to answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from mmx.pod.buckets import mount_buckets
from mmx.pod.progress import read_progress

COPY_EVERY = 60.0  # seconds between copies of the log to the bucket
_BUSY, _NO_BUCKET = 3, 4


def folder() -> Path:
    """Where a run keeps its files."""
    return Path.home() / "mmx-run"


def main(argv: list[str] | None = None) -> int:
    """Parses the arguments; the status of the program."""
    argv = sys.argv[1:] if argv is None else argv
    own, launcher = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = argparse.ArgumentParser(prog="mmx.pod.host")
    actions = parser.add_subparsers(dest="action", required=True)
    one = actions.add_parser("start")
    one.add_argument("--env", action="append", default=[])
    one.add_argument("--logs", default="")
    one = actions.add_parser("stop")
    one.add_argument("--kill", action="store_true")
    one.add_argument("--restarting", action="store_true")
    one = actions.add_parser("logs")
    one.add_argument("--lines", type=int, default=100)
    one.add_argument("--follow", action="store_true")
    actions.add_parser("status")
    actions.add_parser("supervise")
    flags = parser.parse_args(own)
    if flags.action == "start":
        return start(launcher, dict(pair.split("=", 1) for pair in flags.env), flags.logs)
    if flags.action == "stop":
        return stop(flags.kill, flags.restarting)
    if flags.action == "logs":
        follow = ["--follow"] if flags.follow else []
        os.execvp("tail", ["tail", f"--lines={flags.lines}", *follow, str(folder() / "log")])
    return status() if flags.action == "status" else supervise()


def start(launcher: list[str], environment: dict[str, str], logs: str) -> int:
    """Starts a supervisor that outlives this process and the ssh session around it."""
    if running := _alive():
        print(f"error: {_name()} already runs a launcher (process {running[0]}): stop it first", file=sys.stderr)
        return _BUSY
    folder().mkdir(exist_ok=True)
    try:
        launcher = mount_buckets(launcher)
    except OSError as error:
        print(f"error: {_name()}: {error}", file=sys.stderr)
        return _NO_BUCKET
    for name in ("exit", "stopped"):
        (folder() / name).unlink(missing_ok=True)
    attempt = _read("command.json").get("attempt", 0) + 1
    command = {
        "launcher": launcher[0],
        "arguments": launcher[1:],
        "environment": environment,
        "logs": logs,
        "attempt": attempt,
    }
    _write("command.json", command | {"started": time.time()})
    with (folder() / "log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mmx.pod.host", "supervise"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    _write("pids.json", {"supervisor": process.pid})
    print(json.dumps({"host": _name(), "started": process.pid, "attempt": attempt}))
    return 0


def supervise() -> int:
    """Runs the launcher, copies its log to the bucket and writes down how it ended."""
    command = _read("command.json")
    line = [sys.executable, "-u", "-m", f"launch.{command['launcher']}", *command["arguments"]]
    print(f"== {time.strftime('%F %T')} attempt {command['attempt']}: {shlex.join(line)}", flush=True)
    process = subprocess.Popen(line, stdin=subprocess.DEVNULL, env=os.environ | command["environment"])
    # A machine that goes down tells every process. The launcher takes a second SIGTERM as a wish to end without saving,
    # so it is not handed on; this process stays until the launcher is gone.
    signal.signal(signal.SIGTERM, lambda *_: None)
    # The start wrote this process's number; both are needed to see an orphan.
    _write("pids.json", {"supervisor": os.getpid(), "launcher": process.pid})
    copied = _Copies(command["logs"])
    while True:
        try:
            code = process.wait(timeout=COPY_EVERY)
            break
        except subprocess.TimeoutExpired:
            copied.copy()
    code = 128 - code if code < 0 else code
    print(f"== {time.strftime('%F %T')} ended with status {code}", flush=True)
    (folder() / "exit").write_text(str(code))
    copied.copy()
    return code


def stop(kill: bool, restarting: bool) -> int:
    """Asks the launcher to save and leave, or kills it; nobody wanted it to stop if it is only to start again."""
    alive = _alive()
    if alive:
        if not restarting:
            (folder() / "stopped").touch()
        pids = _read("pids.json")
        # The supervisor stays to write down the status; it goes first only when both are killed.
        targets = alive if kill else [pids.get("launcher", alive[0])]
        for pid in targets:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL if kill else signal.SIGTERM)
    print(json.dumps({"host": _name(), "stopping": alive}))
    return 0


def status() -> int:
    """Prints a line of JSON."""
    command = _read("command.json")
    code = folder() / "exit"
    about = {
        "host": _name(),
        "running": bool(_alive()),
        "exit": int(code.read_text()) if code.exists() else None,
        "stopped": (folder() / "stopped").exists(),
        "attempt": command.get("attempt"),
        "started": command.get("started"),
    }
    workdir = next((a.partition("=")[2] for a in command.get("arguments", []) if a.startswith("--workdir=")), "")
    if workdir:
        about["progress"] = dataclasses.asdict(read_progress(Path(workdir)))
    print(json.dumps(about))
    return 0


class _Copies:
    """Copies of the log in a bucket; a bucket that cannot be written must not end a run, and is named once."""

    def __init__(self, url: str):
        self._url, self._failed = url, False

    def copy(self) -> None:
        if not self._url:
            return
        target = f"{self._url.rstrip('/')}/{_name()}.log"
        command = ["gcloud", "storage", "cp", "--quiet", str(folder() / "log"), target]
        try:
            result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)
            problem = result.stderr.strip() if result.returncode else ""
        except (OSError, subprocess.TimeoutExpired) as error:
            problem = str(error)
        if problem and not self._failed:
            print(f"== the log could not be copied to {target}: {problem}", flush=True)
        self._failed = bool(problem)


def _name() -> str:
    return os.environ.get("MMX_HOST_NAME") or socket.gethostname()


def _read(name: str) -> dict:
    path = folder() / name
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def _write(name: str, values: dict) -> None:
    partial = folder() / f"{name}.partial"
    partial.write_text(json.dumps(values))
    partial.replace(folder() / name)


def _alive() -> list[int]:
    """Processes of the run that still are; numbers that others got since do not count."""
    if (folder() / "exit").exists():
        return []  # The supervisor may still be copying the log.
    alive = []
    for pid in _read("pids.json").values():
        with contextlib.suppress(OSError):
            stat, line = (Path(f"/proc/{pid}/{name}").read_bytes() for name in ("stat", "cmdline"))
            dead = stat.rpartition(b")")[2].split()[0] == b"Z"
            if not dead and (b"mmx.pod.host" in line or b"launch." in line):
                alive.append(pid)
    return alive


if __name__ == "__main__":
    sys.exit(main())
