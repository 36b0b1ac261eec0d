"""The flags of `markovia train` that are the same for every method; apart, since they need tyro, which takes half a second to import."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import UseAppendAction as Append


@dataclass(frozen=True)
class TrainFlags:
    """How a run is carried out; what the method does is set by the flags after these."""

    env: str | None = None  # Gymnasium id: markovia/..., or any other environment
    data: Path | None = None  # file (.jsonl, .jsonl.gz or a saved Hugging Face dataset) of preferences, or of prompts where the env reads one
    dataset: str | None = None  # logged data for offline methods: a Minari id, a D4RL file or fixture:NAME; env is then the task of the evaluation
    model: str | None = None  # what is trained: smollm2, a Hugging Face name or folder, a diffusers folder (Pipeline-v0); by default the env's
    judge: str | None = None  # "module:function" that scores texts, called as (prompts, completions, **columns) -> list of numbers
    reward: Annotated[tuple[str, ...], Append] = ()  # "module:function" for texts (Prompts-v0) or images (Pipeline-v0), or "run:FOLDER"; repeatable
    reward_weights: tuple[float, ...] = ()  # one per reward; by default 1 each
    reference: Annotated[tuple[str, ...], Append] = ()  # NAME=FOLDER of a policy that is read (kdrl: teacher, rto: dpo, salsa: other); repeatable
    texts: Path | None = None  # file of texts whose likelihood is kept up beside the reward (ppo-max/ptx, ppo-rlhf/ptx)
    data_options: str = "{}"  # JSON object of how the file is read, e.g. '{"max_length": 512, "held_out": 200}'
    seed: int = 0  # of everything that is random
    num_seeds: int = 1  # so many seeds from there on as one batch, each in a run folder of its own (methods that learn from a dataset)
    out: Path | None = None  # folder of the run; by default runs/<env>/<method>-seed<seed>
    resume: bool = False  # go on from the last checkpoint of that folder, or start when there is none
    env_kwargs: str = "{}"  # JSON object of the environment's arguments, e.g. '{"wanted": 8}'
    agent_options: str = "{}"  # JSON object of the agent's options, e.g. '{"hidden": [256, 256]}'
    vectorization: str = "auto"  # sync, async, mujoco (one batch), envpool or auto (control)
    device: str = "cpu"  # where the networks live
    shard: bool = False  # under torchrun: cut the language model over the processes instead of holding it whole in each
    num_checkpoints: int = 10  # at most; spread over num_env_steps, never closer than an episode of full length
    eval_episodes: int = 10  # greedy episodes or samples at the end; 0 leaves the evaluation out
    eval_checkpoints: bool = False  # evaluate at every checkpoint too
    max_seconds: float | None = None  # end after this time
    compile: bool | None = None  # compile the updates (takes up to half a minute the first time); None: where the run is long enough to repay it
    over_memory: bool = False  # begin a run even if it needs more memory than the machine has
    track: str | None = None  # wandb or trackio: log there too
    progress: bool = True  # show progress
