"""Whole lives of a pod, with the double of gcloud."""

import shutil
import signal
import time

import pytest

from tests.mmx.pod.cloud import HOSTS, NAME, POD

STEPS = 60


def train(cloud, *flags: str, hold: str = "") -> list[str]:
    return [*flags, "--", "pretrain", f"--workdir={cloud.workdir}", f"--steps={STEPS}", f"--hold={hold}"]


def test_create_run_preempt_resume_delete(cloud):
    out = cloud.pod("create", *POD)
    assert f"{NAME} is in the queue: 2 x v5p-16 in us-east5-a, spot, {HOSTS} hosts" in out
    assert "WAITING_FOR_RESOURCES: waiting (Ctrl-C leaves the request in the queue)" in out
    assert "PROVISIONING: waiting" in out
    assert f"installed on {HOSTS} hosts" in cloud.pod("setup", f"--name={NAME}")
    assert "run: not started" in cloud.pod("status", f"--name={NAME}")

    command = train(cloud, "--logs=gs://mine/logs", hold="12")
    assert f"started on {HOSTS} hosts" in cloud.pod("run", f"--name={NAME}", *command)
    cloud.wait_for(12)
    out = cloud.pod("status", f"--name={NAME}")
    assert f"{NAME}: ACTIVE" in out
    assert f"run: running, on {HOSTS} of {HOSTS} hosts, attempt 1" in out
    assert f"step 12 of {STEPS}, loss 0.8333, checkpoint of step 10, " in out
    assert "already runs a launcher" in cloud.pod("run", f"--name={NAME}", *command, status=1)
    assert " attempt 1: " in cloud.pod("logs", f"--name={NAME}", "--slice=1", "--worker=1")

    cloud.double.preempt(NAME)
    assert f"{NAME}: SUSPEND" in cloud.pod("status", f"--name={NAME}")
    assert "gs://mine/logs/moe-1-w-1.log" in cloud.pod("logs", f"--name={NAME}")  # From the bucket.

    cloud.go_on(12)
    cloud.pod("resume", f"--name={NAME}")
    cloud.wait_for(STEPS)
    assert "begins at 12" in cloud.logs()
    assert cloud.steps() == list(range(1, STEPS + 1))
    assert "run: finished" in cloud.pod("status", f"--name={NAME}")
    assert cloud.pod("resume", f"--name={NAME}").startswith("finished: ")

    cloud.pod("delete", f"--name={NAME}")
    assert cloud.double.read("pods.json") == {}
    assert "--zone is missing" in cloud.pod("status", f"--name={NAME}", status=1)
    assert cloud.actions() == ["create", "scp", "delete", "create", "scp", "delete"]


def test_workdir_in_a_bucket(cloud):
    cloud.workdir = cloud.root / "buckets" / "mine" / "run"
    cloud.pod("create", *POD)
    command = ["--", "pretrain", "--workdir=gs://mine/run", f"--steps={STEPS}", "--hold=12"]
    assert "bucket mine not found" in cloud.pod("resume", f"--name={NAME}", *command, status=1)
    (cloud.root / "buckets" / "mine").mkdir(parents=True)
    cloud.pod("resume", f"--name={NAME}")
    cloud.wait_for(12)
    assert f"step 12 of {STEPS}, loss 0.8333, checkpoint of step 10, " in cloud.pod("status", f"--name={NAME}")
    cloud.double.preempt(NAME)
    # The pod is away; what it left is still there to be read.
    out = cloud.pod("status", f"--name={NAME}")
    assert "run: no host can be asked: the pod is not there" in out
    assert f"step 12 of {STEPS}, loss 0.8333, checkpoint of step 12" in out
    assert (cloud.workdir / "logs" / f"{NAME}-0-w-0.log").exists()


@pytest.mark.slow
def test_watch_survives_preemptions_and_a_crash(cloud):
    cloud.pod("create", *POD, "--wait=false")
    watch = cloud.start("resume", f"--name={NAME}", "--watch", *train(cloud, hold="7,22"))
    cloud.wait_for(7)
    # A bad minute of the network is no reason to do anything.
    cloud.settings(
        errors={
            "describe": [[1, "INTERNAL: try again"]],
            "ssh": [[255, "[/usr/bin/ssh] exited with return code [255]."]],
        }
    )
    while cloud.double.read("settings.json")["errors"] != {"describe": [], "ssh": []}:
        time.sleep(0.05)
    cloud.double.preempt(NAME)
    cloud.go_on(7)
    cloud.wait_for(22)
    (cloud.workdir / "crash").touch()
    cloud.double.preempt(NAME, notice=False)
    cloud.go_on(22)
    out, _ = watch.communicate(timeout=60)
    assert watch.returncode == 0, out
    assert cloud.steps() == list(range(1, STEPS + 1))
    assert "ACTIVE: finished" in out
    assert "INTERNAL: try again; trying again" in out
    assert "status 1" in out  # The crash, seen and repaired without a new pod.
    assert cloud.actions().count("create") == 3


