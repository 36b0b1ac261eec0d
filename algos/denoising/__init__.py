"""Steering a denoiser without training it (guidance, particles, interaction), and training it through the gradient of its reward."""
