"""Attention to parts of the keys: parts join to the whole, and what lies behind or elsewhere is not seen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.softmax_attention.part import Places, attention_part, attention_part_gradients, visible_blocks
from pallas_kernels.softmax_attention.reference import softmax_attention_reference

B, S, H, G, K, V = 2, 40, 4, 2, 8, 6
BLOCK, SCALE = 7, 0.3
# Documents of 13 and 27 tokens in one row, of 1, 29 and 10 in the other.
RUNS = np.stack([np.repeat([0, 1], [13, 27]), np.repeat([0, 1, 2], [1, 29, 10])])
PLACES = Places(np.arange(S)[None], RUNS)


def operands():
    rng = np.random.default_rng(0)
    return [rng.normal(size=(B, S, heads, width)) for heads, width in ((H, K), (G, K), (G, V), (H, V))]


def at(index):
    return Places(PLACES.positions_BS[:, index], PLACES.runs_BS[:, index])


@pytest.mark.usefixtures("float64")
def test_parts_join_to_the_whole():
    q, k, v, do = operands()
    o, back = jax.vjp(lambda q, k, v: softmax_attention_reference(q, k, v, RUNS, SCALE), q, k, v)
    want = back(jnp.asarray(do))
    # Two parts of keys that lie in between each other, neither a whole number of blocks.
    parts = np.arange(S)[np.arange(S) % 10 < 4], np.arange(S)[np.arange(S) % 10 >= 4]
    found = [attention_part(q, k[:, part], v[:, part], PLACES, at(part), SCALE, BLOCK) for part in parts]
    lse = jnp.logaddexp(*(lse for _, lse in found))
    joined = sum(jnp.exp(part_lse - lse)[..., None] * part for part, part_lse in found)
    np.testing.assert_allclose(joined, o, atol=1e-12)

    delta = jnp.sum(do * o, axis=-1)
    dq = 0
    for part in parts:
        operands_of = (q, k[:, part], v[:, part], PLACES, at(part), SCALE, BLOCK)
        more, dk, dv = attention_part_gradients(*operands_of, jnp.asarray(do), lse, delta)
        dq += more
        np.testing.assert_allclose(dk, want[1][:, part], atol=1e-12)
        np.testing.assert_allclose(dv, want[2][:, part], atol=1e-12)
    np.testing.assert_allclose(dq, want[0], atol=1e-12)


def test_queries_that_see_nothing():
    q, k, v, _ = (jnp.asarray(x, jnp.float32) for x in operands())
    early, late = np.arange(20), np.arange(20, 40)
    o, lse = attention_part(q[:, early], k[:, late], v[:, late], at(early), at(late), SCALE, BLOCK)
    np.testing.assert_array_equal(o, 0)
    assert (lse < -1e29).all()
    assert np.isfinite(lse).all()


def test_visible_blocks():
    first, end = visible_blocks(PLACES, PLACES, 10)
    # Of keys 0..9, 10..19, 20..29, 30..39: the documents of both rows begin in blocks 0, 1 and 3 at the earliest.
    np.testing.assert_array_equal(end, [1, 2, 3, 4])
    np.testing.assert_array_equal(first, [0, 0, 0, 1])
    # Keys all behind, and rows of one document.
    first, end = visible_blocks(at(np.arange(20)), at(np.arange(20, 40)), 10)
    np.testing.assert_array_equal(np.maximum(end - first, 0), 0)
    first, end = visible_blocks(PLACES._replace(runs_BS=None), PLACES._replace(runs_BS=None), 10)
    np.testing.assert_array_equal((first, end), ([0] * 4, [1, 2, 3, 4]))
