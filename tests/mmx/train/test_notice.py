"""A notice of the machine's owner becomes a SIGTERM; silence, nonsense and live migration do not."""

import http.server
import signal
import threading
import time

import pytest

from mmx.train.notice import HOST, heeding_notices


@pytest.fixture
def metadata(monkeypatch):
    """Values of a metadata server on this host, by key."""
    values = {"preempted": "FALSE", "maintenance-event": "NONE", "flavour": "Google", "asked": 0}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            assert self.headers["Metadata-Flavor"] == "Google"
            assert self.path.startswith("/computeMetadata/v1/instance/")
            values["asked"] += 1
            self.send_response(200)
            self.send_header("Metadata-Flavor", values["flavour"])
            self.end_headers()
            self.wfile.write(values[self.path.rpartition("/")[2]].encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv(HOST, f"127.0.0.1:{server.server_port}")
        yield values
        server.shutdown()


@pytest.fixture
def terminated():
    """Becomes true when SIGTERM comes."""
    came = threading.Event()
    previous = signal.signal(signal.SIGTERM, lambda *_: came.set())
    yield came
    signal.signal(signal.SIGTERM, previous)


@pytest.mark.parametrize(
    ("key", "notice"), [("preempted", "TRUE"), ("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")]
)
def test_notice_terminates(metadata, terminated, key, notice):
    said = []
    with heeding_notices(said.append, every=0.02):
        time.sleep(0.2)
        assert not terminated.is_set()
        metadata[key] = notice
        assert terminated.wait(10)
    assert said == [f"this machine will be stopped ({key}: {notice}): saving and leaving"]


@pytest.mark.parametrize(
    "change",
    [{}, {"maintenance-event": "MIGRATE_ON_HOST_MAINTENANCE"}, {"flavour": "none", "preempted": "TRUE"}],
    ids=["nothing", "live migration", "not Google's server"],
)
def test_nothing_to_heed(metadata, terminated, change):
    metadata.update(change)
    with heeding_notices(print, every=0.02):
        deadline = time.monotonic() + 10
        while metadata["asked"] < 6:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert not terminated.is_set()


def test_no_server_at_all(monkeypatch, terminated):
    monkeypatch.setenv(HOST, "127.0.0.1:9")
    with heeding_notices(print, every=0.02):
        time.sleep(0.2)
    assert not terminated.is_set()
