"""The study on a real language model: which answers are right, and its intervals."""

import statistics

import pytest
from scipy import stats

from benchmarks.gsm8k.study import difference_over_rows, is_right


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("2 + 2 = 4\n#### 4", True),
        ("#### 1,004", False),
        ("#### 4.", True),
        ("#### 4\n\n#### 5", True),
        ("The answer is 4", False),
        ("#### 44", False),
        ("#### -4", False),
    ],
)
def test_an_answer_is_right_if_it_states_the_number(prediction, expected):
    assert is_right(prediction, "2 * 2 = <<2*2=4>>4\n#### 4", prompt="2 * 2?") is expected
    assert is_right("#### 1004", "#### 1,004")


def test_over_rows_of_one_length_the_interval_is_that_of_a_paired_t_test():
    ours, theirs = [1.0, 1.4, 0.7, 2.0], [1.1, 1.3, 0.9, 2.4]
    rows = [[(loss, 5) for loss in losses] for losses in (ours, theirs)]
    expected = stats.ttest_rel(ours, theirs)
    interval = expected.confidence_interval(0.95)
    mean = statistics.fmean(ours) - statistics.fmean(theirs)
    assert difference_over_rows(rows[:1], rows[1:]) == pytest.approx((mean, interval.low, interval.high))


def test_rows_weigh_as_many_tokens_as_they_have_and_seeds_are_averaged_first():
    theirs = [(1.0, 10), (2.0, 30)]
    ours = [[(1.2, 10), (2.0, 30)], [(1.0, 10), (1.6, 30)]]
    mean, low, high = difference_over_rows(ours, [theirs, theirs])
    assert mean == pytest.approx((0.1 * 10 - 0.2 * 30) / 40)
    assert low < mean < high
    assert difference_over_rows([theirs], [theirs]) == (0, 0, 0)
