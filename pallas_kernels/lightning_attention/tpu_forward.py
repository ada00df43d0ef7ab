"""Forward kernel of lightning attention for TPU: one pass over a row, the state in VMEM.

Operands lie as projections give them, [B, S, heads x channels], and a program takes the lanes of its heads; nothing is
transposed. Grid: rows and groups of heads in parallel, the blocks of a row in order. Shapes: ``tpu_block.py``; D stands
for heads x channels, N for blocks.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.lightning_attention.tpu_block import Boundaries, Chunk, Place, Tables, for_block, interleave
from pallas_kernels.lightning_attention.tpu_plan import F32, Plan

NAME = "lightning_attention_forward"
_STAGES = 3


def forward(
    plan: Plan,
    q_BSD: jax.Array,
    k_BSD: jax.Array,
    v_BSD: jax.Array,
    slopes_H: jax.Array,
    boundaries: Boundaries | None,
    initial_BHKV: jax.Array,
    keep_states: bool,
) -> tuple[jax.Array, ...]:
    """Outputs [B, S, H x V], the final state [B, H, K, V] and, if kept, the blocks' entering states [B, N, H, K, V]."""
    B, S, _ = q_BSD.shape
    H, G, K, V, N = slopes_H.shape[0] // plan.packed, plan.heads, plan.key, plan.value, plan.blocks
    in_order = lambda n: n  # noqa: E731
    out_specs = [plan.tokens(V, in_order), plan.state()]
    out_shape = [jax.ShapeDtypeStruct((B, S, H * V), v_BSD.dtype), jax.ShapeDtypeStruct((B, H, K, V), F32)]
    if keep_states:
        out_specs.append(plan.states(in_order))
        out_shape.append(jax.ShapeDtypeStruct((B, N, H, K, V), F32))
    return pl.pallas_call(
        functools.partial(_kernel, plan, keep_states),
        out_shape=out_shape,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2 if boundaries else 1,
            grid=(B, H // G, N),
            in_specs=[
                *plan.ends(in_order),
                *(plan.tokens(width, in_order) for width in (K, K, V)),
                plan.state(),
            ],
            out_specs=out_specs,
            scratch_shapes=[pltpu.VMEM((G, K, V), F32), *Tables.scratch(plan)],
        ),
        name=NAME,
        **plan.call(operands=(K, K, V), results=(V,), flops=plan.flops(B * S * H, backward=False)),
    )(slopes_H, *(boundaries or ()), q_BSD, k_BSD, v_BSD, initial_BHKV)


def _kernel(plan: Plan, keep_states: bool, slopes_H, *refs) -> None:
    boundaries, refs = Boundaries.split(plan, refs)
    q_TD, k_TD, v_TD, initial_GKV, o_TD, final_GKV, *states_GKV, carried_GKV, intra_GCC, query_GCW, key_GCW = refs
    tables = Tables(intra_GCC, query_GCW, key_GCW)
    first_head, block = pl.program_id(1) * plan.heads, pl.program_id(2)
    slopes = plan.slopes(slopes_H, first_head)

    @pl.when(block == 0)
    def _():
        carried_GKV[...] = initial_GKV[...]
        for head in range(plan.heads):
            tables.fill(head, slopes(head))

    if keep_states:
        states_GKV[0][...] = carried_GKV[...]

    def work(place: Place | None) -> None:
        state = {head: carried_GKV[head] for head in range(plan.heads)}

        def one(chunk: Chunk, head: int) -> Iterator[None]:
            q_CK, k_CK = (chunk.take(ref, head, plan.key) for ref in (q_TD, k_TD))
            v_CV = chunk.take(v_TD, head, plan.value)
            w = chunk.weights(head)
            products_CC = [plan.dot(q_CK, own_CK, (1, 1)) for own_CK in plan.apart(k_CK)]
            k_decayed_CK = w.scale(k_CK, w.key_CW)
            yield
            scores_CC = [(x * w_CC).astype(v_CV.dtype) for x, w_CC in zip(products_CC, w.intra_CC, strict=True)]
            yield
            state_KV = state[head].astype(plan.dtype)
            if plan.tiles.fused:
                q_decayed_CK = w.scale(q_CK, w.query_CW)
                left = jnp.concatenate([*scores_CC, q_decayed_CK], 1)
                o_CV = plan.dot(left, jnp.concatenate([*plan.apart(v_CV), state_KV], 0))
            else:
                o_CV = plan.dots(scores_CC, v_CV) + w.query_CW[:, : plan.value] * plan.dot(q_CK, state_KV)
            chunk.put(o_TD, head, plan.value, o_CV)
            state[head] = w.carry_1W[:, : plan.value] * state[head] + plan.diagonal(
                plan.dot(k_decayed_CK, v_CV, (0, 0))
            )

        chunks = [Chunk(plan, tables, slopes, boundaries, place, c) for c in range(plan.chunks)]
        interleave([one(chunk, head) for chunk in chunks for head in range(plan.heads)], _STAGES, plan.tiles.lag)
        for head, state_KV in state.items():
            carried_GKV[head] = state_KV

    for_block(plan, block, boundaries, work)

    @pl.when(block == plan.blocks - 1)
    def _():
        final_GKV[...] = carried_GKV[...]
