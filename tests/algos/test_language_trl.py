"""GRPO and RLOO against TRL from completions and rewards to the gradient of every weight: TRL's trainers score and take the loss, nothing is trained.

Both sides have the same tiny model, the same completions of it and the same rewards. Their old log-probs are those of the sampling weights, the
reference's those of another model, and the loss is taken at moved weights, so that no ratio is 1. TRL's names: its dapo is token-mean, its dr_grpo
divides by B max_completion_length, its sequence-level ratio is GSPO's. Its GRPO multiplies the k3 term by the ratio unless told otherwise (our
estimator rho-k3), and its RLOO clips the sequence ratio, which at the sampling weights has the gradient of our row `rloo`.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from markovia.agents.export import hf_tokenizer
from markovia.agents.language import LanguageAgent
from markovia.agents.records import Rollout
from markovia.algos.on_policy.divergence import KL
from markovia.algos.on_policy.driver import OnPolicyDriver
from markovia.algos.on_policy.language import LANGUAGE
from markovia.algos.on_policy.loss import policy_loss, weights
from markovia.algos.on_policy.method import OnPolicy
from markovia.algos.on_policy.methods import ON_POLICY
from markovia.algos.on_policy.surrogates import Clip
from markovia.algos.presets import override
from markovia.envs.text.tasks import TextTask
from markovia.envs.text.tokens import CharTokenizer

pytest.importorskip("trl")
torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # names that transformers changed and TRL still uses

ALPHABET, PROMPTS, GROUP, T, TEMPERATURE = "abcdefghi", ["a", "bcd", "efghi"], 4, 6, 0.8
ROWS = GROUP * len(PROMPTS)


def vowels(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    return [float(sum(c in "aei" for c in text)) - 0.1 * len(text) for text in completions]


def tiny(seed: int = 0) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=12, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=32,
            initializer_range=0.5, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference model with a tokenizer that gives TRL the ids that `CharTokenizer` gives us."""
    path = tmp_path_factory.mktemp("model")
    hf_tokenizer(CharTokenizer(ALPHABET)).save_pretrained(path)
    tiny(1).save_pretrained(path)
    return path


def moved(model: Any, seed: int, size: float) -> None:
    """The same small step of every weight, whoever's model it is."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(size * torch.randn_like(p))


def sampled() -> tuple[Any, Rollout]:
    """The sampling model, and responses of it with their rewards."""
    model = tiny()
    task = TextTask(PROMPTS, CharTokenizer(ALPHABET), vowels, T)
    rollout = LanguageAgent(model, task.tokenizer, temperature=TEMPERATURE).generate(
        task.all_starts("train", GROUP), torch.Generator().manual_seed(3)
    )
    last = rollout.valid.sum(1, keepdim=True) - 1
    return model, dataclasses.replace(rollout, reward=rollout.reward.scatter(1, last, task.score(rollout)[:, None]))


class Given:
    """A collector of nothing: the record is handed to the driver's slots one by one."""

    def reset(self, seed: int) -> None:
        return


