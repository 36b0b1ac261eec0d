"""The exact problems as Gymnasium environments; `env.unwrapped.oracle` is the problem with its solvers."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from markovia.envs.checks import check_horizon, discrete_action, whole_numbers
from markovia.envs.control.vector import served_autoreset
from markovia.envs.exact.cmdp import CMDP
from markovia.envs.exact.tabular import TabularMDP
from markovia.envs.exact.token_mdp import EnumerableTokenMDP
from markovia.envs.seeded import SeededVectorEnv


class _StateEnv(gym.Env):
    """Run a tabular MDP: draw the start, then a next state for each action."""

    def __init__(self, mdp: TabularMDP) -> None:
        self._mdp = mdp
        # cumulative sums end at exactly 1, so that a uniform draw never falls past the last state
        self._start, self._next = (np.cumsum(p, -1) / p.sum(-1, keepdims=True) for p in (mdp.rho, mdp.P))
        self.observation_space = spaces.Discrete(mdp.num_states)
        self.action_space = spaces.Discrete(mdp.num_actions)
        self._state: int | None = None

    def _draw(self, cumulative: np.ndarray) -> int:
        index = int(np.searchsorted(cumulative, self.np_random.random(), side="right"))
        return min(index, len(cumulative) - 1)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.int64, dict]:
        super().reset(seed=seed)
        self._state = self._draw(self._start)
        return np.int64(self._state), {}

    def _info(self, state: int, action: int) -> dict[str, Any]:
        return {}

    def step(self, action: Any) -> tuple[np.int64, float, bool, bool, dict]:
        if self._state is None:
            raise ValueError("step before reset: call env.reset() first")
        s, a = self._state, discrete_action(action, self._mdp.num_actions)
        self._state = self._draw(self._next[s, a])
        return np.int64(self._state), float(self._mdp.R[s, a]), False, False, self._info(s, a)


class TabularMDPEnv(_StateEnv):
    """A random tabular MDP, run step by step.

    ## Description
    `TabularMDP.random(S, A, gamma, seed)`: Dirichlet transitions, rewards uniform on [0, 1]. `seed` chooses the problem;
    `reset(seed=...)` chooses the randomness of the episodes. `oracle` holds the exact solvers.

    ## Action Space
    Discrete(A).

    ## Observation Space
    Discrete(S): the state.

    ## Rewards
    R(s, a), a float. The problem is discounted by `gamma`, which is the learner's to apply.

    ## Starting State
    Drawn from rho.

    ## Episode End
    The MDP never terminates; the registered id is truncated after 100 steps.

    ## Arguments
    `S=6`, `A=3`, `gamma=0.95`, `seed=0`, or `oracle=` an own `TabularMDP`.
    """

    def __init__(self, S: int = 6, A: int = 3, gamma: float = 0.95, seed: int = 0, oracle: TabularMDP | None = None) -> None:
        self.oracle = TabularMDP.random(S, A, gamma, seed) if oracle is None else oracle
        super().__init__(self.oracle)


class CMDPEnv(_StateEnv):
    """A random tabular MDP with one cost, run step by step.

    ## Description
    `CMDP.random(S, A, gamma, seed, tightness)`; `oracle.solve()` gives the constrained optimum and the price of the
    budget `oracle.budgets[0]`, a bound on the discounted, unnormalised cost.

    ## Action Space
    Discrete(A).

    ## Observation Space
    Discrete(S): the state.

    ## Rewards
    R(s, a), a float; the cost C(s, a) of the step travels as `info["cost"]`, a float.

    ## Starting State
    Drawn from rho.

    ## Episode End
    Never terminates; the registered id is truncated after 100 steps.

    ## Arguments
    `S=6`, `A=3`, `gamma=0.95`, `seed=0`, `tightness=0.5`, or `oracle=` an own `CMDP` with one constraint.
    """

    def __init__(
        self,
        S: int = 6,
        A: int = 3,
        gamma: float = 0.95,
        seed: int = 0,
        tightness: float = 0.5,
        oracle: CMDP | None = None,
    ) -> None:
        self.oracle = CMDP.random(S, A, gamma, seed, tightness) if oracle is None else oracle
        if len(self.oracle.C) != 1:
            raise ValueError(f'info["cost"] is one number, but the CMDP has {len(self.oracle.C)} constraints; pass one with a single cost')
        super().__init__(self.oracle.mdp)

    def _info(self, state: int, action: int) -> dict[str, Any]:
        return {"cost": float(self.oracle.C[0, state, action])}


class TokenTreeEnv(gym.Env):
    """The enumerable token-MDP TM(V, H), written token by token.

    ## Description
    `EnumerableTokenMDP.random(V, H, seed, reward, success, eos)`: the policy writes up to H tokens; `seed` chooses the
    rewards and the reference. Transitions append the token, so the only randomness is the policy's. `oracle` holds the
    reference, the optima and every exact expectation.

    ## Action Space
    Discrete(V): the next token.

    ## Observation Space
    Discrete(num_prefixes + 1): the prefix's index, the row of the oracle's tables; the last index is "finished".

    ## Rewards
    0, and R(y) with the last token, a float; gamma = 1.

    ## Starting State
    The empty prefix, 0.

    ## Episode End
    Terminates after H tokens, or at the token `eos` when there is one.

    ## Arguments
    `V=4`, `H=4`, `seed=0`, `reward="uniform"` or `"binary"` with `success=0.3`, `eos=None`, or `oracle=` an own
    `EnumerableTokenMDP`.
    """

    def __init__(
        self,
        V: int = 4,
        H: int = 4,
        seed: int = 0,
        reward: str = "uniform",
        success: float = 0.3,
        eos: int | None = None,
        oracle: EnumerableTokenMDP | None = None,
    ) -> None:
        self.oracle = EnumerableTokenMDP.random(V, H, seed, reward, success, eos) if oracle is None else oracle
        self.observation_space = spaces.Discrete(self.oracle.num_prefixes + 1)
        self.action_space = spaces.Discrete(self.oracle.V)
        self._prefix: int | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.int64, dict]:
        super().reset(seed=seed)
        self._prefix = 0
        return np.int64(0), {}

    def step(self, action: Any) -> tuple[np.int64, float, bool, bool, dict]:
        if self._prefix is None:
            raise ValueError("step before reset, or after the sequence has ended: call env.reset() first")
        a, tree = discrete_action(action, self.oracle.V), self.oracle
        sequence, child = tree.leaf[self._prefix, a], tree.child[self._prefix, a]
        if sequence >= 0:
            self._prefix = None
            return np.int64(tree.num_prefixes), float(tree.R[sequence]), True, False, {}
        self._prefix = int(child)
        return np.int64(child), 0.0, False, False, {}


class TokenTreeVectorEnv(SeededVectorEnv):
    """`num_envs` token trees in lockstep, without a Python loop; equals SyncVectorEnv over `TokenTreeEnv`.

    `autoreset_mode` SAME_STEP (default): a finished row restarts within the step, its observation is the empty prefix, `infos["final_obs"]` holds
    "finished". NEXT_STEP: it shows "finished", and the step after restarts it and ignores its action. A `max_episode_steps` below H is refused.
    """

    def __init__(
        self,
        num_envs: int = 1,
        autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
        max_episode_steps: int | None = None,
        **kwargs: Any,
    ) -> None:
        template = TokenTreeEnv(**kwargs)
        super().__init__(num_envs)
        self.oracle = tree = template.oracle
        check_horizon(max_episode_steps, self.oracle.H)
        self.autoreset_mode = served_autoreset(autoreset_mode, "TokenTreeVectorEnv")
        self.metadata = {"autoreset_mode": self.autoreset_mode}
        self.single_observation_space, self.single_action_space = template.observation_space, template.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        # The row of "finished" leads to the empty prefix, whatever the action: NEXT_STEP.
        self._leaf, self._child = np.vstack([tree.leaf, np.full(tree.V, -1)]), np.vstack([tree.child, np.zeros(tree.V, np.int64)])
        self._after_end = 0 if self.autoreset_mode is AutoresetMode.SAME_STEP else tree.num_prefixes
        self._prefix: np.ndarray | None = None

    def reset(self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        self._seed(seed)
        self._prefix = np.zeros(self.num_envs, dtype=np.int64)
        return self._prefix.copy(), {}

    def step(self, actions: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        if self._prefix is None:
            raise ValueError("step before reset: call envs.reset() first")
        actions, tree = whole_numbers(actions, (self.num_envs,)), self.oracle
        if not ((actions >= 0) & (actions < tree.V)).all():
            raise ValueError(f"expected {self.num_envs} integers in 0..{tree.V - 1} as actions, got {actions!r}")
        sequence = self._leaf[self._prefix, actions]
        ended = sequence >= 0
        self._prefix = np.where(ended, self._after_end, self._child[self._prefix, actions])
        infos: dict[str, Any] = {}
        if self.autoreset_mode is AutoresetMode.SAME_STEP and ended.any():
            final = np.full(self.num_envs, None, dtype=object)
            final[ended] = [np.int64(tree.num_prefixes)] * int(ended.sum())
            infos = {"final_obs": final, "_final_obs": ended.copy(), "final_info": {}, "_final_info": ended.copy()}
        reward = np.where(ended, tree.R[sequence], 0.0)
        return self._prefix.copy(), reward, ended, np.zeros_like(ended), infos
