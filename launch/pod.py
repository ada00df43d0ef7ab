"""Rents a TPU pod through gcloud, runs a launcher on all of its hosts, and brings it back after a preemption.

  python -m launch.pod create --name=moe --zone=us-east5-a --accelerator_type=v5p-1024 --slices=2 --spot
  python -m launch.pod setup --name=moe
  python -m launch.pod run --name=moe -- pretrain --config=configs/minimax_text_01.py --workdir=gs://bucket/moe
  python -m launch.pod status --name=moe
  python -m launch.pod logs --name=moe --slice=0 --worker=3 --follow
  python -m launch.pod resume --name=moe --watch
  python -m launch.pod ssh --name=moe          (a shell on one host)
  python -m launch.pod ssh --name=moe -- nproc (a command on all)
  python -m launch.pod stop --name=moe         (saves and leaves)
  python -m launch.pod delete --name=moe

--dry_run prints every command, quoted for a shell, and runs none. What was asked for is kept in runs/pods/NAME.json, so
that later commands need the name alone; with the flags of create (and, for resume, the launcher) they need no file.
"""

import re
import sys
from pathlib import Path

from absl import flags

from launch import program
from mmx.config import ConfigError, nearest

ACTIONS = ("create", "setup", "run", "status", "logs", "ssh", "stop", "resume", "delete")

_NAME = flags.DEFINE_string("name", None, "Name of the pod.")
# Fields of the request.
_FIELDS = {
    "zone": flags.DEFINE_string("zone", None, "Zone, as in us-east5-a."),
    "accelerator_type": flags.DEFINE_string(
        "accelerator_type", None, "A slice: v5p-N and v4-N count TensorCores, v6e-N and v5litepod-N chips."
    ),
    "runtime_version": flags.DEFINE_string("runtime_version", None, "Software of the hosts; the generation's own."),
    "project": flags.DEFINE_string("project", None, "Google Cloud project; gcloud's own if not given."),
    "slices": flags.DEFINE_integer("slices", None, "Slices, joined over the data centre's network; 1 by default."),
    "network": flags.DEFINE_string("network", None, "VPC network."),
    "subnetwork": flags.DEFINE_string("subnetwork", None, "Its subnetwork."),
    "service_account": flags.DEFINE_string("service_account", None, "Account that the hosts act as."),
    "connection": flags.DEFINE_enum(
        "connection",
        None,
        ["external", "internal", "iap"],
        "How hosts are reached: their external addresses (default), internal ones, or Google's proxy. The last two "
        "create hosts without external addresses.",
    ),
}
_SPOT = flags.DEFINE_bool("spot", False, "create: capacity that may be taken away at any time.")
_RESERVED = flags.DEFINE_bool("reserved", False, "create: capacity of the project's reservation.")
_WAIT = flags.DEFINE_bool("wait", True, "create: return when the pod is ready, not when it is in the queue.")
_EXTRAS = flags.DEFINE_string("extras", "tpu", "setup, resume: extras of mmx to install, as in tpu,data.")
_ENV = flags.DEFINE_multi_string("env", [], "run: NAME=VALUE for the launcher's environment.")
_LOGS = flags.DEFINE_string("logs", "", "run: folder of a bucket that gets every host's log, as in gs://bucket/logs.")
_SLICE = flags.DEFINE_integer("slice", 0, "logs, ssh: which slice.")
_WORKER = flags.DEFINE_integer("worker", 0, "logs, ssh: which host of it.")
_LINES = flags.DEFINE_integer("lines", 100, "logs: how many of the last lines.", lower_bound=1)
_FOLLOW = flags.DEFINE_bool("follow", False, "logs: go on showing what is added.")
_KILL = flags.DEFINE_bool("kill", False, "stop: end processes at once, without saving.")
_WATCH = flags.DEFINE_bool("watch", False, "resume: keep looking, and resume whenever needed, until the run is over.")
_FAILURES = flags.DEFINE_integer(
    "failures", 3, "resume --watch: give up after this many failures in a row without progress.", lower_bound=1
)
_POLL = flags.DEFINE_float("poll", 30.0, "Seconds between two looks at the pod.", lower_bound=0.01)
_RECORDS = flags.DEFINE_string("records", "runs/pods", "Folder of the files that remember what was asked for.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the commands and run none.")


