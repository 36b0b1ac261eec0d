"""Learning from a fixed dataset: the settings of the off-policy update, with what is done to the data in the place of the replay's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from markovia.algos.off_policy.method import OffPolicy
from markovia.algos.off_policy.slots import Conservative, LoggedTarget, SmoothedTarget
from markovia.algos.table import nearest
from markovia.envs.offline.transforms import REWARD_TRANSFORMS


@dataclass(frozen=True)
class Logged:
    """What is done to a dataset before learning: episodes are chosen, rewards and observations transformed, rows without a successor dropped."""

    fraction: float = 1.0  # of the episodes that are kept, those of largest return
    fraction_gamma: float = 1.0  # discount of the returns that this goes by
    reward: str = "none"  # name of a transform of rewards (envs/offline/transforms.py): none, return_range, antmaze_minus1, x100, ...
    normalize_obs: bool = True  # (s - mean) / (std + 1e-3) of the data, cut at 10; the agent keeps it
    next_action: bool = False  # drop rows without a next logged action, and keep that action
    returns_to_go: Literal["zero", "repeat_last"] | None = None  # Monte Carlo returns: what counts after an episode that was cut
    compat: Literal["minari", "d4rl"] = "minari"  # d4rl: drop the last row of every truncated episode, as D4RL's own view does
    horizon: int | None = None  # time limit of a D4RL file without timeouts whose name does not tell it
    terminate_at: float | None = None  # raw reward from which a step ends its episode: 1 where AntMaze goes on after success

    def __post_init__(self) -> None:
        if not 0.0 < self.fraction <= 1.0:
            raise ValueError(f"data.fraction must lie in (0, 1], got {self.fraction}; 0.1 keeps the best tenth of the episodes")
        if not 0.0 <= self.fraction_gamma <= 1.0:
            raise ValueError(f"data.fraction_gamma must lie in [0, 1], got {self.fraction_gamma}")
        if self.reward not in REWARD_TRANSFORMS:
            raise ValueError(f"unknown data.reward={self.reward!r}{nearest(self.reward, REWARD_TRANSFORMS)}; known: {', '.join(REWARD_TRANSFORMS)}")


@dataclass(frozen=True)
class Offline(OffPolicy):
    """Settings of the actor-critic update on a dataset: one step of the budget is one update, and no environment is stepped while learning."""

    num_env_steps: int = 1_000_000  # updates
    learning_starts: int = 0  # must stay 0: there is nothing to wait for
    replay_size: int = 1  # not used: the dataset is as large as it is
    data: Logged = field(default_factory=Logged)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, wanted in (("learning_starts", 0), ("num_envs", 1), ("utd", 1.0), ("replay_size", 1)):
            if getattr(self, name) != wanted:
                raise ValueError(f"{name} means nothing for a fixed dataset, so it must stay {wanted}, got {getattr(self, name)}")
        if self.constraint is not None:
            raise ValueError("datasets hold no costs here, so a constraint has nothing to go by; set constraint=None")
        if isinstance(self.target, SmoothedTarget) and self.target.penalty and not self.data.next_action:
            raise ValueError("target.penalty compares with the next logged action; set data.next_action=True")
        if isinstance(self.target, LoggedTarget) and not self.data.next_action:
            raise ValueError("target=LoggedTarget() reads the next logged action; set data.next_action=True")
        if isinstance(self.regulariser, Conservative) and self.regulariser.calibrated and self.data.returns_to_go is None:
            raise ValueError("regulariser.calibrated compares with Monte Carlo returns; set data.returns_to_go to 'zero' or 'repeat_last'")

    @property
    def fixed_data(self) -> bool:
        return True
