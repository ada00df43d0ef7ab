"""The states of a queued resource, as ``describe`` reports them, and what each means for a run."""

from __future__ import annotations

import dataclasses
import enum
import json

from mmx.pod import commands
from mmx.pod.gcloud import GcloudError, Runner
from mmx.pod.request import PodRequest


class Phase(enum.Enum):
    """What can be done with a pod."""

    ABSENT = "absent"  # There is none: create it.
    WAITING = "waiting"  # In the queue, or being set up by Google.
    READY = "ready"
    LEAVING = "leaving"  # Being taken away or deleted: wait.
    GONE = "gone"  # Only its name is left, which has to be deleted before it can be created again.


_PHASES = {
    "CREATING": Phase.WAITING,
    "ACCEPTED": Phase.WAITING,  # The older name of the next.
    "WAITING_FOR_RESOURCES": Phase.WAITING,
    "PROVISIONING": Phase.WAITING,
    "ACTIVE": Phase.READY,
    "SUSPENDING": Phase.LEAVING,
    "DELETING": Phase.LEAVING,
    "SUSPENDED": Phase.GONE,
    "FAILED": Phase.GONE,
}


@dataclasses.dataclass(frozen=True)
class State:
    """A state by name, with Google's reason where it gave one."""

    name: str
    phase: Phase
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})" if self.reason else self.name


ABSENT = State("ABSENT", Phase.ABSENT)


def ask_state(pod: PodRequest, runner: Runner) -> State:
    """Asks gcloud.

    Raises:
      GcloudError: if it cannot tell.
    """
    try:
        return parse_state(runner.ask(commands.describe(pod)))
    except GcloudError as error:
        if "NOT_FOUND" in error.words:
            return ABSENT
        raise


def parse_state(described: str) -> State:
    """Reads what ``describe --format=json`` printed; a state that is not known counts as waiting."""
    state = json.loads(described).get("state", {})
    name = state.get("state", "STATE_UNSPECIFIED")
    error = state.get("failedData", {}).get("error", {}).get("message", "")
    initiator = {"SERVICE": "by Google", "USER": "by its user"}.get(state.get("stateInitiator", ""), "")
    return State(name, _PHASES.get(name, Phase.WAITING), error or (initiator if name.startswith("SUSPEND") else ""))
