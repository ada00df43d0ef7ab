"""LASP+ beside LASP: steps that wait for each other, bytes, time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mmx.bench.parallel.program import communication
from mmx.bench.parallel.ranks import AXIS, RANKS, SHARED_CORES, forward, gradients, seconds_in_turns, tokens
from mmx.parallel.lasp import lasp, lasp_plus
from mmx.parallel.sequence_layout import SequenceLayout
from pallas_kernels.lightning_attention import layer_slopes

HEADS, CHANNELS = 4, 64
LENGTHS = (2048, 16384)


def measure(say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Contiguous slices, one document a row, at two lengths: the bytes stay, the serial steps are LASP's alone."""
    slopes = jnp.asarray(layer_slopes(HEADS, 0, 80))
    say(f"one document, {HEADS} heads of {CHANNELS}, {RANKS} ranks; {SHARED_CORES}")
    results = []
    for length in LENGTHS:
        q, k, v, do = (tokens((1, length, HEADS, CHANNELS), seed) for seed in range(4))
        calls = {}
        for name, form in (("LASP", lasp), ("LASP+", lasp_plus)):
            attend = functools.partial(
                lambda q, k, v, form: form(q, k, v, slopes, None, axis=AXIS, layout=SequenceLayout("contiguous")),
                form=form,
            )
            one, both = forward(attend, 3), gradients(attend, 3)
            counts = {"forward": communication(one, RANKS, q, k, v), "both": communication(both, RANKS, do, q, k, v)}
            calls[name] = functools.partial(jax.jit(both), do, q, k, v)
            results.append(
                {
                    "name": name,
                    "length": length,
                    "serial_steps_forward": counts["forward"].serial_steps,
                    "serial_steps": counts["both"].serial_steps,
                    "received_bytes": counts["both"].received_bytes,
                }
            )
        seconds = seconds_in_turns(calls)
        for result in results[-2:]:
            result["seconds"] = seconds[result["name"]]
            say(
                f"{result['name']:5}  {length:>6,} tokens  {result['serial_steps_forward']} serial steps forward, "
                f"{result['serial_steps']:>2} with backward; a rank receives "
                f"{result['received_bytes'] / 1024:,.0f} KiB; {result['seconds'] * 1e3:,.0f} ms"
            )
    return results
