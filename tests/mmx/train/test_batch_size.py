"""When the batch doubles."""

import numpy as np
import pytest

from mmx.train.batch_size import BatchGrowth


def sizes(growth: BatchGrowth, losses, first_step: int = 1) -> list[int]:
    """How often the batch of each step had doubled, each loss becoming known while the next step runs."""
    seen = []
    for step, loss in enumerate(losses, first_step):
        seen.append(growth.doublings(step))
        growth.observe(step, loss)
    return seen


def test_doubles_at_the_marks_and_not_before():
    # Without smoothing the average is the loss: at or below 3.0 from step 11 on, below 2.0 from step 21 on.
    losses = [4.0] * 10 + [3.0] * 10 + [1.9] * 10
    seen = sizes(BatchGrowth((3.0, 2.0), smoothing=1, patience=4), losses)
    # Four steps at the mark, then the one that is running when the fourth loss is known.
    assert seen == [0] * 15 + [1] * 10 + [2] * 5


def test_short_dips_do_not_count_and_it_never_shrinks():
    growth = BatchGrowth((3.0, 1.0), smoothing=1, patience=3)
    assert set(sizes(growth, [2.9, 2.9, 3.1] * 10)) == {0}
    sizes(growth, [2.9] * 3, first_step=31)
    assert set(sizes(growth, [9.0] * 50, first_step=35)) == {1}


def test_both_marks_crossed_at_once_double_one_after_the_other():
    assert sizes(BatchGrowth((3.0, 2.0), smoothing=1, patience=3), [1.0] * 10) == [0] * 4 + [1] * 3 + [2] * 3


def test_smoothing_forgives_noise():
    losses = np.random.default_rng(0).normal(3.2, 0.3, 500)
    assert (losses < 3.0).sum() > 50
    assert set(sizes(BatchGrowth((3.0,), smoothing=50, patience=10), losses)) == {0}
    # The average starts at the first losses, not at zero.
    assert sizes(BatchGrowth((3.0,), smoothing=50, patience=2), [5.0] * 5) == [0] * 5


@pytest.mark.parametrize("cut", [1, 7, 12, 13, 14, 15, 25])
def test_state_goes_on(cut):
    losses = [4.0] * 10 + [2.9] * 10 + [1.9] * 10
    marks = {"marks": (3.0, 2.0), "smoothing": 3, "patience": 2}
    growth = BatchGrowth(**marks)
    seen = sizes(growth, losses[:cut])
    seen += sizes(BatchGrowth(**marks, **growth.state()), losses[cut:], first_step=cut + 1)
    assert seen == sizes(BatchGrowth(**marks), losses)
    assert max(seen) == 2


def test_losses_that_are_not_finite_are_left_out():
    growth = BatchGrowth((3.0,), smoothing=1, patience=1)
    assert sizes(growth, [4.0, float("nan"), 4.0, 4.0]) == [0] * 4