def run(arguments: list[str]) -> int:
    """Does what the first argument says; its status, 130 after Ctrl-C, which leaves the pod as it is."""
    try:
        return _act(arguments)
    except KeyboardInterrupt:
        print("left; the pod and what runs on it stay as they are", file=sys.stderr)
        return 130


def _act(arguments: list[str]) -> int:
    from mmx.pod.control import Pod
    from mmx.pod.gcloud import DryRun, Shell
    from mmx.pod.record import Record
    from mmx.pod.watch import Watch

    if not arguments or arguments[0] not in ACTIONS:
        given = f"{arguments[0]!r} is no action{nearest(arguments[0], ACTIONS)}" if arguments else "no action is given"
        raise ConfigError(f"{given}; write one of {', '.join(ACTIONS)} first, as in python -m launch.pod status")
    action, *rest = arguments
    if rest and action not in ("run", "resume", "ssh"):
        raise ConfigError(f"{action} takes no argument {rest[0]!r}: write flags as --name=value")
    if _NAME.value is None:
        raise ConfigError("--name is missing: give the pod a name, as in --name=moe")
    record = Record(Path(_RECORDS.value), _NAME.value)
    # Resuming is shown from the state that calls for it.
    runner = DryRun(["SUSPENDED", "ACTIVE"] if action == "resume" else ["ACTIVE"]) if _DRY_RUN.value else Shell()
    pod = Pod(record.request(_given()), record, runner, _POLL.value)
    if action == "create":
        pod.create(_WAIT.value)
    elif action == "setup":
        pod.setup(_EXTRAS.value)
    elif action == "run":
        pod.run(_launch(rest))
    elif action == "status":
        return pod.status()
    elif action == "logs":
        return pod.logs(_SLICE.value, _WORKER.value, _LINES.value, _FOLLOW.value)
    elif action == "ssh":
        return pod.ssh(_SLICE.value, _WORKER.value, rest)
    elif action == "stop":
        pod.stop(_KILL.value)
    elif action == "delete":
        pod.delete()
    else:
        launch = _launch(rest) if rest else record.launch()
        if _WATCH.value and not _DRY_RUN.value:
            return Watch(pod, launch, _EXTRAS.value, _FAILURES.value, _POLL.value, print).to_end()
        pod.resume(launch, _EXTRAS.value)
    return 0


def _given() -> dict[str, str | int]:
    """Fields of the request that flags gave."""
    if _SPOT.value and _RESERVED.value:
        raise ConfigError("--spot and --reserved exclude each other: the reservation's capacity is not taken away")
    given = {name: flag.value for name, flag in _FIELDS.items() if flag.value is not None}
    if _SPOT.value or _RESERVED.value:
        given["capacity"] = "spot" if _SPOT.value else "reserved"
    return given


def _launch(arguments: list[str]):
    """The launcher and its flags, made fit for a pod."""
    from mmx.pod.record import Launch

    known = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in _NOT_ON_PODS)
    if not arguments or arguments[0] not in known:
        given = f"{arguments[0]!r} is no launcher" if arguments else "no launcher is given"
        raise ConfigError(
            f"{given}: write it behind two dashes, as in -- pretrain --config=FILE (there are {', '.join(known)})"
        )
    launcher, *rest = arguments
    # Launchers that run on a mesh have this flag; the source says so without starting JAX.
    source = Path(__file__).with_name(f"{launcher}.py").read_text()
    if re.search(r'DEFINE_bool\(\s*"distributed"', source) and "--distributed" not in rest:
        rest.append("--distributed")
    return Launch(launcher, tuple(rest), tuple(_ENV.value), _LOGS.value)


_NOT_ON_PODS = ("__init__", "local", "pod", "program")


if __name__ == "__main__":
    # Flags may stand behind the action.
    flags.FLAGS.set_gnu_getopt()
    program.main(run, takes_arguments=True)
