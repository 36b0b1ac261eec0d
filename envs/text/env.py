"""Token-MDPs as Gymnasium environments: the state is the text so far, an action appends one token."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from markovia.envs.checks import check_horizon, whole_numbers
from markovia.envs.control.vector import served_autoreset
from markovia.envs.seeded import SeededVectorEnv
from markovia.envs.text.tasks import TextTask, make_task


def observation_space(task: TextTask) -> spaces.Dict:
    """ids (L,) int64 and mask (L,) int8, L = prompt length + response length."""
    length = task.prompt_length + task.max_new_tokens
    return spaces.Dict(
        ids=spaces.Box(0, task.vocab_size - 1, (length,), np.int64), mask=spaces.Box(0, 1, (length,), np.int8)
    )


class _Rows:
    """State of n texts in arrays; both environments are thin shells around it, so that they can't differ."""

    def __init__(self, task: TextTask, n: int) -> None:
        self.task, self.n, self.start = task, n, task.prompt_length
        length = self.start + task.max_new_tokens
        self.ids = np.full((n, length), task.tokenizer.pad_token_id, dtype=np.int64)
        self.mask = np.zeros((n, length), dtype=np.int8)
        self.count = np.zeros(n, dtype=np.int64)  # response tokens so far
        self.prompt = [""] * n
        self.columns: list[dict[str, Any]] = [{} for _ in range(n)]

    @property
    def all_allowed(self) -> np.ndarray:
        """A new (V,) array of ones: users may keep and change what an info holds."""
        return np.ones(self.task.vocab_size, dtype=np.int8)

    def reset(self, i: int, rng: np.random.Generator, options: dict[str, Any] | None = None) -> None:
        split = (options or {}).get("split", "train")
        total, index = len(self.task.rows_of(split)[0]), (options or {}).get("prompt")
        index = int(rng.integers(total)) if index is None else int(index)
        self.prompt[i], ids, self.columns[i] = self.task.prompt(index, split)
        self.ids[i], self.mask[i], self.count[i] = self.task.tokenizer.pad_token_id, 0, 0
        self.ids[i, self.start - len(ids) : self.start] = ids
        self.mask[i, self.start - len(ids) : self.start] = 1

    def action_mask(self, i: int) -> np.ndarray:
        if self.task.allowed is None:
            return self.all_allowed
        prompt = self.ids[i, : self.start][self.mask[i, : self.start] == 1]
        return np.asarray(self.task.allowed(prompt, self.response(i)), dtype=np.int8)  # type: ignore[operator]

    def response(self, i: int) -> np.ndarray:
        return self.ids[i, self.start : self.start + self.count[i]]

    def append(self, rows: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Write one token per row; (len(rows),) bool of the texts that are over."""
        vocab = self.task.vocab_size
        bad = tokens[(tokens < 0) | (tokens >= vocab)]
        if len(bad):
            raise ValueError(f"token {int(bad[0])} is outside of the vocabulary, expected 0 <= token < {vocab}")
        if self.task.allowed is not None:
            for i, token in zip(rows, tokens, strict=True):
                if not self.action_mask(i)[token]:
                    raise ValueError(f"token {int(token)} is not allowed here; choose among info['action_mask'] == 1")
        at = self.start + self.count[rows]
        self.ids[rows, at], self.mask[rows, at] = tokens, 1
        self.count[rows] += 1
        return (tokens == self.task.tokenizer.eos_token_id) | (self.count[rows] >= self.task.max_new_tokens)

    def rewards(self, rows: np.ndarray) -> np.ndarray:
        """(len(rows),) float64 reward of finished texts, all in one call of the reward functions."""
        if len(rows) == 0:
            return np.zeros(0, dtype=np.float64)
        ids = [self.response(i).tolist() for i in rows]
        texts = [self.task.tokenizer.decode(i) for i in ids]
        columns = {k: [self.columns[i][k] for i in rows] for k in self.task.columns}
        return self.task.weighted(self.task.rewards_apart([self.prompt[i] for i in rows], texts, columns, ids))

    def obs(self, i: int | slice) -> dict[str, np.ndarray]:
        return {"ids": self.ids[i].copy(), "mask": self.mask[i].copy()}

    def text(self, i: int) -> str:
        return self.prompt[i] + self.task.tokenizer.decode(self.response(i))


class TokenEnv(gym.Env):
    """A text is written token by token and scored at its end.

    ## Description
    Each episode continues one prompt of a `TextTask`. `task` is a TextTask, the name of a ready one ("sentiment", "arithmetic")
    or "module:function"; further keywords go to that function.

    ## Action Space
    `Discrete(V)`: the next token's id. `info["action_mask"]` (V,) int8 says which ids the task allows; others raise ValueError.

    ## Observation Space
    `Dict(ids=Box(L,) int64, mask=Box(L,) int8)`: prompt padded on the left, response behind it; mask is 1 on real tokens.

    ## Rewards
    0 until the text ends, then the weighted sum of the task's reward functions on (prompt, completion).

    ## Starting State
    A uniformly drawn prompt, or `options={"prompt": index, "split": "train" | "held_out"}`.

    ## Episode End
    Terminates at EOS or at `max_new_tokens`: the length is the task's own horizon, so nothing is ever truncated.

    ## Arguments
    `task`, `render_mode` ("ansi": the text so far), and the task's keywords (e.g. `digits=2`).
    """

    metadata = {"render_modes": ["ansi"], "render_fps": 4}  # noqa: RUF012 - Gymnasium's own form

    def __init__(self, task: TextTask | str = "arithmetic", render_mode: str | None = None, **task_kwargs: Any) -> None:
        self.task = make_task(task, **task_kwargs)
        self.render_mode = render_mode
        self.observation_space = observation_space(self.task)
        self.action_space = spaces.Discrete(self.task.vocab_size)
        self._rows = _Rows(self.task, 1)
        self._over = True

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        super().reset(seed=seed)
        self._rows.reset(0, self.np_random, options)
        self._over = False
        return self._rows.obs(0), {"action_mask": self._rows.action_mask(0)}

    def step(self, action: Any) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        if self._over:
            raise ValueError("the text is over; call reset() before the next step()")
        row = np.zeros(1, dtype=np.int64)
        self._over = bool(self._rows.append(row, whole_numbers(action, ())[None])[0])
        reward = float(self._rows.rewards(row)[0]) if self._over else 0.0
        mask = self._rows.all_allowed if self._over else self._rows.action_mask(0)
        return self._rows.obs(0), reward, self._over, False, {"action_mask": mask}

    def render(self) -> str | None:
        return self._rows.text(0) if self.render_mode == "ansi" else None


class TokenVectorEnv(SeededVectorEnv):
    """n token-MDPs in arrays; equals `TokenEnv` under SyncVectorEnv, finished texts are scored in one call.

    `autoreset_mode` is SAME_STEP (the last observation in info["final_obs"]) or NEXT_STEP; others raise ValueError.
    """

    def __init__(
        self,
        num_envs: int = 1,
        task: TextTask | str = "arithmetic",
        autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
        render_mode: str | None = None,
        max_episode_steps: int | None = None,
        **task_kwargs: Any,
    ) -> None:
        self.task = make_task(task, **task_kwargs)
        check_horizon(max_episode_steps, self.task.max_new_tokens)
        super().__init__(num_envs)
        self.render_mode = render_mode
        self._mode = served_autoreset(autoreset_mode, "TokenVectorEnv")
        self.metadata = {"render_modes": ["ansi"], "render_fps": 4, "autoreset_mode": self._mode}
        self.single_observation_space = observation_space(self.task)
        self.single_action_space = spaces.Discrete(self.task.vocab_size)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._rows = _Rows(self.task, num_envs)
        self._over = np.ones(num_envs, dtype=bool)

    def _reset_row(self, i: int, options: dict[str, Any] | None = None) -> None:
        self._rows.reset(i, self._streams[i][0], options)
        self._over[i] = False

    def _masks(self, over: np.ndarray) -> np.ndarray:
        if self.task.allowed is None:
            return np.tile(self._rows.all_allowed, (self.num_envs, 1))
        return np.stack([self._rows.all_allowed if over[i] else self._rows.action_mask(i) for i in range(self.num_envs)])

    def _info(self, over: np.ndarray) -> dict[str, Any]:
        return {"action_mask": self._masks(over), "_action_mask": np.ones(self.num_envs, dtype=bool)}

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        self._seed(seed)
        for i in range(self.num_envs):
            self._reset_row(i, options)
        return self._rows.obs(slice(None)), self._info(np.zeros(self.num_envs, dtype=bool))

    def step(self, actions: Any) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        n, tokens = self.num_envs, whole_numbers(actions, (self.num_envs,))
        rewards, terminated = np.zeros(n, dtype=np.float64), np.zeros(n, dtype=bool)
        if self._mode == AutoresetMode.SAME_STEP and self._over.any():
            raise ValueError("call reset() before the first step()")
        waiting = self._over.copy()  # NEXT_STEP: these begin anew now and ignore their action
        running = np.flatnonzero(~waiting)
        over = self._rows.append(running, tokens[running])
        ended = running[over]
        terminated[ended], rewards[ended] = True, self._rows.rewards(ended)
        for i in np.flatnonzero(waiting):
            self._reset_row(int(i))
        final: dict[str, Any] = {}
        if self._mode == AutoresetMode.NEXT_STEP:
            self._over[ended] = True
        elif len(ended):
            final_obs = np.full(n, None, dtype=object)
            for i in ended:
                final_obs[i] = self._rows.obs(int(i))
            closing = {"action_mask": np.zeros((n, self.task.vocab_size), dtype=np.int8), "_action_mask": terminated.copy()}
            closing["action_mask"][ended] = self._rows.all_allowed
            final = {"final_obs": final_obs, "_final_obs": terminated.copy(), "final_info": closing, "_final_info": terminated.copy()}
            for i in ended:
                self._reset_row(int(i))
        info = self._info(self._over) | final
        return self._rows.obs(slice(None)), rewards, terminated, np.zeros(n, dtype=bool), info

    def render(self) -> tuple[str, ...] | None:
        return tuple(self._rows.text(i) for i in range(self.num_envs)) if self.render_mode == "ansi" else None
