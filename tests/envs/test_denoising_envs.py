"""The denoising environments: Gymnasium's and SB3's contract, batched = scalar, autoreset, scoring and taught errors."""

import subprocess
import sys
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

import markovia
from markovia.envs.denoising.env import DenoisingEnv, DenoisingTask, DenoisingVectorEnv
from markovia.envs.denoising.kernel import GaussianKernel
from markovia.envs.denoising.networks import (
    GuidedDenoiser,
    LinearDenoiser,
    MLPClassifier,
    MLPDenoiser,
    build_network,
    extrapolate,
    load_pretrained,
    network_config,
)
from markovia.envs.denoising.tasks import digit_images, make_task

pytest.importorskip("diffusers")
pytest.importorskip("sklearn")

IDS = ("markovia/Mixture2D-v0", "markovia/Digits-v0", "markovia/DigitsConditional-v0", "markovia/LinearGaussian-v0")


def small_task(reward=lambda x, cond: -x.square().sum(-1), conditions=None, num_steps=4):
    """Two numbers pulled towards 0 (towards the condition, when there is one) in a few steps."""

    def network(x, t, cond):
        return 0.8 * x + (0.0 if cond is None else 0.2 * cond)

    return DenoisingTask(network, GaussianKernel.direct([0.3] * num_steps), reward, (2,), conditions, name="small")


# ----------------------------------------------------------------------------------------------------------- Gymnasium
def test_ids_work_without_an_import_and_specs_are_plain_data():
    code = "import gymnasium as g; print(g.make('markovia:markovia/LinearGaussian-v0').reset(seed=0)[0]['step'])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "0"
    assert markovia.__version__ and gym.spec("markovia/Digits-v0").to_json()


@pytest.mark.parametrize("env_id", IDS)
def test_an_episode_has_exactly_k_steps_and_pays_at_the_end(env_id):
    env = gym.make(env_id)
    obs, _ = env.reset(seed=1)
    K = env.unwrapped.task.num_steps
    for k in range(K):
        assert obs["step"] == k
        obs, reward, terminated, truncated, _ = env.step(np.zeros(env.action_space.shape, np.float32))
        assert type(reward) is float and terminated is (k == K - 1) and truncated is False
        assert k == K - 1 or reward == 0.0
    assert obs["step"] == K
    task = env.unwrapped.task
    clean = torch.from_numpy(obs["sample"]).reshape(1, *task.sample_shape)
    cond = torch.from_numpy(obs["cond"])[None] if "cond" in obs else None
    assert reward == pytest.approx(float(task.rewards(clean, cond)[0]), rel=1e-6)
    with pytest.raises(RuntimeError, match="call reset"):
        env.unwrapped.step(np.zeros(env.action_space.shape, np.float32))


