"""What to rent: the queued resource that a pod is, checked before anything is asked of gcloud."""

from __future__ import annotations

import dataclasses
import re

from mmx.config import ConfigError
from mmx.pod.accelerators import Accelerator, check_runtime_version, find_accelerator

CAPACITIES = ("on-demand", "spot", "reserved")
# How hosts are reached: over their external addresses, internal ones (from the same network), or Google's proxy.
CONNECTIONS = ("external", "internal", "iap")

_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_LONGEST_NAME = 61  # Leaves room for the number of a slice in the 63 characters of a node's name, for up to 10.
_ZONE = re.compile(r"[a-z]+-[a-z]+\d+-([a-z]|ai\d+[a-z]?)")
_PROJECT = re.compile(r"([a-z0-9.-]+:)?[a-z][-a-z0-9]{4,28}[a-z0-9]")


@dataclasses.dataclass(frozen=True)
class PodRequest:
    """A queued resource. Empty strings leave the choice to gcloud.

    Raises:
      ConfigError: for anything that cannot be; the message says what to write.
    """

    name: str
    zone: str
    accelerator_type: str
    runtime_version: str = ""  # of the generation, if empty
    project: str = ""
    slices: int = 1
    capacity: str = "on-demand"
    network: str = ""
    subnetwork: str = ""
    service_account: str = ""
    connection: str = "external"

    def __post_init__(self):
        if not _NAME.fullmatch(self.name) or len(self.name) > _LONGEST_NAME:
            raise ConfigError(
                f"name {self.name!r}: use lower-case letters, digits and dashes, a letter first and no dash last, "
                f"at most {_LONGEST_NAME} characters"
            )
        if not _ZONE.fullmatch(self.zone):
            raise ConfigError(f"zone {self.zone!r}: write a zone such as us-east5-a (a region and a letter)")
        if self.project and not _PROJECT.fullmatch(self.project):
            raise ConfigError(f"project {self.project!r} is no project ID: see gcloud projects list")
        family = self.accelerator.family
        if not self.runtime_version:
            object.__setattr__(self, "runtime_version", family.runtime_version)
        check_runtime_version(self.runtime_version, family)
        if self.slices < 1:
            raise ConfigError(f"slices={self.slices}: at least 1")
        for field, choices in (("capacity", CAPACITIES), ("connection", CONNECTIONS)):
            if getattr(self, field) not in choices:
                raise ConfigError(f"{field} {getattr(self, field)!r}: one of {', '.join(choices)}")

    @property
    def accelerator(self) -> Accelerator:
        """A slice."""
        return find_accelerator(self.accelerator_type)

    @property
    def hosts(self) -> int:
        """Hosts of all slices."""
        return self.slices * self.accelerator.hosts

    @property
    def zone_is_documented(self) -> bool:
        """Whether the table has the generation in this zone; Google opens zones more often than we read."""
        return self.zone in self.accelerator.family.zones

    @property
    def runtime_is_documented(self) -> bool:
        """Whether the runtime version is the one documented for the generation."""
        return check_runtime_version(self.runtime_version, self.accelerator.family)

    def node(self, index: int) -> str:
        """The name of a slice.

        Raises:
          ConfigError: if there is no such slice.
        """
        if not 0 <= index < self.slices:
            raise ConfigError(f"slice {index}: {self.name} has {self.slices}, counted from 0")
        return self.name if self.slices == 1 else f"{self.name}-{index}"

    def __str__(self) -> str:
        size = self.accelerator_type if self.slices == 1 else f"{self.slices} x {self.accelerator_type}"
        return f"{size} in {self.zone}, {self.capacity}"
