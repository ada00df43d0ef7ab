"""Running commands, or only printing them: what gcloud answers, and what to do when it says no."""

from __future__ import annotations

import collections
import json
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from mmx.config import ConfigError

# What gcloud says (the first that matches counts), and what helps.
_ADVICE = (
    (
        r"do not currently have an active account|reauthentication|invalid_grant|default credentials",
        "log in with: gcloud auth login",
    ),
    (r"property \[core/project\]|project.* is not set", "name a project with --project, or: gcloud config set project"),
    (
        r"SERVICE_DISABLED|API has not been used|it is disabled",
        "switch the API on with: gcloud services enable tpu.googleapis.com",
    ),
    (
        r"unrecognized arguments|Invalid choice",
        "this gcloud does not know the command: bring it up to date with gcloud components update",
    ),
    (
        r"PERMISSION_DENIED|does not have .*permission|forbidden",
        "ask for the role roles/tpu.admin on the project (and iam.serviceAccountUser for a service account)",
    ),
    (
        r"ALREADY_EXISTS|already exists",
        "a queued resource of this name exists: go on with resume, or delete it first",
    ),
    (
        r"NOT_FOUND|was not found|could not be found",
        "check --name, --zone and --project; create makes a new one",
    ),
    (
        r"no more capacity|stockout|Insufficient .*capacity",
        "the zone has no room now: try another zone or size, or wait in the queue",
    ),
    (
        r"RESOURCE_EXHAUSTED|quota",
        "ask for more quota, or delete queued resources that no longer run: suspended and failed ones count too",
    ),
    (
        r"SSH Key is not present in the SSH agent",
        "hand gcloud's key to the agent: ssh-add ~/.ssh/google_compute_engine",
    ),
    (
        r"terminal state|cannot be currently connected to",
        "the slice is gone or going: launch.pod resume waits for it or makes a new one",
    ),
    (
        r"connection (timed out|refused)|\[/usr/bin/ssh\] exited|IAP tunneling",
        "hosts cannot be reached: check the firewall (tcp:22), the ssh key, and --connection",
    ),
)
_KEPT_LINES = 40


def quoted(command: Sequence[str]) -> str:
    """A command for a shell; a flag's value is quoted alone, which reads better than the whole flag."""
    words = []
    for word in command:
        flag, is_flag, value = word.partition("=")
        words.append(
            f"{flag}={shlex.quote(value)}" if is_flag and re.fullmatch(r"--[\w-]+", flag) else shlex.quote(word)
        )
    return " ".join(words)


class GcloudError(ConfigError):
    """A command failed; the message has gcloud's own words and what helps."""

    def __init__(self, command: Sequence[str], status: int, words: str, printed: str):
        """``words`` is what it wrote to stderr, ``printed`` what it managed to print before."""
        self.status, self.words, self.printed = status, words.strip(), printed
        advice = next((text for pattern, text in _ADVICE if re.search(pattern, words, re.IGNORECASE)), "")
        said = "; ".join(_essence(self.words)) or "it said nothing"
        super().__init__(
            f"{quoted(command[:5])} ended with status {status}: {said}" + (f" -- {advice}" if advice else "")
        )


class Runner(Protocol):
    """Runs commands, or pretends to."""

    dry: bool

    def ask(self, command: Sequence[str]) -> str:
        """Runs a command and returns what it prints. Raises GcloudError."""

    def run(self, command: Sequence[str]) -> str:
        """The same, and shows the output as it comes."""

    def attach(self, command: Sequence[str]) -> int:
        """Hands the terminal over to a command; its status."""


class Shell:
    """Really runs them."""

    dry = False

    def ask(self, command: Sequence[str]) -> str:
        """Runs quietly."""
        _require(command[0])
        result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
        if result.returncode:
            raise GcloudError(command, result.returncode, result.stderr, result.stdout)
        return result.stdout

    def run(self, command: Sequence[str]) -> str:
        """Runs and shows both streams line by line."""
        _require(command[0])
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        out: list[str] = []
        words: collections.deque[str] = collections.deque(maxlen=_KEPT_LINES)
        threads = [
            threading.Thread(target=_show, args=(process.stdout, sys.stdout, out.append)),
            threading.Thread(target=_show, args=(process.stderr, sys.stderr, words.append)),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if status := process.wait():
            raise GcloudError(command, status, "".join(words), "".join(out))
        return "".join(out)

    def attach(self, command: Sequence[str]) -> int:
        """Shares this terminal."""
        _require(command[0])
        return subprocess.run(command).returncode


class DryRun:
    """Prints them, each a line that can be pasted, and runs none."""

    dry = True

    def __init__(self, states: Sequence[str], write: Callable[[str], None] = print):
        """``states``: of the queued resource, one for each time it is asked for; the last one stays."""
        self._states, self._write = list(states), write

    def ask(self, command: Sequence[str]) -> str:
        """Prints it; questions for the state are answered."""
        self._write(quoted(command))
        if "queued-resources" not in command or "describe" not in command:
            return ""
        state = self._states.pop(0) if len(self._states) > 1 else self._states[0]
        return json.dumps({"state": {"state": state}})

    def run(self, command: Sequence[str]) -> str:
        """Prints it."""
        self._write(quoted(command))
        return ""

    def attach(self, command: Sequence[str]) -> int:
        """Prints it."""
        self._write(quoted(command))
        return 0


def _require(program: str) -> None:
    if shutil.which(program) is None:
        where = ": install the Google Cloud CLI (cloud.google.com/sdk/docs/install)" if program == "gcloud" else ""
        raise ConfigError(f"{program} is not on PATH{where}")


def _show(pipe, stream, keep: Callable[[str], None]) -> None:
    for line in pipe:
        stream.write(line)
        stream.flush()
        keep(line)


def _essence(words: str) -> list[str]:
    """The lines of stderr that matter: those from the first error on, or the last few."""
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    first = next((i for i, line in enumerate(lines) if line.startswith("ERROR")), max(len(lines) - 3, 0))
    return lines[first : first + 6]
