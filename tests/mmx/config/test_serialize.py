"""config.json holds everything and is read strictly."""

import json

import pytest

from configs import minimax_text_01, quickstart
from mmx.config import ConfigError, MixturePoint, from_dict, load_json, save_json, to_dict


@pytest.mark.parametrize("recipe", [quickstart, minimax_text_01])
def test_round_trip(recipe, tmp_path):
    run = recipe.get_config()
    save_json(run, tmp_path / "config.json")
    assert load_json(tmp_path / "config.json") == run
    run.data.mixture_points = (MixturePoint(0, ("a=1",)), MixturePoint(9, ("a/long=1", "b=2")))
    save_json(run, tmp_path / "config.json")
    assert load_json(tmp_path / "config.json") == run


def test_strict():
    values = to_dict(quickstart.get_config())
    values["model"]["hiden_size"] = 1
    with pytest.raises(ConfigError, match=r"unknown field 'model.hiden_size'; did you mean 'hidden_size'"):
        from_dict(values)
    with pytest.raises(ConfigError, match=r"train.steps must be of type int, not 'ten'"):
        from_dict({"train": {"steps": "ten"}})
    with pytest.raises(ConfigError, match=r"train.steps must be of type int, not True"):
        from_dict({"train": {"steps": True}})
    with pytest.raises(ConfigError, match=r"data.mixture must be a list"):
        from_dict({"data": {"mixture": "a=1"}})
    assert from_dict({"optimizer": {"peak_lr": 1}}).optimizer.peak_lr == 1.0
    assert from_dict({"model": {"softmax_alpha": None}}).model.softmax_alpha is None


def test_missing_or_broken_file(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        load_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text('{"model": ')
    with pytest.raises(ConfigError, match="not valid JSON"):
        load_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text(json.dumps([1]))
    with pytest.raises(ConfigError, match="does not hold a configuration"):
        load_json(tmp_path / "config.json")
