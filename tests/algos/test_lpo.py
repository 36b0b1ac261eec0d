"""Learnt drifts: the loader, the shipped network, the exact problems of the inner loop, and meta-training on a tiny budget."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from markovia.agents.checkpoint import save_tensors
from markovia.algos.on_policy.lpo import (
    FOLDER,
    Evolution,
    Inner,
    Problems,
    best_return,
    drift_weights,
    fitness,
    held_out_fitness,
    initial,
    meta_train,
    problem_suites,
    random_bandits,
    random_grids,
    sample_batch,
    save_drift,
    solve,
    split,
)
from markovia.algos.on_policy.surrogates import Learnt, clip_drift, learnt_drift
from markovia.algos.streams import stream

torch.set_num_threads(1)


def test_shipped_network_obeys_the_mirror_learning_conditions() -> None:
    w1, w2 = (w.double() for w in drift_weights("lpo"))
    lr = torch.linspace(-20, 20, 401, dtype=torch.float64)
    for a in (-3.0, -0.5, 0.0, 0.5, 3.0):
        d = learnt_drift(lr, torch.full_like(lr, a), w1=w1, w2=w2, clip=0.2)
        assert torch.isfinite(d).all() and (d >= 0).all()
        zero = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        at_zero = learnt_drift(zero, torch.full_like(zero, a), w1=w1, w2=w2, clip=0.2)
        at_zero.sum().backward()
        assert zero.grad is not None and at_zero.item() == 0.0 and zero.grad.item() == 0.0
    assert torch.isfinite(Learnt()(lr, torch.ones_like(lr), None, torch.ones(()))).all()


def test_shipped_network_is_the_one_of_its_log_and_beat_ppo_on_held_out_problems() -> None:
    log = json.loads((FOLDER / "lpo.json").read_text())
    w1, w2 = drift_weights("lpo")
    assert w1.shape == (log["evolution"]["hidden"], 8)
    es, inner = Evolution(**log["evolution"]), Inner(**log["inner"])
    found = held_out_fitness(torch.stack([initial(es), torch.cat([w1.flatten(), w2.flatten()])]), es, inner)
    assert found.tolist() == pytest.approx([log["held_out"]["ppo"], log["held_out"]["lpo"]], abs=2e-3)
    assert found[1] > found[0]


def test_drift_file_round_trip(tmp_path: Any) -> None:
    g = torch.Generator().manual_seed(0)
    w1, w2 = torch.randn(3, 8, generator=g), torch.randn(1, 3, generator=g)
    path = str(save_drift(tmp_path / "mine.safetensors", w1, w2))
    a, b = drift_weights(path)
    assert torch.equal(a, w1) and torch.equal(b, w2)
    assert drift_weights(path)[0] is a
    lr, adv = torch.tensor([0.1, -2.0]), torch.tensor([1.0, -1.0])
    expected = lr.exp() * adv - learnt_drift(lr, adv, w1=w1, w2=w2, clip=0.3)
    torch.testing.assert_close(Learnt(weights=path, clip=0.3)(lr, adv, None, torch.ones(())), expected)
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        save_drift(tmp_path / "mine.pt", w1, w2)


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        ({"w1": torch.zeros(4, 8)}, r"expected w1 \(h, 8\) and w2 \(1, h\)"),
        ({"w1": torch.zeros(4, 7), "w2": torch.zeros(1, 4)}, "expected w1"),
        ({"w1": torch.zeros(4, 8), "w2": torch.zeros(1, 5)}, "expected w1"),
        ({"w1": torch.zeros(4, 8), "w2": torch.zeros(1, 4), "b": torch.zeros(1)}, "expected w1"),
        ({"w1": torch.full((4, 8), math.nan), "w2": torch.zeros(1, 4)}, "not finite"),
    ],
)
def test_loader_refuses_wrong_tensors(tensors: dict, match: str, tmp_path: Any) -> None:
    save_tensors(tmp_path / "bad.safetensors", tensors)
    with pytest.raises(ValueError, match=match):
        drift_weights(str(tmp_path / "bad.safetensors"))


def test_loader_names_what_is_shipped_and_refuses_foreign_files(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match=r"shipped: lpo.*did you mean 'lpo'"):
        drift_weights("lpoo")
    with pytest.raises(ValueError, match="no drift network"):
        drift_weights(str(tmp_path / "absent.safetensors"))
    foreign = tmp_path / "foreign.safetensors"
    foreign.write_bytes(b"\x80\x04 not safetensors")
    with pytest.raises(ValueError, match=r"is no drift network.*nothing in it was run"):
        drift_weights(str(foreign))


# -- the inner problems ------------------------------------------------------------------------------------------------------------------


def test_exact_solution_of_a_two_state_chain_by_hand() -> None:
    # State 0: action 0 stays with reward 0, action 1 goes to state 1 with reward 1; state 1 keeps itself with reward 0. gamma = 1/2.
    transition = torch.tensor([[[[1.0, 0], [0, 1]], [[0, 1], [0, 1]]]])
    problems = Problems(transition, torch.tensor([[[0.0, 1], [0, 0]]]), torch.tensor([[1.0, 0]]), gamma=0.5, noise=0.0)
    J, adv, visits = solve(problems, torch.zeros(1, 1, 2, 2))
    value = 0.5 / (1 - 0.25)  # V0 = 1/2 (0 + V0 / 2) + 1/2
    assert J.item() == pytest.approx(value)
    assert adv[0, 0, 0].tolist() == pytest.approx([value / 2 - value, 1 - value])
    assert visits[0, 0].tolist() == pytest.approx([0.5 / 0.75, 1 - 0.5 / 0.75])  # half of the discounted mass stays: d0 = 1/2 + d0 / 4
    assert best_return(problems).item() == pytest.approx(1.0)


@pytest.mark.parametrize("make", [random_bandits, random_grids])
def test_random_problems_are_distributions_and_bounded_by_their_optimum(make: Any) -> None:
    problems = make(5, torch.Generator().manual_seed(0))
    p, S, A = problems.reward.shape
    torch.testing.assert_close(problems.transition.sum(-1), torch.ones(p, S, A))
    logits = torch.randn(7, p, S, A, generator=torch.Generator().manual_seed(1))
    J, adv, visits = solve(problems, logits)
    assert (best_return(problems) >= J - 1e-5).all()
    torch.testing.assert_close((adv * logits.softmax(-1)).sum(-1), torch.zeros(7, p, S), rtol=0, atol=1e-5)
    torch.testing.assert_close(visits.sum(-1), torch.ones(7, p))


def test_samples_follow_visits_times_policy() -> None:
    problems = random_grids(1, torch.Generator().manual_seed(0))
    logits = torch.randn(1, 1, 16, 4, generator=torch.Generator().manual_seed(1))
    n = 20_000
    g = torch.Generator().manual_seed(2)
    index, adv = sample_batch(problems, logits, torch.rand(1, n, generator=g), torch.randn(1, n, generator=g))
    _, _, visits = solve(problems, logits)
    joint = (visits[..., None] * logits.softmax(-1)).flatten()
    counts = torch.bincount(index.flatten(), minlength=64) / n
    assert float((counts - joint).abs().max()) < 5 * math.sqrt(0.25 / n)
    assert float(adv.mean()) == pytest.approx(0, abs=1e-4) and float(adv.std()) == pytest.approx(1, abs=1e-4)


@pytest.mark.check("limit", "lpo-dpo-discovered/lpo")
def test_initial_network_is_ppo_up_to_the_dead_zone() -> None:
    es = Evolution()
    w1, w2 = (w[0] for w in split(initial(es)[None], es.hidden))
    lr, adv = torch.linspace(-1, 1, 21), torch.full((21,), 0.7)
    ppo = clip_drift(lr, adv, low=0.2, high=0.2)
    torch.testing.assert_close(learnt_drift(lr, adv, w1=w1, w2=w2, clip=0.2), torch.relu(ppo - 1e-4))


# -- meta-training -------------------------------------------------------------------------------------------------------------------------


def test_a_few_generations_raise_the_mean_fitness() -> None:
    """The problems are new in each generation, so both networks are judged on the same ones, with the sampling noise in common."""
    es = Evolution(generations=12, population=16, hidden=8, bandits=6, grids=0, seed=1)
    inner = Inner(iterations=5, epochs=8, samples=16)
    seen: list[dict[str, float]] = []
    w1, w2, log = meta_train(es, inner, seen.append)
    assert [g["generation"] for g in seen] == list(range(12)) and log["generations"] == seen
    assert w1.shape == (8, 8) and w2.shape == (1, 8)
    flat = torch.stack([initial(es), torch.cat([w1.flatten(), w2.flatten()])])
    before, after = fitness(problem_suites(256, 0, stream(9, "test")), *split(flat, 8), inner, stream(9, "draws")).tolist()
    assert after > before


def test_meta_training_is_reproducible() -> None:
    es = Evolution(generations=1, population=2, hidden=2, bandits=2, grids=1)
    inner = Inner(iterations=1, epochs=1, samples=4)
    (a, _, x), (b, _, y) = meta_train(es, inner), meta_train(es, inner)
    assert torch.equal(a, b) and x == y


@pytest.mark.parametrize(("settings", "match"), [({"population": 3}, "even"), ({"generations": 0}, ">= 1"), ({"bandits": 0, "grids": 0}, ">= 1")])
def test_settings_that_make_no_sense_are_refused(settings: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Evolution(**settings)
