"""Where records come from: stepping a vector environment, or generating whole sequences and scoring them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from torch import Tensor

from markovia.agents.interface import Agent
from markovia.agents.records import Obs, Rollout, map_obs
from markovia.algos.finite import check_logp, check_step, scored
from markovia.algos.on_policy.filters import join
from markovia.algos.reward_scale import RewardScale
from markovia.envs.finite import NotFinite


@dataclass(frozen=True)
class Stepped:
    """What a collection stepped, as the environments gave it; the rest of a record follows from it."""

    obs: Any  # (B, T, ...) as the network saw them, tensors or arrays
    action: Any  # (B, T, ...) in policy coordinates
    reward: np.ndarray  # (B, T)
    terminated: np.ndarray  # (B, T) bool
    truncated: np.ndarray  # (B, T) bool, at a row's cut too
    valid: np.ndarray  # (B, T) bool
    cost: np.ndarray | None  # (B, T, m)
    finals: list[tuple[np.ndarray, int, Any]]  # environments, step, their raw final observations


class StepCollector:
    """Rows of `num_steps` decisions from each of `num_envs` environments; a row goes on where the last one of its environment was cut.

    SAME_STEP: the observation after an end is already the next episode's, the final one comes from infos["final_obs"].
    NEXT_STEP: the step after an end only resets; it is stored with valid = mask = False, and the final observation is the one of the ending step.
    `boot_value` holds V(final observation) where an episode was truncated and V(next observation) at the row's cut, with the normaliser and
    critic as they are at the end of the collection. `episodes` gets the raw return of every finished episode; whoever reads it empties it.
    Environments may tell costs only where there are some: once one was told, steps without count 0 (for agents with cost columns those before too).
    """

    def __init__(
        self,
        venv: VectorEnv,
        agent: Agent,
        num_steps: int,
        seed: int = 0,
        gamma: float = 0.99,
        scale_reward: bool = True,
        cost_gamma: float = 1.0,
    ) -> None:
        mode = venv.metadata.get("autoreset_mode")
        if mode not in (AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP):
            raise ValueError(
                f"the vector environment has autoreset mode {getattr(mode, 'value', mode)!r}; a collector takes SAME_STEP or NEXT_STEP, "
                "e.g. make_vec(env_id, n, vector_kwargs={'autoreset_mode': 'SameStep'})"
            )
        if num_steps < 1:
            raise ValueError(f"num_steps must be >= 1, got {num_steps}")
        if not hasattr(agent, "observe"):
            raise ValueError(f"a {agent.kind} agent is not stepped in an environment; use SequenceCollector(task, num_rows)")
        self.venv, self.num_steps = venv, num_steps
        self.reward_scale = RewardScale(venv.num_envs, gamma) if scale_reward else None
        self.next_step = mode is AutoresetMode.NEXT_STEP
        self.num_costs: int = getattr(agent, "num_costs", 0)
        self.cost_gamma = cost_gamma
        self._costs_told = 0  # costs a step that the environments have told since the run began, 0 until there was one
        self.episodes: list[float] = []
        # The most recent ones; a loop that reads them empties them.
        self.episode_lengths: deque[int] = deque(maxlen=1000)
        self.episode_costs: deque[list[float]] = deque(maxlen=1000)
        # Moves actions on their way to the environment; the record then holds them (`executed`, from -1 to 1) and where episodes ended (`ended`).
        self.shield: Callable[[Any, Any], tuple[Any, np.ndarray]] | None = None
        self.reset(seed)

    def reset(self, seed: int) -> None:
        """Start every environment anew from `seed`; unfinished episodes are dropped, the reward scale stays."""
        n = self.venv.num_envs
        try:
            self._raw, _ = self.venv.reset(seed=seed)
        except (OverflowError, ValueError):
            if seed < 2**31:
                raise
            # Environments that seed numpy's RandomState, as dm_control's through Shimmy, take 32 bits.
            self._raw, _ = self.venv.reset(seed=seed % 2**31)
        self._steps = 0
        check_step("observation", self._raw, 0, dict)
        self._starting = np.zeros(n, dtype=bool)  # environments whose next step only resets (NEXT_STEP)
        if self.reward_scale is not None:
            self.reward_scale.restart(n)
        self._return, self._length, self._cost = np.zeros(n), np.zeros(n, dtype=np.int64), np.zeros((n, 1))

    def state(self) -> dict[str, Tensor]:
        """The reward scale, and how many costs were told. Environments are reset at a checkpoint, so nothing else of theirs is kept."""
        return {"costs_told": torch.tensor(self._costs_told)} | ({} if self.reward_scale is None else self.reward_scale.state())

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Put `state()` back."""
        # Checkpoints of before 'costs_told' was kept: a run with limits would not have come that far without a cost.
        self._costs_told = int(state.get("costs_told", self.num_costs))
        if self.reward_scale is not None:
            self.reward_scale.load_state(state)

    def close(self) -> None:
        """Release the environments."""
        self.venv.close()

    @torch.no_grad()
    def collect(self, agent: Agent, generator: torch.Generator | None = None) -> Rollout:
        """(num_envs, num_steps) decisions of `agent`. Observations, rewards, costs and log-probs that are not finite raise NotFinite."""
        B, T = self.venv.num_envs, self.num_steps
        store: dict[str, Any] = {}
        reward = np.zeros((B, T))
        terminated, truncated = np.zeros((B, T), dtype=bool), np.zeros((B, T), dtype=bool)
        valid = np.zeros((B, T), dtype=bool)
        width = self.num_costs or self._costs_told
        cost = np.zeros((B, T, width)) if width else None
        finals: list[tuple[np.ndarray, int, Any]] = []  # environments, step, their raw final observations
        actor = agent.actor()  # type: ignore[attr-defined]
        ended = np.zeros((B, T), dtype=bool)
        executed = np.zeros((B, T, 0 if self.shield is None else int(np.prod(self.venv.single_action_space.shape or (1,)))))
        for t in range(T):
            live = ~self._starting
            obs = actor.observe(self._raw, update=live)
            action = actor.sample(obs, generator)
            if t == 0:
                store = {"obs": map_obs(obs, lambda x: _room(x, T)), "action": _room(action, T)}
            _put(store["obs"], obs, t)
            store["action"][:, t] = action
            env_action = actor.env_action(action)
            if self.shield is not None:
                env_action, executed[:, t] = self.shield(obs, env_action)
            r, term, trunc, infos = self._advance(env_action, live)
            done = term | trunc
            ended[:, t] = done
            valid[:, t], reward[:, t], terminated[:, t], truncated[:, t] = live, r, term, trunc
            step_cost = self._told(infos, done)
            if step_cost is not None:
                check_step("cost", step_cost, self._steps - 1, partial(dict, observation=self._raw, action=env_action, reward=r))
                cost = np.zeros((B, T, step_cost.shape[1])) if cost is None else cost
                if cost.shape[2] != step_cost.shape[1]:
                    raise ValueError(
                        f"info['cost'] has {step_cost.shape[1]} column(s), expected {cost.shape[2]}; "
                        "build the agent with num_costs equal to the number of costs"
                    )
                cost[:, t] = np.where(live[:, None], step_cost, 0.0)
            self._episode(r, live, done, None if cost is None else cost[:, t])
            if trunc.any():
                who = np.flatnonzero(trunc)
                finals.append((who, t, _rows(self._raw, who) if self.next_step else final_obs(infos, who, self.venv, self._steps - 1)))
            self._starting = done if self.next_step else np.zeros(B, dtype=bool)
        if self.reward_scale is not None:
            reward = self.reward_scale(reward, terminated | truncated, valid)
        who = np.flatnonzero(valid[:, -1] & ~terminated[:, -1] & ~truncated[:, -1])
        if len(who):
            finals.append((who, T - 1, _rows(self._raw, who)))
            truncated[who, -1] = True
        cost = cost if self._costs_told else None
        rollout = self._record(agent, Stepped(store["obs"], store["action"], reward, terminated, truncated, valid, cost, finals))
        if self.shield is not None:
            device = rollout.valid.device
            rollout.columns |= {"executed": torch.from_numpy(executed).to(device), "ended": torch.from_numpy(ended).to(device)}
        return rollout

    def _record(self, agent: Agent, steps: Stepped) -> Rollout:
        """The record of a collection, with values, boot values, and log-probs of one pass over the whole of it."""
        device = agent.device
        mask = torch.from_numpy(steps.valid).to(device)
        dtype = next(agent.net.parameters()).dtype
        as_float = lambda x: torch.from_numpy(x).to(device=device, dtype=dtype)  # noqa: E731
        rollout = Rollout(
            obs=map_obs(steps.obs, torch.as_tensor),
            action=torch.as_tensor(steps.action),
            logp_old=as_float(np.zeros_like(steps.reward)),
            reward=as_float(steps.reward),
            valid=mask,
            mask=mask.clone(),
            continuation=as_float((steps.valid & ~steps.terminated).astype(np.float64)),
            truncated=torch.from_numpy(steps.truncated).to(device),
            cost=None if steps.cost is None else as_float(steps.cost),
        )
        has_critic = agent.critic is not None
        # The distribution that was sampled, through the matrix products of the update: the first ratio is 1 to the last bit.
        out = agent.evaluate(rollout, ("logp", "value") if has_critic else ("logp",))
        assert out.logp is not None
        rollout = replace(rollout, logp_old=out.logp)
        check_logp(rollout)
        return replace(rollout, value=out.value, boot_value=_boot(agent, steps.finals, out.value) if has_critic else None)

    def _advance(self, action: Any, live: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Step all environments: rewards, terminated, truncated (not both) and infos, cleared where a step only resets (not `live`)."""
        self._raw, r, term, trunc, infos = self.venv.step(action)
        # A resetting step returns no reward, and its flags belong to no decision.
        r, term, trunc = np.where(live, r, 0.0), term & live, trunc & live & ~term
        check_step("reward", r, self._steps, lambda: {"observation": self._raw, "action": action})
        check_step("observation", self._raw, self._steps, lambda: {"action": action, "reward": r})
        self._steps += 1
        return r, term, trunc, infos

    def _told(self, infos: dict[str, Any], done: np.ndarray) -> np.ndarray | None:
        """The costs (n, m) that a step tells, which is noted for the steps to come; None where it tells none."""
        cost = cost_of(infos, done & (not self.next_step), self.venv.num_envs)
        self._costs_told = self._costs_told if cost is None else cost.shape[1]
        return cost

    def _episode(self, r: np.ndarray, live: np.ndarray, done: np.ndarray, cost: np.ndarray | None) -> None:
        """Add a step to the running episodes and report those that ended."""
        self._return += r
        if cost is not None:
            self._cost = self._cost + self.cost_gamma ** self._length[:, None] * cost
        self._length += live
        if not done.any():
            return
        self.episodes += self._return[done].tolist()
        self.episode_lengths += self._length[done].tolist()
        if cost is not None:
            self.episode_costs += self._cost[done].tolist()
        self._return[done], self._length[done], self._cost[done] = 0.0, 0, 0.0


def _room(x: Any, T: int) -> Any:
    """Uninitialised (n, T, ...) for T tensors or arrays like x (n, ...)."""
    shape = (x.shape[0], T, *x.shape[1:])
    return np.empty(shape, x.dtype) if isinstance(x, np.ndarray) else torch.empty(shape, dtype=x.dtype, device=x.device)


def _put(store: Obs, obs: Obs, t: int) -> None:
    if isinstance(store, dict):
        for k, v in obs.items():  # type: ignore[union-attr]
            store[k][:, t] = v
    else:
        store[:, t] = obs  # type: ignore[assignment]


def _rows(obs: Any, who: np.ndarray) -> Any:
    """Copies of some rows of a batched numpy observation."""
    return {k: v[who].copy() for k, v in obs.items()} if isinstance(obs, dict) else obs[who].copy()


def final_obs(infos: dict[str, Any], who: np.ndarray, venv: VectorEnv, step: int = 0) -> Any:
    """Final observations of the environments `who` (SAME_STEP); a vector environment without them, and numbers that are not finite (found at
    `step` of the collection) raise ValueError."""
    if "final_obs" not in infos:
        raise ValueError(
            f"{type(venv).__name__} says that it resets in the same step, but gives no infos['final_obs'] for a truncated episode; "
            "add it, or declare AutoresetMode.NEXT_STEP if that is what it does"
        )
    final = infos["final_obs"]
    found: Any
    if isinstance(final, dict):
        found = {k: np.asarray(v)[who] for k, v in final.items()}
    else:
        rows = [final[i] for i in who]
        found = {k: np.stack([r[k] for r in rows]) for k in rows[0]} if isinstance(rows[0], dict) else np.stack(rows)
    check_step("final observation", found, step, lambda: {"environment": who}, who)
    return found


def cost_of(infos: dict[str, Any], ended: np.ndarray, n: int) -> np.ndarray | None:
    """info["cost"] of every environment (n, m), that of the ending step where the environment was reset in it; None where none is told."""
    final = infos.get("final_info")
    last = final.get("cost") if isinstance(final, dict) and ended.any() else None
    now = infos.get("cost")
    if now is None and last is None:
        return None
    shape = np.asarray(now if now is not None else last).reshape(n, -1).shape
    out = np.zeros(shape) if now is None else np.array(now, dtype=np.float64).reshape(shape)
    if last is not None:
        out[ended] = np.asarray(last, dtype=np.float64).reshape(shape)[ended]
    return out


def _boot(agent: Agent, finals: list[tuple[np.ndarray, int, Any]], value: Tensor | None) -> Tensor:
    """V of every final observation in one batch, at its place of a (B, T, 1 + m) tensor of zeros."""
    assert value is not None and agent.critic is not None
    boot = torch.zeros_like(value)
    if not finals:
        return boot
    raws = [raw for _, _, raw in finals]
    raw = {k: np.concatenate([r[k] for r in raws]) for k in raws[0]} if isinstance(raws[0], dict) else np.concatenate(raws)
    row = torch.from_numpy(np.concatenate([who for who, _, _ in finals])).to(value.device)
    step = torch.from_numpy(np.concatenate([np.full(len(who), t) for who, t, _ in finals])).to(value.device)
    boot[row, step] = agent.critic(agent.observe(raw))  # type: ignore[attr-defined]
    return boot


class SequenceTask(Protocol):
    """What a token or denoising task offers to the collector; text tasks have numbered prompts and their `batch` beside it."""

    def starts(self, n: int, generator: torch.Generator | None) -> dict[str, Any]: ...
    def score(self, rollout: Rollout) -> Any: ...


class Stateless:
    """What collectors of whole sequences share: each collection starts anew, so there is nothing to keep, put back or release."""

    def reset(self, seed: int) -> None:
        """Nothing is carried from one collection to the next."""

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Nothing to put back."""

    def close(self) -> None:
        """Nothing to release."""


class SequenceCollector(Stateless):
    """`num_rows` whole sequences: starts of the task, the agent's own `generate`, and the task's score at the last valid step of each row.

    `cost(rollout) -> (n,) or (n, m)` (or the task's own `cost`) gives each sequence its costs, paid at that step too.
    With `greedy` (which a driver sets for methods that read it) the column `greedy` holds the score of the greedy response to each row's prompt.
    """

    def __init__(self, task: SequenceTask, num_rows: int, cost: Callable[[Rollout], Any] | None = None) -> None:
        if num_rows < 1:
            raise ValueError(f"num_rows must be >= 1, got {num_rows}")
        self.task, self.num_rows = task, num_rows
        self.cost = cost if cost is not None else getattr(task, "cost", None)
        self.episodes: list[float] = []
        self.episode_lengths: deque[int] = deque(maxlen=1000)
        self.episode_costs: deque[list[float]] = deque(maxlen=1000)
        self.greedy = False
        self.without: frozenset[int] = frozenset()  # prompts that are left out, by number

    @torch.no_grad()
    def presample(self, agent: Agent, prompts: int, per_prompt: int, generator: torch.Generator | None = None) -> tuple[Rollout, list[int]]:
        """`per_prompt` scored responses to each of so many training prompts (all where there are fewer), and the prompts' numbers.

        Raises ValueError for a task without prompts.
        """
        task: Any = self.task
        if not hasattr(task, "prompts"):
            raise ValueError(f"{type(task).__name__} has no prompts to try out; text tasks have")
        chosen = torch.randperm(len(task.prompts), generator=generator, device="cpu" if generator is None else generator.device)[:prompts].tolist()
        at_once, parts = max(1, self.num_rows // per_prompt), []
        for some in (chosen[i : i + at_once] for i in range(0, len(chosen), at_once)):
            index, group = [p for p in some for _ in range(per_prompt)], [g for g in range(len(some)) for _ in range(per_prompt)]
            rollout = agent.generate(task.batch(index, group), generator)
            parts.append(paid_at_end(rollout, rewards_of(task, rollout)))
        return join(parts), chosen

    @torch.no_grad()
    def collect(self, agent: Agent, generator: torch.Generator | None = None) -> Rollout:
        """(num_rows, T) generated and scored decisions. A score of another length or one that is not finite raises ValueError."""
        starts = self.task.starts(self.num_rows, generator, **({"without": self.without} if self.without else {}))
        rollout = agent.generate(starts, generator)
        check_logp(rollout)
        score = rewards_of(self.task, rollout)
        self.episodes += score.tolist()
        rollout = paid_at_end(rollout, score)
        if self.cost is not None:
            last = last_step(rollout)
            cost = check_cost(self.cost(rollout), rollout.shape[0], rollout)
            self.episode_costs += cost.tolist()
            self.episode_lengths += rollout.valid.sum(1).tolist()
            column = torch.zeros(*rollout.shape, cost.shape[1], dtype=rollout.reward.dtype, device=rollout.reward.device)
            rollout = replace(rollout, cost=column.scatter_(1, last[..., None].expand(-1, -1, cost.shape[1]), cost.to(column)[:, None]))
        if self.greedy:
            best = rewards_of(self.task, agent.generate(starts, generator, deterministic=True))
            rollout.columns["greedy"] = best.to(rollout.reward)[:, None].expand(rollout.shape)
        if agent.critic is not None:
            rollout = replace(rollout, value=agent.evaluate(rollout, ("value",)).value)
        return rollout


def last_step(rollout: Rollout) -> Tensor:
    """(B, 1) number of the last valid step of each row."""
    return (torch.arange(rollout.shape[1], device=rollout.valid.device) * rollout.valid).argmax(1, keepdim=True)


def paid_at_end(rollout: Rollout, score: Tensor) -> Rollout:
    """The record with `score` (B,) added to the reward of each row's last valid step."""
    at_end = torch.zeros_like(rollout.reward).scatter_(1, last_step(rollout), score.to(rollout.reward)[:, None])
    return replace(rollout, reward=rollout.reward + at_end)


def rewards_of(task: Any, rollout: Rollout) -> Tensor:
    """The task's rewards of a record, (B,) float64; see `check_score`."""
    return check_score(scored(task, rollout), rollout.shape[0], rollout)


def check_cost(cost: Any, n: int, batch: Rollout | None = None) -> Tensor:
    """The task's costs as (n, m) float64, one column for a plain vector. Raises ValueError for another length, NotFinite for NaN or infinity."""
    out = torch.as_tensor(cost, dtype=torch.float64).detach().cpu()
    out = out[:, None] if out.dim() == 1 else out
    if out.dim() != 2 or len(out) != n:
        raise ValueError(f"the cost function must return {n} numbers, or {n} rows with one number per cost, got shape {tuple(out.shape)}")
    if not torch.isfinite(out).all():
        bad = int(torch.nonzero(~torch.isfinite(out))[0, 0])
        raise NotFinite(
            f"the cost function returned {out[bad].tolist()} for sequence {bad}; costs must be finite numbers", {"cost": out, "record": batch}
        )
    return out


def check_score(score: Any, n: int, batch: Rollout | None = None) -> Tensor:
    """The task's rewards as (n,) float64. Raises ValueError for another length, NotFinite (with the record `batch`) for NaN or infinity."""
    try:
        out = torch.as_tensor(score, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"the reward function must return {n} numbers, got {type(score).__name__}: {error}") from error
    if out.shape != (n,):
        raise ValueError(f"the reward function must return {n} numbers, one per sequence, got shape {tuple(out.shape)}")
    if not torch.isfinite(out).all():
        bad = int(torch.nonzero(~torch.isfinite(out))[0])
        why = f"the reward function returned {out[bad].item()} for sequence {bad}; rewards must be finite, return 0.0 where there is none"
        raise NotFinite(why, {"score": out, "record": batch})
    return out
