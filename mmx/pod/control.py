"""A pod from its creation to its end: each method is an action of launch.pod."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import time
from collections.abc import Callable

from mmx.config import ConfigError
from mmx.pod import commands, install
from mmx.pod.gcloud import GcloudError, Runner
from mmx.pod.hosts import Condition, Hosts, parse_answers
from mmx.pod.progress import Progress, read_checkpoints, read_config, read_metrics_tail, show_seconds
from mmx.pod.record import Launch, Record
from mmx.pod.request import PodRequest
from mmx.pod.states import Phase, State, ask_state


@dataclasses.dataclass(frozen=True)
class Look:
    """One look at a pod and its run; ``hosts`` is None where none could be asked."""

    state: State
    hosts: Hosts | None
    progress: Progress

    @property
    def condition(self) -> Condition | None:
        """How the run is, if its hosts could say."""
        return None if self.hosts is None else self.hosts.condition(self.progress)


class NotComing(ConfigError):
    """A pod that was waited for and will not be there."""

    def __init__(self, name: str, state: State):
        self.state = state
        super().__init__(f"{name} is {state}: {_REMEDY[state.phase]}")


class Incomplete(ConfigError):
    """Something that all hosts had to do was done by some."""


class Pod:
    """One pod."""

    def __init__(
        self, request: PodRequest, record: Record, runner: Runner, poll: float, say: Callable[[str], None] = print
    ):
        """``poll``: seconds between two looks."""
        self._request, self._record, self._runner, self._poll, self._say = request, record, runner, poll, say

    def create(self, wait: bool) -> None:
        """Puts the request into the queue, and waits until the pod is there if ``wait``.

        Raises:
          ConfigError: if gcloud refuses it, or it failed in the queue.
        """
        self._check()
        known = self._record.exists
        if not self._runner.dry:
            # Before the request: if this program dies in between, delete still finds what to delete.
            self._record.save(self._request)
        try:
            self._runner.run(commands.create(self._request))
        except GcloudError:
            if not known:
                self._record.forget()
            raise
        self._announce(f"{self._request.name} is in the queue: {self._request}, {self._request.hosts} hosts")
        if wait:
            self.wait()

    def wait(self) -> None:
        """Returns when the pod is ready.

        Raises:
          ConfigError: if it will not be: it failed, was taken away, or does not exist.
        """
        self._comment("again until the state is ACTIVE")
        last = None
        while (state := ask_state(self._request, self._runner)).phase is Phase.WAITING:
            if state != last:
                self._announce(f"{state}: waiting (Ctrl-C leaves the request in the queue)")
                last = state
            time.sleep(self._poll)
        if state.phase is not Phase.READY:
            raise NotComing(self._request.name, state)

    def setup(self, extras: str) -> None:
        """Packs this checkout and installs it on every host."""
        self.wait()
        self._pack()
        self._install(extras)

    def _pack(self) -> None:
        if not self._runner.dry:
            self._record.archive.parent.mkdir(parents=True, exist_ok=True)
        self._runner.run(install.pack(str(self._record.archive)))

    def _install(self, extras: str) -> None:
        self._runner.run(install.ship(self._request, str(self._record.archive)))
        self._on_all(install.install(self._request, extras), "installed", quiet=False)

    def run(self, launch: Launch) -> None:
        """Starts a launcher on every host and leaves it running.

        Raises:
          ConfigError: if one is running already, or the launcher could not be started.
        """
        logs = [f"--logs={launch.logs}"] if launch.logs else []
        start = install.on_host(
            "start", *[f"--env={pair}" for pair in launch.environment], *logs, "--", launch.launcher, *launch.arguments
        )
        if not self._runner.dry:
            self._record.save(self._request, launch)
        self._on_all(commands.ssh_everywhere(self._request, start), "started")

    def look(self) -> Look:
        """The state of the pod and of its run. A pod that is away still has the progress in a bucket."""
        state = ask_state(self._request, self._runner)
        hosts = self._ask_hosts() if state.phase is Phase.READY else None
        return Look(state, hosts, hosts.progress() if hosts else self._progress_in_bucket())

    def status(self) -> int:
        """Prints a look; 0 unless the run failed."""
        look = self.look()
        if self._runner.dry:
            return 0
        self._say(f"{self._request.name}: {look.state}, {self._request}")
        if look.hosts is None:
            self._say(
                "run: no host can be asked" + (_ADVICE_AWAY if look.state.phase is not Phase.READY else _ADVICE_SSH)
            )
        else:
            for line in _describe(look, self._request.hosts):
                self._say(line)
        if look.progress != Progress():
            self._say(str(look.progress))
        return 1 if look.condition is Condition.FAILED else 0

    def logs(self, node: int, worker: int, lines: int, follow: bool) -> int:
        """Shows a host's log on this terminal, or the end of all hosts' logs from the bucket if the pod is away.

        Returns:
          The status of the command that shows them.
        """
        copies = self._record.launch().logs if self._record.has_launch() else ""
        if copies and ask_state(self._request, self._runner).phase is not Phase.READY:
            return self._runner.attach(commands.storage_tails(f"{copies}/*.log"))
        rest = ["--follow"] if follow else []
        command = install.on_host("logs", f"--lines={lines}", *rest)
        return self._runner.attach(commands.ssh_host(self._request, node, worker, command))

    def ssh(self, node: int, worker: int, command: list[str]) -> int:
        """Opens a shell on a host, or runs a command on all of them."""
        if command:
            self._runner.run(commands.ssh_everywhere(self._request, shlex.join(command)))
            return 0
        return self._runner.attach(commands.shell(self._request, node, worker))

    def stop(self, kill: bool) -> None:
        """Asks the launcher on every host to save and leave."""
        self._on_all(
            commands.ssh_everywhere(self._request, install.on_host("stop", *(["--kill"] if kill else []))), "stopping"
        )

    def delete(self) -> None:
        """Deletes the pod with all its slices, whatever state it is in."""
        try:
            self._runner.run(commands.delete(self._request))
        except GcloudError as error:
            if "NOT_FOUND" not in error.words:
                raise
            self._say(f"{self._request.name} was deleted already")
        if not self._runner.dry:
            self._record.forget()

    def recreate(self, state: State) -> None:
        """From whatever is left of a pod, in this state, to one that is ready."""
        while state.phase is Phase.LEAVING:
            time.sleep(self._poll)
            state = ask_state(self._request, self._runner)
        if state.phase is Phase.GONE:
            self._announce(f"{self._request.name} is {state}: making a new one")
            self._runner.run(commands.delete(self._request))
        if state.phase in (Phase.GONE, Phase.ABSENT):
            self._runner.run(commands.create(self._request))
        self.wait()

    def resume(self, launch: Launch, extras: str) -> None:
        """Makes the run go on, on this pod or a new one, with the checkout that setup packed; leaves it alone if it is
        going, ending or over.

        Raises:
          ConfigError: if gcloud refuses something, or the new pod is not coming.
        """
        look = self.look()
        if look.hosts is not None:
            if look.condition in (Condition.RUNNING, Condition.ENDING, Condition.FINISHED):
                self._announce(f"{look.condition.value}: {look.progress}")
                return
            if look.condition is Condition.PARTIAL:
                self._announce(
                    f"{look.condition.value} ({look.hosts.running} of {self._request.hosts}): starting again"
                )
                with contextlib.suppress(GcloudError, Incomplete):  # A host that was replaced has nothing to end.
                    self._on_all(
                        commands.ssh_everywhere(self._request, install.on_host("stop", "--kill", "--restarting")),
                        "stopping",
                    )
            if len(look.hosts.answers) == self._request.hosts:
                self.run(launch)
                return
        self.recreate(look.state)
        if not self._record.archive.exists():
            self._pack()
        # A host that Google replaced has an empty disk, and one that was set up before is done in seconds.
        self._install(extras)
        self.run(launch)

    def _check(self) -> None:
        """Asks gcloud about what the table does not have."""
        if not self._request.zone_is_documented:
            self._verify(commands.describe_accelerator(self._request), self._request.accelerator.family.zones)
        if not self._request.runtime_is_documented:
            self._verify(commands.describe_runtime(self._request), (self._request.accelerator.family.runtime_version,))

    def _verify(self, command: list[str], documented: tuple[str, ...]) -> None:
        family = self._request.accelerator.family.name
        try:
            self._runner.ask(command)
        except GcloudError as error:
            raise ConfigError(f"{error} (documented for {family}: {', '.join(documented)})") from None

    def _ask_hosts(self) -> Hosts | None:
        try:
            printed = self._runner.ask(commands.ssh_everywhere(self._request, install.on_host("status")))
        except GcloudError as error:
            printed = error.printed  # Of the hosts that could be asked.
        answers = parse_answers(printed, "running")
        return Hosts(answers, self._request.hosts) if answers else None

    def _on_all(self, command: list[str], done: str, quiet: bool = True) -> None:
        """Runs a command on every host and counts: gcloud leaves out hosts that it cannot reach, and ends with 0."""
        printed = self._runner.ask(command) if quiet else self._runner.run(command)
        if self._runner.dry:
            return
        count = len(parse_answers(printed, done))
        if count < self._request.hosts:
            raise Incomplete(f"{self._request.name}: {done} on {count} of {self._request.hosts} hosts only: see status")
        self._say(f"{self._request.name}: {done} on {count} hosts")

    def _progress_in_bucket(self) -> Progress:
        """What a pod that is away has left where its workdir lies in a bucket."""
        workdir = self._record.launch().workdir.rstrip("/") if self._record.has_launch() else ""
        progress = Progress()
        if workdir.startswith("gs://"):
            for name, read in (("config.json", read_config), ("metrics.jsonl", read_metrics_tail)):
                with contextlib.suppress(GcloudError):  # It is not there yet.
                    read(self._runner.ask(commands.storage_tail(f"{workdir}/{name}")), progress)
            with contextlib.suppress(GcloudError):
                read_checkpoints(self._runner.ask(commands.storage_list(f"{workdir}/checkpoints/")), progress)
        return progress

    def _announce(self, message: str) -> None:
        if not self._runner.dry:
            self._say(message)

    def _comment(self, message: str) -> None:
        if self._runner.dry:
            self._say(f"# {message}")


_REMEDY = {
    Phase.ABSENT: "make it with create",
    Phase.GONE: "launch.pod resume makes a new one (or delete it and create again)",
    Phase.LEAVING: "wait until it is gone, or launch.pod resume",
}
_ADVICE_AWAY = ": the pod is not there"
_ADVICE_SSH = ": not set up yet (setup), or ssh does not get through (launch.pod ssh shows why)"


def _describe(look: Look, expected: int) -> list[str]:
    hosts = look.hosts
    parts = [f"run: {look.condition.value}"]
    if look.condition in (Condition.RUNNING, Condition.PARTIAL):
        parts.append(f"on {hosts.running} of {expected} hosts")
    if hosts.attempt:
        parts.append(f"attempt {hosts.attempt}, {show_seconds(time.time() - (hosts.started or 0))} ago")
    return [", ".join(parts), *hosts.failures()[:8]]
