"""Lightning attention: the operation that the rest of the project calls, and the choice of its implementation.

Shapes: B batch, S tokens, H heads, K key channels, V value channels.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.lightning_attention.blocked import lightning_attention_blocked
from pallas_kernels.lightning_attention.reference import lightning_attention_reference
from pallas_kernels.lightning_attention.tpu import lightning_attention_tpu
from pallas_kernels.lightning_attention.tpu_tiles import choose_tiles, unsupported
from pallas_kernels.platform import no_tpu_kernel_here, say_once, target_platform

IMPLEMENTATIONS = ("auto", "reference", "blocked", "tpu", "gpu", "tpu_interpret", "gpu_interpret")

# Tokens in a block, by target platform. The released model trains with 256; on a CPU the scores of a shorter block
# cost less and stay in cache (BUILD_NOTES.md has the measurements).
_BLOCK = {"cpu": 64, "gpu": 256, "tpu": 256}
# Bytes of fp32 scores that one group of blocks may hold at once; 0 works on one block at a time.
_GROUP_BYTES = {"cpu": 0, "gpu": 2**28, "tpu": 2**28}
# Memory that nobody wrote reads as NaN.
_INTERPRET = pltpu.InterpretParams(uninitialized_memory="nan")


def lightning_attention(
    q_BSHK: jax.Array,
    k_BSHK: jax.Array,
    v_BSHV: jax.Array,
    slopes_H: jax.Array,
    *,
    segment_ids_BS: jax.Array | None = None,
    initial_state_BHKV: jax.Array | None = None,
    implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """Causal linear attention with a constant decay a head, without scale (report section 2.1, released code).

    ``o_t = q_t^T S_t`` and ``S_t = exp(-slope) S_{t-1} + k_t v_t^T``. A document begins wherever the segment id differs
    from the token before; there the state starts from zero. The initial state belongs to the row's first document.

    Args:
      q_BSHK, k_BSHK, v_BSHV: queries, keys and values of one floating dtype; S may be any length from 1.
      slopes_H: decay slopes, not negative; constants, so their gradient is zero.
      segment_ids_BS: integer document ids, or None for one document a row.
      initial_state_BHKV: state before the first token, zero if None.
      implementation: "auto", or one of ``IMPLEMENTATIONS`` to force it. "auto" takes the kernel of the platform that
        the code is traced for (the mesh's, never the host's where a mesh is in scope), and "blocked" where there is no
        kernel or it does not take the call; the log says why once. "tpu_interpret" simulates the TPU kernel on a CPU.

    Returns:
      o [B, S, H, V] in v's dtype, and the state after the last token [B, H, K, V], of that token's document, in fp32
      (float64 for float64 inputs).

    Raises:
      ValueError: if shapes or dtypes do not fit, or the implementation is unknown.
      NotImplementedError: if a forced implementation cannot run, with the reason.
    """
    _check(q_BSHK, k_BSHK, v_BSHV, slopes_H, segment_ids_BS, initial_state_BHKV)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    (B, S, H, K), V = q_BSHK.shape, v_BSHV.shape[-1]
    state_dtype = jnp.promote_types(jnp.float32, q_BSHK.dtype)
    if initial_state_BHKV is None:
        initial_state_BHKV = jnp.zeros((B, H, K, V), state_dtype)
    arguments = (
        *(q_BSHK, k_BSHK, v_BSHV, jax.lax.stop_gradient(slopes_H), segment_ids_BS),
        initial_state_BHKV.astype(state_dtype),
    )
    if implementation == "reference":
        return lightning_attention_reference(*arguments)
    if implementation == "auto":
        implementation = _choose(q_BSHK, v_BSHV)
    if implementation == "blocked":
        platform = target_platform()
        block = min(_BLOCK[platform], S)
        group = max(1, _GROUP_BYTES[platform] // (4 * B * H * block * block))
        return lightning_attention_blocked(*arguments, block, group)
    if implementation in ("tpu", "tpu_interpret"):
        interpret = _INTERPRET if implementation == "tpu_interpret" else False
        reason = unsupported(q_BSHK, v_BSHV) or (None if interpret else no_tpu_kernel_here())
        if reason is not None:
            raise NotImplementedError(f"implementation={implementation!r} cannot run: {reason}")
        return lightning_attention_tpu(*arguments, *choose_tiles(q_BSHK, v_BSHV), interpret)
    raise NotImplementedError(
        f"implementation={implementation!r}: this kernel is not written yet; use 'auto', which takes 'blocked'"
    )


def _choose(q_BSHK: jax.Array, v_BSHV: jax.Array) -> str:
    if target_platform() != "tpu":
        return "blocked"
    reason = unsupported(q_BSHK, v_BSHV) or no_tpu_kernel_here()
    if reason is None:
        return "tpu"
    say_once(f"lightning attention takes the blocked form, not the TPU kernel: {reason}")
    return "blocked"


def _check(q_BSHK, k_BSHK, v_BSHV, slopes_H, segment_ids_BS, initial_state_BHKV) -> None:
    if q_BSHK.ndim != 4 or v_BSHV.ndim != 4:
        raise ValueError(f"q and v must be [B, S, H, channels], not {q_BSHK.shape} and {v_BSHV.shape}")
    (B, S, H, K), V = q_BSHK.shape, v_BSHV.shape[-1]
    expected = {
        "k": (k_BSHK, (B, S, H, K)),
        "v": (v_BSHV, (B, S, H, V)),
        "slopes": (slopes_H, (H,)),
        "segment_ids": (segment_ids_BS, (B, S)),
        "initial_state": (initial_state_BHKV, (B, H, K, V)),
    }
    for name, (array, shape) in expected.items():
        if array is not None and array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}, but q {q_BSHK.shape} and v need {shape}")
    if S < 1:
        raise ValueError("the sequence is empty: S must be at least 1")
    if not (q_BSHK.dtype == k_BSHK.dtype == v_BSHV.dtype and jnp.issubdtype(q_BSHK.dtype, jnp.floating)):
        raise ValueError(f"q, k and v need one floating dtype, not {q_BSHK.dtype}, {k_BSHK.dtype}, {v_BSHV.dtype}")
    if segment_ids_BS is not None and not jnp.issubdtype(segment_ids_BS.dtype, jnp.integer):
        raise ValueError(f"segment_ids must be integers, not {segment_ids_BS.dtype}")
