"""Reward models: a scalar head on a language model or on a sentence-embedding model; scores texts with TRL's reward signature.

    r(x, y) = head(h),  h the last hidden state at the text's last token (language models), or the normalised mean over its tokens (sentences)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from markovia.agents.checkpoint import HEADER, find_agent
from markovia.agents.interface import Agent, Evaluation
from markovia.agents.pretrained import plain_model, weights_hash, with_lora
from markovia.agents.records import Rollout
from markovia.envs.text.preference_rows import BadRow, encode, encode_response
from markovia.envs.text.tokens import as_tokenizer


@dataclass
class RewardOptions:
    """What is trained, JSON-able: the head alone (`frozen`), the head and adapters (`lora`), or every weight.

    `hidden` puts a layer of that width before the output, None: the head is linear. `max_length` tokens of a text are read, its end where it is
    longer. `batch` texts are scored at once. Raises ValueError for numbers below 1 and for adapters on a frozen body.
    """

    frozen: bool = False
    lora: dict[str, Any] | None = None
    hidden: int | None = None
    max_length: int = 1024
    batch: int = 32

    def __post_init__(self) -> None:
        if min(self.max_length, self.batch, self.hidden or 1) < 1:
            raise ValueError(f"max_length, batch and hidden must be >= 1, got {self.max_length}, {self.batch} and {self.hidden}")
        if self.frozen and self.lora is not None:
            raise ValueError("adapters are trained, so the body is not frozen: choose frozen=True or lora={...}")


class RewardModel(Agent):
    """A body that reads tokens and a head that says how good the text is. `base` is the name from which a checkpoint finds the body again.

    It decides nothing: `act` and `evaluate` raise, `scores` and `__call__` are what there is.
    """

    kind = "reward"
    policy_names = ("body", "head")

    def __init__(self, body: Any, tokenizer: Any, *, base: str, **options: Any) -> None:
        self.options = RewardOptions(**options)
        self.tokenizer, self.base = as_tokenizer(tokenizer), base
        self.__name__ = base  # as a reward function
        body.eval()  # without dropout, at training as at scoring
        # Sentence models have no output layer; a causal LM's is left out, and its text is read at the last token.
        self.pool = "last" if getattr(body, "get_output_embeddings", lambda: None)() is not None else "mean"
        partly = self.options.frozen or self.options.lora is not None
        self.base_hash = weights_hash(body) if partly else None
        width = body.config.hidden_size
        if self.options.lora is not None:
            body = with_lora(body, self.options.lora)
        elif self.options.frozen:
            body.requires_grad_(False)
        layers: list[nn.Module] = [nn.Linear(width, 1)]
        if self.options.hidden is not None:
            layers = [nn.Linear(width, self.options.hidden), nn.Tanh(), nn.Linear(self.options.hidden, 1)]
        nn.init.zeros_(layers[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(layers[-1].bias)  # type: ignore[arg-type]
        self.net = nn.ModuleDict({"body": body, "head": nn.Sequential(*layers)})
        self._saved = {n for n, p in self.net.named_parameters() if p.requires_grad} if partly else set(self.net.state_dict())

    @classmethod
    def from_name(cls, base: str, **options: Any) -> RewardModel:
        """On the named model with its own tokenizer: "minilm" (sentence embeddings, frozen unless told otherwise), or any language model's name."""
        from markovia.envs.text.pretrained import load_encoder, load_model, load_tokenizer

        if base == "minilm":
            if options.get("lora") is None:
                options = {"frozen": True, "hidden": 64, "max_length": 256, **options}
            return cls(load_encoder(base), load_tokenizer(base), base=base, **options)
        return cls(load_model(base), load_tokenizer(base), base=base, **options)

    # -- scores ------------------------------------------------------------------------------------------------------------------

    def features(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(n, d) what the head reads of texts ids (n, L), padded on the right, mask (n, L) bool."""
        body = plain_model(self.net["body"])
        inner = body.base_model if self.pool == "last" else body
        hidden = inner(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        if self.pool == "last":
            last = (mask.long() * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
            return hidden[torch.arange(len(ids), device=ids.device), last]
        weight = mask.to(hidden.dtype)[..., None]
        return nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=1)

    def scores(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """(n,) rewards of texts as token ids, with gradient."""
        kept = [list(r)[-self.options.max_length :] for r in rows]
        mask = torch.arange(max(map(len, kept))) < torch.tensor([len(r) for r in kept])[:, None]
        ids = torch.full(mask.shape, self.tokenizer.pad_token_id)
        ids[mask] = torch.tensor([i for r in kept for i in r])
        return self.net["head"](self.features(ids.to(self.device), mask.to(self.device)))[:, 0]

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
        """One reward per text: TRL's signature, so that the model is a reward function and a judge."""
        rows = [self.tokens(p, c) for p, c in zip(prompts, completions, strict=True)]
        parts = [rows[i : i + self.options.batch] for i in range(0, len(rows), self.options.batch)]
        return [float(x) for part in parts for x in self.scores(part)]

    def tokens(self, prompt: str, completion: str) -> list[int]:
        """Ids of a prompt with its completion, closed by EOS, as in training."""
        start = encode(self.tokenizer, prompt, True)
        try:
            return start + encode_response(self.tokenizer, prompt, start, completion, False)
        except BadRow:  # a completion without a word
            return [*start, self.tokenizer.eos_token_id]

    # -- the interface -----------------------------------------------------------------------------------------------------------

    def act(self, obs: Any, deterministic: bool = False, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Raises ValueError: a reward model decides nothing."""
        raise ValueError("a reward model scores texts and decides nothing; use it as a reward: --reward run:FOLDER, or agent(prompts, completions)")

    def evaluate(self, rollout: Rollout, want: Iterable[str]) -> Evaluation:
        """Raises ValueError: a reward model has no policy."""
        raise ValueError("a reward model has no policy to evaluate; score texts with agent(prompts, completions)")

    def config(self) -> dict[str, Any]:
        """Plain JSON: options, the base's name, and the hash of its weights where they are not saved."""
        return {"kind": self.kind, "base": self.base, "base_hash": self.base_hash, "options": dict(vars(self.options))}

    @classmethod
    def from_config(cls, config: dict[str, Any], network: nn.Module | None = None) -> RewardModel:
        """Rebuild from `config()`. Raises ValueError when the base's weights are not those that head or adapters were trained on."""
        from markovia.envs.text.pretrained import load_tokenizer

        made = (
            cls.from_name(config["base"], **config["options"]) if network is None
            else cls(network, load_tokenizer(config["base"]), base=config["base"], **config["options"])
        )  # fmt: skip
        if made.base_hash != config["base_hash"]:
            raise ValueError(f"the weights of {config['base']!r} are not those that this reward model was trained on; give the model of that time")
        return made

    def state(self) -> dict[str, Tensor]:
        """Head and adapters where the body keeps its weights, else every weight."""
        return {k: v for k, v in self.net.state_dict().items() if k in self._saved}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Put `state()` back. Missing or unknown names, or another shape, raise ValueError."""
        own = self.net.state_dict()
        super().load_state({k: v for k, v in own.items() if k not in self._saved} | state)


def reward_of_run(folder: str) -> RewardModel:
    """The reward model of a run's folder (its newest checkpoint) or of a folder of `agent.save`, frozen: what "run:FOLDER" names.

    Raises ValueError for a folder that holds none.
    """
    place = find_agent(folder)
    agent = None if place is None else _loaded(place, (place / HEADER).stat().st_mtime_ns)
    if not isinstance(agent, RewardModel):
        found = "nothing of the kind" if agent is None else f"a {agent.kind} agent"
        raise ValueError(f"run:{folder} should be a trained reward model (markovia train reward-model --data prefs.jsonl), found {found}")
    agent.net.requires_grad_(False)
    agent.__name__ = f"run:{Path(folder).name}"
    return agent


@lru_cache(maxsize=4)
def _loaded(place: Path, stamp: int) -> Agent:
    """Several environments of one task share a reward model; `stamp` tells a newer checkpoint from the one that was read."""
    return Agent.load(place)
