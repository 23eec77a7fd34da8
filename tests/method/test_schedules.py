import pytest
from hypothesis import given
from hypothesis import strategies as st

from vldnp.schedules import as_schedule, front_loaded, uniform


def test_steps_by_hand():
    assert front_loaded(10).steps(50) == (5, 6, 7, 9, 12, 16, 21, 27, 34, 42)  # the paper's
    assert front_loaded(10).steps(100) == (10, 12, 14, 18, 24, 32, 42, 54, 68, 84)
    assert front_loaded(1).steps(50) == (5,)
    assert uniform(5).steps(25) == (2, 7, 12, 17, 22)
    assert uniform(1).steps(50) == (25,)


@given(st.data(), st.integers(1, 200), st.sampled_from([front_loaded, uniform]))
def test_always_n_ascending_steps_in_range(data, num_steps, make):
    n = data.draw(st.integers(0, num_steps))
    steps = make(n).steps(num_steps)
    assert len(steps) == n
    assert list(steps) == sorted(set(steps))
    assert all(type(step) is int and 0 <= step < num_steps for step in steps)


@given(st.integers(3, 20))
def test_front_loaded_is_denser_at_first(n):
    steps = front_loaded(n).steps(1000)
    gaps = [b - a for a, b in zip(steps, steps[1:], strict=False)]
    assert gaps[0] < gaps[-1]
    assert all(a <= b + 1 for a, b in zip(gaps, gaps[1:], strict=False))  # 1 for rounding


def test_explicit_steps():
    assert as_schedule([7, 2, 2]).steps(25) == (2, 7)
    assert as_schedule(range(3)).steps(25) == (0, 1, 2)
    assert as_schedule([]).steps(25) == ()
    assert as_schedule(uniform(3)) == as_schedule({"uniform": 3}) == uniform(3)
    mirrored = tuple(49 - i for i in reversed(front_loaded(10).steps(50)))
    assert as_schedule({"late": 10}).steps(50) == mirrored
    with pytest.raises(ValueError, match="unknown query schedule 'unifrm': did you mean 'uniform'"):
        as_schedule({"unifrm": 3})


def test_what_does_not_fit():
    for steps in ([25], [3, -1], [24, 25, 26]):
        with pytest.raises(ValueError, match=r"outside the 25 denoising steps; use 0 to 24$"):
            as_schedule(steps).steps(25)
    with pytest.raises(ValueError, match=r"30 queries .* 25 .* n ≤ 25"):
        front_loaded(30).steps(25)


@pytest.mark.parametrize("make", [front_loaded, uniform])
@pytest.mark.parametrize("n", [-1, 2.5, "5"])
def test_a_number_of_queries_is_a_whole_number(make, n):
    with pytest.raises(ValueError, match="n ≥ 0"):
        make(n)


def test_neither_schedule_nor_steps():
    for wrong in (5, "5", [2.5], None):
        with pytest.raises(ValueError, match="step indices such as"):
            as_schedule(wrong)
