"""Language agents on a tiny random Llama and on the shipped arithmetic model."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from markovia.agents.language import LanguageAgent, draw, nucleus, pack, unpack, weights_hash
from markovia.agents.tokens import response_valid
from markovia.envs.text.env import TokenEnv
from markovia.envs.text.tasks import TextTask, arithmetic
from markovia.envs.text.tokens import CharTokenizer

torch.set_num_threads(1)
VARIANTS = [{}, {"temperature": 0.6}, {"temperature": 1.3, "top_p": 0.7}, {"lora": {"r": 2}, "value_head": True}]


def tiny_model(family="llama", seed=0, vocab=12):
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=vocab, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2))
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config)


def tiny_agent(family="llama", **options):
    return LanguageAgent(tiny_model(family), CharTokenizer("abcdefghi"), **options)


def vowels(prompts, completions, **columns):
    return [float(sum(c in "aei" for c in text)) for text in completions]


def tiny_task(**changes):
    return TextTask(**({"prompts": ["a", "bcd", "efghi"], "tokenizer": CharTokenizer("abcdefghi"), "rewards": vowels, "max_new_tokens": 6} | changes))


def rollout_of(agent, n=12, seed=0, task=None, **kwargs):
    starts = (task or tiny_task()).starts(n, torch.Generator().manual_seed(seed), **kwargs)
    return agent.generate(starts, torch.Generator().manual_seed(seed + 1))


# -- pure parts ----------------------------------------------------------------------------------------------------------------------


def test_nucleus_keeps_the_crossing_token():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert nucleus(logits, 0.79).tolist() == [[True, True, False, False]]
    assert nucleus(logits, 0.81).tolist() == [[True, True, True, False]]
    assert nucleus(logits, 0.01).tolist() == [[True, False, False, False]]


def test_draw_is_the_inverse_cdf():
    logits = torch.tensor([0.2, 0.0, 0.5, 0.3]).log().expand(5, 4)
    assert draw(logits, torch.tensor([0.0, 0.19, 0.21, 0.69, 0.999], dtype=torch.float64)).tolist() == [0, 0, 2, 2, 3]


def test_bits_round_trip():
    kept = torch.rand(3, 2, 13, generator=torch.Generator().manual_seed(0)) < 0.5
    assert torch.equal(unpack(pack(kept), 13), kept) and pack(kept).shape == (3, 2, 2)


def test_valid_goes_up_to_the_first_eos():
    action = torch.tensor([[5, 2, 2, 2], [5, 6, 7, 8], [2, 5, 5, 5]])
    assert response_valid(action, eos=2).tolist() == [[True, True, False, False], [True] * 4, [True, False, False, False]]


# -- generation ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_first_pass_ratio_is_one(family, options):
    agent = tiny_agent(family, **options)
    rollout = rollout_of(agent, group_size=4)
    logp = agent.evaluate(rollout, ["logp"]).logp
    assert (torch.exp(logp - rollout.logp_old) - 1.0).abs().max() < 1e-5
    assert ("kept" in rollout.obs) == ("top_p" in options)


def test_the_sampled_law_is_the_evaluated_one():
    agent = tiny_agent(temperature=0.8, top_p=0.9)
    starts = tiny_task(prompts=["abc"], max_new_tokens=1).starts(6000, group_size=6000)
    rollout = agent.generate(starts, torch.Generator().manual_seed(0))
    p = agent.evaluate(rollout.rows(torch.tensor([0])), ["dist"]).dist.logits[0, 0].softmax(-1)
    counts = torch.bincount(rollout.action[:, 0], minlength=12)
    assert (counts[p < 1e-12] == 0).all() and (p < 1e-12).any()
    kept = p > 1e-12
    chi2 = ((counts - 6000 * p).square() / (6000 * p))[kept].sum()
    assert chi2 < 40.0  # at most 11 degrees of freedom: exceeded with probability 4e-5


def test_generation_is_reproducible_and_greedy_needs_no_luck():
    agent, starts = tiny_agent(), tiny_task().starts(6, torch.Generator().manual_seed(0))
    a, b = (agent.generate(starts, torch.Generator().manual_seed(1)) for _ in range(2))
    c = agent.generate(starts, torch.Generator().manual_seed(2))
    assert torch.equal(a.action, b.action) and torch.equal(a.logp_old, b.logp_old) and not torch.equal(a.action, c.action)
    g, h = (agent.generate(starts, torch.Generator().manual_seed(s), deterministic=True) for s in (1, 2))
    assert torch.equal(g.action, h.action)


def test_a_shared_prompt_gives_what_separate_rows_give():
    agent, task = tiny_agent(), tiny_task()
    starts = task.starts(12, torch.Generator().manual_seed(0), group_size=4)
    grouped = agent.generate(starts, torch.Generator().manual_seed(1), deterministic=True)
    for i in range(12):
        one = {"prompt_ids": starts["prompt_ids"][i : i + 1], "prompt_mask": starts["prompt_mask"][i : i + 1], "max_new_tokens": 6}
        alone = agent.generate(one, deterministic=True)
        assert torch.equal(alone.action[0], grouped.action[i])
        assert torch.allclose(alone.logp_old[0], grouped.logp_old[i], atol=1e-5)


def test_eos_and_length_rules_of_the_record():
    rollout = rollout_of(tiny_agent(), n=60)
    eos, ended = CharTokenizer.eos_token_id, 0
    for i in range(60):
        n = int(rollout.valid[i].sum())
        ended += n < 6
        assert rollout.valid[i, :n].all() and n >= 1 and (n == 6 or rollout.action[i, n - 1] == eos)
        assert eos not in rollout.action[i, : n - 1]
        assert rollout.continuation[i, :n].tolist() == [1.0] * (n - 1) + [0.0]
        assert (rollout.action[i, n:] == CharTokenizer.pad_token_id).all() and (rollout.logp_old[i, n:] == 0.0).all()
    assert 0 < ended < 60 and not rollout.truncated.any() and (rollout.reward == 0.0).all() and rollout.per_row
    assert torch.equal(rollout.mask, rollout.valid) and rollout.boot_value is None


def only_ab(prompt_ids, response_ids):
    allowed = np.zeros(12, dtype=bool)
    allowed[[3, 4]] = True
    return allowed


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_allowed_tokens_bind_generation_and_evaluation(top_p):
    agent = tiny_agent(top_p=top_p)
    rollout = rollout_of(agent, task=tiny_task(allowed=only_ab))
    assert set(rollout.action.unique().tolist()) <= {3, 4}
    got = agent.evaluate(rollout, ["logp", "entropy"])
    assert torch.allclose(got.logp, rollout.logp_old, atol=1e-5) and got.entropy.max() <= np.log(2.0) + 1e-6


# -- evaluation ----------------------------------------------------------------------------------------------------------------------


def test_padding_and_batch_change_nothing():
    agent = tiny_agent(value_head=True)
    torch.nn.init.normal_(agent.critic.weight)
    rollout = rollout_of(agent)
    whole = agent.evaluate(rollout, ["logp", "entropy", "value"])
    for i in (0, 5, 11):
        row = rollout.rows(torch.tensor([i]))
        real = row.obs["prompt_mask"][0]
        row.obs = {k: v[:, real] for k, v in row.obs.items()}
        alone = agent.evaluate(row, ["logp", "entropy", "value"])
        for name in ("logp", "entropy", "value"):
            assert torch.allclose(getattr(alone, name)[0], getattr(whole, name)[i], atol=1e-5), name


def test_chunks_without_gradient_equal_one_pass(monkeypatch):
    agent = tiny_agent()
    rollout = rollout_of(agent)
    whole = agent.evaluate(rollout, ["logp"]).logp
    monkeypatch.setattr("markovia.agents.language.CHUNK_LOGITS", 6 * 12 * 5)
    with torch.no_grad():
        assert torch.allclose(agent.evaluate(rollout, ["logp"]).logp, whole, atol=1e-6)


def test_entropy_and_dist_agree_with_logp():
    agent = tiny_agent(temperature=0.7)
    rollout = rollout_of(agent)
    got = agent.evaluate(rollout, ["logp", "entropy", "dist", "hidden"])
    logp = got.dist.logits.log_softmax(-1)
    assert torch.allclose(logp.gather(-1, rollout.action.unsqueeze(-1)).squeeze(-1)[rollout.valid], got.logp[rollout.valid], atol=1e-6)
    assert torch.allclose(-(logp.exp() * logp).sum(-1)[rollout.valid], got.entropy[rollout.valid], atol=1e-6)
    head = agent.net["policy"].get_output_embeddings()
    assert torch.allclose(head(got.hidden) / 0.7, got.dist.logits, atol=1e-5)


def test_single_steps_follow_the_same_law():
    agent, task = tiny_agent(temperature=0.9), tiny_task()
    rollout = rollout_of(agent, n=3, task=task)
    env = TokenEnv(task)
    for i, text in enumerate(rollout.outcome["prompt_text"]):
        obs, _ = env.reset(options={"prompt": task.prompts.index(text)})
        for t in range(int(rollout.valid[i].sum())):
            token, logp = agent.act({k: v[None] for k, v in obs.items()}, deterministic=True)
            dist = agent.evaluate(rollout.rows(torch.tensor([i])), ["dist"]).dist.logits[0, t]
            assert token.item() == dist.argmax() and torch.allclose(logp[0], dist.log_softmax(-1).max(), atol=1e-5)
            assert agent.predict(obs, deterministic=True)[0] == token.item()
            obs = env.step(rollout.action[i, t].item())[0]


# -- references, roles, checkpoints --------------------------------------------------------------------------------------------------


def disturb(agent, scale=0.3):
    torch.manual_seed(7)
    with torch.no_grad():
        for p in agent.parameters("policy"):
            p.add_(scale * torch.randn_like(p))


def test_lora_reference_is_the_base_without_a_copy():
    base = tiny_agent()
    agent = tiny_agent(lora={"r": 2, "alpha": 4})
    rollout = rollout_of(agent)
    disturb(agent)
    ref = agent.reference()
    assert ref.net is agent.net and ref.parameters("policy") == []
    want = base.evaluate(rollout, ["logp"]).logp
    got = ref.evaluate(rollout, ["logp"]).logp
    assert torch.equal(got, want) and not got.requires_grad
    assert (agent.evaluate(rollout, ["logp"]).logp - want).abs().max() > 1e-2


def test_full_reference_is_a_frozen_copy():
    agent = tiny_agent()
    rollout, ref = rollout_of(agent), agent.reference()
    before = agent.evaluate(rollout, ["logp"]).logp.detach()
    disturb(agent)
    assert torch.equal(ref.evaluate(rollout, ["logp"]).logp, before) and ref.parameters("policy") == []


def test_roles_of_parameters():
    agent = tiny_agent(lora={"r": 2}, value_head=True, num_costs=2)
    policy, value = agent.parameters("policy"), agent.parameters("value")
    assert len(value) == 2 and not {id(p) for p in policy} & {id(p) for p in value}
    assert sum(p.numel() for p in policy) < 0.2 * sum(p.numel() for p in agent.net["policy"].parameters())
    rollout = rollout_of(agent)
    assert agent.evaluate(rollout, ["value"]).value.shape == (12, 6, 3)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_config_and_state_rebuild_the_agent(options):
    agent = tiny_agent(**options)
    disturb(agent)
    rollout = rollout_of(agent)
    twin = LanguageAgent.from_config(json.loads(json.dumps(agent.config())))
    twin.load_state({k: v.clone() for k, v in agent.state().items()})
    assert torch.equal(twin.evaluate(rollout, ["logp"]).logp, agent.evaluate(rollout, ["logp"]).logp)
    assert rollout_of(twin).outcome["completion_text"] == rollout.outcome["completion_text"]


def test_lora_on_a_named_base_saves_the_adapter_only():
    agent = LanguageAgent.from_name("arithmetic", lora={"r": 2}, value_head=True)
    disturb(agent, 0.05)
    state, config = agent.state(), json.loads(json.dumps(agent.config()))
    assert sum(v.numel() for v in state.values()) < 0.15 * sum(p.numel() for p in agent.net.parameters())
    rollout = rollout_of(agent, task=arithmetic(1))
    twin = LanguageAgent.from_config(config)
    twin.load_state(state)
    assert torch.equal(twin.evaluate(rollout, ["logp"]).logp, agent.evaluate(rollout, ["logp"]).logp)
    with pytest.raises(ValueError, match="hash"):
        LanguageAgent.from_config(config | {"base_hash": "0" * 64})
    with pytest.raises(ValueError, match="does not fit"):
        twin.load_state(dict(list(state.items())[1:]))


def test_checkpoint_folder_round_trip(tmp_path):
    agent = LanguageAgent.from_name("arithmetic", lora={"r": 2}, temperature=0.9)
    disturb(agent, 0.05)
    rollout = rollout_of(agent, task=arithmetic(1))
    twin = LanguageAgent.load(agent.save(tmp_path / "agent"))
    assert torch.equal(twin.evaluate(rollout, ["logp"]).logp, agent.evaluate(rollout, ["logp"]).logp)


def test_export_is_a_plain_folder_with_the_adapter_merged(tmp_path):
    from transformers import AutoModelForCausalLM

    agent = tiny_agent(lora={"r": 2})
    disturb(agent)
    rollout = rollout_of(agent)
    agent.net.double()  # in float32 rounding alone moves one of these log-probs by 1e-4
    before = agent.evaluate(rollout, ["logp"]).logp.detach()
    plain = AutoModelForCausalLM.from_pretrained(agent.export(tmp_path / "plain"), dtype=torch.float64)
    got = LanguageAgent(plain, CharTokenizer("abcdefghi")).evaluate(rollout, ["logp"]).logp
    assert torch.allclose(got, before, atol=1e-6) and torch.equal(agent.evaluate(rollout, ["logp"]).logp, before)


def test_the_hash_sees_one_changed_weight():
    a, b = tiny_model(), tiny_model()
    assert weights_hash(a) == weights_hash(b)
    with torch.no_grad():
        b.lm_head.weight[0, 0] += 1e-6
    assert weights_hash(a) != weights_hash(b)
    a.register_buffer("scale", torch.tensor(2.0))  # a single number has no axis to be read as bytes along
    assert weights_hash(a) not in (weights_hash(tiny_model()), weights_hash(b))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"temperature": 0.0}, "temperature"), ({"top_p": 0.0}, "top_p"), ({"top_p": 1.5}, "top_p"), ({"max_new_tokens": 0}, "max_new_tokens"),
     ({"lora": {"rank": 2}}, "no setting 'rank'"), ({"lora": {"lora_alfa": 2}}, "did you mean 'lora_alpha'")],
)
def test_bad_options_teach(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_agent(**options)


def test_other_bad_input_teaches():
    agent = tiny_agent()
    with pytest.raises(ValueError, match="starts"):
        agent.generate({"prompt": 1})
    rollout = rollout_of(agent)
    with pytest.raises(ValueError, match=r"no critic.*value_head=True"):
        agent.evaluate(rollout, ["value"])
    with pytest.raises(ValueError, match="can't give"):
        agent.evaluate(rollout, ["q"])
    with pytest.raises(ValueError, match="embeds"):
        LanguageAgent(tiny_model(vocab=5), CharTokenizer("abcdefghi"))
    with pytest.raises(ValueError, match="unit='row'"):
        next(rollout.minibatches("decision", 4))


def test_shipped_arithmetic_model_leaves_room():
    agent, task = LanguageAgent.from_name("arithmetic"), arithmetic(2)
    score = task.score(agent.generate(task.all_starts("held_out"), torch.Generator().manual_seed(0)))
    assert 0.2 <= score.mean() <= 0.4


@pytest.mark.slow
def test_smollm2_first_pass_and_reference():
    from markovia.envs.text.tasks import sentiment

    task = sentiment()
    agent = LanguageAgent.from_name("smollm2", lora={"r": 4}, temperature=task.temperature)
    rollout = agent.generate(task.starts(4, torch.Generator().manual_seed(0), group_size=2), torch.Generator().manual_seed(1))
    with torch.no_grad():
        logp = agent.evaluate(rollout, ["logp"]).logp
    assert (logp - rollout.logp_old).abs().max() < 1e-4
    assert torch.equal(agent.reference().evaluate(rollout, ["logp"]).logp, logp)  # adapters start at zero
    assert task.score(rollout).abs().max() <= 1.0


def test_unpacking_a_model_for_the_cache_draws_nothing(tmp_path, monkeypatch):
    """A run that finds the cache empty goes on with the random numbers of one that finds the model there."""
    import transformers

    from markovia.envs.text import pretrained

    quantised = SimpleNamespace(from_pretrained=lambda *args, **options: tiny_model(seed=3))
    own = {name: getattr(transformers, name) for name in ("LlamaConfig", "LlamaForCausalLM")}
    monkeypatch.setattr(pretrained, "_transformers", lambda: SimpleNamespace(AutoModelForCausalLM=quantised, **own))
    monkeypatch.setattr(pretrained, "_gguf_folder", lambda: "")
    weights = tiny_model(seed=3).state_dict()
    before = torch.get_rng_state()  # the stand-in seeds itself, so loading it leads here again
    pretrained._build_smollm2_model(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    made = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert made.keys() == weights.keys() and all(torch.equal(made[k], v) for k, v in weights.items())
