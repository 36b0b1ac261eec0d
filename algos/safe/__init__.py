"""Learning under cost limits: what a policy may cost an episode, and how the limit enters the improvement step."""
