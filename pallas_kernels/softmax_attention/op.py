"""Causal softmax attention with grouped key-value heads and packed documents, and the choice of its implementation.

Shapes: B batch, S tokens, H query heads, G key-value heads, K key channels, V value channels.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.platform import no_tpu_kernel_here, say_once, target_platform
from pallas_kernels.softmax_attention.blocked import softmax_attention_blocked
from pallas_kernels.softmax_attention.pairs import default_block
from pallas_kernels.softmax_attention.reference import softmax_attention_reference
from pallas_kernels.softmax_attention.tpu import softmax_attention_tpu, unsupported
from pallas_kernels.softmax_attention.tpu_blocks import choose_blocks
from pallas_kernels.softmax_attention.tpu_kernels import Kernels

IMPLEMENTATIONS = ("auto", "reference", "blocked", "tpu", "tpu_interpret", "cudnn")

# Memory that nobody wrote reads as NaN.
_INTERPRET = pltpu.InterpretParams(uninitialized_memory="nan")


def softmax_attention(
    q_BSHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGV: jax.Array,
    *,
    segment_ids_BS: jax.Array | None = None,
    scale: float | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """Causal attention within each document; query head h reads key-value head h // (H / G).

    Args:
      q_BSHK, k_BSGK, v_BSGV: one floating dtype; H is a multiple of G.
      segment_ids_BS: integer document ids; a document begins wherever the id changes. None: one document a row.
      scale: of the scores, 1/sqrt(K) if None.
      implementation: "auto", or one of ``IMPLEMENTATIONS`` to force it. "auto" takes splash attention's kernels where
        the code is traced for TPU (by the mesh in scope, never the host), and "blocked" elsewhere or where the kernels
        do not take the call; the log says why once. "tpu_interpret" simulates the TPU kernels on a CPU. "cudnn" (NVIDIA
        GPUs, half precision, one document a row) is never chosen automatically: the suite cannot run it,
        ``launch.bench --gpu`` checks it.

    Returns:
      o [B, S, H, V] in v's dtype. Scores, softmax and accumulation are fp32 (float64 for float64 inputs).

    Raises:
      ValueError: if shapes or dtypes do not fit, or the implementation is unknown.
      NotImplementedError: if a forced implementation cannot run, with the reason.
    """
    (B, S, H, K), G = q_BSHK.shape, k_BSGK.shape[2]
    if k_BSGK.shape != (B, S, G, K) or v_BSGV.shape[:3] != (B, S, G) or H % G:
        raise ValueError(
            f"q {q_BSHK.shape}, k {k_BSGK.shape} and v {v_BSGV.shape} do not fit: need [B, S, H, K], [B, S, G, K] and "
            "[B, S, G, V] with H a multiple of G"
        )
    if not (q_BSHK.dtype == k_BSGK.dtype == v_BSGV.dtype and jnp.issubdtype(q_BSHK.dtype, jnp.floating)):
        raise ValueError(f"q, k and v need one floating dtype, not {q_BSHK.dtype}, {k_BSGK.dtype}, {v_BSGV.dtype}")
    if segment_ids_BS is not None and segment_ids_BS.shape != (B, S):
        raise ValueError(f"segment_ids has shape {segment_ids_BS.shape}, but q needs {(B, S)}")
    scale = K**-0.5 if scale is None else scale
    if implementation == "reference":
        return softmax_attention_reference(q_BSHK, k_BSGK, v_BSGV, segment_ids_BS, scale)
    if implementation == "auto":
        implementation = _choose(q_BSHK, v_BSGV)
    if implementation == "blocked":
        return softmax_attention_blocked(q_BSHK, k_BSGK, v_BSGV, segment_ids_BS, scale, default_block(S))
    if implementation in ("tpu", "tpu_interpret"):
        interpret = _INTERPRET if implementation == "tpu_interpret" else False
        reason = unsupported(q_BSHK, v_BSGV) or (None if interpret else no_tpu_kernel_here())
        if reason is not None:
            raise NotImplementedError(f"implementation={implementation!r} cannot run: {reason}")
        kernels = Kernels(choose_blocks(q_BSHK, v_BSGV), interpret)
        return softmax_attention_tpu(q_BSHK, k_BSGK, v_BSGV, segment_ids_BS, scale, kernels)
    if implementation == "cudnn":
        if segment_ids_BS is not None or q_BSHK.dtype not in (jnp.bfloat16, jnp.float16):
            raise NotImplementedError("implementation='cudnn' takes bfloat16 or float16 and no segment_ids")
        return jax.nn.dot_product_attention(q_BSHK, k_BSGK, v_BSGV, scale=scale, is_causal=True, implementation="cudnn")
    raise ValueError(f"implementation={implementation!r} is not one of {', '.join(IMPLEMENTATIONS)}")


def _choose(q_BSHK: jax.Array, v_BSGV: jax.Array) -> str:
    if target_platform() != "tpu":
        return "blocked"
    reason = unsupported(q_BSHK, v_BSGV) or no_tpu_kernel_here()
    if reason is None:
        return "tpu"
    say_once(f"softmax attention takes the blocked form, not the TPU kernels: {reason}")
    return "blocked"
