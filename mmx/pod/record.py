"""What was asked for, kept in a file: later commands need only the pod's name, and resume knows what to repeat."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from mmx.config import ConfigError, from_dict
from mmx.pod.request import PodRequest


@dataclasses.dataclass(frozen=True)
class Launch:
    """A launcher, as ``run`` was told to start it."""

    launcher: str
    arguments: tuple[str, ...]
    environment: tuple[str, ...] = ()  # NAME=VALUE
    logs: str = ""  # folder of a bucket that gets the hosts' logs; in the workdir where that lies in a bucket

    def __post_init__(self):
        for pair in self.environment:
            if not re.fullmatch(r"[A-Za-z_]\w*=.*", pair, re.DOTALL):
                raise ConfigError(f"--env={pair}: write NAME=VALUE")
        if self.logs and not self.logs.startswith("gs://"):
            raise ConfigError(f"--logs={self.logs}: write a folder of a bucket, as in gs://bucket/logs")
        if self.workdir and not self.workdir.startswith(("/", "gs://")):
            raise ConfigError(
                f"--workdir={self.workdir}: write a folder of a bucket (gs://...) or an absolute path that every host "
                "sees; setup replaces the checkout, and what lies in it"
            )
        if not self.logs and self.workdir.startswith("gs://"):
            object.__setattr__(self, "logs", f"{self.workdir.rstrip('/')}/logs")

    @property
    def workdir(self) -> str:
        """Its workdir, or empty."""
        return next((a.partition("=")[2] for a in self.arguments if a.startswith("--workdir=")), "")


class Record:
    """A JSON file of a pod: its request and what it runs."""

    def __init__(self, folder: Path, name: str):
        self.path = folder / f"{name}.json"
        # The checkout as setup packed it: a run that goes on elsewhere goes on with the code that it began with.
        self.archive = folder / f"{name}.tar.gz"
        self._name = name

    @property
    def exists(self) -> bool:
        """Whether the pod was asked for."""
        return self.path.exists()

    def request(self, given: dict[str, Any]) -> PodRequest:
        """The request that is on record, or that flags describe.

        Args:
          given: fields of PodRequest that flags gave.

        Raises:
          ConfigError: if the two contradict each other, or neither is complete.
        """
        known = self._read().get("pod", {})
        for field, value in given.items():
            if field in known and known[field] != value:
                raise ConfigError(
                    f"--{field}={value} contradicts {self.path}, where {self._name} has {known[field]!r}: leave the "
                    "flag out, or delete the pod first"
                )
        fields = {"name": self._name} | known | given
        for field in ("zone", "accelerator_type"):
            if field not in fields:
                raise ConfigError(f"--{field} is missing: there is no record of {self._name} in {self.path}")
        return from_dict(fields, PodRequest)

    def launch(self) -> Launch:
        """What runs on it.

        Raises:
          ConfigError: if nothing was started yet.
        """
        known = self._read().get("run")
        if known is None:
            raise ConfigError(f"{self.path} knows of no run: start one with run")
        return from_dict(known, Launch)

    def has_launch(self) -> bool:
        """Whether anything was started."""
        return "run" in self._read()

    def save(self, pod: PodRequest, launch: Launch | None = None) -> None:
        """Writes both; None keeps the run that is on record."""
        values = self._read() | {"pod": dataclasses.asdict(pod)}
        if launch is not None:
            values["run"] = dataclasses.asdict(launch)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(values, indent=2) + "\n")
        partial.replace(self.path)

    def forget(self) -> None:
        """Removes the file, and the checkout beside it."""
        self.path.unlink(missing_ok=True)
        self.archive.unlink(missing_ok=True)

    def _read(self) -> dict[str, Any]:
        if not self.path.exists():
            return {}
        try:
            return json.loads(self.path.read_text())
        except json.JSONDecodeError:
            raise ConfigError(f"{self.path} is no JSON: mend or remove it") from None
