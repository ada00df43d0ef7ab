"""The cloud of these tests."""

import pytest

from tests.mmx.pod.cloud import Cloud


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    """A Cloud; nothing of it runs on afterwards."""
    cloud = Cloud(tmp_path, monkeypatch)
    yield cloud
    for pod in cloud.double.read("pods.json").values():
        cloud.double.remove_hosts(pod)
