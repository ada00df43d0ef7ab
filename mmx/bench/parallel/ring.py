"""Ring attention in the three layouts: the busiest rank's work, and time."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from mmx.bench.parallel.packed import mixed_rows
from mmx.bench.parallel.ranks import AXIS, RANKS, SHARED_CORES, gradients, integers, seconds_in_turns, tokens
from mmx.parallel.ring import ring_attention
from mmx.parallel.ring_work import block_pairs, busiest_over_mean, steps_over_mean
from mmx.parallel.sequence_layout import NAMES, SequenceLayout

# Counted: rows of 64K tokens in blocks of a TPU's size.
ROWS, LENGTH, BLOCK, SHORTEST, LONGEST = 20, 65536, 512, 64, 16384
# Run: a row that a laptop takes seconds for.
RUN_LENGTH, RUN_BLOCK, HEADS, KV_HEADS, CHANNELS = 8192, 128, 4, 2, 64


def measure(say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Counts on packed rows and on rows of one document, then times on a shorter row."""
    packed = mixed_rows(ROWS, LENGTH, SHORTEST, LONGEST)
    say(
        f"pairs of blocks of {BLOCK} over {RANKS} ranks, rows of {LENGTH:,} tokens, {ROWS} of them with documents of "
        f"{SHORTEST} to {LONGEST:,} tokens"
    )
    results = []
    for what, rows in (("one document", np.ones_like(packed[:1])), ("mixed documents", packed)):
        for name in NAMES:
            count = _count(what, rows, SequenceLayout(name))
            results.append(count)
            say(
                f"{what:15}  {name:10}  busiest rank over mean {count['busiest_over_mean']:.2f}, worst row "
                f"{count['busiest_over_mean_worst']:.2f}; {count['steps_over_mean']:.2f} if ranks met after each step; "
                f"{count['pairs_share']:.0%} of the pairs of one document"
            )
    seconds = _seconds(np.ones((1, RUN_LENGTH), np.int32), mixed_rows(1, RUN_LENGTH, 16, RUN_LENGTH // 4))
    say(f"forward and backward over {RUN_LENGTH:,} tokens; {SHARED_CORES}")
    for (what, name), value in seconds.items():
        say(f"{what:15}  {name:10}  {value * 1e3:7,.0f} ms")
        results.append({"documents": what, "layout": name, "length": RUN_LENGTH, "seconds": value})
    return results


def _count(what: str, rows: np.ndarray, layout: SequenceLayout) -> dict[str, Any]:
    pairs = [block_pairs(row[None], RANKS, layout, BLOCK) for row in rows]
    busiest = [busiest_over_mean(x) for x in pairs]
    blocks = LENGTH // BLOCK
    return {
        "documents": what,
        "layout": layout.name,
        "busiest_over_mean": statistics.median(busiest),
        "busiest_over_mean_worst": max(busiest),
        "steps_over_mean": statistics.median(map(steps_over_mean, pairs)),
        "pairs_share": sum(x.sum() for x in pairs) / len(pairs) / (blocks * (blocks + 1) // 2),
    }


def _seconds(one: np.ndarray, mixed: np.ndarray) -> dict[tuple[str, str], float]:
    q, do = (tokens((1, RUN_LENGTH, HEADS, CHANNELS), seed) for seed in range(2))
    k, v = (tokens((1, RUN_LENGTH, KV_HEADS, CHANNELS), seed) for seed in (2, 3))
    calls: dict[tuple[str, str], Callable[[], Any]] = {}
    for name in NAMES:
        layout = SequenceLayout(name)

        def attend(q, k, v, segment_ids, slice_ids, layout=layout):
            slice_ids = slice_ids if layout.depends_on_documents else None
            where = {"axis": AXIS, "layout": layout, "slice_ids_BN": slice_ids, "block": RUN_BLOCK}
            return ring_attention(q, k, v, segment_ids, **where)

        compiled = jax.jit(gradients(attend, 5))
        for what, segment_ids in (("one document", one), ("mixed documents", mixed)):
            in_order = segment_ids.reshape(-1)[layout.permutation(RUN_LENGTH, RANKS, segment_ids)].reshape(1, -1)
            slice_ids = layout.slice_ids(RANKS, segment_ids).reshape(1, -1)
            calls[what, name] = functools.partial(compiled, do, q, k, v, integers(in_order), integers(slice_ids))
    return seconds_in_turns(calls)
