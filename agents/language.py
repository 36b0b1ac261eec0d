"""Language agents: any transformers causal LM as a policy over tokens, with our own sampling loop on its key-value cache.

    pi(token | text) = softmax(logits / temperature) over the kept set (all tokens, or the nucleus of top_p, or what the task allows)

The kept set is stored with the record when it is not the whole vocabulary, and evaluation renormalises over the same set.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from markovia.agents.distributions import Categorical
from markovia.agents.interface import WANT, Agent, Evaluation
from markovia.agents.records import Rollout
from markovia.envs.text.tokens import CharTokenizer, HFTokenizer, as_tokenizer

# Logits held at once while nothing is differentiated: 2^26 float32 are 256 MB.
CHUNK_LOGITS = 2**26


def positions(mask: Tensor) -> Tensor:
    """Position of every token counted from the first real one, (n, L) int64; left padding gets 0."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """The kept set of top-p sampling, (n, V) bool: the most probable tokens until their mass reaches top_p (the crossing one included).

    Keeps token v iff the mass of strictly more probable tokens is < top_p                       [Holtzman 2020; arXiv 1904.09751]
    """
    p, order = logits.softmax(-1).sort(dim=-1, descending=True)
    before = p.cumsum(-1) - p
    return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before < top_p)


def keep_only(logits: Tensor, kept: Tensor | None) -> Tensor:
    """Logits with everything outside of `kept` at the dtype's minimum, so that the softmax renormalises over it."""
    return logits if kept is None else logits.masked_fill(~kept, torch.finfo(logits.dtype).min)


def draw(logits: Tensor, u: Tensor) -> Tensor:
    """Inverse-CDF sample: the first token whose cumulative probability exceeds u; logits (n, V), u (n,) float64 in [0, 1)."""
    cdf = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(cdf, (u * cdf[:, -1]).unsqueeze(1), right=True).squeeze(1)


def token_logp(logits: Tensor, token: Tensor) -> Tensor:
    """log softmax(logits)[token] in nats, shape of `token`; cross_entropy is several times faster than log_softmax and gather."""
    return -F.cross_entropy(logits.reshape(-1, logits.shape[-1]), token.reshape(-1), reduction="none").view(token.shape)


def pack(kept: Tensor) -> Tensor:
    """Booleans (..., V) as bits (..., ceil(V / 8)) uint8."""
    return torch.from_numpy(np.packbits(kept.cpu().numpy(), axis=-1)).to(kept.device)


def unpack(bits: Tensor, size: int) -> Tensor:
    """Inverse of `pack`."""
    return torch.from_numpy(np.unpackbits(bits.cpu().numpy(), axis=-1, count=size).astype(bool)).to(bits.device)


def response_valid(action: Tensor, eos: int) -> Tensor:
    """(B, T) bool: tokens up to and including the first EOS."""
    ended_before = (action == eos).long().cumsum(1) - (action == eos).long()
    return ended_before == 0


def weights_hash(model: nn.Module) -> str:
    """sha256 over names and bytes of all weights; tells whether an adapter meets the base that it was trained on."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass
class LanguageOptions:
    """How a language agent samples and what is trained; JSON-able.

    temperature > 0 and 0 < top_p <= 1 shape the policy itself; `max_new_tokens` holds where the starts name no length.
    `lora` (e.g. {"r": 16, "alpha": 32, "target_modules": [...]}) trains adapters only. `value_head` adds a linear head on the last
    hidden state with 1 + num_costs columns. `bf16` runs the network under autocast. Raises ValueError outside of these ranges.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 24
    lora: dict[str, Any] | None = None
    value_head: bool = False
    num_costs: int = 0
    bf16: bool = False

    def __post_init__(self) -> None:
        if not self.temperature > 0.0:
            raise ValueError(f"temperature must be > 0, got {self.temperature}; for greedy text use generate(..., deterministic=True)")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.max_new_tokens < 1 or self.num_costs < 0:
            raise ValueError(f"expected max_new_tokens >= 1 and num_costs >= 0, got {self.max_new_tokens} and {self.num_costs}")


def _with_lora(model: nn.Module, lora: dict[str, Any]) -> nn.Module:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as e:
        raise ImportError("LoRA needs peft: pip install markovia[text]") from e
    settings = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", **lora}
    if "alpha" in settings:
        settings["lora_alpha"] = settings.pop("alpha")
    with warnings.catch_warnings():
        # peft reads an attribute that transformers renamed; nothing that a user could mend.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))


