import numpy as np

from tools.demo_checkpoint.noise import uniform


def mixed(index: int, key: int) -> float:
    """Return one number of the noise, computed in whole numbers without numpy."""
    bits = (index * 0x9E3779B9 + key * 0x85EBCA6B) % 2**32
    bits = (bits ^ bits >> 16) * 0x7FEB352D % 2**32
    bits = (bits ^ bits >> 15) * 0x846CA68B % 2**32
    bits ^= bits >> 16
    return (bits >> 8) / 2**24 - 0.5


def test_noise_is_the_mixing_function_of_index_and_key() -> None:
    noise = uniform(1000, key=721)

    assert noise.tolist() == [mixed(index, 721) for index in range(1000)]  # exact in float32: a grid of 2**-24


def test_noise_of_another_key_is_unrelated() -> None:
    one, other = uniform(20_000, key=1), uniform(20_000, key=2)

    correlation = float(np.corrcoef(one, other)[0, 1])

    assert abs(correlation) < 0.03  # four standard deviations of 20000 independent pairs


def test_noise_fills_the_interval_evenly_around_zero() -> None:
    noise = uniform(100_000, key=3)

    counts, _ = np.histogram(noise, bins=10, range=(-0.5, 0.5))

    assert counts.sum() == noise.size  # none outside
    assert np.abs(counts - 10_000).max() < 500  # five standard deviations
