"""Denoising agents with adapters: adapters off is the reference, only adapters are trained and saved, and diffusers reads what is written."""

import copy
import json

import pytest
import torch
from torch import nn

from markovia.agents.adapters import adapters_off, inject, linear_names, plain_state
from markovia.agents.denoising import DenoisingAgent
from markovia.agents.interface import Agent
from markovia.algos.collect import SequenceCollector
from markovia.algos.denoising.methods import DENOISING
from markovia.algos.presets import configure, override
from markovia.algos.setup import Setup, build, make_driver
from markovia.envs.denoising.average import WeightAverage
from markovia.envs.denoising.pipeline import pipeline
from markovia.envs.denoising.pipeline_network import load_pipeline
from markovia.envs.denoising.tasks import make_task
from markovia.envs.denoising.unet import UNetDenoiser

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")
torch.set_num_threads(1)

LORA = {"r": 2, "alpha": 4}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def adapted(task, **options):
    """An agent whose adapters have been moved away from zero."""
    torch.manual_seed(0)
    agent = DenoisingAgent.from_task(task, critic_hidden=None, lora=LORA, **options)
    with torch.no_grad():
        for p in agent.parameters("policy"):
            p.add_(0.1 * torch.randn(p.shape, generator=generator(1)))
    return agent


def digits_folder(tmp_path):
    pipe = diffusers.DDIMPipeline(UNetDenoiser((1, 8, 8), (8, 16)).model, diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing"))
    pipe.save_pretrained(str(tmp_path / "pipe"))
    return str(tmp_path / "pipe")


@pytest.mark.parametrize("name", ["mixture2d", "pipeline"])
def test_adapters_off_is_the_task_and_on_is_another_policy(name):
    task = make_task(name, num_steps=4)
    agent = adapted(task)
    ref = agent.reference()
    record = agent.generate(task.starts(5, generator()), generator(2))
    mine, theirs = (a.evaluate(record, ("logp",)).logp for a in (agent, ref))
    plain = DenoisingAgent.from_task(task, critic_hidden=None).evaluate(record, ("logp",)).logp
    assert torch.equal(theirs, plain) and ref.net is agent.net and ref.parameters("policy") == []
    assert not torch.allclose(mine, theirs)
    torch.testing.assert_close(mine, record.logp_old, rtol=1e-4, atol=1e-4)
    mine.sum().backward()
    assert all(p.grad is not None for p in agent.parameters("policy"))
    # frozen weights are shared with the task, not copied
    own = {p.data_ptr() for p in task.network.parameters()}
    assert all(p.data_ptr() in own for n, p in agent.net.named_parameters() if "lora_" not in n)


def test_adapters_start_at_the_reference_and_add_the_scaled_product():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    before = copy.deepcopy(net)
    inject(net, {"r": 2, "alpha": 6, "target_modules": ["0"]})
    x = torch.randn(5, 3)
    assert torch.equal(net(x), before(x)) and linear_names(before) == ["0", "2"]
    trained = {n: p for n, p in net.named_parameters() if p.requires_grad}
    assert set(trained) == {"0.lora_A.default.weight", "0.lora_B.default.weight"}
    nn.init.ones_(trained["0.lora_B.default.weight"])
    # W + (6/2) B A, by hand
    weight = before[0].weight + 3.0 * trained["0.lora_B.default.weight"] @ trained["0.lora_A.default.weight"]
    torch.testing.assert_close(net(x), before[2](torch.tanh(x @ weight.T + before[0].bias)))
    merged = plain_state(net)
    assert merged.keys() == before.state_dict().keys()
    torch.testing.assert_close(merged["0.weight"], weight)
    with adapters_off(net):
        assert torch.equal(net(x), before(x))
    assert trained["0.lora_A.default.weight"].requires_grad


@pytest.mark.parametrize("method_id", ["ddpo", "adjoint-matching", "d3po", "rebel-diffusion", "se-ppo", "spo-step", "diffusion-dpo"])
def test_every_trainer_takes_adapters_and_leaves_the_rest_alone(method_id, tmp_path):
    env = "markovia/Mixture2D-v0"
    method = override(configure(method_id, env), {"num_env_steps": 16, "num_envs": 8})
    if method_id in ("diffusion-dpo", "se-ppo"):
        method = override(method, {"source": {"num_pairs": 16} if method_id == "diffusion-dpo" else {"every": 1}})
    setup = build(env, method, 0, env_kwargs={"num_steps": 6, "final": "mid"}, agent_options={"lora": LORA})
    driver = make_driver(method, setup, 0)
    before = {n: p.detach().clone() for n, p in setup.agent.net.named_parameters()}
    stats = [driver.step() for _ in range(2)]
    assert driver.finished and all(torch.isfinite(torch.tensor(list(s.values()))).all() for s in stats)
    for n, p in setup.agent.net.named_parameters():
        assert "lora_A" in n or torch.equal(p, before[n]) == ("lora_B" not in n), n
    # a run that goes on has the same state
    tensors, meta = driver.state()
    again = make_driver(method, build(env, method, 0, env_kwargs={"num_steps": 6, "final": "mid"}, agent_options={"lora": LORA}), 0)
    again.load_state(tensors, meta)
    resumed = again.state()[0]
    assert resumed.keys() == tensors.keys() and all(torch.equal(v, resumed[k]) for k, v in tensors.items())


def test_an_anchor_of_each_round_is_the_policy_with_its_adapters():
    task = make_task("mixture2d", num_steps=5)
    method = override(DENOISING["rebel-diffusion"].value, {"num_env_steps": 16, "num_envs": 8})
    agent = adapted(task)
    driver = make_driver(method, build("markovia/Mixture2D-v0", method, 0, {"num_steps": 5}, {"lora": LORA}), 0)
    driver = type(driver)(method, agent, SequenceCollector(task, 8), 0)
    driver.step()
    driver.reference.net.load_state_dict(driver.agent.net.state_dict())
    record = driver.collect().record
    assert torch.equal(driver.agent.evaluate(record, ("logp",)).logp, driver.reference.evaluate(record, ("logp",)).logp)


def test_checkpoints_of_a_folders_pipeline_hold_adapters_only(tmp_path):
    task = pipeline(digits_folder(tmp_path), num_steps=4)
    agent = adapted(task)
    assert agent.state() and all("lora_" in name for name in agent.state())
    again = Agent.load(agent.save(tmp_path / "agent"))
    record = agent.generate(task.starts(3, generator()), generator())
    assert torch.equal(agent.evaluate(record, ("logp",)).logp, again.evaluate(record, ("logp",)).logp)
    assert json.loads((tmp_path / "agent" / "agent.json").read_text())["config"]["lora"] == LORA
    whole = DenoisingAgent.from_task(task, critic_hidden=None)
    assert len(whole.state()) == len(whole.net.state_dict())


@pytest.mark.parametrize("lora", [None, LORA])
def test_the_trained_pipeline_is_one_that_diffusers_loads(lora, tmp_path):
    folder = digits_folder(tmp_path)
    task = pipeline(folder, num_steps=4)
    agent = adapted(task) if lora else DenoisingAgent.from_task(task, critic_hidden=None)
    with torch.no_grad():
        for p in agent.parameters("policy"):
            p.add_(0.01)
    again = load_pipeline(agent.export(tmp_path / "out"))
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([10, 500, 999])
    with torch.no_grad():
        torch.testing.assert_close(again.unet(x, t).sample, agent.network(x, t), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(again.unet(x, t).sample, task.network(x, t), atol=1e-3)


def test_adapters_of_diffusers_networks_are_written_by_its_own_call(tmp_path):
    torch.manual_seed(0)
    network = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=2,
    )  # fmt: skip
    fresh, x, t, text = copy.deepcopy(network), torch.randn(2, 1, 8, 8), torch.tensor([5, 700]), torch.randn(2, 3, 8)
    inject(network, {"r": 2, "target_modules": ["to_q", "to_v"]})
    with torch.no_grad():
        for n, p in network.named_parameters():
            if "lora_" in n:
                p.add_(0.1)
        network.save_lora_adapter(str(tmp_path))
        fresh.load_lora_adapter(str(tmp_path), prefix=None, use_safetensors=True)
        torch.testing.assert_close(fresh(x, t, text).sample, network(x, t, text).sample)


def test_batches_without_gradient_are_cut_and_give_the_same():
    task = make_task("digits", num_steps=3)
    whole, cut = (DenoisingAgent.from_task(task, critic_hidden=None, batch=b) for b in (None, 4))
    record = whole.generate(task.starts(7, generator()), generator())
    with torch.no_grad():
        torch.testing.assert_close(cut.evaluate(record, ("logp",)).logp, whole.evaluate(record, ("logp",)).logp, rtol=1e-4, atol=1e-3)


def test_the_weight_average_by_hand():
    net = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(net.weight)
    average = WeightAverage(net, decay=0.5)
    nn.init.ones_(net.weight)
    # rates 1 - min(0.5, n/(n + 9)): 0.9, then 1 - 2/11
    average.update(net)
    assert float(average.network.weight) == pytest.approx(0.9)
    average.update(net)
    assert float(average.network.weight) == pytest.approx(0.9 + 0.1 * 9 / 11)
    for _ in range(20):
        average.update(net)
    assert not average.network.weight.requires_grad and float(average.network.weight) == pytest.approx(1.0, abs=1e-4)
    with pytest.raises(ValueError, match="share of the old average"):
        WeightAverage(net, 1.0)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: adapted(make_task("linear_gaussian")), "can't take these adapters"),
        (lambda: DenoisingAgent.from_task(make_task("mixture2d"), lora={"rank": 4}), "lora has no setting 'rank'"),
        (lambda: DenoisingAgent.from_task(make_task("mixture2d"), lora={"target_modules": ["to_q"]}), "its linear layers: time, inp"),
        (lambda: DenoisingAgent.from_task(make_task("mixture2d"), batch=0), "batch must be >= 1"),
        (lambda: DenoisingAgent.from_task(make_task("mixture2d")).export("x"), "only a pipeline"),
        (lambda: DenoisingAgent.from_task(make_task("pipeline")).export("x", adapters=True), "no adapters that diffusers could write"),
    ],
)
def test_bad_input_is_explained(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("method_id", ["adjoint-matching", "ddpo", "spo-step"])
def test_a_guided_latent_pipeline_is_trained_through_its_decoder(method_id):
    # Latents, class labels, guidance and a decoder; adjoint matching needs the gradient of the reward through all of them.
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=1, sample_size=4, patch_size=2, norm_num_groups=4,
        num_embeds_ada_norm=1000,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8,), down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",), latent_channels=4, norm_num_groups=4,
        sample_size=8, scaling_factor=0.5,
    )  # fmt: skip
    for p in transformer.parameters():
        nn.init.normal_(p, std=0.1)
    pipe = diffusers.DiTPipeline(transformer, vae, diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing"))
    task = pipeline(pipe, prompts=[3, 7], guidance=2.0, num_steps=5, final="mid")
    agent = DenoisingAgent.from_task(task, critic_hidden=None, lora=LORA, batch=16)
    method = override(configure(method_id, "markovia/DigitsConditional-v0"), {"num_env_steps": 16, "num_envs": 8, "solver": {"lr": 1e-3}})
    setup = Setup("denoising", agent, SequenceCollector(task, 8), lambda *a: {}, task)
    driver = make_driver(method, setup, 0)
    before = agent.state()
    before = {k: v.clone() for k, v in before.items()}
    stats = driver.step()
    assert all(torch.isfinite(torch.tensor(list(stats.values()))))
    moved = {k for k, v in agent.net.state_dict().items() if not torch.equal(v, before[k])}
    assert moved and all("lora_" in name for name in moved)