# --------------------------------------------------------------------------------------------------- batched = scalar
def episode_pair(batched, scalars, steps, seed=0):
    """Both environments under the same seed and actions; yields the returns of each step."""
    assert batched.single_action_space == scalars.single_action_space
    first, second = batched.reset(seed=seed)[0], scalars.reset(seed=seed)[0]
    yield (first,), (second,)
    rng = np.random.default_rng(0)
    for _ in range(steps):
        action = rng.standard_normal(batched.action_space.shape).astype(np.float32)
        yield batched.step(action), scalars.step(action)


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP])
@pytest.mark.parametrize("action_mode", ["residual", "next_sample", "model_output"])
@pytest.mark.parametrize("conditional", [False, True])
def test_batched_equals_scalar(mode, action_mode, conditional):
    conditions = [[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]] if conditional else None
    task = small_task(conditions=conditions)
    batched = DenoisingVectorEnv(task, 3, action_mode, autoreset_mode=mode.value)
    scalars = SyncVectorEnv([lambda: DenoisingEnv(task, action_mode)] * 3, autoreset_mode=mode)
    assert batched.metadata["autoreset_mode"] is mode
    ends = 0
    for ours, theirs in episode_pair(batched, scalars, steps=11):
        for name, space in batched.single_observation_space.items():
            np.testing.assert_allclose(ours[0][name], theirs[0][name], rtol=1e-6, atol=1e-6)
            assert ours[0][name].dtype == theirs[0][name].dtype == space.dtype
        for a, b in zip(ours[1:4], theirs[1:4], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
            assert a.dtype == b.dtype
        if len(ours) > 1:
            assert ours[4].keys() == theirs[4].keys()
            ends += bool(ours[2].all())
            for mine, other in zip(ours[4].get("final_obs", ()), theirs[4].get("final_obs", ()), strict=True):
                assert mine["step"] == other["step"] == task.num_steps
                np.testing.assert_allclose(mine["sample"], other["sample"], rtol=1e-6, atol=1e-6)
    assert ends == 2


def test_make_vec_uses_the_batched_environment_with_one_network_call_a_step():
    env = gym.make_vec("markovia/Mixture2D-v0", num_envs=5, wanted=2, autoreset_mode="NextStep")
    assert isinstance(env, DenoisingVectorEnv) and env.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    calls = []
    network = env.task.network
    env.task.network = lambda x, t, cond: calls.append(len(x)) or network(x, t, cond)
    env.reset(seed=0)
    for _ in range(env.task.num_steps):
        _, reward, terminated, *_ = env.step(np.zeros((5, 2), np.float32))
    assert calls == [5] * env.task.num_steps and terminated.all() and (reward > 0).all()
    obs, reward, terminated, *_ = env.step(np.zeros((5, 2), np.float32))
    assert (obs["step"] == 0).all() and not terminated.any() and len(calls) == env.task.num_steps


def test_residual_noise_of_zero_mean_is_the_reference_chain():
    task = small_task()
    env = DenoisingEnv(task)
    obs, _ = env.reset(seed=3)
    z = np.array([0.5, -1.0], np.float32)
    after, *_ = env.step(z)
    np.testing.assert_allclose(after["sample"], 0.8 * obs["sample"] + 0.3 * z, rtol=1e-6)


def test_model_output_of_the_reference_network_draws_from_the_reference():
    task = small_task(num_steps=1)
    env = DenoisingVectorEnv(task, 4000, "model_output")
    obs, _ = env.reset(seed=0)
    *_, infos = env.step(0.8 * obs["sample"])
    final = np.stack([o["sample"] for o in infos["final_obs"]])
    residual = (final - 0.8 * obs["sample"]) / 0.3
    assert abs(residual.mean()) < 0.04 and abs(residual.std() - 1) < 0.04


def test_image_shaped_observations_and_rendering():
    env = gym.make("markovia/Digits-v0", flatten=False, render_mode="rgb_array")
    obs, _ = env.reset(seed=0)
    assert obs["sample"].shape == env.action_space.shape == (8, 8)
    assert env.render().shape == (128, 128, 3) and env.render().dtype == np.uint8
    env = gym.make("markovia/Mixture2D-v0", render_mode="rgb_array")
    env.reset(seed=0)
    assert (env.render() != 255).any()


@pytest.mark.parametrize("env_id", ["markovia/Mixture2D-v0", "markovia/Digits-v0"])
def test_the_batched_environment_draws_what_single_ones_draw(env_id):
    batched = gym.make_vec(env_id, num_envs=3, render_mode="rgb_array")
    assert batched.render_mode == "rgb_array" and batched.render() is None
    batched.reset(seed=5)
    for _ in range(2):
        frames = batched.render()
        assert isinstance(frames, tuple) and len(frames) == 3
        batched.step(np.ones(batched.action_space.shape, np.float32))
    for i, frame in enumerate(batched.render()):
        env = gym.make(env_id, render_mode="rgb_array")
        env.reset(seed=5 + i)
        for _ in range(2):
            env.step(np.ones(env.action_space.shape, np.float32))
        assert np.abs(frame.astype(int) - env.render()).mean() < 0.1  # a rounded float may move a pixel by one shade
    plain = gym.make_vec(env_id, num_envs=1)
    plain.reset(seed=0)
    assert plain.render() is None


# -------------------------------------------------------------------------------------------------- tasks and networks
def rollout(task, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = task.starts(n, generator)["x"]
    for k in range(task.num_steps):
        mean, std = task.mean_std(x, k)
        x = mean + std * torch.randn(x.shape, generator=generator)
    return x


@pytest.mark.parametrize("network", ["mlp", "unet"])
def test_sampled_digits_are_digits_of_every_class(network):
    x = rollout(make_task("digits", network=network), 1000 if network == "mlp" else 400)
    with torch.no_grad():
        probability = load_pretrained("digits_judge")(x).softmax(-1)
    shares = torch.bincount(probability.argmax(-1), minlength=10) / len(x)
    assert float(shares.min()) > 0.04 and float(shares.max()) < 0.22
    assert float(probability.max(-1).values.mean()) > 0.75
    # samples are as far from the nearest real digit as real digits are from each other: neither blur nor copies
    real = digit_images()[0].flatten(1)
    between = torch.cdist(real, real).fill_diagonal_(torch.inf).min(-1).values.mean()
    ratio = float(torch.cdist(x.flatten(1), real).min(-1).values.mean() / between)
    assert 0.6 < ratio < 1.4


def test_conditional_digits_follow_the_condition_and_guidance_makes_them_surer():
    probability = []
    for guidance in (1.0, 2.0):
        task = make_task("digits_conditional", guidance=guidance)
        generator = torch.Generator().manual_seed(0)
        starts = task.starts(300, generator)
        assert starts["cond"].unique(dim=0).shape == (10, 10)
        x = starts["x"]
        for k in range(task.num_steps):
            mean, std = task.mean_std(x, k, starts["cond"])
            x = mean + std * torch.randn(x.shape, generator=generator)
        probability.append(float(task.judged(x, starts["cond"]).mean()))
    assert probability[0] > 0.7 and probability[1] > probability[0]
    with pytest.raises(ValueError, match="class of the condition"):
        task.rewards(x)


def test_classifier_and_judge_read_real_digits():
    images, labels = digit_images()
    for name, half in (("digits_classifier", slice(1, None, 2)), ("digits_judge", slice(0, None, 2))):
        with torch.no_grad():
            right = load_pretrained(name)(images[half]).argmax(-1) == labels[half]
        assert float(right.float().mean()) > 0.95


def test_mixture_samples_lie_on_the_ring_with_equal_shares():
    x = rollout(make_task("mixture2d"), 2000)
    assert float(x.norm(dim=-1).mean()) == pytest.approx(1.0, abs=0.06)
    angle = torch.atan2(x[:, 1], x[:, 0]) / (2 * torch.pi) * 8
    shares = torch.bincount(angle.round().long() % 8, minlength=8) / 2000
    assert float((shares - 1 / 8).abs().max()) < 0.04


def test_linear_gaussian_task_has_the_fixture_return():
    task = make_task("linear_gaussian")
    x = rollout(task, 20_000)
    assert float(task.rewards(x).mean()) == pytest.approx(-0.434, abs=0.03)


def test_judge_and_reward_agree_on_real_digits():
    task = make_task("digits", wanted=7)
    images, labels = digit_images()
    wanted = images[labels == 7]
    assert float(task.rewards(wanted).mean()) > 0.85 and float(task.judged(wanted).mean()) > 0.85
    assert float(task.rewards(images[labels == 0]).mean()) < 0.1


@pytest.mark.parametrize(
    "network",
    [
        MLPDenoiser((2, 3), 16, 2, cond_dim=4),
        LinearDenoiser(torch.ones(3, 2, 2), torch.ones(3, 2)),
        GuidedDenoiser(MLPDenoiser((2, 3), 16, 2, cond_dim=4), 2.5),
        MLPClassifier((4,), 3),
    ],
    ids=lambda n: type(n).__name__,
)
def test_networks_rebuild_from_their_config(network):
    again = build_network(network_config(network))
    again.load_state_dict(network.state_dict())
    assert network_config(again) == network_config(network)


def test_guidance_extrapolates_from_no_condition_to_the_condition():
    # by hand: base 1, towards 3, scale 2.5 -> 1 + 2.5 * 2 = 6
    assert extrapolate(torch.tensor(1.0), torch.tensor(3.0), 2.5) == 6.0
    inner = MLPDenoiser((2,), 16, 2, cond_dim=3)
    x, t, cond = torch.randn(5, 2), torch.arange(5), torch.eye(3)[torch.tensor([0, 1, 2, 0, 1])]
    with torch.no_grad():
        none, given = inner(x, t, torch.zeros(5, 3)), inner(x, t, cond)
        torch.testing.assert_close(GuidedDenoiser(inner, 2.5)(x, t, cond), none + 2.5 * (given - none))
        torch.testing.assert_close(GuidedDenoiser(inner, 0.0)(x, t, cond), none)
        assert torch.equal(GuidedDenoiser(inner, 1.0)(x, t, cond), given)


def test_a_denoiser_takes_any_leading_shape():
    network = load_pretrained("digits")
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([[9, 99, 999], [9, 99, 999]])
    with torch.no_grad():
        torch.testing.assert_close(network(x, t).flatten(0, 1), network(x.flatten(0, 1), t.flatten()))


def test_starts_are_reproducible_and_draw_conditions():
    task = small_task(conditions=[[1.0, 0.0], [0.0, 1.0]])
    one, two = (task.starts(64, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(one["x"], two["x"]) and torch.equal(one["cond"], two["cond"])
    assert one["cond"].unique(dim=0).shape == (2, 2) and one["x"].shape == (64, 2)


# ----------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    "reward, message",
    [
        (lambda x, c: torch.full((len(x),), float("nan")), "returned nan for sample 0"),
        (lambda x, c: torch.tensor([1.0, float("inf"), 0.0]), "returned inf for sample 1"),
        (lambda x, c: x, r"shape \(3, 2\) for 3 samples; expected \(3,\)"),
        (lambda x, c: [1.0, 2.0], r"shape \(2,\) for 3 samples"),
        (lambda x, c: 1.0, r"shape \(\) for 3 samples"),
    ],
)
def test_bad_rewards_are_explained(reward, message):
    with pytest.raises(ValueError, match=message):
        small_task(reward).rewards(torch.zeros(3, 2))
    env = DenoisingVectorEnv(small_task(reward, num_steps=1), 3)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        env.step(np.zeros((3, 2), np.float32))


def test_score_reads_the_record_and_rewards_bare_samples():
    task = small_task(reward=lambda x, c: x.sum(-1) + c.sum(-1), conditions=[[1.0, 0.0]])
    x, cond = torch.ones(3, 2), torch.full((3, 1), 0.5)
    record = SimpleNamespace(outcome={"x": x, "cond": cond})
    assert task.score(record).tolist() == task.rewards(x, cond).tolist() == [2.5] * 3


def test_rewards_may_be_lists_or_arrays():
    for reward in (lambda x, c: [1, 2, 3], lambda x, c: np.array([1.0, 2.0, 3.0])):
        assert small_task(reward).rewards(torch.zeros(3, 2)).tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: DenoisingEnv(small_task(), "residuals"), "did you mean 'residual'"),
        (lambda: DenoisingEnv(small_task(), bound=float("inf")), "positive finite"),
        (lambda: DenoisingEnv(small_task(), render_mode="human"), "rgb_array"),
        (lambda: DenoisingVectorEnv(small_task(), 0), "at least 1"),
        (lambda: DenoisingVectorEnv(small_task(), 2, render_mode="human"), "rgb_array"),
        (lambda: DenoisingVectorEnv(DenoisingTask(None, GaussianKernel.direct([0.3]), None, (3,)), 2, render_mode="rgb_array"), "can't be drawn"),
        (lambda: DenoisingVectorEnv(small_task(), 2, autoreset_mode=AutoresetMode.DISABLED), "SameStep"),
        (lambda: DenoisingVectorEnv(small_task(), 2).reset(seed=[1]), "1 seeds for 2"),
        (lambda: small_task(conditions=[1.0, 2.0]), "one row per condition"),
        (lambda: small_task().judged(torch.zeros(1, 2)), "no judge"),
        (lambda: make_task("digit"), "did you mean 'digits'"),
        (lambda: make_task("digits", wanted=10), "a digit, 0 to 9"),
        (lambda: make_task("mixture2d", wanted=8), "0 to 7"),
        (lambda: make_task("digits", final="flor"), "did you mean 'floor'"),
        (lambda: load_pretrained("digit"), "digits_judge"),
        (lambda: build_network({"network": "UNet"}), "'UNet' is unknown"),
        (lambda: network_config(torch.nn.Linear(1, 1)), "Linear has no JSON config"),
        (lambda: GuidedDenoiser(torch.nn.Identity(), -1.0), "scale >= 0"),
        (lambda: GuidedDenoiser(torch.nn.Identity())(torch.zeros(1, 2), torch.zeros(1)), "guidance needs a condition"),
        (lambda: MLPDenoiser((2,), 8, 1)(torch.zeros(1, 2), torch.zeros(1), torch.zeros(1, 3)), "cond_dim=0"),
    ],
)
def test_bad_arguments_are_explained(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_wrong_action_shape_is_explained():
    env = DenoisingEnv(small_task())
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"action has shape \(3,\); expected \(2,\)"):
        env.step(np.zeros(3, np.float32))
