"""What is decided: the Markov decision processes.

exact/      problems whose optimum is known exactly, and their solvers
text/       token-MDPs        denoising/  denoising MDPs        control/  any Gymnasium id as a vector environment
offline/    logged decisions: read, checked, measured, replayed
safe/       tasks with a cost: robots with a speed limit, a point robot among hazards, exact constrained problems
"""

from markovia.envs.registry import register_all

__all__ = ["register_all"]
