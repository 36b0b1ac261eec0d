"""What is decided: the Markov decision processes.

exact/      problems whose optimum is known exactly, and their solvers
text/       token-MDPs        denoising/  denoising MDPs        control/  vectorisation and normalisation of any Gymnasium id
safe/       tasks with a cost: robots with a speed limit, a point robot among hazards, exact constrained problems
"""

from markovia.envs.registry import register_all

__all__ = ["register_all"]
