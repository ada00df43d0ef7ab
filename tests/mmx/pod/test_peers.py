"""Processes of a multislice pod find each other by what Google's metadata server tells each host, without our help."""

import http.server
import socket
import subprocess
import sys
import threading

import pytest
from jax._src.clusters import cloud_tpu_cluster

from tests.mmx.pod.cloud import REPOSITORY

# A process as one of a pod: the server's address says which. What JAX decides for want of a TPU is turned round.
JOIN = """
import os
from jax._src.clusters import cloud_tpu_cluster, cluster
cloud_tpu_cluster.running_in_cloud_tpu_vm = cluster.running_in_cloud_tpu_vm = True
del os.environ["TPU_SKIP_MDS_QUERY"]
from mmx.parallel.processes import join_processes
join_processes(managed=True)
import jax
print(jax.process_index(), jax.process_count(), jax.device_count())
"""


def metadata(slices: int, slice_id: int, workers: int, worker: int) -> dict[str, str]:
    """What the server says on a host of a queued resource; no MEGASCALE lines where there is one slice."""
    multislice = {
        "MEGASCALE_COORDINATOR_ADDRESS": "127.0.0.1",
        "MEGASCALE_NUM_SLICES": slices,
        "MEGASCALE_SLICE_ID": slice_id,
    }
    lines = {"ACCELERATOR_TYPE": "v5p-16", "WORKER_ID": worker} | (multislice if slices > 1 else {})
    return {
        "agent-worker-number": str(worker),
        "worker-network-endpoints": ",".join(["127.0.0.1"] * workers),
        "tpu-env": "\n".join(f"{name}: '{value}'" for name, value in lines.items()),
    }


def serve(values: dict[str, str]) -> http.server.HTTPServer:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            value = values.get(self.path.rpartition("/")[2])
            self.send_response(404 if value is None else 200)
            self.end_headers()
            self.wfile.write((value or "").encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@pytest.mark.parametrize(("slices", "workers"), [(1, 2), (2, 2)])
def test_numbers_of_processes(slices, workers, monkeypatch):
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    for index in range(slices * workers):
        server = serve(metadata(slices, index // workers, workers, index % workers))
        monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_port}")
        cluster = cloud_tpu_cluster.GceTpuCluster
        assert cluster.is_env_present()
        assert (cluster.get_process_id(), cluster.get_process_count()) == (index, slices * workers)
        server.shutdown()


def test_two_slices_join(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("JAX_COORDINATOR_PORT", str(free.getsockname()[1]))
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    processes = []
    for index in range(2):
        server = serve(metadata(slices=2, slice_id=index, workers=1, worker=0))
        monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_port}")
        processes.append(
            subprocess.Popen([sys.executable, "-c", JOIN], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    for index, process in enumerate(processes):
        out, err = process.communicate(timeout=120)
        assert out == f"{index} 2 4\n", err
