"""The comparison of ways to split a sequence, at tiny sizes: counts are right, sections run."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from mmx.bench.parallel import lasp, overlap, report, ring
from mmx.bench.parallel.packed import mixed_rows
from mmx.bench.parallel.program import communication
from mmx.bench.parallel.ranks import AXIS, RANKS, TOKENS, forward, rank_mesh


def tokens(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(rank_mesh(), TOKENS))


def test_collectives_are_counted_with_their_loops():
    ring_of_all = [(rank, (rank + 1) % RANKS) for rank in range(RANKS)]

    def local(x, y):
        moved, _ = lax.scan(lambda x, _: (lax.ppermute(x, AXIS, ring_of_all), None), x, None, length=3)
        alone = lax.ppermute(y, AXIS, [(0, 1)])
        return moved + alone + lax.cond(jnp.sum(x) > 0, lambda y: y, lambda y: 2 * y, y)

    # 2 x 2 local tokens of fp32.
    got = communication(forward(local, 2), RANKS, tokens(2, 2 * RANKS), tokens(2, 2 * RANKS))
    assert [(c.kind, c.result_bytes, c.times) for c in got.collectives] == [("ppermute", 16, 3), ("ppermute", 16, 1)]
    assert got.received_bytes == 3 * 16 + 16 / RANKS
    assert got.serial_steps == 3, "the one outside the loop waits for none"


def test_a_gather_brings_what_the_others_have():
    local = lambda x: x + lax.all_gather(x, AXIS).sum(0) + lax.psum(x, AXIS)  # noqa: E731
    got = communication(forward(local, 1), RANKS, tokens(1, RANKS))
    assert {c.kind: c.received_bytes for c in got.collectives} == {
        "all_gather": 4 * (RANKS - 1),
        "psum": 2 * 4 * (RANKS - 1) / RANKS,
    }
    assert got.serial_steps == 1


def test_mixed_rows():
    rows = mixed_rows(3, 1000, shortest=5, longest=300)
    assert rows.shape == (3, 1000)
    assert (rows[:, 0] == 1).all()
    assert set(np.unique(np.diff(rows, axis=1))) == {0, 1}
    assert (rows[0] != rows[1]).any()


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(lasp, "LENGTHS", (64, 128))
    monkeypatch.setattr(lasp, "HEADS", 2)
    monkeypatch.setattr(lasp, "CHANNELS", 8)
    for name, value in {"ROWS": 4, "RUN_LENGTH": 512, "RUN_BLOCK": 8, "HEADS": 2, "KV_HEADS": 1, "CHANNELS": 8}.items():
        monkeypatch.setattr(ring, name, value)
    monkeypatch.setattr(overlap, "CONFIG", dataclasses.replace(overlap.CONFIG, hidden_size=256, expert_hidden_size=256))
    monkeypatch.setattr(overlap, "GROUPS", (2,))


@pytest.mark.usefixtures("small")
def test_report(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    lines = []
    report.report(lines.append, tmp_path / "out.json")
    results = json.loads((tmp_path / "out.json").read_text())
    by_form = {name: [r for r in results["lasp"] if r["name"] == name] for name in ("LASP", "LASP+")}
    assert [r["serial_steps"] for r in by_form["LASP"]] == [2 * (RANKS - 1)] * 2
    assert [r["serial_steps"] for r in by_form["LASP+"]] == [2] * 2
    # A state of 2 heads of 8 x 8 in fp32: one from the rank before, or one from each other rank, in each direction.
    state = 2 * 8 * 8 * 4
    assert [r["received_bytes"] for r in by_form["LASP"]] == [2 * state * (RANKS - 1) / RANKS] * 2
    assert [r["received_bytes"] for r in by_form["LASP+"]] == [2 * state * (RANKS - 1)] * 2

    counts = {(r["documents"], r["layout"]): r for r in results["ring"] if "busiest_over_mean" in r}
    assert counts["one document", "zigzag"]["busiest_over_mean"] == 1
    mixed = {layout: r["busiest_over_mean"] for (what, layout), r in counts.items() if what == "mixed documents"}
    assert mixed["balanced"] < 1.1 < mixed["zigzag"] < mixed["contiguous"]
    assert all(r["seconds"] > 0 for r in results["lasp"] + results["ring"] if "seconds" in r)
    assert [line for line in lines if line.startswith("==")] == ["== lasp", "== ring", "== overlap"]
