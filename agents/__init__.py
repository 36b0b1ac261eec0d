"""Who decides: records, distributions, policies and critics behind one interface."""

from markovia.agents.distributions import Categorical, FixedStdGaussian, Gaussian, MultiCategorical, SquashedGaussian, kl
from markovia.agents.interface import Agent, Evaluation
from markovia.agents.records import Rollout

__all__ = [
    "Agent",
    "Categorical",
    "Evaluation",
    "FixedStdGaussian",
    "Gaussian",
    "MultiCategorical",
    "Rollout",
    "SquashedGaussian",
    "kl",
]
