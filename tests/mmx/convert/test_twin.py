"""What we write, read by Transformers: every tensor found, none unexpected, the same logits."""

import dataclasses

import numpy as np
import pytest

from mmx.config import HYBRID_PERIOD, ConfigError, ModelConfig
from mmx.convert.conversion import convert
from mmx.convert.twin import TOLERANCE, can_compare, small_twin, twin_difference
from tests.tiny import tiny

torch = pytest.importorskip("torch", reason="PyTorch is not installed: bash tests/run.sh installs a CPU build")
transformers = pytest.importorskip("transformers", reason="Transformers is not installed")

from mmx.convert.twin import load_in_transformers  # noqa: E402
from mmx.model.text import bind  # noqa: E402
from tests.mmx.convert.checkpoints import write_directory  # noqa: E402
from tests.tiny import tokens  # noqa: E402


def test_small_twin_of_the_released_model():
    released = ModelConfig(
        num_layers=80, layer_pattern=HYBRID_PERIOD * 10, num_heads=64, num_kv_heads=8, head_dim=128, rotary_dim=64
    )
    twin = small_twin(released)
    twin.validate()
    assert twin.layer_pattern == HYBRID_PERIOD * 2
    assert (twin.num_heads, twin.num_kv_heads, twin.head_dim, twin.rotary_dim) == (16, 2, 16, 8)
    assert twin.alpha("softmax") == pytest.approx(3.5565588200778455)


def test_difference_is_small_and_would_not_be_without_the_correction(monkeypatch):
    config = tiny(num_heads=6, num_kv_heads=3)
    assert twin_difference(config) < TOLERANCE
    monkeypatch.setattr("mmx.convert.twin._partial_rope", lambda dim, half, q, k, *tables: (q, k))
    assert twin_difference(config) > 100 * TOLERANCE


def test_what_cannot_be_compared():
    assert can_compare(tiny()) == ""
    assert "no pre-norm" in can_compare(tiny(postnorm=False))


def test_exported_directory_in_transformers_as_it_is(tmp_path):
    """A model that the unmodified class computes, through files, loaded as its users load it."""
    config = tiny(rotary_dim=8, slope_rule="transformers", num_heads=6, num_kv_heads=3)
    write_directory(tmp_path / "released", dataclasses.replace(config, slope_rule="transformers"), "transformers")
    arguments = {"shard_bytes": 30_000, "dtype": "float32", "verify": False, "dry_run": False, "say": lambda _: None}
    convert(tmp_path / "released", tmp_path / "run", layout=None, **arguments)
    convert(tmp_path / "run", tmp_path / "exported", layout="transformers", **arguments)

    assert type(load_in_transformers(tmp_path / "exported")) is transformers.MiniMaxForCausalLM
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported").eval()
    ids = tokens(2, 75)
    with torch.no_grad():
        want = model(torch.tensor(ids).long(), use_cache=False).logits.numpy()
    import mmx

    ours = mmx.load(tmp_path / "exported")
    assert ours.config.dtype == "float32"
    np.testing.assert_allclose(ours.logits(ids), want, atol=TOLERANCE)
    assert bind(ours.config, ours.params) is not None


def test_missing_tensors_are_named(tmp_path):
    config = tiny(rotary_dim=8, slope_rule="transformers")
    write_directory(tmp_path / "hf", dataclasses.replace(config, num_layers=3, layer_pattern=config.layer_pattern[:3]))
    fields = (tmp_path / "hf" / "config.json").read_text()
    wrong = fields.replace("minimax_text_01", "minimax").replace('"num_hidden_layers": 3', '"num_hidden_layers": 4')
    (tmp_path / "hf" / "config.json").write_text(wrong)
    with pytest.raises(ConfigError, match=r"Transformers does not find in .*model\.layers"):
        load_in_transformers(tmp_path / "hf")