class LanguageAgent(Agent):
    """A causal LM and its tokenizer as an agent of kind "language".

    `base` is the loader's name ("smollm2", "arithmetic", a Hugging Face name or folder) from which the checkpoint finds the weights again;
    without it the checkpoint holds the architecture and all weights.
    """

    kind = "language"

    def __init__(self, model: Any, tokenizer: Any, *, base: str | None = None, **options: Any) -> None:
        self.options = LanguageOptions(**options)
        self.tokenizer = as_tokenizer(tokenizer)
        self.base = base
        model.eval()  # without dropout, so that the first-pass ratio is exactly 1
        self.base_hash = weights_hash(model) if base is not None and self.options.lora is not None else None
        width, rows = model.get_output_embeddings().in_features, model.get_input_embeddings().num_embeddings
        if rows < self.tokenizer.vocab_size:
            raise ValueError(
                f"the tokenizer has {self.tokenizer.vocab_size} tokens but the model embeds {rows}; pass the tokenizer of this model"
            )
        modules: dict[str, nn.Module] = {"policy": _with_lora(model, self.options.lora) if self.options.lora is not None else model}
        if self.options.value_head:
            head = nn.Linear(width, 1 + self.options.num_costs)
            nn.init.zeros_(head.weight)  # the value starts at 0 everywhere
            nn.init.zeros_(head.bias)
            modules["critic"] = head
        self.net = nn.ModuleDict(modules)
        self._saved = {n for n, p in self.net.named_parameters() if p.requires_grad} if self.base_hash else set(self.net.state_dict())
        self._adapters_off = False

    @classmethod
    def from_name(cls, base: str, **options: Any) -> LanguageAgent:
        """The named model with its own tokenizer, e.g. `LanguageAgent.from_name("smollm2", lora={"r": 16}, temperature=0.7)`."""
        from markovia.envs.text.pretrained import load_model, load_tokenizer

        return cls(load_model(base), load_tokenizer(base), base=base, **options)

    @property
    def _lm(self) -> Any:
        return self.net["policy"]

    # -- the network -------------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _forward_mode(self) -> Iterator[None]:
        """Autocast when asked for; adapters off and no gradient for a reference that shares the weights."""
        with contextlib.ExitStack() as stack:
            if self.options.bf16:
                stack.enter_context(torch.autocast(self.device.type, torch.bfloat16))
            if self._adapters_off:
                stack.enter_context(torch.no_grad())
                stack.enter_context(self._lm.disable_adapter())
            yield

    def _logits(self, kept_positions: int, **inputs: Any) -> tuple[Any, Tensor]:
        """The model's output and its tempered float32 logits (n, kept_positions, V) over the tokenizer's vocabulary."""
        out = self._lm(logits_to_keep=kept_positions, **inputs)
        # In place: the logits are the largest tensor here, and nothing else reads them.
        return out, out.logits[..., : self.tokenizer.vocab_size].float().div_(self.options.temperature)

    def _teacher_forced(self, rollout: Rollout, index: slice, want_hidden: bool) -> tuple[Tensor, Tensor | None]:
        """Logits (b, T, V) that predict the response tokens of some rows and, if wanted, the last hidden states (b, T, d) there."""
        assert isinstance(rollout.obs, dict)
        prompt, mask, action = rollout.obs["prompt_ids"][index], rollout.obs["prompt_mask"][index], rollout.action[index]
        T = action.shape[1]
        seen = torch.cat([mask, rollout.valid[index]], 1)[:, :-1]
        caught: list[Tensor] = []
        # What enters the output embedding is the last hidden state at the kept positions, whatever the model's class.
        head = self._lm.get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda _, args: caught.append(args[0])) if want_hidden else None
        try:
            ids = torch.cat([prompt, action], 1)[:, :-1]
            _, logits = self._logits(T, input_ids=ids, attention_mask=seen.long(), position_ids=positions(seen), use_cache=False)
        finally:
            if hook is not None:
                hook.remove()
        if "kept" in rollout.obs:
            logits = keep_only(logits, unpack(rollout.obs["kept"][index], logits.shape[-1]))
        return logits, caught[0].float() if want_hidden else None

    def evaluate(self, rollout: Rollout, want: Iterable[str]) -> Evaluation:
        """Teacher-forced log-probs, entropies, logits, values and hidden states at the response tokens; zero where not valid.

        Without gradient the rows are cut so that at most CHUNK_LOGITS logits exist at once. Raises ValueError for an unknown quantity.
        """
        want = set(want)
        if unknown := want - set(WANT):
            raise ValueError(f"evaluate() can give {WANT}, got {sorted(unknown)}")
        if "value" in want and "critic" not in self.net:
            raise ValueError("this language agent has no value head; build it with value_head=True")
        B, T = rollout.shape
        size = B
        if not torch.is_grad_enabled() or self._adapters_off:
            size = max(1, CHUNK_LOGITS // (T * self.tokenizer.vocab_size))
        parts: dict[str, list[Tensor]] = {k: [] for k in want}
        for start in range(0, B, size):
            index = slice(start, start + size)
            with self._forward_mode():
                logits, hidden = self._teacher_forced(rollout, index, bool(want & {"value", "hidden"}))
            valid = rollout.valid[index]
            if "logp" in want:
                parts["logp"].append(token_logp(logits, rollout.action[index]).masked_fill(~valid, 0.0))
            if "entropy" in want:
                parts["entropy"].append(Categorical(logits).entropy() * valid)
            if "dist" in want:
                parts["dist"].append(logits)
            if "value" in want:
                parts["value"].append(self.net["critic"](hidden) * valid.unsqueeze(-1))
            if "hidden" in want:
                assert hidden is not None
                parts["hidden"].append(hidden)
        out: dict[str, Any] = {k: torch.cat(v) for k, v in parts.items()}
        if "dist" in out:
            out["dist"] = Categorical(out["dist"])
        return Evaluation(**out)

    # -- sampling ----------------------------------------------------------------------------------------------------------------

    def _allowed(self, starts: dict[str, Any], action: Tensor, t: int) -> Tensor | None:
        """(B, V) bool of the task's own rule, called with real tokens only; None without a rule."""
        rule = starts.get("allowed")
        if rule is None:
            return None
        ids, mask, tokens = starts["prompt_ids"].cpu().numpy(), starts["prompt_mask"].cpu().numpy(), action[:, :t].cpu().numpy()
        eos, rows = self.tokenizer.eos_token_id, []
        for i in range(len(ids)):
            # A finished row goes on being filled with padding; whatever it draws is dropped.
            over = eos in tokens[i]
            rows.append(np.ones(self.tokenizer.vocab_size, bool) if over else np.asarray(rule(ids[i][mask[i]], tokens[i]), bool))
        return torch.from_numpy(np.stack(rows)).to(action.device)

    @torch.no_grad()
    def generate(self, starts: dict[str, Any], generator: torch.Generator | None = None, deterministic: bool = False) -> Rollout:
        """One response per row of `starts` (prompt_ids (B, P) padded left, prompt_mask; optional texts, columns, group, max_new_tokens).

        Repeated prompts are read once and share their cache. The record has T = max_new_tokens columns; its reward is zero until scored.
        Raises ValueError when starts lack the prompts.
        """
        if not {"prompt_ids", "prompt_mask"} <= starts.keys():
            raise ValueError(f"generate() needs prompt_ids and prompt_mask, got {sorted(starts)}; use task.starts(n, generator)")
        device, tok = self.device, self.tokenizer
        prompt, mask = starts["prompt_ids"].to(device), starts["prompt_mask"].to(device).bool()
        B, T, V = len(prompt), int(starts.get("max_new_tokens") or self.options.max_new_tokens), tok.vocab_size
        # All uniforms are drawn at once, so an early stop leaves the generator where a full run would.
        u = torch.rand((B, T), generator=generator, device=generator.device if generator else device, dtype=torch.float64).to(device)
        action = torch.full((B, T), tok.pad_token_id, device=device)
        logp = torch.zeros((B, T), device=device)
        restricted = self.options.top_p < 1.0 or starts.get("allowed") is not None
        kept_bits = torch.full((B, T, -(-V // 8)), 255, dtype=torch.uint8, device=device) if restricted else None

        both, inverse = torch.unique(torch.cat([prompt, mask.long()], 1), dim=0, return_inverse=True)
        ids, seen = both[:, : prompt.shape[1]], both[:, prompt.shape[1] :]
        with self._forward_mode():
            out, logits = self._logits(1, input_ids=ids, attention_mask=seen, position_ids=positions(seen), use_cache=True)
        cache, logits, seen = out.past_key_values, logits[inverse], seen[inverse]
        if len(both) < B or not torch.equal(inverse, torch.arange(B, device=device)):
            cache.batch_select_indices(inverse)
        alive = torch.ones(B, dtype=torch.bool, device=device)
        for t in range(T):
            step, allowed = logits[:, -1], self._allowed(starts, action, t)
            kept = allowed
            if self.options.top_p < 1.0:
                kept = nucleus(keep_only(step, allowed), self.options.top_p)
                kept = kept if allowed is None else kept & allowed
            step = keep_only(step, kept)
            token = step.argmax(-1) if deterministic else draw(step, u[:, t])
            token = torch.where(alive, token, tok.pad_token_id)
            action[:, t], logp[:, t] = token, torch.where(alive, token_logp(step, token), 0.0)
            if kept_bits is not None and kept is not None:
                kept_bits[:, t] = pack(kept | ~alive[:, None])
            alive = alive & (token != tok.eos_token_id)
            if t + 1 == T or not bool(alive.any()):
                break
            seen = torch.cat([seen, torch.ones_like(seen[:, :1])], 1)
            with self._forward_mode():
                out, logits = self._logits(
                    1,
                    input_ids=token[:, None],
                    attention_mask=seen,
                    position_ids=positions(seen)[:, -1:],
                    past_key_values=cache,
                    use_cache=True,
                )
        return self._record(starts, prompt, mask, action, logp, kept_bits)

    def _record(
        self, starts: dict[str, Any], prompt: Tensor, mask: Tensor, action: Tensor, logp: Tensor, kept_bits: Tensor | None
    ) -> Rollout:
        """The Rollout of finished responses; the last valid token ends the episode (EOS, or the task's own length)."""
        valid = response_valid(action, self.tokenizer.eos_token_id)
        last = valid & ~F.pad(valid[:, 1:], (0, 1), value=False)
        obs = {"prompt_ids": prompt, "prompt_mask": mask} | ({} if kept_bits is None else {"kept": kept_bits})
        texts = [self.tokenizer.decode(a[v].tolist()) for a, v in zip(action, valid, strict=True)]
        prompts = starts.get("prompt_text")
        group = starts.get("group")
        return Rollout(
            obs=obs,
            action=action,
            logp_old=logp,
            reward=torch.zeros_like(logp),
            valid=valid,
            mask=valid.clone(),
            continuation=1.0 - last.to(logp.dtype),
            truncated=torch.zeros_like(valid),
            group=None if group is None else group.to(self.device),
            outcome={
                "prompt_text": prompts if prompts is not None else [self.tokenizer.decode(p[m].tolist()) for p, m in zip(prompt, mask, strict=True)],
                "completion_text": texts,
                "columns": starts.get("columns", {}),
            },
            per_row=True,
        )

    @torch.no_grad()
    def act(self, obs: Any, deterministic: bool = False, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """One token for each text of a TokenEnv batch, obs {"ids": (n, L), "mask": (n, L)}, optionally "action_mask" (n, V); and its log-prob."""
        ids, mask = torch.as_tensor(obs["ids"]).to(self.device), torch.as_tensor(obs["mask"]).to(self.device).bool()
        L = ids.shape[1]
        # Turn every row so that its last real token stands at the right edge; what was padding behind it becomes padding in front.
        last = (mask.long() * torch.arange(L, device=self.device)).argmax(1, keepdim=True)
        index = (torch.arange(L, device=self.device) + last + 1) % L
        ids, mask = ids.gather(1, index), mask.gather(1, index)
        with self._forward_mode():
            _, logits = self._logits(1, input_ids=ids, attention_mask=mask.long(), position_ids=positions(mask), use_cache=False)
        allowed = torch.as_tensor(obs["action_mask"]).to(self.device).bool() if "action_mask" in obs else None
        step = keep_only(logits[:, -1], allowed)
        if self.options.top_p < 1.0:
            kept = nucleus(step, self.options.top_p)
            step = keep_only(step, kept if allowed is None else kept & allowed)
        if deterministic:
            token = step.argmax(-1)
        else:
            source = generator.device if generator else self.device
            token = draw(step, torch.rand(len(ids), generator=generator, device=source, dtype=torch.float64).to(self.device))
        return token, token_logp(step, token)

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[np.ndarray, Any]:
        """Stable-Baselines3's signature on TokenEnv observations, one or a batch; draws from torch's global generator."""
        single = np.ndim(observation["ids"]) == 1
        obs = {k: np.asarray(v)[None] if single else np.asarray(v) for k, v in observation.items()}
        token = self.act(obs, deterministic=deterministic)[0].cpu().numpy()
        return (token[0] if single else token), state

    # -- references, checkpoints, export -----------------------------------------------------------------------------------------

    def parameters(self, which: Literal["policy", "value"]) -> list[nn.Parameter]:
        """Trainable parameters of one role; none for a reference, which shares its weights with the agent."""
        found = super().parameters(which)
        return [] if self._adapters_off else found

    def reference(self) -> Agent:
        """The policy before training: the same weights with the adapters off (LoRA, no copy), else a frozen copy."""
        if self.options.lora is None:
            return super().reference()
        ref = copy.copy(self)
        ref._adapters_off = True
        return ref

    def config(self) -> dict[str, Any]:
        """Plain JSON: options, the base's name with the hash of its weights (LoRA), or the architecture and tokenizer themselves."""
        out: dict[str, Any] = {"kind": self.kind, "base": self.base, "base_hash": self.base_hash, "options": dict(vars(self.options))}
        if self.base is None:
            out["architecture"] = _plain_model(self._lm).config.to_dict()
            out["tokenizer"] = _tokenizer_config(self.tokenizer)
        return out

    @classmethod
    def from_config(cls, config: dict[str, Any], network: nn.Module | None = None) -> LanguageAgent:
        """Rebuild from `config()`. Raises ValueError when the base's weights are not those that the adapter was trained on."""
        if config["base"] is not None and network is None:
            agent = cls.from_name(config["base"], **config["options"])
            if agent.base_hash != config["base_hash"]:
                raise ValueError(
                    f"the base model {config['base']!r} has hash {str(agent.base_hash)[:12]}, the adapter was trained on "
                    f"{str(config['base_hash'])[:12]}; give the model of that time as base"
                )
            return agent
        from markovia.envs.text.pretrained import load_tokenizer

        tokenizer = load_tokenizer(config["base"]) if config["base"] is not None else _tokenizer_from(config["tokenizer"])
        if network is None:
            from transformers import AutoConfig, AutoModelForCausalLM

            settings = dict(config["architecture"])
            network = AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings))
        return cls(network, tokenizer, base=config["base"], **config["options"])

    def state(self) -> dict[str, Tensor]:
        """Adapter and value head for LoRA on a named base, else every weight."""
        return {k: v for k, v in self.net.state_dict().items() if k in self._saved}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Put `state()` back. Missing or unknown names, or another shape, raise ValueError."""
        own = self.net.state_dict()
        super().load_state({k: v for k, v in own.items() if k not in self._saved} | state)

    def export(self, folder: str | Path) -> Path:
        """A plain Hugging Face folder, adapters merged into the weights; the agent itself stays as it is."""
        folder = Path(folder)
        policy = self._lm
        model = policy if self.options.lora is None else copy.deepcopy(policy).merge_and_unload()
        model.save_pretrained(folder)
        if isinstance(self.tokenizer, HFTokenizer):
            self.tokenizer.inner.save_pretrained(folder)
        return folder


def _plain_model(policy: Any) -> Any:
    return policy.get_base_model() if hasattr(policy, "get_base_model") else policy


def _tokenizer_config(tokenizer: Any) -> dict[str, Any]:
    """A tokenizer as JSON: our characters, or a fast tokenizer's own serialisation with its special tokens."""
    if isinstance(tokenizer, CharTokenizer):
        return {"alphabet": tokenizer.alphabet, "eos": tokenizer.eos}
    backend = getattr(tokenizer.inner, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"{type(tokenizer.inner).__name__} can't be written as JSON; name the base model: LanguageAgent(..., base='name')")
    special = {k: str(v) for k, v in tokenizer.inner.special_tokens_map.items() if isinstance(v, str)}
    return {"json": backend.to_str(), "special": special}


def _tokenizer_from(config: dict[str, Any]) -> Any:
    if "alphabet" in config:
        return CharTokenizer(config["alphabet"], config["eos"])
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Backend.from_str(config["json"]), **config["special"])
