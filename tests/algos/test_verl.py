"""Rows as verl policy losses: called as verl's actor calls them, against formulas of their own. verl itself is not needed."""

import inspect
import math
from types import SimpleNamespace

import pytest
import torch

from markovia.algos.on_policy.verl import aggregated, verl_policy_loss
from markovia.algos.systems import find

F64 = torch.float64
REGISTRY = {}


def register_policy_loss(name):
    """A stub of verl's decorator of that name."""

    def decorator(fn):
        REGISTRY[name] = fn
        return fn

    return decorator


def batch(seed=0, rows=5, tokens=6, requires_grad=True):
    g = torch.Generator().manual_seed(seed)
    mask = (torch.arange(tokens) < torch.randint(1, tokens + 1, (rows, 1), generator=g)).long()
    old = -torch.rand(rows, tokens, generator=g, dtype=F64)
    logp = (old + 0.4 * torch.randn(rows, tokens, generator=g, dtype=F64)).requires_grad_(requires_grad)
    adv = torch.randn(rows, 1, generator=g, dtype=F64).expand(rows, tokens)
    return old, logp, adv, mask


def as_the_actor_calls_it(fn, data, mode, info=None, weights=None):
    """verl.workers.actor.dp_actor passes these keywords and takes two values."""
    old, logp, adv, mask = data
    config = SimpleNamespace(clip_ratio=0.2, global_batch_info=info or {})
    return fn(
        old_log_prob=old, log_prob=logp, advantages=adv, response_mask=mask, loss_agg_mode=mode, config=config, rollout_is_weights=weights
    )


def by_tokens(data, term):
    """mean over all tokens of term(ratio, advantage), token after token."""
    old, logp, adv, mask = data
    terms = [term((logp[i, t] - old[i, t]).exp(), adv[i, t]) for i in range(len(mask)) for t in range(mask.shape[1]) if mask[i, t]]
    return torch.stack(terms).mean()


def same(loss, want, leaf):
    torch.testing.assert_close(loss, want, rtol=1e-10, atol=1e-12)
    got, expected = (torch.autograd.grad(x, leaf, retain_graph=True)[0] for x in (loss, want))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def clipped(low, high):
    return lambda r, a: -torch.minimum(r * a, r.clamp(1 - low, 1 + high) * a)


@pytest.mark.parametrize(("row", "term"), [("grpo", clipped(0.2, 0.2)), ("grpo/dapo", clipped(0.2, 0.28)), ("rloo", lambda r, a: -r * a)])
def test_token_rows(row, term):
    fn = register_policy_loss(row)(verl_policy_loss(find(row).value))
    data = batch()
    loss, metrics = as_the_actor_calls_it(REGISTRY[row], data, "token-mean")
    same(loss, by_tokens(data, term), data[1])
    assert loss.shape == () and all(isinstance(v, float) for v in metrics.values()) and metrics.keys() >= {"actor/pg_clipfrac", "actor/ppo_kl"}
    old, logp, _, mask = data
    assert metrics["actor/ppo_kl"] == pytest.approx(float(((old - logp.detach()) * mask).sum() / mask.sum()))
    assert fn.loss_agg_mode == find(row).value.aggregation


def test_dual_clip_of_negative_advantages():
    data = batch(1)

    def term(r, a):
        inside = torch.minimum(r * a, r.clamp(0.8, 1.2) * a)
        return -torch.maximum(inside, 3.0 * a) if a < 0 else -inside

    same(as_the_actor_calls_it(verl_policy_loss(find("copo").value), data, "token-mean")[0], by_tokens(data, term), data[1])


def test_gspo_counts_a_response_once():
    data = batch(2)
    old, logp, adv, mask = data
    fn = verl_policy_loss(find("grpo/gspo").value)
    terms = []
    for i in range(len(mask)):
        n = int(mask[i].sum())
        s = ((logp[i, :n] - old[i, :n]).sum() / n).exp()
        terms.append(-torch.minimum(s * adv[i, 0], s.clamp(1 - 3e-4, 1 + 4e-4) * adv[i, 0]))
    same(as_the_actor_calls_it(fn, data, "seq-mean-token-mean")[0], torch.stack(terms).mean(), logp)
    with pytest.raises(ValueError, match=r"set actor.loss_agg_mode=seq-mean-token-mean, got 'token-mean'"):
        as_the_actor_calls_it(fn, data, "token-mean")


