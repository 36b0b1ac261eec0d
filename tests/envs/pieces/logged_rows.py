"""What tests of logged rows share."""

import numpy as np


def same(a, b):
    for name in ("obs", "action", "reward", "next_obs", "terminated", "truncated", "episode", "next_action", "has_next_action"):
        x, y = getattr(a, name), getattr(b, name)
        if isinstance(x, dict):
            assert list(x) == list(y)
            x, y = (np.concatenate([v[k].reshape(len(v[k]), -1) for k in v], axis=1) for v in (x, y))
        np.testing.assert_array_equal(x, y, err_msg=name)
        assert x.dtype == y.dtype, name
