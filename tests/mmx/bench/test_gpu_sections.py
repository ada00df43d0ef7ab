"""The GPU report at tiny sizes on the CPU: sections run, and what cannot run is reported and stops nothing else."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from mmx.bench.gpu import attention, clock, correctness, experts, meshes, quickstart, sections, training
from mmx.config import HYBRID_PERIOD
from tests.tiny import TINY


class Collect:
    """A sink that keeps results."""

    def __init__(self, folder=None):
        self.results = []
        self.folder = folder

    def say(self, line):
        pass

    def result(self, line, **values):
        self.results.append(values)


def test_attention(monkeypatch):
    monkeypatch.setattr(attention, "SHAPES", ((32, 2), (64, 1)))
    monkeypatch.setattr(attention, "_PROFILED", (32, 2))
    monkeypatch.setattr(attention, "SOFTMAX_SHAPES", ((32, 2),))
    monkeypatch.setattr(attention, "SOFTMAX_BLOCKED_SHAPES", ((32, 2),))
    sink = Collect()
    attention.measure(sink)
    times = {(r["name"], r["direction"], r["length"]): r["seconds"] for r in sink.results if "seconds" in r}
    directions = (attention.FORWARD, attention.BACKWARD)
    assert set(times) == {("mmx lightning, blocked", d, length) for d in directions for length in (32, 64)} | {
        ("mmx softmax, blocked", d, 32) for d in directions
    }
    assert min(times.values()) > 0
    failed = [r for r in sink.results if "failed" in r]
    assert len(failed) == 2, "there is no cuDNN here"
    assert all("cudnn" in r["name"] for r in failed)


def test_attention_that_would_take_too_long_is_not_begun(monkeypatch):
    monkeypatch.setattr(attention, "SOFTMAX_SHAPES", ())
    monkeypatch.setattr(attention, "SOFTMAX_BLOCKED_SHAPES", ((32, 2), (64, 2), (128, 2), (256, 2)))
    monkeypatch.setattr(attention, "SHAPES", ())
    monkeypatch.setattr(attention, "_PROFILED", (32, 2))
    monkeypatch.setattr(attention, "MOST_SECONDS", 10.0)
    # The second length is expected to take 4 times as long as the first, which is allowed, the third 4 times that.
    seconds = iter([1.0, 2.4, 4.0, 9.0])
    monkeypatch.setattr(attention, "seconds_a_call", lambda *_, **__: next(seconds))
    sink = Collect()
    attention.measure(sink)
    got = [(r["length"], r["direction"], r.get("seconds", "not run")) for r in sink.results]
    assert got == [
        (32, attention.FORWARD, 1.0),
        (32, attention.BACKWARD, 2.4),
        (64, attention.FORWARD, 4.0),
        (64, attention.BACKWARD, 9.0),
        (128, attention.FORWARD, "not run"),
        (128, attention.BACKWARD, "not run"),
        (256, attention.FORWARD, "not run"),
        (256, attention.BACKWARD, "not run"),
    ]
    assert "16 s expected" in sink.results[4]["failed"]
    assert "64 s expected" in sink.results[6]["failed"]


def test_operands_repeat_what_is_drawn(monkeypatch):
    monkeypatch.setattr(attention, "_DRAWN", 8)
    q, k = attention._draw(2, 32, 2)
    assert q.shape == (1, 32, 2, attention.CHANNELS)
    np.testing.assert_array_equal(q[:, :8], q[:, 24:])
    assert not np.array_equal(q, k)


@pytest.mark.parametrize(("compiled", "calls"), [(True, 1), (False, 2)])
def test_a_long_call_is_timed_once(monkeypatch, compiled, calls):
    now, made = [0.0], []
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])

    def call():
        made.append(1)
        now[0] += 3.0

    assert clock.seconds_a_call(call, lambda _: None, compiled=compiled) == 3.0
    assert len(made) == calls


def test_experts(monkeypatch):
    run = experts.get_config()
    run.model = dataclasses.replace(run.model, hidden_size=16, expert_hidden_size=8)
    monkeypatch.setattr(experts, "get_config", lambda: run)
    monkeypatch.setattr(experts, "TOKENS", (64,))
    sink = Collect()
    experts.measure(sink)
    assert len(sink.results) == 8
    assert all(r["flops_per_second"] > 0 for r in sink.results)


def test_training(monkeypatch):
    run = training.get_config()
    run.model = dataclasses.replace(TINY, layer_pattern=HYBRID_PERIOD[-2:], num_layers=2)
    monkeypatch.setattr(training, "get_config", lambda: run)
    monkeypatch.setattr(training, "BATCHES", ((2, 16), (1, 48)))
    sink = Collect()
    training.measure(sink)
    assert [(r["rows"], r["length"]) for r in sink.results] == [(2, 16), (1, 48)]
    assert all(r["seconds"] > 0 and r["peak_bytes"] > 0 and np.isfinite(r["loss"]) for r in sink.results)


def test_meshes(monkeypatch):
    small = dataclasses.replace(TINY, layer_pattern=HYBRID_PERIOD[-2:], num_layers=2, hidden_size=64)
    run = meshes.get_config()
    run.model = small
    monkeypatch.setattr(meshes, "get_config", lambda: run)
    monkeypatch.setattr(meshes, "TIMED", (("fsdp", 1.0, 32),))
    monkeypatch.setattr(meshes, "AXES", ("context", "tensor"))
    monkeypatch.setattr(meshes, "STEPS", 2)
    data = dataclasses.replace(meshes.SMALL.data, sequence_length=32)
    monkeypatch.setattr(meshes, "SMALL", dataclasses.replace(meshes.SMALL, model=small, data=data))
    sink = Collect()
    meshes.measure(sink)
    compared, timed = sink.results
    # There are 8 devices and fewer heads than that.
    assert (compared["axis"], compared["verdict"]) == ("context", "agree")
    assert (timed["mesh"], timed["rows"]) == ("fsdp=8", 8)
    assert timed["seconds"] > 0
    assert timed["peak_bytes"] > 0


def test_what_does_not_fit_is_not_run(monkeypatch):
    class Small:
        def memory_stats(self):
            return {"bytes_limit": 2**20}

    monkeypatch.setattr(clock.jax, "local_devices", lambda: [Small()])
    with pytest.raises(MemoryError, match="out of memory"):
        clock.compile_if_it_fits(lambda x: x + 1, jax.ShapeDtypeStruct((2**25,), np.float32))


def test_correctness_finds_agreement_and_difference(monkeypatch, tmp_path):
    small = dataclasses.replace(TINY, layer_pattern=HYBRID_PERIOD[-2:], num_layers=2)
    monkeypatch.setattr(correctness, "MODEL", small)
    monkeypatch.setattr(correctness, "NEW_TOKENS", 4)
    sink = Collect(tmp_path)
    correctness.compute_on_cpu(sink)
    for name, change in (("bfloat16.npz", lambda x: 2 * x), ("tokens.npz", lambda x: np.append(x[:-1], x[-1] + 1))):
        first, *others = correctness._load(tmp_path / name)
        correctness._save(tmp_path / name, [first, *map(change, others)])
    correctness.compare(sink)
    assert [r["verdict"] for r in sink.results] == ["agree", "agree", "DIFFER", "DIFFER"]
    assert sink.results[-1]["same"] == [4, 3], "the first row agrees, the second up to the changed token"
    assert correctness._difference({"a": np.ones(4)}, {"a": np.full(4, 2.0)}) == pytest.approx(0.5)


def test_a_section_that_fails_or_hangs_stops_no_other(monkeypatch, tmp_path):
    here = {name: f"tests.mmx.bench.stand_ins:{name}" for name in ("fails", "hangs", "works", "writes", "reads")}
    chosen = {
        "fails": sections.Section(here["fails"]),
        "hangs": sections.Section(here["hangs"]),
        "works": sections.Section(here["works"]),
        "compares": sections.Section(here["reads"], here["writes"], shares_gpu=True),
        "shares too": sections.Section(here["works"], shares_gpu=True),
        "has nothing to compare with": sections.Section(here["reads"], here["fails"]),
    }
    monkeypatch.setattr(sections, "SECTIONS", chosen)
    lines = []
    sections.report(list(chosen), 8, lines.append, tmp_path / "out.json")
    results = json.loads((tmp_path / "out.json").read_text())
    failure = [{"value": 1}, {"failed": "the process ended; its message is above"}]
    assert results["works"] == results["shares too"] == [{"value": 2}]
    assert "== compares, shares too" in lines
    assert results["fails"] == results["has nothing to compare with"] == failure
    assert results["hangs"] == [{"failed": "not done after 8 s"}]
    assert results["compares"] == [{"written": True}, {"note": "cpu"}]
    assert "   two" in lines


@pytest.mark.slow
def test_quickstart_on_both_devices(monkeypatch, tmp_path):
    """The CPU plays both parts."""
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # The suite has several devices, the quickstart one.
    run = quickstart._run
    monkeypatch.setattr(quickstart, "_run", lambda *flags, platform="cpu": run(*flags, platform="cpu"))
    monkeypatch.setattr(quickstart, "STEPS", 3)
    sink = Collect(tmp_path)
    quickstart.train_on_cpu(sink)
    quickstart.compare(sink)
    assert [r["platform"] for r in sink.results[:2]] == ["cpu", "cuda"]
    assert [r["verdict"] for r in sink.results[2:]] == ["agree", "agree"]
