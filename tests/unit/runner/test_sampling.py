import pytest
import torch
from torch import Tensor

from runner.errors import NotFinite
from runner.sampling import Sampling, keep_most_probable, sample

PROBABILITIES = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])


def draw(logits: Tensor, sampling: Sampling, n_draws: int, seed: int = 0) -> Tensor:
    """Return how often each token was drawn, as a fraction."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [sample(logits, sampling, generator) for _ in range(n_draws)]
    return torch.bincount(torch.tensor(drawn), minlength=logits.shape[0]) / n_draws


def test_temperature_zero_takes_the_most_probable_token() -> None:
    assert draw(PROBABILITIES.log(), Sampling(temperature=0.0), 10).tolist() == [0, 1, 0, 0, 0]


def test_temperature_one_draws_by_the_softmax() -> None:
    frequencies = draw(PROBABILITIES.log(), Sampling(temperature=1.0), 4000)

    # Four standard deviations of a frequency of 0.5 in 4000 draws.
    assert torch.allclose(frequencies, PROBABILITIES, atol=0.032, rtol=0)


def test_the_temperature_divides_the_logits() -> None:
    frequencies = draw(PROBABILITIES.log(), Sampling(temperature=0.5), 4000)

    # softmax(log p / 0.5) is p squared, normalized; tolerance as above.
    assert torch.allclose(frequencies, PROBABILITIES**2 / (PROBABILITIES**2).sum(), atol=0.032, rtol=0)


def test_top_k_draws_from_the_k_most_probable_alone() -> None:
    frequencies = draw(PROBABILITIES.log(), Sampling(temperature=1.0, top_k=2), 4000)

    expected = torch.tensor([0, 0.4 / 0.7, 0, 0.3 / 0.7, 0])
    assert torch.allclose(frequencies, expected, atol=0.032, rtol=0)
    assert frequencies[[0, 2, 4]].sum() == 0


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.0, [1]), (0.3, [1]), (0.5, [1, 3]), (0.72, [1, 3, 4]), (1.0, [1, 3, 4, 0, 2])],
)
def test_top_p_keeps_the_fewest_tokens_of_that_probability(top_p: float, kept: list[int]) -> None:
    _, token_ids = keep_most_probable(PROBABILITIES.log(), Sampling(1.0, top_p=top_p))

    assert token_ids.tolist() == kept


def test_a_top_k_beyond_the_vocabulary_keeps_all() -> None:
    _, token_ids = keep_most_probable(PROBABILITIES.log(), Sampling(1.0, top_k=100))

    assert token_ids.shape[0] == 5


def test_the_same_seed_draws_the_same_tokens() -> None:
    first, second = (draw(torch.zeros(50), Sampling(1.0), 20, seed=7) for _ in range(2))

    assert torch.equal(first, second)


def test_another_seed_draws_other_tokens() -> None:
    first, second = (draw(torch.zeros(50), Sampling(1.0), 20, seed=seed) for seed in (7, 8))

    assert not torch.equal(first, second)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_refused(bad: float, temperature: float) -> None:
    with pytest.raises(NotFinite, match="no finite numbers"):
        sample(torch.tensor([0.0, bad]), Sampling(temperature), torch.Generator())
