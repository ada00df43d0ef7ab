"""The GPU report at tiny sizes on the CPU: sections run, and what cannot run is reported and stops nothing else."""

import dataclasses
import json
import time

import numpy as np
import pytest

from mmx.bench.gpu import attention, correctness, experts, sections
from mmx.config import HYBRID_PERIOD
from tests.tiny import TINY


class Collect:
    """A sink that keeps results."""

    def __init__(self):
        self.results = []

    def say(self, line):
        pass

    def result(self, line, **values):
        self.results.append(values)


def test_attention(monkeypatch):
    monkeypatch.setattr(attention, "HEADS", 2)
    monkeypatch.setattr(attention, "LENGTHS", (32,))
    monkeypatch.setattr(attention, "SOFTMAX_LENGTHS", (32,))
    sink = Collect()
    attention.measure(sink)
    times = {(r["name"], r["direction"]): r["seconds"] for r in sink.results if "seconds" in r}
    assert set(times) == {
        (name, direction)
        for name in ("mmx lightning, blocked", "mmx softmax, blocked")
        for direction in (attention.FORWARD, attention.BACKWARD)
    }
    assert min(times.values()) > 0
    failed = [r for r in sink.results if "failed" in r]
    assert failed, "there is no cuDNN here"
    assert all("cudnn" in r["name"] for r in failed)


def test_experts(monkeypatch):
    run = experts.get_config()
    run.model = dataclasses.replace(run.model, hidden_size=16, expert_hidden_size=8)
    monkeypatch.setattr(experts, "get_config", lambda: run)
    monkeypatch.setattr(experts, "TOKENS", (64,))
    sink = Collect()
    experts.measure(sink)
    assert len(sink.results) == 8
    assert all(r["flops_per_second"] > 0 for r in sink.results)


def test_correctness_finds_agreement_and_difference(monkeypatch):
    small = dataclasses.replace(TINY, layer_pattern=HYBRID_PERIOD[-2:], num_layers=2)
    monkeypatch.setattr(correctness, "MODEL", small)
    sink = Collect()
    correctness.compare_with_cpu(sink)
    assert [r["verdict"] for r in sink.results] == ["agree"] * 3
    assert correctness._difference({"a": np.ones(4)}, {"a": np.full(4, 2.0)}) == pytest.approx(0.5)


def fails(sink):
    sink.result("one", value=1)
    raise RuntimeError("as planned")


def works(sink):
    sink.result("two", value=2)


def hangs(sink):
    time.sleep(60)


def test_a_section_that_fails_or_hangs_stops_no_other(monkeypatch, tmp_path):
    names = {name: f"{__name__}:{name}" for name in ("fails", "hangs", "works")}
    monkeypatch.setattr(sections, "SECTIONS", names)
    lines = []
    sections.report(list(names), 5, lines.append, tmp_path / "out.json")
    results = json.loads((tmp_path / "out.json").read_text())
    assert results["works"] == [{"value": 2}]
    assert results["fails"] == [{"value": 1}, {"failed": "the process ended; its message is above"}]
    assert results["hangs"] == [{"failed": "not done after 5 s"}]
    assert "   two" in lines
