"""Softmax attention of some tokens of a row to some others of its keys, and the choice of its form: ring attention's
pieces.

Shapes: B batch (1 where all rows are alike), S queries, T keys, H query heads, G key-value heads, K key channels, V
value channels.
"""

from typing import NamedTuple

import jax
from jax.experimental.pallas.ops.tpu.splash_attention import BlockSizes

from pallas_kernels.platform import no_tpu_kernel_here, say_once, target_platform
from pallas_kernels.softmax_attention import part, tpu_part
from pallas_kernels.softmax_attention.pairs import default_block
from pallas_kernels.softmax_attention.part import Places, visible_blocks
from pallas_kernels.softmax_attention.tpu import unsupported
from pallas_kernels.softmax_attention.tpu_blocks import LANES, choose_blocks
from pallas_kernels.softmax_attention.tpu_kernels import Kernels
from pallas_kernels.softmax_attention.tpu_tables import SCALAR_BYTES, table_bytes

IMPLEMENTATIONS = ("auto", "blocked", "tpu", "tpu_interpret")


class PartForm(NamedTuple):
    """How parts are computed: static, so that forward and backward pass agree. ``choose_form`` makes it."""

    slice_length: int  # so many tokens at a time follow each other in the row
    block: int  # in which the tokens are looked through for work
    kernels: Kernels | None = None  # of a TPU; None for plain JAX

    def any_work(self, q_places: Places, k_places: Places) -> jax.Array:
        """Whether any query may see any of the keys; True where they are only near each other."""
        first_N, end_N = visible_blocks(q_places, k_places, self.block)
        return (first_N < end_N).any()

    def attention(self, q_BSHK, k_BTGK, v_BTGV, q_places: Places, k_places: Places, scale: float):
        """``part.attention_part``; the TPU's kernels round the output to the operands' dtype."""
        operands = q_BSHK, k_BTGK, v_BTGV, q_places, k_places, scale
        if self.kernels is None:
            return part.attention_part(*operands, self.block)
        return tpu_part.attention_part_tpu(*operands, self.slice_length, self.kernels)

    def gradients(
        self, q_BSHK, k_BTGK, v_BTGV, q_places: Places, k_places: Places, scale: float, do_BSHV, lse_BSH, delta_BSH
    ):
        """``part.attention_part_gradients``; fp32 on TPU too, of what its kernels rounded to the operands' dtype."""
        operands, cotangents = (q_BSHK, k_BTGK, v_BTGV, q_places, k_places, scale), (do_BSHV, lse_BSH, delta_BSH)
        if self.kernels is None:
            return part.attention_part_gradients(*operands, self.block, *cotangents)
        return tpu_part.attention_part_gradients_tpu(*operands, self.slice_length, self.kernels, *cotangents)


def choose_form(
    q_BSHK: jax.Array,
    v_BTGV: jax.Array,
    slice_length: int,
    block: int | None = None,
    implementation: str = "auto",
) -> PartForm:
    """The form for parts with so many queries and as many keys.

    Args:
      q_BSHK, v_BTGV: the queries and values of a part, for their shapes and dtypes.
      slice_length: so many tokens at a time follow each other in the row.
      block: tokens in a block; the target platform's if None.
      implementation: "auto", or one of ``IMPLEMENTATIONS`` to force it. "auto" takes splash attention's kernels where
        the code is traced for TPU (by the mesh in scope, never the host), and plain JAX, "blocked", elsewhere or where
        the kernels do not take the call; the log says why once. "tpu_interpret" simulates the kernels on a CPU.

    Raises:
      NotImplementedError: if a forced implementation cannot run, with the reason.
      ValueError: if the implementation is unknown.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    plain = PartForm(slice_length, default_block(slice_length) if block is None else block)
    if implementation == "blocked" or (implementation == "auto" and target_platform() != "tpu"):
        return plain
    blocks = choose_blocks(q_BSHK, v_BTGV, whole_row=False) if block is None else BlockSizes(*[block] * 8)
    reason = _unsupported(q_BSHK, v_BTGV, blocks)
    if implementation != "tpu_interpret":
        reason = reason or no_tpu_kernel_here()
    if reason is None:
        # jax's older interpreter: the one that knows uninitialised memory waits for all devices at each kernel, and
        # a rank that has nothing to do never comes.
        return plain._replace(kernels=Kernels(blocks, interpret=implementation == "tpu_interpret"))
    if implementation != "auto":
        raise NotImplementedError(f"implementation={implementation!r} cannot run: {reason}")
    say_once(f"ring attention takes its plain form, not the TPU kernels: {reason}")
    return plain


def _unsupported(q_BSHK: jax.Array, v_BTGV: jax.Array, blocks: BlockSizes) -> str | None:
    if reason := unsupported(q_BSHK, v_BTGV):
        return reason
    if blocks.block_q % LANES:
        return f"the TPU kernels take blocks of a multiple of {LANES} tokens, not {blocks.block_q}"
    S = q_BSHK.shape[1]
    if table_bytes(S, S, blocks) > SCALAR_BYTES:
        return f"the TPU kernels' tables for {S:,} tokens of a rank take more than {SCALAR_BYTES:,} bytes"
    return None
