"""Control and tabular agents: distributions, spaces, normaliser, networks."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn

from markovia.agents.control import ControlAgent
from markovia.agents.networks import is_image
from markovia.agents.normalizer import RunningNorm
from markovia.agents.records import Rollout
from markovia.agents.spaces import space_from_json, space_to_json
from markovia.agents.tabular import TabularAgent

torch.set_num_threads(1)

VECTOR = spaces.Box(-np.inf, np.inf, (3,), np.float32)
ACTIONS = {
    "gaussian": spaces.Box(np.array([-1.0, -2.0], np.float32), np.array([1.0, 4.0], np.float32)),
    "matrix": spaces.Box(-1.0, 1.0, (2, 2), np.float32),
    "discrete": spaces.Discrete(4, start=2),
    "multi": spaces.MultiDiscrete([2, 3]),
    "binary": spaces.MultiBinary(3),
}
OBSERVATIONS = {
    "vector": VECTOR,
    "matrix": spaces.Box(-1.0, 1.0, (2, 3), np.float64),
    "discrete": spaces.Discrete(5, start=-1),
    "multi": spaces.MultiDiscrete([2, 3]),
    "binary": spaces.MultiBinary(3),
    "image": spaces.Box(0, 255, (12, 12, 3), np.uint8),
    "atari": spaces.Box(0, 255, (4, 84, 84), np.uint8),
    "gray": spaces.Box(0, 255, (16, 16), np.uint8),
    "dict": spaces.Dict(
        pos=spaces.Box(-1.0, 1.0, (2,)), goal=spaces.Discrete(3), cam=spaces.Box(0, 255, (3, 10, 10), np.uint8)
    ),
}


def record(agent, obs, action, lead):
    """A record of the shape `lead` from flat rows."""
    shape = (*lead,)
    zeros, ones = torch.zeros(shape), torch.ones(shape, dtype=torch.bool)
    fold = lambda x: x.unflatten(0, lead)  # noqa: E731
    obs = {k: fold(v) for k, v in obs.items()} if isinstance(obs, dict) else fold(obs)
    return Rollout(obs, fold(action), zeros, zeros, ones, ones, zeros + 1, ~ones)


def batch_of(space, n):
    space.seed(0)
    rows = [space.sample() for _ in range(n)]
    return {k: np.stack([r[k] for r in rows]) for k in rows[0]} if isinstance(rows[0], dict) else np.stack(rows)


BOXES = [name for name, space in ACTIONS.items() if isinstance(space, spaces.Box)]


@pytest.mark.parametrize(("name", "squash"), [*((name, False) for name in ACTIONS), *((name, True) for name in BOXES)])
def test_actions_are_legal_and_evaluate_repeats_act(name, squash):
    space = ACTIONS[name]
    torch.manual_seed(0)
    agent = ControlAgent.from_spaces(VECTOR, space, squash=squash, log_std_init=1.0)
    obs = agent.observe(np.random.default_rng(0).normal(size=(12, 3)), update=True)
    action, logp = agent.act(obs, generator=torch.Generator().manual_seed(0))
    assert all(space.contains(a) for a in agent.env_action(action))
    out = agent.evaluate(record(agent, obs, action, (3, 4)), ("logp", "entropy", "value", "dist", "hidden"))
    assert torch.equal(out.logp.flatten(), logp)
    assert out.value.shape == (3, 4, 1) and out.entropy.shape == (3, 4) and out.hidden.shape == (3, 4, 64)
    single, state = agent.predict(np.zeros(3), deterministic=True)
    assert space.contains(space.dtype.type(single) if name == "discrete" else single) and state is None


def test_gaussian_keeps_unclipped_actions_and_clips_for_the_environment():
    agent = ControlAgent.from_spaces(VECTOR, ACTIONS["gaussian"])
    raw = torch.tensor([[5.0, -7.0], [0.25, 1.5]])
    assert np.allclose(agent.env_action(raw), [[1.0, -2.0], [0.25, 1.5]])


def test_squash_rescales_to_the_box():
    agent = ControlAgent.from_spaces(VECTOR, ACTIONS["gaussian"], squash=True)
    raw = torch.tensor([[0.0, 0.0], [30.0, -30.0]])
    assert np.allclose(agent.env_action(raw), [[0.0, 1.0], [1.0, -2.0]])  # middle of each interval, then its ends


@pytest.mark.parametrize("name", OBSERVATIONS)
def test_every_observation_space_acts_and_predicts(name):
    space = OBSERVATIONS[name]
    agent = ControlAgent.from_spaces(space, spaces.Discrete(3), hidden=(16,))
    batch = batch_of(space, 6)
    obs = agent.observe(batch, update=True)
    action, _ = agent.act(obs)
    out = agent.evaluate(record(agent, obs, action, (2, 3)), ("logp", "value"))
    assert out.logp.shape == (2, 3) and torch.isfinite(out.value).all()
    one = {k: v[0] for k, v in batch.items()} if isinstance(batch, dict) else batch[0]
    many = agent.predict(batch, deterministic=True)[0]
    assert many.shape == (6,) and agent.predict(one, deterministic=True)[0] == many[0]


def test_images_stay_bytes_and_are_not_normalised():
    agent = ControlAgent.from_spaces(OBSERVATIONS["dict"], spaces.Discrete(3))
    obs = agent.observe(batch_of(OBSERVATIONS["dict"], 4), update=True)
    assert obs["cam"].dtype == torch.uint8 and agent.net["normalizer"].keys == ["pos"]
    assert is_image(OBSERVATIONS["gray"]) and not is_image(VECTOR)


def test_cnn_learns_where_a_bright_pixel_row_is():
    """Policy gradient on a contextual bandit over 12 x 12 images: the half that is bright is the right action."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, 64)
    image = rng.integers(0, 60, (64, 12, 12, 1))
    image[np.arange(64), label * 6 + 3] += 150
    agent = ControlAgent.from_spaces(spaces.Box(0, 255, (12, 12, 1), np.uint8), spaces.Discrete(2), hidden=(), critic=False)
    obs, right = agent.observe(image.astype(np.uint8)), torch.from_numpy(label)
    opt = torch.optim.Adam(agent.parameters("policy"), 3e-3)
    for _ in range(25):
        action, _ = agent.act(obs)
        adv = (action == right).float() - 0.5
        loss = -(agent.evaluate(record(agent, obs, action, (64, 1)), ("logp",)).logp[:, 0] * adv).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert (agent.act(obs, deterministic=True)[0] == right).float().mean() > 0.95


