"""Commands against gcloud's documentation, quoting, and what its messages are answered with."""

import itertools
import shlex

import pytest

from mmx.pod import commands, install
from mmx.pod.gcloud import DryRun, GcloudError, Shell, quoted
from mmx.pod.request import CAPACITIES, CONNECTIONS, PodRequest
from tests.mmx.pod.cloud import load_double


def all_commands(pod: PodRequest) -> list[list[str]]:
    return [
        commands.create(pod),
        commands.describe(pod),
        commands.delete(pod),
        commands.describe_accelerator(pod),
        commands.describe_runtime(pod),
        commands.ssh_host(pod, 0, 1, "nproc"),
        commands.shell(pod, 0, 1),
        commands.storage_tail("gs://mine/run/metrics.jsonl"),
        commands.storage_tails("gs://mine/run/logs/*.log"),
        commands.storage_list("gs://mine/run/checkpoints/"),
        install.ship(pod, "/tmp/a.tar.gz"),
        install.install(pod, "tpu"),
        commands.ssh_everywhere(pod, install.on_host("start", "--", "pretrain", "--config=a b")),
    ]


@pytest.mark.parametrize(("capacity", "connection", "slices"), list(itertools.product(CAPACITIES, CONNECTIONS, (1, 2))))
def test_documented_flags_alone(capacity, connection, slices):
    more = {"project": "my-project", "network": "n", "subnetwork": "s", "service_account": "a@b"}
    pod = PodRequest("moe", "us-east5-a", "v5p-16", slices=slices, capacity=capacity, connection=connection, **more)
    parse = load_double().parse
    for command in all_commands(pod):
        assert command[0] == "gcloud"
        group, flags, _ = parse(command[1:])
        if group.startswith("compute"):
            assert flags["--zone"] == "us-east5-a"
            assert flags["--project"] == "my-project"
    _, flags, _ = parse(commands.create(pod)[1:])
    assert ("--spot" in flags, "--reserved" in flags) == (capacity == "spot", capacity == "reserved")
    assert flags.get("--node-count", "1") == str(slices)
    assert ("--internal-ips" in flags) == (connection != "external")


@pytest.mark.parametrize("command", [["--frobnicate"], ["--zone"], ["--spot=yes"], []])
def test_double_refuses_what_is_not_documented(command, capsys):
    with pytest.raises(SystemExit) as end:
        load_double().parse(["compute", "tpus", "queued-resources", "create", "moe", *command])
    assert end.value.code == 2
    assert "gcloud.compute.tpus.queued-resources.create" in capsys.readouterr().err


def test_commands_can_be_pasted():
    pod = PodRequest("moe", "us-east5-a", "v5p-16", slices=2)
    hard = commands.ssh_everywhere(
        pod, install.on_host("start", "--", "pretrain", "--config.data.path=it's $HOME; 'x'")
    )
    for command in [*all_commands(pod), hard]:
        assert shlex.split(quoted(command)) == command
    printed = []
    runner = DryRun(["SUSPENDED", "ACTIVE"], printed.append)
    for command in all_commands(pod):
        runner.run(command)
    assert [shlex.split(line) for line in printed] == all_commands(pod)


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        ("ERROR: (gcloud.x) You do not currently have an active account selected.", "gcloud auth login"),
        ("ERROR: (gcloud.x) The required property [core/project] is not currently set.", "gcloud config set project"),
        ("ERROR: (gcloud.x) PERMISSION_DENIED: Cloud TPU API has not been used in project 1", "gcloud services enable"),
        ("ERROR: (gcloud.x) PERMISSION_DENIED: Permission 'tpu.nodes.create' denied", "roles/tpu.admin"),
        ("ERROR: (gcloud.x) unrecognized arguments: --node", "gcloud components update"),
        ("ERROR: (gcloud.x) ALREADY_EXISTS: Resource 'moe' already exists", "go on with resume"),
        ("ERROR: (gcloud.x) NOT_FOUND: Resource 'moe' was not found", "check --name, --zone and --project"),
        ('ERROR: (gcloud.x) There is no more capacity in the zone "us-east5-a"', "another zone"),
        ("ERROR: (gcloud.x) RESOURCE_EXHAUSTED: Quota limit 'TPUV5P' has been exceeded.", "suspended and failed"),
        ("ERROR: (gcloud.x) SSH Key is not present in the SSH agent. Please run", "ssh-add"),
        ('ERROR: (gcloud.x) This TPU has terminal state "PREEMPTED", so it', "launch.pod resume"),
        ("ssh: connect to host 1.2.3.4 port 22: Connection timed out", "firewall"),
    ],
)
def test_messages_come_with_advice(words, advice):
    message = str(GcloudError(["gcloud", "compute"], 1, f"Some progress...\n{words}\n", ""))
    assert words in message
    assert advice in message


def test_unknown_messages_come_as_they_are():
    assert str(GcloudError(["gcloud", "x"], 3, "boom\n", "")) == "gcloud x ended with status 3: boom"
    assert "it said nothing" in str(GcloudError(["gcloud", "x"], 3, "", ""))


def test_without_gcloud(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Exception, match="gcloud is not on PATH: install the Google Cloud CLI"):
        Shell().ask(["gcloud", "version"])
