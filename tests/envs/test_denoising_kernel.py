"""GaussianKernel against diffusers' own step() and against the identities that tie the samplers together."""

import json

import pytest
import torch

from markovia.envs.denoising.kernel import GaussianKernel
from markovia.envs.denoising.likelihood import control_pair, delta, log_prob, step_kl
from markovia.envs.exact.denoisers import GMMDenoiser

diffusers = pytest.importorskip("diffusers")
K = 10


def ddim(**kwargs):
    return diffusers.DDIMScheduler(**{"clip_sample": False, "timestep_spacing": "trailing", **kwargs})


def ddpm(**kwargs):
    return diffusers.DDPMScheduler(**{"clip_sample": False, "timestep_spacing": "trailing", **kwargs})


def batch(kernel, shape=(3, 4), dtype=torch.float64, seed=0):
    """(x, m, step) with one sample per step of the kernel."""
    generator = torch.Generator().manual_seed(seed)
    n = kernel.num_steps
    return (*torch.randn(2, n, *shape, dtype=dtype, generator=generator).unbind(0), torch.arange(n))


# ------------------------------------------------------------------------------------------------------------- parity
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddim_matches_diffusers_step(prediction, clip, spacing):
    scheduler = ddim(prediction_type=prediction, clip_sample=clip, timestep_spacing=spacing)
    kernel = GaussianKernel.from_scheduler(scheduler, K, eta=0.8)
    scheduler.set_timesteps(K)
    x, m, step = batch(kernel, dtype=torch.float32)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    mean, std = kernel.mean_std(m, x, step)
    for k, t in enumerate(scheduler.timesteps):
        out = scheduler.step(m[k], int(t), x[k], eta=0.8, variance_noise=noise[k])
        torch.testing.assert_close(mean[k] + std[k] * noise[k], out.prev_sample, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(kernel.x0_from(m, x, step)[k], out.pred_original_sample, rtol=1e-4, atol=1e-5)


def test_ddim_recomputed_eps_matches_use_clipped_model_output():
    scheduler = ddim(clip_sample=True)
    kernel = GaussianKernel.from_scheduler(scheduler, K, eta=0.0, recompute_eps=True)
    scheduler.set_timesteps(K)
    x, m, step = batch(kernel, dtype=torch.float32)
    mean, _ = kernel.mean_std(m, x, step)
    for k, t in enumerate(scheduler.timesteps):
        out = scheduler.step(m[k], int(t), x[k], eta=0.0, use_clipped_model_output=True)
        torch.testing.assert_close(mean[k], out.prev_sample, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_ddpm_matches_diffusers_step(variance, spacing):
    scheduler = ddpm(variance_type=variance, clip_sample=True, timestep_spacing=spacing)
    kernel = GaussianKernel.from_scheduler(scheduler, K)
    scheduler.set_timesteps(K)
    x, m, step = batch(kernel, dtype=torch.float32)
    mean, std = kernel.mean_std(m, x, step)
    for k, t in enumerate(scheduler.timesteps):
        # step() draws its noise itself: the same seed gives the same noise
        noise = torch.randn(x[k].shape, generator=torch.Generator().manual_seed(k)) if t > 0 else torch.zeros_like(x[k])
        out = scheduler.step(m[k], t, x[k], generator=torch.Generator().manual_seed(k))
        torch.testing.assert_close(mean[k] + std[k] * noise, out.prev_sample, rtol=1e-4, atol=1e-5)


def test_fixed_large_log_reads_as_fixed_large():
    large, log = (GaussianKernel.from_scheduler(ddpm(variance_type=v), K) for v in ("fixed_large", "fixed_large_log"))
    assert torch.equal(large.std, log.std) and bool(log.std.isfinite().all())


@pytest.mark.parametrize("stochastic", [False, True])
def test_flow_matching_matches_diffusers_step(stochastic):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=stochastic)
    kernel = GaussianKernel.from_scheduler(scheduler, K, eta=None if stochastic else 0.0)
    assert kernel.kind == ("flow_resample" if stochastic else "flow_sde")
    scheduler.set_timesteps(K)
    x, m, step = batch(kernel, dtype=torch.float32)
    mean, std = kernel.mean_std(m, x, step)
    assert torch.equal(kernel.timestep(step), scheduler.timesteps)
    for k, t in enumerate(scheduler.timesteps):
        noise = torch.randn(x[k].shape, generator=torch.Generator().manual_seed(k))
        out = scheduler.step(m[k], t, x[k], generator=torch.Generator().manual_seed(k)).prev_sample
        torch.testing.assert_close(mean[k] + std[k] * noise, out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("set_alpha_to_one", [True, False])
def test_consistency_matches_lcm_step(set_alpha_to_one):
    scheduler = diffusers.LCMScheduler(clip_sample=False, set_alpha_to_one=set_alpha_to_one)
    kernel = GaussianKernel.from_scheduler(scheduler, 4)
    scheduler.set_timesteps(4)
    x, m, step = batch(kernel, dtype=torch.float32)
    mean, std = kernel.mean_std(m, x, step)
    for k, t in enumerate(scheduler.timesteps):
        noise = torch.randn(x[k].shape, generator=torch.Generator().manual_seed(k))
        out = scheduler.step(m[k], t, x[k], generator=torch.Generator().manual_seed(k)).prev_sample
        torch.testing.assert_close(mean[k] + std[k] * noise, out, rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------------------- identities
@pytest.mark.parametrize("clip, recompute", [(None, False), (1.0, True)])
def test_ddim_one_equals_ddpm_small(clip, recompute):
    one = GaussianKernel.from_scheduler(ddim(), K, eta=1.0, clip_x0=clip, recompute_eps=recompute)
    two = GaussianKernel.from_scheduler(ddpm(), K, clip_x0=clip)
    x, m, step = batch(one)
    for a, b in zip(one.mean_std(m, x, step), two.mean_std(m, x, step), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_flow_sde_of_zero_noise_is_the_euler_step():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    kernel = GaussianKernel.from_scheduler(scheduler, K, eta=0.0)
    scheduler.set_timesteps(K)
    x, m, step = batch(kernel)
    dt = scheduler.sigmas.double().diff()[:, None, None]
    torch.testing.assert_close(kernel.mean_std(m, x, step)[0], x + dt * m, rtol=1e-12, atol=1e-12)
    assert not kernel.in_likelihood.any()


def test_flow_sde_formula_and_its_singular_start():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    kernel = GaussianKernel.from_scheduler(scheduler, K, eta=0.7)
    scheduler.set_timesteps(K)
    x, v, step = batch(kernel)
    mean, std = kernel.mean_std(v, x, step)
    sigmas = scheduler.sigmas.double().tolist()
    for k in range(K):
        s, dt = sigmas[k], sigmas[k + 1] - sigmas[k]
        g = 0.7 * (s / (1 - (sigmas[1] if k == 0 else s))) ** 0.5
        expected = x[k] + (v[k] + g**2 / (2 * s) * (x[k] + (1 - s) * v[k])) * dt
        torch.testing.assert_close(mean[k], expected, rtol=1e-10, atol=1e-12)
        assert float(std[k].flatten()) == pytest.approx(g * (-dt) ** 0.5, rel=1e-12)


@pytest.mark.parametrize("shift", [1.67, 1.18])
def test_a_first_sigma_that_float32_rounds_below_one_is_one(shift):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    kernel = GaussianKernel.from_scheduler(scheduler, K, eta=0.7)
    scheduler.set_timesteps(K)
    assert 1 - 1e-6 < float(scheduler.sigmas[0]) < 1
    # with sigma' in the place of 1: std = eta sqrt(1/(1-sigma')) sqrt(1-sigma') = eta; the output is eps - x0 and says nothing about eps alone
    assert float(kernel.std[0]) == pytest.approx(0.7, rel=1e-12) and float(kernel.std.max()) < 1
    assert (kernel.tables.signal[0], kernel.tables.eps_m[0]) == (0.0, 0.0)


@pytest.mark.parametrize("kind", ["ddpm", "ddim", "flow_sde", "flow_resample", "consistency"])
def test_means_are_affine_in_the_output(kind):
    flow = kind.startswith("flow")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler() if flow else ddim()
    kernel = GaussianKernel.from_scheduler(scheduler, K, kind=kind)
    x, m, step = batch(kernel)
    mean = lambda out: kernel.mean_std(out, x, step)[0]  # noqa: E731
    torch.testing.assert_close(mean(0.3 * m + 0.7 * x), 0.3 * mean(m) + 0.7 * mean(x), rtol=1e-12, atol=1e-12)


def test_affine_path_equals_the_clipping_path_when_nothing_is_clipped():
    plain = GaussianKernel.from_scheduler(ddim(), K)
    clipping = GaussianKernel.from_scheduler(ddim(), K, clip_x0=1e9)
    x, m, step = batch(plain)
    torch.testing.assert_close(plain.mean_std(m, x, step)[0], clipping.mean_std(m, x, step)[0], rtol=1e-11, atol=1e-11)


def test_step_index_may_have_any_leading_shape():
    kernel = GaussianKernel.from_scheduler(ddim(), K)
    x, m, step = batch(kernel)
    mean, std = kernel.mean_std(m, x, step)
    shape = (2, K // 2)
    mean2, std2 = kernel.mean_std(m.unflatten(0, shape), x.unflatten(0, shape), step.reshape(shape))
    assert mean2.shape == (*shape, 3, 4) and std2.shape == (*shape, 1, 1)
    assert torch.equal(mean2.flatten(0, 1), mean) and torch.equal(std2.flatten(0, 1), std)
    one, std_one = kernel.mean_std(m, x, 3)
    assert torch.equal(one[3], mean[3]) and float(std_one) == float(std[3])


def test_delta_at_the_forward_posterior_mean_is_the_eps_form():
    # E_q Delta = (w/2)(|eps - eps_ref|^2 - |eps - eps_theta|^2), w = (d mean/d eps)^2/s^2; Delta is affine in x'
    kernel = GaussianKernel.from_scheduler(ddim(), K)
    x0, eps, step = batch(kernel, shape=(6,), seed=1)
    theta, ref, _ = batch(kernel, shape=(6,), seed=2)
    x = kernel.add_noise(x0, eps, step)
    q_mean, std = kernel.mean_std(eps, x, step)
    mean, mean_ref = kernel.mean_std(theta, x, step)[0], kernel.mean_std(ref, x, step)[0]
    got = delta(*control_pair(mean, mean_ref, q_mean, std))
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    slope = (kernel.mean_std(one, x, step)[0] - kernel.mean_std(zero, x, step)[0])[:, 0]
    weight = torch.where(kernel.in_likelihood, slope**2 / kernel.std**2, torch.zeros(K, dtype=torch.float64))
    expected = 0.5 * weight * ((eps - ref).square().sum(-1) - (eps - theta).square().sum(-1))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


# ------------------------------------------------------------------------------------------- log-probs and control pair
@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_control_pair_gives_the_log_ratio_and_the_kl(reduce):
    kernel = GaussianKernel.from_scheduler(ddim(), K)
    x, m, step = batch(kernel)
    m_ref = batch(kernel, seed=7)[1]
    (mean, std), (mean_ref, _) = kernel.mean_std(m, x, step), kernel.mean_std(m_ref, x, step)
    x_next = mean + std * batch(kernel, seed=9)[0]
    u, z = control_pair(mean, mean_ref, x_next, std)
    ratio = log_prob(x_next, mean, std, reduce) - log_prob(x_next, mean_ref, std, reduce)
    torch.testing.assert_close(delta(u, z, reduce), ratio, rtol=1e-9, atol=1e-9)
    live = kernel.in_likelihood
    closed = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean[live], std[live]), torch.distributions.Normal(mean_ref[live], std[live])
    ).flatten(1)
    closed = closed.sum(-1) if reduce == "sum" else closed.mean(-1)
    torch.testing.assert_close(step_kl(u, reduce)[live], closed, rtol=1e-9, atol=1e-9)


def test_log_prob_is_the_normal_density_and_zero_where_dropped():
    kernel = GaussianKernel.from_scheduler(ddim(), K)
    x, m, step = batch(kernel)
    m.requires_grad_(True)
    mean, std = kernel.mean_std(m, x, step)
    x_next = (mean + std * x).detach()
    logp = kernel.log_prob(x_next, mean, std)
    live = kernel.in_likelihood
    assert live.tolist() == [True] * (K - 1) + [False]
    normal = torch.distributions.Normal(mean[live], std[live]).log_prob(x_next[live]).flatten(1).sum(-1)
    torch.testing.assert_close(logp[live], normal, rtol=1e-10, atol=1e-10)
    assert float(logp[-1].detach()) == 0.0
    logp.sum().backward()
    assert bool(m.grad.isfinite().all()) and bool((m.grad[-1] == 0).all())


KERNELS = {
    "ddpm": lambda: GaussianKernel.from_scheduler(ddpm(), K),
    "ddpm-large": lambda: GaussianKernel.from_scheduler(ddpm(variance_type="fixed_large"), K),
    "ddim": lambda: GaussianKernel.from_scheduler(ddim(), K, eta=0.6),
    "flow_sde": lambda: GaussianKernel.from_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(), K),
    "flow_resample": lambda: GaussianKernel.from_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(), K, kind="flow_resample"),
    "consistency": lambda: GaussianKernel.from_scheduler(diffusers.LCMScheduler(), 4),
    "direct": lambda: GaussianKernel.direct([0.3] * 5),
}


@pytest.mark.parametrize("kind", KERNELS)
def test_log_prob_of_a_chain_is_the_product_of_its_densities(kind):
    """The whole chain against one multivariate normal over all its entries, in float64."""
    kernel = KERNELS[kind]()
    generator = torch.Generator().manual_seed(3)
    W = 0.3 * torch.randn(4, 4, dtype=torch.float64, generator=generator)
    x, total, means, stds, points = torch.randn(4, dtype=torch.float64, generator=generator), 0.0, [], [], []
    for k in range(kernel.num_steps):
        mean, std = kernel.mean_std((x @ W)[None], x[None], torch.tensor([k]))
        x_next = mean[0] + std[0] * torch.randn(4, dtype=torch.float64, generator=generator)
        total += float(kernel.log_prob(x_next[None], mean, std))
        if bool(kernel.in_likelihood[k]):
            means, stds, points = [*means, mean[0]], [*stds, kernel.std[k].expand(4)], [*points, x_next]
        x = x_next
    joint = torch.distributions.MultivariateNormal(torch.cat(means), torch.diag(torch.cat(stds).square()))
    assert total == pytest.approx(float(joint.log_prob(torch.cat(points))), abs=1e-6)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction", "flow"])
def test_target_is_the_output_whose_estimates_are_right(prediction):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.67) if prediction == "flow" else ddim(prediction_type=prediction)
    kernel = GaussianKernel.from_scheduler(scheduler, K)
    x0, eps, step = batch(kernel)
    x, target = kernel.add_noise(x0, eps, step), kernel.target(x0, eps, step)
    torch.testing.assert_close(kernel.x0_from(target, x, step), x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(kernel.eps_from(target, x, step), eps, rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------------------------------------------------- memorylessness
@pytest.mark.parametrize("flow", [False, True])
def test_memoryless_kernels_forget_the_start_and_have_a_density_everywhere(flow):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler() if flow else ddim(beta_schedule="squaredcos_cap_v2")
    kernel = GaussianKernel.memoryless(scheduler, 50)
    assert kernel.memory < 0.01 and bool(kernel.in_likelihood.all())
    kernel.require_density("a test", every_step=True)
    assert GaussianKernel.from_scheduler(scheduler, 50, eta=0.0).memory == pytest.approx(1.0, abs=1e-12)
    assert GaussianKernel.from_scheduler(scheduler, 50, eta=0.3).memory > 0.3


@pytest.mark.parametrize("kind", ["ddpm", "flow_resample"])
def test_kinds_with_noise_of_their_own_may_be_memoryless_too(kind):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True) if kind == "flow_resample" else ddpm()
    kernel = GaussianKernel.memoryless(scheduler, 50)
    assert kernel.kind == kind and kernel.memory < 0.01 and bool(kernel.in_likelihood.all())


def test_memory_of_ddpm_is_that_of_the_forward_process():
    # the forward process x_T = sqrt(ab_T) x0 + ... has correlation sqrt(ab_T) with the data; ddpm with many steps is its reversal
    kernel = GaussianKernel.from_scheduler(ddpm(num_train_timesteps=200, beta_end=0.05), 200)
    assert kernel.memory == pytest.approx(float(ddpm(num_train_timesteps=200, beta_end=0.05).alphas_cumprod[-1].sqrt()), rel=0.05)


def test_memory_is_the_correlation_of_sampled_chains():
    kernel, exact = GaussianKernel.from_scheduler(ddim(), K, eta=0.3), GMMDenoiser([[0.0]], 1.0)
    network = exact.network(ddim().alphas_cumprod)
    generator = torch.Generator().manual_seed(0)
    start = x = torch.randn(50_000, 1, dtype=torch.float64, generator=generator)
    for k in range(K):
        step = torch.full((len(x),), k)
        mean, std = kernel.mean_std(network(x, kernel.timestep(step)), x, step)
        x = mean + std * torch.randn(x.shape, dtype=torch.float64, generator=generator)
    measured = float(torch.corrcoef(torch.cat([start, x], 1).T)[0, 1])
    assert 0.2 < kernel.memory < 0.98 and measured == pytest.approx(kernel.memory, abs=0.01)


def test_final_rules():
    build = lambda final, **kw: GaussianKernel.from_scheduler(ddim(), K, final=final, **kw)  # noqa: E731
    assert float(build("drop").std[-1]) == 0.0
    floor = build("floor", min_std=0.3)
    assert bool((floor.std >= 0.3).all()) and bool(floor.in_likelihood.all())
    ab = ddim().alphas_cumprod.double()
    now = ab[99]
    for final, after in (("mid", (1 + now) / 2), ("train0", ab[0])):
        expected = ((1 - after) / (1 - now) * (1 - now / after)).sqrt()
        assert float(build(final).std[-1]) == pytest.approx(float(expected), rel=1e-12)


def test_config_round_trip_through_json_is_exact():
    for kernel in (
        GaussianKernel.from_scheduler(ddim(clip_sample=True), K, eta=0.5, final="mid"),
        GaussianKernel.from_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(), K),
        GaussianKernel.direct([0.3] * 4),
    ):
        again = GaussianKernel.from_config(json.loads(json.dumps(kernel.to_config())))
        x, m, step = batch(kernel)
        for a, b in zip(kernel.mean_std(m, x, step), again.mean_std(m, x, step), strict=True):
            assert torch.equal(a, b)
        assert torch.equal(kernel.timestep(step), again.timestep(step))
        assert again.to_config() == kernel.to_config()


