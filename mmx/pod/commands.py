"""The gcloud commands, as lists of arguments. Nothing is run here."""

from __future__ import annotations

from mmx.pod.progress import TAIL
from mmx.pod.request import PodRequest

_QUEUED = ("gcloud", "compute", "tpus", "queued-resources")
_TPU_VM = ("gcloud", "compute", "tpus", "tpu-vm")
_SHOWN_BYTES = 1 << 14
_EVERYWHERE = ("--node=all", "--worker=all")


def create(pod: PodRequest) -> list[str]:
    """Asks for the pod."""
    command = [*_QUEUED, "create", pod.name, *_place(pod)]
    command += [f"--accelerator-type={pod.accelerator_type}", f"--runtime-version={pod.runtime_version}"]
    if pod.slices == 1:
        command.append(f"--node-id={pod.node(0)}")
    else:
        command += [f"--node-count={pod.slices}", f"--node-prefix={pod.name}"]
    if pod.capacity != "on-demand":
        command.append(f"--{pod.capacity}")
    for flag, value in (
        ("network", pod.network),
        ("subnetwork", pod.subnetwork),
        ("service-account", pod.service_account),
    ):
        if value:
            command.append(f"--{flag}={value}")
    if pod.connection != "external":
        command.append("--internal-ips")
    return command


def describe(pod: PodRequest) -> list[str]:
    """The queued resource as JSON."""
    return [*_QUEUED, "describe", pod.name, *_place(pod), "--format=json"]


def delete(pod: PodRequest) -> list[str]:
    """Deletes the queued resource and its slices; returns when they are gone."""
    return [*_QUEUED, "delete", pod.name, *_place(pod), "--force", "--quiet"]


def describe_accelerator(pod: PodRequest) -> list[str]:
    """Fails unless the zone has the accelerator type."""
    return [*_TPU_VM, "accelerator-types", "describe", pod.accelerator_type, *_place(pod)]


def describe_runtime(pod: PodRequest) -> list[str]:
    """Fails unless the zone has the runtime version."""
    return [*_TPU_VM, "versions", "describe", pod.runtime_version, *_place(pod)]


def copy_everywhere(pod: PodRequest, source: str, target: str) -> list[str]:
    """Copies a local file into the home directory of every host."""
    return [*_QUEUED, "scp", source, f"{pod.name}:{target}", *_place(pod), *_EVERYWHERE, *_route(pod)]


def ssh_everywhere(pod: PodRequest, command: str) -> list[str]:
    """Runs a shell command on every host; the status is the first that is not 0."""
    return [*_QUEUED, "ssh", pod.name, *_place(pod), *_EVERYWHERE, *_route(pod), f"--command={command}"]


def ssh_host(pod: PodRequest, node: int, worker: int, command: str) -> list[str]:
    """Runs a shell command on one host; the status is its."""
    pod.node(node)
    where = [f"--node={node}", f"--worker={worker}"]
    return [*_QUEUED, "ssh", pod.name, *_place(pod), *where, *_route(pod), f"--command={command}"]


def shell(pod: PodRequest, node: int, worker: int) -> list[str]:
    """Opens a shell on one host. Only the alpha version goes through Google's proxy."""
    gcloud, *group = _TPU_VM
    group = ["alpha", *group] if pod.connection == "iap" else group
    return [gcloud, *group, "ssh", pod.node(node), *_place(pod), f"--worker={worker}", *_route(pod)]


def storage_tail(url: str) -> list[str]:
    """The end of an object."""
    return ["gcloud", "storage", "cat", url, f"--range=-{TAIL}"]


def storage_list(url: str) -> list[str]:
    """Names of what lies in a folder, a line each."""
    return ["gcloud", "storage", "ls", url]


def storage_tails(pattern: str) -> list[str]:
    """The end of each object that matches, with its URL above."""
    return ["gcloud", "storage", "cat", pattern, "--display-url", f"--range=-{_SHOWN_BYTES}"]


def _place(pod: PodRequest) -> list[str]:
    return [f"--zone={pod.zone}", *([f"--project={pod.project}"] if pod.project else [])]


def _route(pod: PodRequest) -> list[str]:
    return {"external": [], "internal": ["--internal-ip"], "iap": ["--tunnel-through-iap"]}[pod.connection]
