"""Perplexity and cosine, against what can be worked out by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from qgraft.quantizer.evaluate import cosine_to, embed, perplexity

VOCABULARY = 7


class Fixed(nn.Module):
    """Predicts the same distribution after every token."""

    def __init__(self, logits, wrap=False):
        super().__init__()
        self.logits, self.wrap = torch.as_tensor(logits), wrap
        self.lengths, self.modes = [], []

    def forward(self, ids):
        self.lengths.append(ids.shape[1])
        self.modes.append(self.training)
        logits = self.logits.expand(*ids.shape, -1)
        return SimpleNamespace(logits=logits) if self.wrap else logits


class Table(nn.Module):
    """An encoder that looks its hidden states up."""

    def __init__(self, states, wrap=True):
        super().__init__()
        self.states, self.wrap = torch.as_tensor(states), wrap

    def forward(self, input_ids, attention_mask=None):
        hidden = self.states[input_ids]
        return SimpleNamespace(last_hidden_state=hidden) if self.wrap else hidden


@pytest.mark.parametrize("wrap", [False, True])
def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(wrap):
    tokens = torch.randint(VOCABULARY, (100,))
    assert perplexity(Fixed(torch.zeros(VOCABULARY), wrap), tokens, 16) == pytest.approx(VOCABULARY)


def test_perplexity_is_the_inverse_geometric_mean_of_the_probabilities():
    probabilities = torch.tensor([0.5, 0.25, 0.125, 0.125])
    tokens = torch.tensor([3, 0, 1, 2])  # the first is given, the other three are predicted
    expected = (0.5 * 0.25 * 0.125) ** (-1 / 3)
    assert perplexity(Fixed(probabilities.log()), tokens) == pytest.approx(expected)


def test_windows_do_not_overlap_and_one_token_left_over_predicts_nothing():
    model = Fixed(torch.zeros(VOCABULARY))
    perplexity(model, torch.zeros(21, dtype=torch.long), 10)
    assert model.lengths == [10, 10]
    model.lengths.clear()
    perplexity(model, torch.zeros(22, dtype=torch.long), 10)
    assert model.lengths == [10, 10, 2]


def test_a_model_that_is_surely_wrong_is_infinitely_perplexed_and_nan_stays_visible():
    tokens = torch.ones(10, dtype=torch.long)
    assert perplexity(Fixed([0.0, -1e6]), tokens) == math.inf
    assert math.isnan(perplexity(Fixed([0.0, math.nan]), tokens))


def test_evaluation_is_without_dropout_and_gives_the_flags_back():
    model = Fixed(torch.zeros(VOCABULARY)).train()
    perplexity(model, torch.zeros(4, dtype=torch.long))
    assert model.modes == [False] and model.training


@pytest.mark.parametrize("tokens", [torch.zeros(1, 5, dtype=torch.long), torch.zeros(5), torch.zeros(1).long()])
def test_what_is_no_row_of_token_ids_is_refused(tokens):
    with pytest.raises(ValueError, match="at least 2 ids in one dimension"):
        perplexity(Fixed(torch.zeros(VOCABULARY)), tokens)
    with pytest.raises(ValueError, match="window must be at least 2"):
        perplexity(Fixed(torch.zeros(VOCABULARY)), torch.zeros(5).long(), 1)


@pytest.mark.parametrize("wrap", [False, True])
def test_padding_has_no_part_in_a_vector(wrap):
    model = Table([[3.0, 0.0], [0.0, 4.0], [100.0, 100.0]], wrap)
    ids, mask = torch.tensor([[0, 1, 2], [0, 2, 2]]), torch.tensor([[1, 1, 0], [1, 0, 0]])
    vectors = embed(model, [{"input_ids": ids, "attention_mask": mask}])
    torch.testing.assert_close(vectors, torch.tensor([[0.6, 0.8], [1.0, 0.0]]))


def test_without_a_mask_all_are_tokens_and_batches_are_joined_in_order():
    model = Table(torch.eye(2))
    vectors = embed(model, [{"input_ids": torch.tensor([[0, 0]])}, {"input_ids": torch.tensor([[1, 1]])}])
    torch.testing.assert_close(vectors, torch.eye(2))


def test_a_model_without_hidden_states_is_refused_by_name():
    with pytest.raises(TypeError, match="Namespaced gives no last_hidden_state"):
        embed(type("Namespaced", (nn.Module,), {"forward": lambda self, x: (x,)})(), [{"x": torch.ones(1)}])
    with pytest.raises(ValueError, match="no batches"):
        embed(Table(torch.eye(2)), [])


def test_cosine_is_1_for_the_same_0_for_orthogonal_and_minus_1_for_opposite_vectors():
    x = torch.eye(3)
    assert cosine_to(x, 5 * x) == pytest.approx(1)
    assert cosine_to(x, x.roll(1, 0)) == pytest.approx(0)
    assert cosine_to(x, -x) == pytest.approx(-1)
    assert cosine_to(x[:2], torch.stack((x[0], -x[1]))) == pytest.approx(0), "the mean over the rows"


def test_cosine_tells_differences_that_float32_would_round_away():
    x = torch.ones(1, 4, dtype=torch.float64)
    y = x + torch.tensor([1e-5, -1e-5, 0, 0], dtype=torch.float64)
    assert 1 - cosine_to(x, y) == pytest.approx(2.5e-11, rel=1e-3)


def test_vectors_of_different_shapes_are_refused_where_they_would_broadcast():
    with pytest.raises(ValueError, match="same shape"):
        cosine_to(torch.ones(3, 4), torch.ones(1, 4))