def test_kl_cov_holds_the_tokens_of_highest_covariance():
    """Of 30 tokens at a rate that selects one: the loss is the ratio's, plus |log ratio| of that token."""
    from dataclasses import replace

    old, logp, adv, mask = batch(3)
    mask = torch.ones_like(mask)
    row = find("kl-cov").value
    fn = verl_policy_loss(replace(row, tokens=replace(row.tokens, rate=1 / 30)))
    covariance = (logp - logp.mean()) * (adv - adv.mean())
    i, t = divmod(int(covariance.argmax()), 6)
    want = by_tokens((old, logp, adv, mask), lambda r, a: -r * a) + row.divergence.beta * (logp[i, t] - old[i, t]).abs() / 30
    same(as_the_actor_calls_it(fn, (old, logp, adv, mask), "token-mean")[0], want, logp)


def test_importance_weights_of_the_rollout_multiply():
    data = batch(4)
    weights = torch.rand(5, 6, generator=torch.Generator().manual_seed(5), dtype=F64)
    loss = as_the_actor_calls_it(verl_policy_loss(find("rloo").value), data, "token-mean", weights=weights)[0]
    old, logp, adv, mask = data
    same(loss, -((logp - old).exp() * adv * weights * mask).sum() / mask.sum(), logp)


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"])
def test_workers_add_up_to_the_whole_batch(mode):
    """Mean over dp_size workers of their losses, as data parallelism averages gradients, is the loss of the whole batch."""
    old, logp, adv, mask = batch(6, rows=6, requires_grad=False)
    fn = verl_policy_loss(find("grpo").value)
    whole = as_the_actor_calls_it(fn, (old, logp, adv, mask), mode)[0]
    info = {"dp_size": 2, "batch_num_tokens": int(mask.sum()), "global_batch_size": 6, "loss_scale_factor": 6}
    halves = [as_the_actor_calls_it(fn, tuple(x[rows] for x in (old, logp, adv, mask)), mode, info)[0] for rows in (slice(0, 2), slice(2, 6))]
    factor = 1 if mode == "seq-mean-token-sum-norm" else 2  # this one is not scaled by dp_size in verl
    torch.testing.assert_close(sum(halves) / factor, whole, rtol=1e-12, atol=0)


def test_aggregation_by_hand():
    loss, mask = torch.tensor([[1.0, 2.0], [4.0, 9.0]], dtype=F64), torch.tensor([[1, 1], [1, 0]])
    # tokens 1, 2, 4: mean 7/3; rows 3 and 4; row means 1.5 and 4
    got = [float(aggregated(loss, mask, m)) for m in ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")]
    assert got == pytest.approx([7 / 3, 3.5, 2.75, 3.5])
    with pytest.raises(ValueError, match="unknown loss_agg_mode 'mean'"):
        aggregated(loss, mask, "mean")


def test_signature_is_verls():
    names = list(inspect.signature(verl_policy_loss(find("grpo").value)).parameters)
    assert names == ["old_log_prob", "log_prob", "advantages", "response_mask", "loss_agg_mode", "config", "rollout_is_weights"]


REFUSED = {
    "ppo/kl": "distributions", "steer": "Steer reads more", "siren": "anchor", "apa/initial": "a reference", "kdrl": "'teacher'", "p3o": "Partner",
    "dph-rl": "auxiliary loss Rehearsal",
}  # fmt: skip


@pytest.mark.parametrize(("row", "why"), REFUSED.items())
def test_rows_that_read_more_are_refused(row, why):
    with pytest.raises(ValueError, match=f"can't be a verl policy loss: .*{why}"):
        verl_policy_loss(find(row).value)


def test_infinite_log_probs_of_padding_do_no_harm():
    old, logp, adv, mask = batch(7, requires_grad=False)
    filled = logp.masked_fill(mask == 0, -math.inf)
    assert math.isfinite(float(as_the_actor_calls_it(verl_policy_loss(find("grpo").value), (old, filled, adv, mask), "token-mean")[0]))
