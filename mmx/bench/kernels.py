"""Lightning attention's TPU kernels beside their floors: predicted for every chip, or measured on the TPU that is here.

Nanoseconds a token and head, bf16, heads of 128 channels, 8,192 tokens, 8 heads, packed documents. A prediction is the
compiler's static cycle count over the clock, or the bytes over the bandwidth where that is longer. Floors count the
bytes or, where that is longer, the bf16 products at a block of 256. The sketch is a plain chunked kernel without
documents that the project started from; its figures are predictions too.

Decoding: 32 rows, 16 heads of 128 (64 heads over four devices), fp32 states updated in place by one or several tokens,
microseconds a call beside what their bytes take at full bandwidth.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.aot import CHIPS, Chip, ProfileError, compiler_version, missing_compiler
from pallas_kernels.lightning_attention.tpu_figures import Call, DecodeCall
from pallas_kernels.lightning_attention.tpu_tiles import choose_tiles
from pallas_kernels.platform import one_spelling

TOKENS, HEADS = 8192, 8
DECODED = (1, 2, 4, 8)


@dataclasses.dataclass(frozen=True)
class Reference:
    """What a chip's figures are held against: forward and backward."""

    floor: tuple[float, float]
    sketch: tuple[float, float]


REFERENCES = {
    "v5e": Reference((1.25, 2.34), (1.25, 2.96)),
    "v5p": Reference((0.43, 1.00), (0.616, 1.36)),
    "v6e": Reference((0.62, 1.17), (0.670, 1.89)),
    "tpu7x": Reference((0.28, 0.52), (0.62, 1.81)),
}


def report(chips: Sequence[str], say: Callable[[str], None], tokens: int = TOKENS) -> dict[str, Any]:
    """Says one line a chip and returns the figures.

    Args:
      chips: names out of ``REFERENCES``; on a machine with a TPU, its own is measured and the others predicted.
      say: receives lines of text.
      tokens: length of the row.
    """
    here = one_spelling(jax.devices()[0].device_kind) if jax.default_backend() == "tpu" else None
    say(f"ns a token and head, {tokens:,} tokens, {HEADS} heads of 128, bf16, documents; libtpu {compiler_version()}")
    say("chip   source     forward: floor sketch  ours   backward: floor sketch  ours   both over floor")
    results = {}
    for name in chips:
        chip, reference = CHIPS[name], REFERENCES[name]
        source = "measured" if chip.device_kind == here else "predicted"
        figures = [_figure(chip, kernel, tokens, source == "measured", say) for kernel in ("forward", "backward")]
        results[name] = dict(zip(("forward", "backward"), figures, strict=True)) | {"source": source}
        if None in figures:
            continue
        over = sum(figures) / sum(reference.floor)
        columns = (
            f"{f:6.3f} {s:6.3f} {o:6.3f}" for f, s, o in zip(reference.floor, reference.sketch, figures, strict=True)
        )
        say(f"{name:6} {source:10} {'          '.join(f'{column:>22}' for column in columns)}   {over:.2f}")
        results[name]["over_floor"] = over
    rows, heads = DecodeCall(1).batch, DecodeCall(1).heads
    say(f"decode, us a call of {rows} rows, {heads} heads of 128, bf16, fp32 states")
    say("chip   source     tokens: HBM bound  cycles  share of the bound")
    for name in chips:
        source = results[name]["source"]
        decoded = [_decode_figure(CHIPS[name], tokens, source == "measured", say) for tokens in DECODED]
        results[name]["decode"] = dict(zip(DECODED, decoded, strict=True))
    return results


def reason_not_to() -> str | None:
    """Why nothing can be said here, or None."""
    return missing_compiler()


def _figure(chip: Chip, kernel: str, tokens: int, measured: bool, say: Callable[[str], None]) -> float | None:
    q = jax.ShapeDtypeStruct((1, tokens, HEADS, 128), jnp.bfloat16)
    tiles = choose_tiles(q, q, chip.device_kind)[kernel == "backward"]
    call = Call(kernel, tokens, HEADS, tiles)
    try:
        return call.measure() if measured else call.predict(chip, timeout=900)[1]
    except ProfileError as error:
        say(f"{chip.name}: this compiler's profiler does not follow the {kernel} kernel ({error})")
        return None


def _decode_figure(chip: Chip, tokens: int, measured: bool, say: Callable[[str], None]) -> dict[str, float] | None:
    call = DecodeCall(tokens)
    bound = chip.memory_seconds(call.bytes_moved)
    try:
        seconds = call.measure() if measured else call.cycles(chip, timeout=900) / chip.clock
    except ProfileError as error:
        say(f"{chip.name}: this compiler's profiler does not follow the decode kernel ({error})")
        return None
    # Cycles below the bound mean that memory decides; a measurement has no such excuse.
    share = bound / seconds if measured else min(1.0, bound / seconds)
    source = "measured" if measured else "predicted"
    say(f"{chip.name:6} {source:10} {tokens:6} {1e6 * bound:10.1f} {1e6 * seconds:7.1f} {share:19.0%}")
    return {"bound_us": 1e6 * bound, "us": 1e6 * seconds, "share": share}
