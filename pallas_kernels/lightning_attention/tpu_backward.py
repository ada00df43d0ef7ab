"""Backward kernel of lightning attention for TPU: one pass over a row, from its end.

It starts from the states that the forward kernel left at the blocks' edges and recomputes those between chunks, so that
the residuals are one state a block. dscores serves dq and dk; the cotangent of the state stays in VMEM. Grid and layout
are the forward kernel's. Shapes: ``tpu_block.py``; D stands for heads x channels.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.lightning_attention.tpu_block import Boundaries, Chunk, Place, Tables, for_block, interleave
from pallas_kernels.lightning_attention.tpu_plan import F32, Plan

NAME = "lightning_attention_backward"
_STAGES = 3


def backward(
    plan: Plan,
    q_BSD: jax.Array,
    k_BSD: jax.Array,
    v_BSD: jax.Array,
    do_BSD: jax.Array,
    slopes_H: jax.Array,
    boundaries: Boundaries | None,
    states_BNHKV: jax.Array,
    dfinal_BHKV: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k, v and the initial state."""
    B, S, _ = q_BSD.shape
    H, G, K, V, N = slopes_H.shape[0] // plan.packed, plan.heads, plan.key, plan.value, plan.blocks
    from_the_end = lambda n: N - 1 - n  # noqa: E731
    return pl.pallas_call(
        functools.partial(_kernel, plan),
        out_shape=[
            *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q_BSD, k_BSD, v_BSD)),
            jax.ShapeDtypeStruct((B, H, K, V), F32),
        ],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2 if boundaries else 1,
            grid=(B, H // G, N),
            in_specs=[
                *plan.ends(from_the_end),
                *(plan.tokens(width, from_the_end) for width in (K, K, V, V)),
                plan.states(from_the_end),
                plan.state(),
            ],
            out_specs=[*(plan.tokens(width, from_the_end) for width in (K, K, V)), plan.state()],
            scratch_shapes=[
                pltpu.VMEM((G, K, V), F32),
                pltpu.VMEM((plan.chunks, G, K, V), plan.dtype),
                *Tables.scratch(plan),
            ],
        ),
        name=NAME,
        **plan.call(operands=(K, K, V, V), results=(K, K, V), flops=plan.flops(B * S * H, backward=True)),
    )(slopes_H, *(boundaries or ()), q_BSD, k_BSD, v_BSD, do_BSD, states_BNHKV, dfinal_BHKV)


def _kernel(plan: Plan, slopes_H, *refs) -> None:
    boundaries, refs = Boundaries.split(plan, refs)
    q_TD, k_TD, v_TD, do_TD, states_GKV, dfinal_GKV, *refs = refs
    dq_TD, dk_TD, dv_TD, dinitial_GKV, dcarried_GKV, entering_UGKV, *tables = refs
    tables = Tables(*tables)
    first_head, step = pl.program_id(1) * plan.heads, pl.program_id(2)
    slopes = plan.slopes(slopes_H, first_head)

    @pl.when(step == 0)
    def _():
        dcarried_GKV[...] = dfinal_GKV[...]
        for head in range(plan.heads):
            tables.fill(head, slopes(head))

    def work(place: Place | None) -> None:
        heads = range(plan.heads)
        chunks = [Chunk(plan, tables, slopes, boundaries, place, c) for c in range(plan.chunks)]
        for head in heads:
            entering_UGKV[0, head] = states_GKV[head].astype(plan.dtype)
        state = {head: states_GKV[head] for head in heads}
        for chunk in chunks[:-1]:
            for head in heads:
                w = chunk.weights(head)
                k_decayed_CK = w.scale(chunk.take(k_TD, head, plan.key), w.key_CW)
                summary_KV = plan.diagonal(plan.dot(k_decayed_CK, chunk.take(v_TD, head, plan.value), (0, 0)))
                state[head] = w.carry_1W[:, : plan.value] * state[head] + summary_KV
                entering_UGKV[chunk.index + 1, head] = state[head].astype(plan.dtype)
        dstate = {head: dcarried_GKV[head] for head in heads}

        def one(chunk: Chunk, head: int) -> Iterator[None]:
            q_CK, k_CK = (chunk.take(ref, head, plan.key) for ref in (q_TD, k_TD))
            v_CV, do_CV = (chunk.take(ref, head, plan.value) for ref in (v_TD, do_TD))
            w = chunk.weights(head)
            products_CC = [plan.dot(q_CK, own_CK, (1, 1)) for own_CK in plan.apart(k_CK)]
            dproducts_CC = [plan.dot(do_CV, own_CV, (1, 1)) for own_CV in plan.apart(v_CV)]
            do_decayed_CV = w.scale(do_CV, w.query_CW)
            yield
            scores_CC, dscores_CC = (
                [(x * w_CC).astype(plan.dtype) for x, w_CC in zip(products, w.intra_CC, strict=True)]
                for products in (products_CC, dproducts_CC)
            )
            yield
            state_KV, dstate_KV = entering_UGKV[chunk.index, head], dstate[head].astype(plan.dtype)
            if plan.tiles.fused:
                left = jnp.concatenate([*dscores_CC, do_decayed_CV], 1)
                dq_CK = plan.dot(left, jnp.concatenate([*plan.apart(k_CK), state_KV.T], 0))
            else:
                dq_CK = plan.dots(dscores_CC, k_CK) + plan.dot(do_decayed_CV, state_KV, (1, 1))
            chunk.put(dq_TD, head, plan.key, dq_CK)
            dk_CK = w.key_CW[:, : plan.key] * plan.dot(v_CV, dstate_KV, (1, 1))
            chunk.put(dk_TD, head, plan.key, dk_CK + plan.dots(dscores_CC, q_CK, (0, 0)))
            dv_CV = w.key_CW[:, : plan.value] * plan.dot(k_CK, dstate_KV)
            chunk.put(dv_TD, head, plan.value, dv_CV + plan.dots(scores_CC, do_CV, (0, 0)))
            dsummary_KV = plan.diagonal(plan.dot(q_CK, do_decayed_CV, (0, 0)))
            dstate[head] = w.carry_1W[:, : plan.value] * dstate[head] + dsummary_KV

        interleave([one(chunk, head) for chunk in reversed(chunks) for head in heads], _STAGES, plan.tiles.lag)
        for head, dstate_KV in dstate.items():
            dcarried_GKV[head] = dstate_KV

    for_block(plan, plan.blocks - 1 - step, boundaries, work)

    @pl.when(step == plan.blocks - 1)
    def _():
        dinitial_GKV[...] = dcarried_GKV[...]
