"""jax's splash attention kernels, called one by one.

jax's own operation around them refuses to differentiate what gives away the log-sum-exp, and its backward pass takes
that of its own keys. The kernels by themselves are private to jax, whose versions ``setup.py`` bounds: this is the only
file that knows them.

Shapes: S queries, T keys, H query heads, G key-value heads, K key channels, V value channels.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.splash_attention import BlockSizes, SegmentIds
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo
from jax.extend.core import jaxpr_as_fun

from pallas_kernels.softmax_attention.tpu_tables import not_behind


class Kernels(NamedTuple):
    """The kernels, for given blocks."""

    blocks: BlockSizes
    interpret: Any  # what ``pallas_call`` takes

    def forward(self, q_HSK, k_GTK, v_GTV, segment_ids: SegmentIds | None, tables: MaskInfo):
        """o [H, S, V] in q's dtype and the log-sum-exp of the scores [H, S], fp32; ``tables`` by queries."""
        o_HSV, (lse_HS,) = splash._splash_attention_forward(
            tables,
            *(q_HSK, k_GTK, v_GTV, segment_ids, None),
            **_SETTINGS,
            block_sizes=self.blocks,
            residual_checkpoint_name=None,
            save_residuals=True,
            interpret=self.interpret,
        )
        return o_HSV, lse_HS

    def backward(
        self,
        of_queries: tuple[jax.Array, ...],
        of_keys: tuple[jax.Array, ...],
        segment_ids: SegmentIds | None,
        q_tables: MaskInfo | None,
        k_tables: MaskInfo,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Gradients, rounded to the operands' dtype.

        One kernel gives all three where the blocks say so, with what each block of keys adds to dq in memory, rounded;
        else scores are computed twice, for dq and for dk and dv.

        Args:
          of_queries: q [H, S, K], do [H, S, V], and in fp32 [H, S] the log-sum-exp over all keys and the sum of do * o.
          of_keys: k [G, T, K], v [G, T, V].
          q_tables, k_tables: by queries and by keys; the one kernel needs none by queries.

        Returns:
          dq [H, S, K], dk [G, T, K], dv [G, T, V].
        """
        blocks, layouts = self.blocks, ("q_layout", "k_layout", "v_layout")
        settings = _SETTINGS | {name: getattr(blocks, name) for name in layouts} | {"interpret": self.interpret}

        def kernels(q_HSK, do_HSV, lse_HS, delta_HS, k_GTK, v_GTV):
            operands = q_HSK, k_GTK, v_GTV, segment_ids, None, lse_HS, do_HSV, delta_HS
            by_keys = functools.partial(
                splash._splash_attention_bwd_dkv,
                **settings,
                bq=blocks.block_q_dkv,
                bkv=blocks.block_kv_dkv,
                bkv_compute=blocks.block_kv_dkv_compute,
                mask_info=k_tables,
                use_fused_bwd_kernel=blocks.use_fused_bwd_kernel,
            )
            if blocks.use_fused_bwd_kernel:
                dq_MHSK, dk_GTK, dv_GTV = _before_the_sum(by_keys, operands)
                dq_HSK = functools.reduce(jnp.add, (share_HSK.astype(jnp.float32) for share_HSK in dq_MHSK))
                return dq_HSK.astype(q_HSK.dtype), dk_GTK, dv_GTV
            _, dk_GTK, dv_GTV = by_keys(*operands)
            dq_HSK = splash._splash_attention_bwd_dq(
                *operands, **settings, bq=blocks.block_q_dq, bkv=blocks.block_kv_dq, mask_info=q_tables
            )
            return dq_HSK, dk_GTK, dv_GTV

        # jax 0.10.2's stricter interpreter does not follow a grid with the dimension that halves add.
        if isinstance(self.interpret, pltpu.InterpretParams):
            return kernels(*of_queries, *of_keys)
        return _on_two_cores(kernels, of_queries, of_keys)


# What all kernels are told alike.
_SETTINGS = {
    "mask_value": splash.DEFAULT_MASK_VALUE,
    "is_mqa": False,
    "mask_function": not_behind,
    "attn_logits_soft_cap": None,
}


def _before_the_sum(by_keys: Callable, operands: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq's shares of each block of keys [M, H, S, K], dk and dv, as the kernel of all gradients leaves them.

    jax sums the shares by a reduction, which the TPU compiler does not fuse: 7.9 ms for eight of 64 heads and 16K
    tokens on a v5p, where additions take 1.5. Its function is traced, and the trace is cut behind the kernel.
    """
    leaves, tree = jax.tree.flatten(operands)
    traced = jax.make_jaxpr(lambda *leaves: by_keys(*jax.tree.unflatten(tree, leaves)))(*leaves)
    equations = traced.jaxpr.eqns
    (end,) = (n for n, equation in enumerate(equations) if equation.primitive.name == "pallas_call")
    results = equations[end].outvars[-3:]
    names = traced.jaxpr.debug_info._replace(result_paths=("dq_MHSK", "dk_GTK", "dv_GTV"))
    until_kernel = traced.jaxpr.replace(eqns=equations[: end + 1], outvars=results, debug_info=names)
    dq_MHSK, dk_GTK, dv_GTV = jaxpr_as_fun(traced.replace(jaxpr=until_kernel))(*leaves)
    return dq_MHSK, dk_GTK, dv_GTV


def _on_two_cores(kernels: Callable, of_queries: tuple[jax.Array, ...], of_keys: tuple[jax.Array, ...]):
    """``kernels(*of_queries, *of_keys)``, on both cores of a chip that has two.

    The kernels of the backward pass declare that their grids run in order, which is on one core. A dimension that vmap
    adds runs on both: here the two halves of the heads.
    """
    H, G = len(of_queries[0]), len(of_keys[0])
    if H % 2 or (G > 1 and G % 2):
        return kernels(*of_queries, *of_keys)

    def halve(x):
        return x.reshape(2, -1, *x.shape[1:])

    of_queries = tuple(map(halve, of_queries))
    if G == 1:
        dq_2HSK, *dkv_2GT = jax.vmap(lambda *halves: kernels(*halves, *of_keys))(*of_queries)
        # Each half of the query heads has a share in the gradients of the one head of keys.
        dk_GTK, dv_GTV = (jnp.sum(x, axis=0, dtype=jnp.float32) for x in dkv_2GT)
    else:
        dq_2HSK, *dkv_2GT = jax.vmap(kernels)(*of_queries, *map(halve, of_keys))
        dk_GTK, dv_GTV = (x.reshape(-1, *x.shape[2:]) for x in dkv_2GT)
    return dq_2HSK.reshape(-1, *dq_2HSK.shape[2:]), dk_GTK, dv_GTV
