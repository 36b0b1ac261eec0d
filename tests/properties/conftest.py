"""Properties are checked on the same examples at every run, so that a green run stays green; no deadline, since machines differ."""

from hypothesis import settings

settings.register_profile("properties", derandomize=True, deadline=None, max_examples=40)
settings.load_profile("properties")