def test_the_scheduler_is_not_changed():
    scheduler = ddim()
    before = scheduler.timesteps.clone()
    GaussianKernel.from_scheduler(scheduler, K)
    assert torch.equal(scheduler.timesteps, before) and scheduler.num_inference_steps is None


# ----------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"final": "flor"}, "did you mean 'floor'"),
        ({"kind": "dpm"}, "did you mean 'ddpm'"),
        ({"prediction_type": "epsilom"}, "did you mean 'epsilon'"),
        ({"kind": "flow_sde"}, "does not fit DDIMScheduler"),
        ({"num_inference_steps": 0}, "at least 1"),
        ({"eta": -1.0}, "noise scale"),
        ({"kind": "ddpm", "eta": 0.0}, "a ddpm kernel's noise follows from its levels"),
        ({"kind": "consistency", "eta": 0.5}, "a consistency kernel's noise follows from its levels"),
        ({"clip_x0": -2.0}, "half-width"),
        ({"final": "floor", "min_std": 0.0}, "positive min_std"),
    ],
)
def test_bad_arguments_are_explained(kwargs, message):
    with pytest.raises(ValueError, match=message):
        GaussianKernel.from_scheduler(ddim(), **{"num_inference_steps": K, **kwargs})


def test_eta_of_a_kernel_with_noise_of_its_own_is_one_or_left_out():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    with pytest.raises(ValueError, match="a flow_resample kernel's noise follows from its levels"):
        GaussianKernel.from_scheduler(scheduler, K, eta=0.7)
    for kind in ("ddpm", "consistency"):
        one, none = (GaussianKernel.from_scheduler(ddim(), K, kind=kind, eta=eta) for eta in (1.0, None))
        assert one.to_config() == none.to_config()


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_schedulers_without_a_gaussian_step_are_refused_with_the_one_to_use(name):
    with pytest.raises(ValueError, match=rf"{name} is not supported.*DDIMScheduler.from_config"):
        GaussianKernel.from_scheduler(getattr(diffusers, name)(), K)
    replacement = diffusers.DDIMScheduler.from_config(getattr(diffusers, name)().config)
    assert GaussianKernel.from_scheduler(replacement, K).kind == "ddim"


