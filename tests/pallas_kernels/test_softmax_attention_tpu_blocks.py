"""The choice of splash attention's block sizes, and the search that fills its table."""

import json

import jax
import numpy as np
import pytest

from pallas_kernels import tune
from pallas_kernels.aot import CHIPS, ProfileError
from pallas_kernels.softmax_attention import tpu_blocks, tpu_figures, tpu_search
from pallas_kernels.softmax_attention.tpu_blocks import PRODUCTS, Sizes, choose_blocks, share_of_peak

KIND = "TPU v5"


def write_table(path, **shares):
    """A table that knows one kind of device, with sizes and shares alike for kernels that are not named."""
    row = {"device": KIND, "dtype": "bfloat16", "channels": 128}
    kernels = {kernel: shares.get(kernel, shares["all"]) for kernel in PRODUCTS}
    path.write_text(json.dumps({"rows": [row | kernels]}))


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Where a table of the test's own is to be written."""
    path = tmp_path / "blocks.json"
    write_table(path, all=[[512, 512, 512, 0.8], [1024, 2048, 512, 0.9]])
    monkeypatch.setattr(tpu_blocks, "TABLE", path)
    monkeypatch.setattr(tpu_search, "TABLE", path)
    forget()
    yield path
    forget()


def forget():
    tpu_blocks._table.cache_clear()
    tpu_blocks._choose.cache_clear()


def blocks(tokens, kind=KIND, channels=128, dtype="bfloat16", **how):
    q = jax.ShapeDtypeStruct((1, tokens, 4, channels), dtype)
    chosen = choose_blocks(q, q, kind, **how)
    forward = chosen.block_q, chosen.block_kv, chosen.block_kv_compute
    dkv = chosen.block_q_dkv, chosen.block_kv_dkv, chosen.block_kv_dkv_compute
    assert chosen.use_fused_bwd_kernel == (chosen.block_q_dq is None)
    return (forward, dkv) if chosen.use_fused_bwd_kernel else (forward, (chosen.block_q_dq, chosen.block_kv_dq), dkv)


@pytest.mark.parametrize("sizes", [(128, 128), (128, 512), (512, 128)])
def test_pairs_of_a_causal_row(sizes):
    length, (q, k) = 1024, sizes
    causal = np.tril(np.ones((length, length), bool))
    computed = causal.reshape(length // q, q, length // k, k).any((1, 3)).sum() * q * k
    assert Sizes(q, k, k).causal_pairs(length) == computed


def test_long_rows_take_the_sizes_that_reach_most_and_short_ones_those_that_waste_least(table):
    small, large = (512, 512, 512), (1024, 2048, 512)
    assert blocks(2**17) == (large, large[:2], large)
    assert blocks(4096) == (small, small)
    assert blocks(4096, whole_row=False) == (large, large)
    # Rows are padded to a multiple of the largest.
    assert blocks(2**16 + 1) == (large, large[:2], large)
    assert blocks(4096 + 1) == (small, small[:2], small)
    # Of small ones a long row has more than tables have room for.
    write_table(table, all=[[512, 512, 512, 0.9], [1024, 2048, 512, 0.8]])
    forget()
    assert blocks(2**17) == (small, small[:2], small)
    assert blocks(2**19) == (large, large[:2], large)


def test_kernels_differ(table):
    one, two = [[512, 512, 512, 0.9]], [[1024, 2048, 256, 0.9]]
    write_table(table, all=one, dkv=two)
    forget()
    assert blocks(2**15) == (tuple(one[0][:3]), (512, 512), tuple(two[0][:3]))


def test_one_kernel_backward_where_its_shares_of_dq_are_few(table):
    forward, fused = (512, 512, 512), (1024, 2048, 512)
    write_table(table, all=[[*forward, 0.9]], fused=[[*forward, 0.9], [*fused, 0.8]])
    forget()
    assert blocks(4096) == (forward, forward)
    # Eight shares of dq at most.
    assert blocks(2**14) == (forward, fused)
    assert blocks(2**14 + 1) == (forward, forward[:2], forward)
    # Five products instead of seven, unless they are slower by as much.
    write_table(table, all=[[*forward, 0.9]], fused=[[*forward, 0.6]])
    forget()
    assert blocks(4096) == (forward, forward[:2], forward)


def test_sizes_without_a_count():
    assert blocks(2**15, kind="TPU v4")[0] == (1024, 2048, 512)
    assert blocks(2**15, kind="TPU v4", dtype="float32")[0] == (512, 1024, 512)
    assert blocks(2**15, channels=256)[0] == (512, 1024, 512)
    # No longer than the row.
    assert blocks(300, kind="TPU v4")[0] == (512, 512, 512)
    assert blocks(5)[0] == (128, 128, 128)
    assert share_of_peak("TPU v4", "fwd", 8192, whole_row=True) is None


def test_both_spellings_of_a_kind(table):
    assert blocks(4096, kind="TPU v5p") == blocks(4096)


def test_a_row_loses_what_is_computed_above_its_diagonal(table):
    assert share_of_peak(KIND, "fused", 4096, whole_row=False) == 0.9
    assert share_of_peak(KIND, "fused", 4096, whole_row=True) == pytest.approx(0.8 * 8 / 9, rel=1e-3)


def test_the_table_in_the_repository_is_of_every_chip():
    for name in ("v5e", "v5p", "v6e", "tpu7x"):
        for kernel in PRODUCTS:
            for length, least in ((128, 0.05), (512, 0.05), (1024, 0.1), (8192, 0.2)):
                assert least < share_of_peak(CHIPS[name].device_kind, kernel, length, whole_row=True) < 1


def test_the_search_keeps_what_compiles(table, monkeypatch, capsys):
    def predict(call, chip):
        if call.sizes.queries == 2048:
            raise ProfileError("does not fit")
        return 0.5 + call.sizes.compute / 10_000

    monkeypatch.setattr(tpu_figures.Call, "predict", predict)
    monkeypatch.setattr(tpu_search, "compiler_version", lambda: "0")
    monkeypatch.setattr(tune, "missing_compiler", lambda: None)
    assert tune.main(["--kernels=softmax", "--chips=v6e"]) == 0
    assert "queries=2048 keys=1024 compute=1024: does not fit" in capsys.readouterr().out
    rows = {row["device"]: row for row in json.loads(table.read_text())["rows"]}
    assert rows.keys() == {KIND, "TPU v6 lite"}
    found = rows["TPU v6 lite"]
    assert [1024, 2048, 256, 0.526] in found["fwd"]
    # Then with as many keys at a time as were best.
    assert [1024, 1024, 1024, 0.602] in found["dkv"]
    assert not any(queries == 2048 for kernel in PRODUCTS for queries, *_ in found[kernel])
    forget()
    assert blocks(2**17, kind="TPU v6e")[0][2] == 1024


def test_a_search_for_what_there_is_not(capsys):
    assert tune.main(["--kernels=softmax,linear"]) == 1
    assert "--kernels: 'linear' is not one of lightning, softmax" in capsys.readouterr().err
    assert tune.main(["--chips=v9"]) == 1
    assert "--chips: 'v9' is not one of v4, v5e" in capsys.readouterr().err