def test_policy_and_critic_share_no_parameter():
    agent = ControlAgent.from_spaces(VECTOR, ACTIONS["gaussian"], num_costs=2)
    policy, value = agent.parameters("policy"), agent.parameters("value")
    assert not {id(p) for p in policy} & {id(p) for p in value}
    assert sum(p.numel() for p in policy) == 3 * 64 + 64 + 64 * 64 + 64 + 64 * 2 + 2 + 2
    assert agent.critic(torch.zeros(5, 3)).shape == (5, 3)


def test_initialisation_is_orthogonal_with_the_stated_gains():
    agent = ControlAgent.from_spaces(VECTOR, ACTIONS["gaussian"], log_std_init=-0.5)
    hidden = agent.net["policy"].trunk.body[1][2].weight
    assert torch.allclose(hidden @ hidden.T, 2.0 * torch.eye(64), atol=1e-5)
    head, value = agent.net["policy"].head.weight, agent.net["critic"].head.weight
    assert torch.allclose(head @ head.T, 1e-4 * torch.eye(2), atol=1e-8)
    assert torch.allclose(value @ value.T, torch.eye(1), atol=1e-5)
    assert all((m.bias == 0).all() for m in agent.net.modules() if isinstance(m, nn.Linear))
    assert torch.equal(agent.net["policy"].log_std, torch.full((2,), -0.5))