def test_a_scheduler_that_scales_its_input_is_refused_even_with_a_kind():
    with pytest.raises(ValueError, match="scales the network's input"):
        GaussianKernel.from_scheduler(diffusers.EulerDiscreteScheduler(), K, kind="ddim")


def test_likelihoods_of_deterministic_steps_are_explained():
    with pytest.raises(ValueError, match="eta = 0"):
        GaussianKernel.from_scheduler(ddim(), K, eta=0.0).require_density("ddpo")
    drop = GaussianKernel.from_scheduler(ddim(), K)
    drop.require_density("ddpo")
    with pytest.raises(ValueError, match=r"0 at step 9 of 10.*final='mid'"):
        drop.require_density("adjoint matching", every_step=True)


def test_unusable_schedulers_are_explained():
    with pytest.raises(ValueError, match="steps_offset=1"):
        GaussianKernel.from_scheduler(ddim(timestep_spacing="leading"), K, final="train0")
    with pytest.raises(ValueError, match="thresholding=False"):
        GaussianKernel.from_scheduler(ddim(thresholding=True), K)
    with pytest.raises(ValueError, match="fixed_small"):
        GaussianKernel.from_scheduler(ddpm(variance_type="learned_range"), K)
    with pytest.raises(ValueError, match="no x0 estimate"):
        GaussianKernel.from_scheduler(ddim(rescale_betas_zero_snr=True), K)
    with pytest.raises(ValueError, match="neither alphas_cumprod"):
        GaussianKernel.from_scheduler(object(), K)
    with pytest.raises(ValueError, match="not a kernel config"):
        GaussianKernel.from_config({"kind": "ddim"})
    with pytest.raises(ValueError, match="did you mean 'sum'"):
        log_prob(torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, 1), reduce="summ")
