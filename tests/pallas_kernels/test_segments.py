"""Numbers of documents and of tokens within them."""

import jax.numpy as jnp
import numpy as np

from pallas_kernels.segments import document_positions, document_runs, document_starts


def test_documents_are_runs_of_one_id():
    ids = jnp.asarray([[7, 7, 3, 3, 3, 7], [0, 1, 2, 3, 4, 5], [2, 2, 2, 2, 2, 2]])
    np.testing.assert_array_equal(document_starts(ids), [[0, 0, 1, 0, 0, 1], [0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(document_runs(ids), [[0, 0, 1, 1, 1, 2], [0, 1, 2, 3, 4, 5], [0] * 6])
    np.testing.assert_array_equal(document_positions(ids), [[0, 1, 0, 1, 2, 0], [0] * 6, [0, 1, 2, 3, 4, 5]])


def test_numbers_of_documents_in_long_rows():
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 3, (2, 2500)))
    np.testing.assert_array_equal(document_runs(ids), np.cumsum(document_starts(ids), axis=1))
