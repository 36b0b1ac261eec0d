"""The tree of a token-MDP: every prefix at which a token is chosen, and every complete sequence, in one fixed order."""

from __future__ import annotations

import numpy as np

from markovia.envs.exact.arrays import Array, to_numpy

MAX_SEQUENCES = 4096


class TokenTree:
    """All sequences over V tokens of length H, or shorter where `eos` ends them.

    num_prefixes, M           N prefixes, breadth first (row 0 is the empty one), and M complete sequences
    tokens, prefix_index      (M, H) the tokens of a sequence and the prefixes before them; mask (M, H) bool where there is one, lengths (M,)
    child, leaf               (N, V) the next prefix, or the finished sequence, of each choice; -1 where it is the other; depth (N,)
    Raises ValueError for a size with more than 4096 sequences.
    """

    def __init__(self, V: int, H: int, eos: int | None = None) -> None:
        self.V, self.H, self.eos = V, H, eos
        N, M = tree_size(V, H, eos)
        prefixes: list[tuple[int, ...]] = [()]
        for prefix in prefixes:  # grows while it is read: breadth first
            if len(prefix) < H - 1:
                prefixes.extend((*prefix, a) for a in range(V) if a != eos)
        index = {prefix: i for i, prefix in enumerate(prefixes)}
        self.num_prefixes, self.M = N, M
        self.depth = np.array([len(prefix) for prefix in prefixes])
        self.child = np.full((N, V), -1)  # the next prefix, or -1 where the sequence ends
        self.leaf = np.full((N, V), -1)  # the finished sequence, or -1 where it goes on
        self.tokens = np.full((M, H), 0 if eos is None else eos)  # padded after the end, where mask is 0
        self.prefix_index = np.zeros((M, H), dtype=np.int64)
        self.mask = np.zeros((M, H), dtype=bool)
        count = 0
        for i, prefix in enumerate(prefixes):
            for a in range(V):
                sequence = (*prefix, a)
                if a != eos and len(sequence) < H:
                    self.child[i, a] = index[sequence]
                    continue
                self.leaf[i, a] = count
                self.tokens[count, : len(sequence)] = sequence
                self.prefix_index[count, : len(sequence)] = [index[sequence[:t]] for t in range(len(sequence))]
                self.mask[count, : len(sequence)] = True
                count += 1
        self.lengths = self.mask.sum(-1)

    def _table(self, logits: Array, name: str = "logits") -> np.ndarray:
        table = to_numpy(logits)
        if table.shape != (self.num_prefixes, self.V):
            raise ValueError(f"{name} must have shape (num_prefixes, V) = {(self.num_prefixes, self.V)}, got {table.shape}")
        return table

    def sequence_index(self, tokens: Array) -> np.ndarray:
        """(n,): which sequence each row of tokens (n, H) is; what follows EOS is ignored."""
        tokens = to_numpy(tokens).astype(np.int64)
        at, found = np.zeros(len(tokens), dtype=np.int64), np.full(len(tokens), -1)
        for t in range(self.H):
            going = found < 0
            found[going] = self.leaf[at[going], tokens[going, t]]
            at = np.where(found < 0, self.child[at, tokens[:, t]], at)
        return found


def tree_size(V: int, H: int, eos: int | None = None) -> tuple[int, int]:
    """(N, M): number of prefixes and of complete sequences; raises ValueError for sizes that cannot be enumerated."""
    if V < 2 or H < 1:
        raise ValueError(f"a token-MDP needs V >= 2 tokens and H >= 1 steps, got V={V}, H={H}")
    if eos is not None and not 0 <= eos < V:
        raise ValueError(f"eos must be a token in 0..{V - 1} or None, got {eos!r}")
    branches = V if eos is None else V - 1
    if branches > 1 and H > 12:
        levels = [MAX_SEQUENCES + 1]
    else:
        levels = [branches**h for h in range(H)]
    N = sum(levels)
    M = levels[-1] * V + (0 if eos is None else N - levels[-1])
    if M > MAX_SEQUENCES:
        raise ValueError(f"V={V}, H={H} has more than {MAX_SEQUENCES} sequences, too many to enumerate; lower V or H")
    return N, M
