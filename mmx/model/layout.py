"""Logical axes of the activations: what is split between layers and what inside attention.

Between layers the tokens of a row are split over ``context`` and ``tensor`` (sequence parallelism): norms, residuals,
router and experts work on distinct tokens everywhere. Attention gathers the tokens over ``tensor`` and splits heads
instead; its output projection scatters the tokens again.
"""

HEADS_OF_TOKENS = ("batch", "attention_sequence", "heads", None)
# Numbers of the slices of each row, in the order of the ranks that hold them (mmx.parallel.sequence_layout).
SLICES = ("batch", "attention_sequence")


def stream_axes(ndim: int) -> tuple[str | None, ...]:
    """Axes of the residual stream, [B, S, D] or, in decoding, [B, D]."""
    return ("batch", "sequence", None) if ndim == 3 else ("batch", None)


def heads_axes(ndim: int) -> tuple[str | None, ...]:
    """Axes of queries, keys, values and gates, from the dimensions of the stream that they are made of."""
    return HEADS_OF_TOKENS if ndim == 3 else ("batch", "heads", None)


def merged_heads_axes(ndim: int) -> tuple[str | None, ...]:
    """The same with heads and their channels in one dimension."""
    return heads_axes(ndim)[:-1]
