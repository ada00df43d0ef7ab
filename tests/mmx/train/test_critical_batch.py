"""The fit of the critical batch size: the report's marks, and runs whose noise follows a known law."""

import json

import numpy as np
import pytest

from mmx.config import ConfigError, ModelConfig, Run, save_json
from mmx.train.critical_batch import PICTURE, REPORT_MARKS, PowerLaw, fit_power_law, run_points, write_critical_batch

LAW = PowerLaw(scale=4e6, exponent=-5.0)


def write_run(workdir, losses, hidden_size: int = 64, noisy: bool = True):
    """A workdir as a run leaves it, whose steps scatter around the law."""
    workdir.mkdir()
    save_json(Run(model=ModelConfig(hidden_size=hidden_size)), workdir / "config.json")
    rng, run = np.random.default_rng(0), Run()
    tokens_per_step = run.data.batch_size * run.data.sequence_length
    warmup = run.optimizer.schedule[0].steps
    rows = []
    for step in range(1, warmup + len(losses) + 1):
        loss = 9.0 if step <= warmup else losses[step - warmup - 1]
        # Single steps are noise all over, with estimates of |G|^2 below zero among them.
        square = rng.normal(0.02, 0.05 if noisy else 0) if step > warmup else 99.0
        row = {"loss": loss, "gradient_square": square, "gradient_variance": 0.02 * LAW.tokens(loss)}
        rows.append({"step": step, "tokens": step * tokens_per_step, **row})
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return workdir


def test_the_reports_marks_lie_on_a_power_law():
    law = fit_power_law(list(REPORT_MARKS), list(REPORT_MARKS.values()))
    assert law.exponent == pytest.approx(-6.12, abs=0.01)
    assert law.scale == pytest.approx(2.10e9, rel=0.01)
    for loss, tokens in REPORT_MARKS.items():
        assert law.tokens(loss) == pytest.approx(tokens, rel=0.01)
        assert law.loss(tokens) == pytest.approx(loss, rel=0.002)


def test_fits_several_runs_together(tmp_path):
    runs = [
        write_run(tmp_path / "narrow", np.geomspace(4.5, 3.2, 800)),
        write_run(tmp_path / "wide", np.geomspace(4.2, 2.4, 800), hidden_size=128),
    ]
    fit = write_critical_batch(runs, tmp_path / "out")
    assert fit["exponent"] == pytest.approx(LAW.exponent, rel=0.1)
    # The runs' batch is 4,096 tokens; it doubles where the law says.
    for tokens, loss in fit["doubling_marks"].items():
        assert loss == pytest.approx(LAW.loss(float(tokens)), rel=0.05)
    assert list(fit["doubling_marks"]) == ["8192", "16384", "32768"]
    assert (tmp_path / "out" / PICTURE).read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "out" / "critical_batch.json").read_text())["exponent"] == fit["exponent"]


def test_points_leave_the_warm_up_out(tmp_path):
    points = run_points(write_run(tmp_path / "run", np.geomspace(4.0, 3.0, 400), noisy=False))
    assert max(points.losses) <= 4.0
    np.testing.assert_allclose(points.sizes, LAW.tokens(np.asarray(points.losses)), rtol=0.03)


def test_runs_without_the_noise_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"needs 30: train longer, with --config.train.micro_batches=4"):
        run_points(write_run(tmp_path / "run", [3.0, 2.9]))
    with pytest.raises(ConfigError, match="two losses at least"):
        fit_power_law([3.0, 3.0], [1e4, 2e4])