class OwnNet(nn.Module):
    def __init__(self, n_out):
        super().__init__()
        self.layer = nn.Linear(3, n_out)

    def forward(self, obs):
        return torch.relu(self.layer(obs))


def test_own_network_gives_features_or_parameters():
    own = OwnNet(7)
    agent = ControlAgent.from_spaces(VECTOR, spaces.Discrete(4), network=own)
    assert agent.net["policy"].trunk.body is own and agent.net["policy"].head.in_features == 7
    assert agent.net["critic"].trunk.body is not own
    params = ControlAgent.from_spaces(VECTOR, spaces.Discrete(4), network=OwnNet(4), network_output="params")
    obs = torch.randn(2, 3)
    dist = params.evaluate(record(params, obs, torch.zeros(2, dtype=torch.long), (2, 1)), ("dist",)).dist
    assert torch.equal(dist.logits[:, 0], params.net["policy"].trunk.body(obs))
    with pytest.raises(ValueError, match="needs 4 distribution parameters"):
        ControlAgent.from_spaces(VECTOR, spaces.Discrete(4), network=OwnNet(5), network_output="params")
    with pytest.raises(ValueError, match=r"\(n, k\) tensor"):
        ControlAgent.from_spaces(VECTOR, spaces.Discrete(4), network=nn.Flatten(0))


@pytest.mark.parametrize(
    ("obs", "action", "kwargs", "message"),
    [
        (VECTOR, spaces.Box(-np.inf, np.inf, (2,)), {}, "infinite bounds"),
        (VECTOR, spaces.Box(-np.inf, np.inf, (2,)), {"squash": True}, "infinite bounds"),
        (VECTOR, spaces.Text(4), {}, "serves Box, Discrete"),
        *((VECTOR, ACTIONS[name], {"squash": True}, "needs a Box") for name in ("discrete", "multi", "binary")),
        (VECTOR, spaces.Box(0, 5, (2,), np.int64), {}, "float Box"),
        (spaces.Text(4), spaces.Discrete(2), {}, "Text"),
        (spaces.Dict(a=spaces.Dict(b=VECTOR)), spaces.Discrete(2), {}, "flat Dict"),
        (VECTOR, spaces.Discrete(2), {"activation": "tan"}, "unknown activation"),
    ],
)
def test_bad_spaces_are_refused_with_the_mend(obs, action, kwargs, message):
    with pytest.raises(ValueError, match=message):
        ControlAgent.from_spaces(obs, action, **kwargs)


def test_observations_of_another_shape_are_refused():
    agent = ControlAgent.from_spaces(spaces.Box(-1, 1, (3,)), spaces.Discrete(2))
    for wrong in (np.zeros(4), np.zeros((2, 4)), np.zeros((1, 2, 3)), 0.0):
        with pytest.raises(ValueError, match=r"arrays of shape \(3,\)"):
            agent.predict(wrong)
    agent = ControlAgent.from_spaces(spaces.Dict(a=spaces.Box(-1, 1, (3,)), b=spaces.Discrete(2)), spaces.Discrete(2))
    for wrong in ({"a": np.zeros(3)}, np.zeros(3)):
        with pytest.raises(ValueError, match=r"the keys \['a', 'b'\]"):
            agent.predict(wrong)


@pytest.mark.parametrize(("options", "message"), [({"hidden": 64}, r"\(64, 64\)"), ({"hidden": (8, 0)}, "sizes"), ({"num_costs": -1}, ">= 0")])
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ControlAgent.from_spaces(spaces.Box(-1, 1, (3,)), spaces.Discrete(2), **options)


def test_evaluate_refuses_unknown_columns_and_a_missing_critic():
    agent = ControlAgent.from_spaces(VECTOR, spaces.Discrete(2), critic=False)
    row = record(agent, torch.zeros(1, 3), torch.zeros(1, dtype=torch.long), (1, 1))
    with pytest.raises(ValueError, match="choose from"):
        agent.evaluate(row, ("logprob",))
    with pytest.raises(ValueError, match="no critic"):
        agent.evaluate(row, ("value",))


