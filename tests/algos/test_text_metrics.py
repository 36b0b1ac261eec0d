"""Text metrics by hand-computed values."""

import math

import pytest
import torch

from markovia.algos.text_metrics import distinct, logp_per_token, sequence_kl

MASK = torch.tensor([[True, True, False], [True, True, True]])


def test_distinct_counts_different_ngrams_over_all_texts():
    # Bigrams: (a b) (b a) (a b) and (a b): two different ones of four, whatever the case.
    assert distinct(["a b a b", "A b"], 2) == 2 / 4
    assert distinct(["a b a b", "A b"], 1) == 2 / 6
    assert distinct(["one two three"], 2) == 1.0


def test_distinct_of_spam_is_low_and_of_short_texts_zero():
    assert distinct(["great " * 11] * 3, 2) == 1 / 30
    assert distinct(["", "one"], 2) == 0.0


def test_distinct_refuses_empty_ngrams():
    with pytest.raises(ValueError, match="n must be >= 1, got 0"):
        distinct(["a b"], 0)


def test_logp_per_token_is_a_mean_over_tokens_that_count():
    logp = torch.tensor([[-1.0, -2.0, -99.0], [-3.0, -4.0, -5.0]])
    assert logp_per_token(logp, MASK) == pytest.approx(-15.0 / 5)


def test_sequence_kl_sums_over_tokens_and_averages_over_rows():
    logp = torch.log(torch.tensor([[0.5, 0.5, 0.1], [0.5, 0.25, 1.0]]))
    ref = torch.log(torch.tensor([[0.25, 0.5, 0.9], [0.5, 0.5, 0.5]]))
    # Rows: log 2 + 0 (the third token does not count), and 0 - log 2 + log 2 = 0.
    assert sequence_kl(logp, ref, MASK) == pytest.approx(math.log(2.0) / 2)