@pytest.mark.slow
def test_watch_gives_up_on_a_run_that_cannot_work(cloud):
    cloud.pod("create", *POD)
    command = [f"--name={NAME}", "--watch", "--failures=2", "--", "pretrain", f"--workdir={cloud.workdir}", "--steps=x"]
    out = cloud.pod("resume", *command, status=1)
    assert "failed 2 times in a row without getting beyond step -1: giving up" in out
    assert cloud.actions() == ["create", "scp"]


@pytest.mark.slow
def test_watch_asks_again_when_the_queue_failed_it(cloud):
    cloud.settings(outcomes=["FAILED", "ACTIVE"])
    assert "There is no more capacity" in cloud.pod("create", *POD, status=1)
    cloud.pod("resume", f"--name={NAME}", "--watch", *train(cloud))
    assert cloud.steps()[-1] == STEPS


@pytest.mark.slow
def test_stop_saves_and_watch_leaves_it_stopped(cloud):
    cloud.pod("create", *POD)
    watch = cloud.start("resume", f"--name={NAME}", "--watch", *train(cloud, hold="8"))
    cloud.wait_for(8)
    cloud.pod("stop", f"--name={NAME}")
    out, _ = watch.communicate(timeout=60)
    assert watch.returncode == 0, out
    assert "stopped on request" in out
    assert (cloud.workdir / "checkpoints" / "8").exists()
    cloud.go_on(8)
    cloud.pod("resume", f"--name={NAME}")
    cloud.wait_for(STEPS)
    assert cloud.steps() == list(range(1, STEPS + 1))
    assert cloud.actions() == ["create", "scp"]


@pytest.mark.slow
def test_a_host_that_was_replaced_is_set_up_again(cloud):
    cloud.pod("create", *POD)
    cloud.pod("resume", f"--name={NAME}", *train(cloud, hold="8"))
    cloud.wait_for(8)
    [home] = cloud.double.homes(f"{NAME}-1", "1")
    cloud.double.signal_hosts({"nodes": [f"{NAME}-0", f"{NAME}-1"]}, signal.SIGKILL)
    shutil.rmtree(home)
    shutil.copytree(cloud.root / "image", home, symlinks=True)
    cloud.go_on(8)
    cloud.pod("resume", f"--name={NAME}")
    cloud.wait_for(STEPS)
    assert cloud.actions() == ["create", "scp", "scp"]


def test_what_gcloud_refuses_is_shown_with_what_helps(cloud):
    for words, advice in (
        ("PERMISSION_DENIED: Permission 'tpu.nodes.create' denied", "roles/tpu.admin"),
        ("RESOURCE_EXHAUSTED: Quota limit 'TPUV5P' has been exceeded", "ask for more quota"),
        ("You do not currently have an active account selected.", "gcloud auth login"),
    ):
        cloud.settings(errors={"create": [[1, words]]})
        out = cloud.pod("create", *POD, status=1)
        assert words in out
        assert advice in out
        assert not list((cloud.checkout / "runs" / "pods").iterdir())
    cloud.settings()
    cloud.pod("create", *POD)
    assert "go on with resume, or delete it first" in cloud.pod("create", *POD, status=1)
    assert "contradicts" in cloud.pod("create", f"--name={NAME}", "--zone=us-central1-a", status=1)


def test_zones_and_runtimes_that_are_not_in_the_table_are_asked_about(cloud):
    undocumented = (f"--name={NAME}", "--zone=us-west9-z", "--accelerator_type=v5p-16", "--runtime_version=v2-next")
    out = cloud.pod("create", *undocumented, status=1)
    assert "documented for v5p: europe-west4-b, us-central1-a, us-east5-a" in out
    cloud.settings(types=[["v5p-16", "us-west9-z"]])
    assert "documented for v5p: v2-alpha-tpuv5" in cloud.pod("create", *undocumented, status=1)
    assert cloud.actions() == []
    assert cloud.double.read("pods.json") == {}
    cloud.settings(types=[["v5p-16", "us-west9-z"]], versions=["v2-next"])
    cloud.pod("create", *undocumented)


def test_dry_run_runs_nothing(cloud):
    for action, rest in (
        ("create", []),
        ("setup", []),
        ("run", train(cloud)),
        ("resume", train(cloud)),
        ("delete", []),
    ):
        assert "gcloud compute tpus queued-resources" in cloud.pod(action, *POD, "--dry_run", *rest)
    assert cloud.calls() == []
    assert not (cloud.checkout / "runs").exists()
