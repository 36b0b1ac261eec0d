"""Preference optimisation: direct alignment on pairs, ranked lists and scored or labelled responses, for text and for denoising chains.

A method is a `Preference` (preference.method): a loss put together from components, and what the loop around it has to do.

    loss(scores, views) -> (N,)   one loss per item; the driver weights nothing further, takes the mean and steps
    loss.needs                    which columns that call reads, so that only those are computed
    loss.coupled                  True where the items of a batch see each other (sorting, a shared baseline): no micro-batches then

`scores` is a `TokenScores` (preference.scores): log-probabilities (B, T) under the policy and under the anchors that the loss names; never a model.
`views` is a `Views` (agents.records): which rows make a pair, a list, a single response, with their labels, margins and scores.
An item is a pair, a group or an unpaired row, whatever the loss is about.

The names in `needs`, all of them in `NEEDS`:

    logp_ref.NAME   scores.logp_ref[NAME]: log-probabilities under an anchor: ref, old (the sampler of this round), proposal, stage0, stage1, ...
    kl_ref          scores.kl_ref: KL(anchor ref || policy) of the next-token distribution, per token, with gradient
    collision       scores.collision: log sum_v pi(v)^2 of the next-token distribution, per token
    value           scores.value: V(x), one number per row, with gradient
    mismatched      scores.mismatched: log-ratios of responses put under other prompts
    progress        scores.progress: the share of training that is done
    pairs, groups, gold, unpaired, q, margin, score, label, c, keep, diff     the fields of `views`
    weight          is never needed: where views.weight is set, it multiplies each item's loss
"""
