"""Denoising MDPs: samplers as Gaussian kernels, the environments, small networks and the tasks that are ready to use."""
