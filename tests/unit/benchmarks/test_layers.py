import pytest

from benchmarks.layers import LayerTimes, TokenTimes, fastest
from benchmarks.peer import Speed, SpeedPlan


def test_speeds_become_times() -> None:
    times = TokenTimes.of(Speed(prefill=64.0, decode=20.0), SpeedPlan(prompt_tokens=128))

    assert times == TokenTimes(prefill_s=2.0, decode_s=0.05)


def test_a_layer_is_a_third_of_what_four_take_longer_than_one() -> None:
    rounds = LayerTimes()

    rounds.add(TokenTimes(prefill_s=1.0, decode_s=0.02), TokenTimes(prefill_s=2.5, decode_s=0.05))

    assert rounds.decode_s == pytest.approx([0.01])
    assert rounds.prefill_s == pytest.approx([0.5])


def test_what_is_beside_the_layers_is_the_rest_of_the_one() -> None:
    rounds = LayerTimes()

    rounds.add(TokenTimes(prefill_s=1.0, decode_s=0.02), TokenTimes(prefill_s=2.5, decode_s=0.05))

    (beside,) = rounds.besides
    assert (beside.prefill_s, beside.decode_s) == pytest.approx((0.5, 0.01))


def test_a_setting_does_not_win_by_one_slow_measurement_of_few_layers() -> None:
    faster, disturbed = LayerTimes(), LayerTimes()
    faster.add(TokenTimes(prefill_s=1.0, decode_s=0.02), TokenTimes(prefill_s=2.5, decode_s=0.05))
    disturbed.add(TokenTimes(prefill_s=1.0, decode_s=0.04), TokenTimes(prefill_s=2.5, decode_s=0.06))

    assert fastest([disturbed, faster], lambda whole: whole.decode_s) is faster
