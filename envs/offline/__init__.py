"""Logged data: Minari datasets and D4RL files as rows (s, a, r, s', a', ...), checked, measured, scored, and replayed as an environment."""

from markovia.envs.offline.d4rl import check_d4rl, load_d4rl, write_d4rl
from markovia.envs.offline.measures import action_coverage, returns_histogram, state_action_coverage, trajectory_quality
from markovia.envs.offline.minari_io import check_minari, load_minari, write_minari
from markovia.envs.offline.scores import Reference, reference, score_pct
from markovia.envs.offline.sources import load
from markovia.envs.offline.transforms import ObsTransform, RewardTransform, Transform, reward_transform, terminate_at
from markovia.envs.offline.transitions import About, Transitions, concatenate
from markovia.envs.offline.validate import DatasetError, Fault, Report, check_transitions

__all__ = [
    "About",
    "DatasetError",
    "Fault",
    "ObsTransform",
    "Reference",
    "Report",
    "RewardTransform",
    "Transform",
    "Transitions",
    "action_coverage",
    "check_d4rl",
    "check_minari",
    "check_transitions",
    "concatenate",
    "load",
    "load_d4rl",
    "load_minari",
    "reference",
    "returns_histogram",
    "reward_transform",
    "score_pct",
    "state_action_coverage",
    "terminate_at",
    "trajectory_quality",
    "write_d4rl",
    "write_minari",
]