def ours(method: OnPolicy, model: Any, reference: Any, rollout: Rollout, step: float) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss at moved weights, and its gradient by the name of the weight."""
    rollout = dataclasses.replace(rollout.map(torch.clone), outcome=rollout.outcome)
    agent = LanguageAgent(copy.deepcopy(model), CharTokenizer(ALPHABET), temperature=TEMPERATURE)
    driver = OnPolicyDriver(method, agent, Given())  # type: ignore[arg-type]
    if "ref" in driver.references:
        driver.references["ref"].net["policy"].load_state_dict(reference.state_dict())
    driver.advantages(rollout, driver.prepare(rollout))
    moved(agent.net["policy"], 5, step)
    omega = weights(rollout.mask, method.aggregation, method.max_length)
    agent.net.zero_grad()
    loss, _ = policy_loss(method, agent, rollout, omega, torch.tensor(1.0), False)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in agent.net["policy"].named_parameters()}


def theirs(kind: str, folder: Path, out: Path, model: Any, rollout: Rollout, step: float, **settings: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The same of TRL's trainer, given the completions instead of sampling some."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    Config, Trainer = (GRPOConfig, GRPOTrainer) if kind == "grpo" else (RLOOConfig, RLOOTrainer)
    args = Config(
        output_dir=str(out), use_cpu=True, bf16=False, report_to="none", per_device_train_batch_size=ROWS, gradient_accumulation_steps=1,
        gradient_checkpointing=False, num_generations=GROUP, num_iterations=2, max_completion_length=T, temperature=TEMPERATURE,
        disable_tqdm=True, **settings,
    )  # fmt: skip
    model = copy.deepcopy(model)
    model.config._name_or_path = str(folder)  # where TRL loads the reference from
    data = Dataset.from_dict({"prompt": PROMPTS})
    trainer = Trainer(model, reward_funcs=vowels, args=args, train_dataset=data, processing_class=AutoTokenizer.from_pretrained(folder))
    prompts = [ids[m].tolist() for ids, m in zip(rollout.obs["prompt_ids"], rollout.obs["prompt_mask"], strict=True)]
    completions = [a[v].tolist() for a, v in zip(rollout.action, rollout.valid, strict=True)]
    canned = {"grpo": (completions, None), "rloo": completions}[kind]
    trainer._generate_single_turn = lambda prompt_ids, *_: canned
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    inputs = [{"prompt": p} for p in PROMPTS for _ in range(GROUP)]
    assert trainer._tokenize_prompts([x["prompt"] for x in inputs])[0] == prompts
    batch = trainer._generate_and_score_completions(inputs)
    moved(trainer.model, 5, step)
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in trainer.model.named_parameters()}


GRPO, RLOO = LANGUAGE["grpo"].value, ON_POLICY["rloo"].value
K3 = {"loss_type": "grpo", "beta": 0.04, "use_bias_correction_kl": False}
CASES: dict[str, tuple[str, OnPolicy, dict[str, Any], float]] = {
    "grpo": ("grpo", GRPO, K3, 0.05),
    "grpo at the sampling weights": ("grpo", GRPO, K3, 0.0),
    "rho-k3": ("grpo", override(GRPO, {"divergence": {"estimator": "rho-k3"}}), {"loss_type": "grpo", "beta": 0.04}, 0.05),
    "dr-grpo": ("grpo", LANGUAGE["grpo/dr-grpo"].value, {"loss_type": "dr_grpo", "scale_rewards": "none", "beta": 0.0}, 0.05),
    "dapo": (
        "grpo", dataclasses.replace(LANGUAGE["grpo/dapo"].value, reward=(), filter=None),
        {"loss_type": "dapo", "epsilon_high": 0.28, "beta": 0.0}, 0.05,
    ),
    "gspo": (
        "grpo", LANGUAGE["grpo/gspo"].value,
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4, "beta": 0.0}, 2e-4,
    ),
    "rloo with a clipped sequence ratio": (
        "rloo", dataclasses.replace(RLOO, surrogate=Clip(0.2), ratio_level="sequence", aggregation="seq-mean-token-mean"), {"beta": 0.05}, 0.05,
    ),
}  # fmt: skip


def compared(kind: str, method: OnPolicy, settings: dict[str, Any], step: float, folder: Path, out: Path) -> tuple[Tensor, Tensor]:
    """Both losses, after the gradients of all weights were found equal and not zero."""
    model, rollout = sampled()
    loss, grads = ours(method, model, tiny(1), rollout, step)
    other, other_grads = theirs(kind, folder, out, model, rollout, step, **settings)
    assert grads.keys() == other_grads.keys()
    assert max(float(g.abs().max()) for g in grads.values()) > 1e-3
    for name, grad in grads.items():
        torch.testing.assert_close(grad, other_grads[name], rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    return loss, other


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_equal_those_of_trl(case: str, folder: Path, tmp_path: Path) -> None:
    loss, other = compared(*CASES[case], folder, tmp_path)
    torch.testing.assert_close(loss, other, rtol=1e-5, atol=1e-5)


def test_rloo_row_has_the_gradient_of_trl_at_the_sampling_weights(folder: Path, tmp_path: Path) -> None:
    """The values differ, as log-probs are summed: ours is a sum of A over the tokens of a response, TRL's one A."""
    compared("rloo", dataclasses.replace(RLOO, divergence=KL(0.05)), {"beta": 0.05}, 0.0, folder, tmp_path)