def test_running_norm_equals_numpy_over_uneven_batches():
    data = np.random.default_rng(0).normal(3.0, 2.0, (100, 4))
    norm = RunningNorm((4,))
    for part in np.split(data, [1, 3, 40, 40, 77]):
        norm.update(torch.from_numpy(part))
    assert np.allclose(norm.mean.numpy(), data.mean(0), atol=1e-12)
    assert np.allclose(norm.var.numpy(), data.var(0), atol=1e-12)
    assert norm(torch.full((1, 4), 1e9)).eq(10.0).all() and norm(torch.zeros(1, 4)).dtype == torch.float32


def test_normaliser_takes_only_the_rows_of_the_mask():
    agent = ControlAgent.from_spaces(VECTOR, spaces.Discrete(2))
    rows = np.arange(12.0).reshape(4, 3)
    agent.observe(rows, update=np.array([True, False, True, False]))
    assert np.allclose(agent.net["normalizer"].norms[0].mean.numpy(), rows[[0, 2]].mean(0))
    agent.predict(rows)
    assert agent.net["normalizer"].norms[0].count == 2


@pytest.mark.parametrize("space", [*ACTIONS.values(), *OBSERVATIONS.values()], ids=str)
def test_spaces_survive_json(space):
    import json

    back = space_from_json(json.loads(json.dumps(space_to_json(space))))
    assert back == space and list(getattr(back, "spaces", [])) == list(getattr(space, "spaces", []))


def test_tabular_starts_from_a_prior_and_equals_the_formula():
    prior = torch.tensor([[0.2, 0.8], [0.5, 0.5], [0.9, 0.1]], dtype=torch.float64)
    agent = TabularAgent.from_spaces(spaces.Discrete(3), spaces.Discrete(2), logits=prior.log(), dtype="float64", num_costs=1)
    state, action = torch.tensor([[0, 2], [1, 0]]), torch.tensor([[1, 0], [1, 0]])
    row = record(agent, state.flatten(), action.flatten(), (2, 2))
    out = agent.evaluate(row, ("logp", "entropy", "value", "dist"))
    assert torch.allclose(out.logp.exp(), torch.tensor([[0.8, 0.9], [0.5, 0.2]], dtype=torch.float64))
    assert torch.allclose(out.entropy[1, 0], torch.tensor(2.0, dtype=torch.float64).log())
    assert out.value.shape == (2, 2, 2) and torch.allclose(out.dist.log_prob(action), out.logp)
    assert agent.predict(np.int64(2), deterministic=True)[0] == 0
    assert agent.predict(np.array([0, 2]), deterministic=True)[0].tolist() == [1, 0]


def test_tabular_numbers_vector_states_row_major():
    agent = TabularAgent.from_spaces(spaces.MultiDiscrete([2, 3]), spaces.Discrete(2))
    assert agent.net["policy"].table.shape == (6, 2)
    assert agent.observe(np.array([[0, 2], [1, 1]])).tolist() == [2, 4]


@pytest.mark.parametrize(
    ("obs", "action", "kwargs", "message"),
    [
        (VECTOR, spaces.Discrete(2), {}, "use ControlAgent"),
        (spaces.Discrete(2), ACTIONS["gaussian"], {}, "Discrete action"),
        (spaces.Discrete(2), spaces.Discrete(2), {"logits": torch.zeros(3, 2)}, r"\(2, 2\)"),
        (spaces.Discrete(2), spaces.Discrete(2), {"dtype": "int8"}, "float64"),
    ],
)
def test_tabular_refuses_what_it_cannot_serve(obs, action, kwargs, message):
    with pytest.raises(ValueError, match=message):
        TabularAgent.from_spaces(obs, action, **kwargs)


def test_predict_drives_a_gymnasium_environment():
    env = gym.make("CartPole-v1")
    agent = ControlAgent.from_spaces(env.observation_space, env.action_space)
    obs, _ = env.reset(seed=0)
    for _ in range(5):
        obs, *_ = env.step(agent.predict(obs)[0])
    assert env.observation_space.contains(obs)
