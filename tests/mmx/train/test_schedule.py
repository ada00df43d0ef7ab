"""The learning rate, against the report's numbers."""

import pytest

from configs.minimax_text_01 import T, get_config
from mmx.config import OptimizerConfig, Phase
from mmx.train.schedule import learning_rate

STEP = 2048 * 8192


def test_report_schedule():
    config = get_config().optimizer

    def rate(tokens):
        return learning_rate(config, tokens, STEP)

    assert rate(STEP) == pytest.approx(2e-4 / 500)
    assert rate(250 * STEP) == pytest.approx(1e-4)
    assert rate(500 * STEP) == pytest.approx(2e-4)
    warmup = 500 * STEP
    assert rate(warmup + 7 * T) == pytest.approx(2e-4)
    assert rate(warmup + 75 * T // 10) == pytest.approx(1.3e-4)
    halfway = warmup + 104 * T // 10 + T // 2
    assert rate(halfway) == pytest.approx((1.3e-4 * 3e-5) ** 0.5)  # Exponential: the geometric mean.
    assert rate(warmup + 114 * T // 10) == pytest.approx(3e-5)
    assert rate(20 * T) == pytest.approx(3e-5)


def test_kinds():
    phases = (Phase("linear", 1.0, steps=10), Phase("cosine", 0.2, steps=10), Phase("linear", 0.0, tokens=100))
    config = OptimizerConfig(peak_lr=2.0, schedule=phases)
    got = [learning_rate(config, tokens, 10) for tokens in (10, 100, 150, 200, 250, 300, 999)]
    assert got == pytest.approx([0.2, 2.0, 2.0 * 0.6, 0.4, 0.2, 0.0, 0.0])


def test_steps_of_a_phase_do_not_stretch_with_the_batch():
    # A phase in steps is a number of tokens at the initial batch; only tokens decide the rate.
    config = OptimizerConfig(peak_lr=1.0, schedule=(Phase("linear", 1.0, steps=100), Phase("constant", 1.0)))
    assert learning_rate(config, 500, 10) == pytest.approx(0.5)
