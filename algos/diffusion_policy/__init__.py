"""Policies that denoise chunks of actions: cloned from data, and fine-tuned in the two-layer MDP of their denoising steps."""
