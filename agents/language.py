"""Language agents: any transformers causal LM as a policy over tokens, with our own sampling loop on its key-value cache.

    pi(token | text) = softmax(logits / temperature) over the kept set (all tokens, or the nucleus of top_p, or what the task allows)

The kept set is stored with the record when it is not the whole vocabulary, and evaluation renormalises over the same set.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from markovia.agents.checkpointing import checkpointed, layers_of
from markovia.agents.distributions import Categorical
from markovia.agents.export import export
from markovia.agents.interface import Agent, Evaluation, check_want
from markovia.agents.packing import hidden_states, make_packs, probe, unfit
from markovia.agents.pretrained import LanguageOptions, matrices_in_bfloat16, plain_model, tokenizer_config, tokenizer_from, weights_hash, with_lora
from markovia.agents.products import laid_out, use_products
from markovia.agents.records import Rollout
from markovia.agents.responses import allowed_tokens, record_of_responses
from markovia.agents.selective import plain_head, selective_logp
from markovia.agents.tokens import draw, keep_only, nucleus, pack, positions, token_logp, unpack
from markovia.envs.text.tokens import as_tokenizer

# Logits held at once while nothing is differentiated: 2^26 float32 are 256 MB.
CHUNK_LOGITS = 2**26
# Logits of a padded pass that is differentiated; with their log-softmax and both gradients 4.3 GB.
MOST_LOGITS = 2**28
# Entries of an architecture that would have transformers fetch or run code.
_NOT_FROM_FILES = ("auto_map", "custom_pipelines", "attn_implementation", "_attn_implementation", "quantization_config")


class LanguageAgent(Agent):
    """A causal LM and its tokenizer as an agent of kind "language".

    `base` is the loader's name ("smollm2", "arithmetic", a Hugging Face name or folder) from which the checkpoint finds the weights again;
    without it the checkpoint holds the architecture and all weights.
    """

    kind = "language"

    def __init__(self, model: Any, tokenizer: Any, *, base: str | None = None, **options: Any) -> None:
        self.options = LanguageOptions(**options)
        self.num_costs = self.options.num_costs
        self.tokenizer = as_tokenizer(tokenizer)
        self.base = base
        model.eval()  # without dropout, so that the first-pass ratio is exactly 1
        use_products(model)
        self.base_hash = weights_hash(model) if base is not None and self.options.lora is not None else None
        width, rows = model.get_output_embeddings().in_features, model.get_input_embeddings().num_embeddings
        if rows < self.tokenizer.vocab_size:
            raise ValueError(
                f"the tokenizer has {self.tokenizer.vocab_size} tokens but the model embeds {rows}; pass the tokenizer of this model"
            )
        if self.options.gradient_checkpointing:
            layers_of(model)  # a model without any is told here, not in the first update
        modules: dict[str, nn.Module] = {"policy": with_lora(model, self.options.lora) if self.options.lora is not None else model}
        if self.options.value_head:
            head = nn.Linear(width, 1 + self.options.num_costs)
            nn.init.zeros_(head.weight)  # the value starts at 0 everywhere
            nn.init.zeros_(head.bias)
            modules["critic"] = head
        self.net = nn.ModuleDict(modules)
        self._saved = {n for n, p in self.net.named_parameters() if p.requires_grad} if self.base_hash else set(self.net.state_dict())
        self._adapters_off = False
        self._packs: bool | None = None  # whether this model can be evaluated packed, once it has been tried

    @classmethod
    def from_name(cls, base: str, **options: Any) -> LanguageAgent:
        """The named model with its own tokenizer, e.g. `LanguageAgent.from_name("smollm2", lora={"r": 16}, temperature=0.7)`."""
        from markovia.envs.text.pretrained import load_model, load_tokenizer

        return cls(load_model(base), load_tokenizer(base), base=base, **options)

    @property
    def _lm(self) -> Any:
        return self.net["policy"]

    @property
    def output_layer(self) -> Any:
        """What makes logits of hidden states."""
        return self._lm.get_output_embeddings()

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
            if self.options.gradient_checkpointing and torch.is_grad_enabled():
                stack.enter_context(checkpointed(self._lm))
            yield

    def forward(self, **inputs: Any) -> Any:
        """The network's own output, under this agent's mode: autocast, or adapters off."""
        with self._forward_mode():
            return self._lm(**inputs)

    def _logits(self, kept_positions: int, **inputs: Any) -> tuple[Any, Tensor]:
        """The model's output and its tempered float32 logits (n, kept_positions, V) over the tokenizer's vocabulary."""
        out = self._lm(logits_to_keep=kept_positions, **inputs)
        return out, self._tempered(out.logits)

    def _tempered(self, logits: Tensor) -> Tensor:
        """Logits of the tokenizer's vocabulary in float32, divided by the temperature: the largest tensors here, so nothing is copied needlessly."""
        if logits.shape[-1] > self.tokenizer.vocab_size:
            logits = logits[..., : self.tokenizer.vocab_size]
        return logits.float() if self.options.temperature == 1.0 else logits.float() / self.options.temperature

    def _teacher_forced(self, rollout: Rollout, index: slice, want_hidden: bool) -> tuple[Tensor, Tensor | None]:
        """Logits (b, T, V) that predict the response tokens of some rows and, if wanted, the last hidden states (b, T, d) there."""
        assert isinstance(rollout.obs, dict)
        prompt, mask, action = rollout.obs["prompt_ids"][index], rollout.obs["prompt_mask"][index], rollout.action[index]
        T = action.shape[1]
        seen = torch.cat([mask, rollout.valid[index]], 1)[:, :-1]
        caught: list[Tensor] = []
        # What enters the output embedding is the last hidden state at the kept positions, whatever the model's class.
        head = self.output_layer
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

        Without gradient the rows are cut so that at most CHUNK_LOGITS logits exist at once. What is larger (a row without gradient, or MOST_LOGITS
        with it) is evaluated packed, so that logits are made in pieces, where the model can and no whole distributions are wanted.
        Raises ValueError for an unknown quantity.
        """
        want = check_want(want, self.critic is not None, "value_head=True")
        packed = self._packing() or ("dist" not in want and self._too_large(*rollout.shape) and self.packable())
        out: dict[str, Any] = dict(self._evaluate_packed(rollout, want) if packed else self.evaluate_padded(rollout, want))
        if "dist" in out:
            out["dist"] = Categorical(out["dist"])
        return Evaluation(**out)

    def _measure(self, logits: Tensor, token: Tensor, hidden: Tensor | None, want: set[str]) -> dict[str, Tensor]:
        """What is wanted of logits (..., V), tokens (...) and hidden states (..., d)."""
        out: dict[str, Tensor] = {}
        if "logp" in want:
            out["logp"] = token_logp(logits, token)
        if "entropy" in want:
            out["entropy"] = Categorical(logits).entropy()
        if "dist" in want:
            out["dist"] = logits
        return out if hidden is None else out | self._of_hidden(hidden, want)

    def _of_hidden(self, hidden: Tensor, want: set[str]) -> dict[str, Tensor]:
        """What is wanted of hidden states (..., d) in float32."""
        out: dict[str, Tensor] = {"value": self.net["critic"](hidden)} if "value" in want else {}
        return out | {"hidden": hidden} if "hidden" in want else out

    def evaluate_padded(self, rollout: Rollout, want: set[str]) -> dict[str, Tensor]:
        B, T = rollout.shape
        size = B
        if not torch.is_grad_enabled() or self._adapters_off:
            size = max(1, CHUNK_LOGITS // (T * self.tokenizer.vocab_size))
        parts: dict[str, list[Tensor]] = {k: [] for k in want}
        for start in range(0, B, size):
            index = slice(start, start + size)
            with self._forward_mode():
                logits, hidden = self._teacher_forced(rollout, index, bool(want & {"value", "hidden"}))
                found = self._measure(logits, rollout.action[index], hidden, want)
            valid = rollout.valid[index]
            for name, x in found.items():
                counts = name in ("logp", "entropy", "value")
                parts[name].append(x.masked_fill(~(valid if x.ndim == 2 else valid.unsqueeze(-1)), 0.0) if counts else x)
        return {k: torch.cat(v) for k, v in parts.items()}

    def _evaluate_packed(self, rollout: Rollout, want: set[str]) -> dict[str, Tensor]:
        """The same by packs; of more than CHUNK_LOGITS logits a part is kept, and made again in the backward pass. Zero where not valid."""
        assert isinstance(rollout.obs, dict)
        obs, V = rollout.obs, self.tokenizer.vocab_size
        head, size = self.output_layer, max(1, CHUNK_LOGITS // V)
        selective = plain_head(head) and "logp" in want and not want & {"entropy", "dist"}

        def measure(hidden: Tensor, token: Tensor, bits: Tensor | None) -> dict[str, Tensor]:
            if selective and bits is None:
                logp = selective_logp(hidden, head.weight[:V], token, self.options.temperature)
                return {"logp": logp, **self._of_hidden(hidden.float(), want)}
            logits = self._tempered(head(hidden))
            logits = logits if bits is None else keep_only(logits, unpack(bits, V))
            return self._measure(logits, token, hidden.float(), want)

        parts: dict[str, list[Tensor]] = {k: [] for k in want}
        packs = make_packs(obs["prompt_ids"], obs["prompt_mask"], rollout.action, rollout.valid)
        for one in packs:
            with self._forward_mode():
                hidden = hidden_states(self._lm, one)
                for index in torch.arange(len(hidden), device=hidden.device).split(size):
                    row, column = one.row[index], one.column[index]
                    arguments = hidden[index], rollout.action[row, column], obs["kept"][row, column] if "kept" in obs else None
                    again = torch.is_grad_enabled() and len(hidden) > size
                    found = checkpoint(measure, *arguments, use_reentrant=False) if again else measure(*arguments)
                    for name, x in found.items():
                        parts[name].append(x)
        at = torch.cat([p.row for p in packs]), torch.cat([p.column for p in packs])
        joined = {k: torch.cat(v) for k, v in parts.items()}
        return {k: x.new_zeros(*rollout.shape, *x.shape[1:]).index_put(at, x) for k, x in joined.items()}

    def _too_large(self, rows: int, length: int) -> bool:
        """Whether a padded pass over so many rows would hold more logits at once than it should."""
        row = length * self.tokenizer.vocab_size
        return rows * row > MOST_LOGITS if torch.is_grad_enabled() and not self._adapters_off else row > CHUNK_LOGITS

    def _packing(self) -> bool:
        """Whether packs are wanted and possible."""
        return self.options.packed and self.packable()

    def packable(self) -> bool:
        """Whether this model computes packs rightly; one that does not is told of once."""
        if self._packs is None:
            reason = self._unfit()
            self._packs = reason is None
            if reason is not None:
                warnings.warn(f"{type(plain_model(self._lm)).__name__} is evaluated padded, not packed: {reason}", stacklevel=3)
        return self._packs

    @torch.no_grad()
    def _unfit(self) -> str | None:
        tried = probe(self.tokenizer.vocab_size, self.device)
        zero = torch.zeros(tried["valid"].shape, device=self.device)
        record = Rollout(
            obs={"prompt_ids": tried["prompt"], "prompt_mask": tried["mask"]}, action=tried["action"], logp_old=zero, reward=zero,
            valid=tried["valid"], mask=tried["valid"], continuation=zero, truncated=~tried["valid"], per_row=True,
        )  # fmt: skip
        plain = copy.copy(self)
        plain.options = replace(self.options, bf16=False)  # rounding would hide what is looked for
        want = {"logp"}
        return unfit(self._lm, lambda: plain._evaluate_packed(record, want)["logp"], lambda: plain.evaluate_padded(record, want)["logp"])

    # -- sampling ----------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self,
        starts: dict[str, Any],
        generator: torch.Generator | None = None,
        deterministic: bool = False,
        watch: Callable[[Tensor], object] | None = None,
    ) -> Rollout:
        """One response per row of `starts` (prompt_ids (B, P) padded left, prompt_mask; optional texts, columns, group, max_new_tokens,
        uniforms (B, T) in place of the generator's, goes_on(bool) -> bool that decides whether there is another step).

        Repeated prompts are read once and share their cache. The record has T = max_new_tokens columns; its reward is zero until scored.
        `watch` is called with each step's tokens (B,) as they are drawn. Raises ValueError when starts lack the prompts.
        """
        if not {"prompt_ids", "prompt_mask"} <= starts.keys():
            raise ValueError(f"generate() needs prompt_ids and prompt_mask, got {sorted(starts)}; use task.starts(n, generator)")
        device, tok = self.device, self.tokenizer
        prompt, mask = starts["prompt_ids"].to(device), starts["prompt_mask"].to(device).bool()
        B, T, V = len(prompt), int(starts.get("max_new_tokens") or self.options.max_new_tokens), tok.vocab_size
        goes_on: Callable[[bool], bool] = starts.get("goes_on", bool)
        u = starts.get("uniforms")
        if u is None:  # drawn all at once, so an early stop leaves the generator where a full run would
            u = torch.rand((B, T), generator=generator, device=generator.device if generator else device, dtype=torch.float64)
        u = u.to(device)
        action = torch.full((B, T), tok.pad_token_id, device=device)
        logp = torch.zeros((B, T), device=device)
        restricted = self.options.top_p < 1.0 or starts.get("allowed") is not None
        kept_bits = torch.full((B, T, -(-V // 8)), 255, dtype=torch.uint8, device=device) if restricted else None

        both, inverse = torch.unique(torch.cat([prompt, mask.long()], 1), dim=0, return_inverse=True)
        ids, seen = both[:, : prompt.shape[1]], both[:, prompt.shape[1] :]
        with self._forward_mode(), laid_out(self._lm, B):  # around all steps: the weights are converted once
            out, logits = self._logits(1, input_ids=ids, attention_mask=seen, position_ids=positions(seen), use_cache=True)
            cache, logits, seen = out.past_key_values, logits[inverse], seen[inverse]
            if len(both) < B or not torch.equal(inverse, torch.arange(B, device=device)):
                cache.batch_select_indices(inverse)
            alive = torch.ones(B, dtype=torch.bool, device=device)
            for t in range(T):
                step, allowed = logits[:, -1], allowed_tokens(tok, starts, action, t)
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
                if watch is not None:
                    watch(token)
                alive = alive & (token != tok.eos_token_id)
                if t + 1 == T or not goes_on(bool(alive.any())):
                    break
                seen = torch.cat([seen, torch.ones_like(seen[:, :1])], 1)
                at = {"attention_mask": seen, "position_ids": positions(seen)[:, -1:], "past_key_values": cache}
                _, logits = self._logits(1, input_ids=token[:, None], use_cache=True, **at)
        return record_of_responses(tok, starts, prompt, mask, action, logp, kept_bits)

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

    def reference(self, fixed: bool = False) -> Agent:
        """The policy before training: the same weights with the adapters off (LoRA, no copy), else a frozen copy, compact if fixed and in bf16."""
        if self.options.lora is None:
            copied: LanguageAgent = super().reference()  # type: ignore[assignment]
            return copied.compact() if fixed and self.options.bf16 else copied
        ref = copy.copy(self)
        ref._adapters_off = True
        return ref

    def compact(self) -> LanguageAgent:
        """This frozen copy with its matrices in bfloat16, as autocast makes them at every pass: the same numbers, half the memory.

        Not for weights that will move. Raises ValueError without bf16, where the numbers would change.
        """
        if not self.options.bf16:
            raise ValueError("matrices are kept in bfloat16 only where the network runs in it; build the agent with bf16=True")
        self._packing()  # is tried out in float32
        matrices_in_bfloat16(self._lm)
        return self

    def config(self) -> dict[str, Any]:
        """Plain JSON: options, the base's name with the hash of its weights (LoRA), or the architecture and tokenizer themselves."""
        out: dict[str, Any] = {"kind": self.kind, "base": self.base, "base_hash": self.base_hash, "options": dict(vars(self.options))}
        if self.base is None:
            out["architecture"] = plain_model(self._lm).config.to_dict()
            out["tokenizer"] = tokenizer_config(self.tokenizer)
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

        tokenizer = load_tokenizer(config["base"]) if config["base"] is not None else tokenizer_from(config["tokenizer"])
        if network is None:
            from transformers import AutoConfig, AutoModelForCausalLM

            settings = dict(config["architecture"])
            made = AutoConfig.for_model(settings.pop("model_type"), **{k: v for k, v in settings.items() if k not in _NOT_FROM_FILES})
            network = AutoModelForCausalLM.from_config(made, trust_remote_code=False)
        return cls(network, tokenizer, base=config["base"], **config["options"])

    def state(self) -> dict[str, Tensor]:
        """Adapter and value head for LoRA on a named base, else every weight."""
        return {k: v for k, v in self.net.state_dict().items() if k in self._saved}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Put `state()` back. Missing or unknown names, or another shape, raise ValueError."""
        own = self.net.state_dict()
        super().load_state({k: v for k, v in own.items() if k not in self._saved} | state)

    def export(self, folder: str | Path, merge: bool = True) -> Path:
        """A plain Hugging Face folder, adapters merged into the weights or apart (`markovia.agents.export`); the agent itself stays as it is."""
        return export(self, folder, merge)
