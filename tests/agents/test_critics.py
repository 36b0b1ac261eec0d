"""Ensembles of critics as one batched product."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium import spaces

from markovia.agents.critics import QEnsemble

torch.set_num_threads(1)
F64 = torch.float64
OBS = spaces.Box(-np.inf, np.inf, (3,), np.float32)


@pytest.mark.parametrize("layer_norm", [False, True])
def test_twin_critics_equal_two_separate_networks(layer_norm: bool) -> None:
    torch.manual_seed(0)
    twin = QEnsemble(OBS, 2, num=2, hidden=(8, 8), layer_norm=layer_norm).double()
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(0.3 * torch.randn_like(p))
    obs, action = torch.randn(5, 3, dtype=F64), torch.randn(5, 2, dtype=F64)
    weights = torch.randn(2, 5, dtype=F64)
    (twin(obs, action) * weights).sum().backward()
    for j in range(2):
        parts: list[torch.nn.Module] = []
        for layer in twin.hidden:
            n_in, n_out = layer.weight.shape[1:]
            linear = torch.nn.Linear(n_in, n_out, dtype=F64)
            linear.load_state_dict({"weight": layer.weight[j].T, "bias": layer.bias[j, 0]})
            parts.append(linear)
            if layer_norm:
                norm = torch.nn.LayerNorm(n_out, dtype=F64)
                norm.load_state_dict({"weight": layer.scale[j, 0], "bias": layer.shift[j, 0]})
                parts.append(norm)
            parts.append(torch.nn.ReLU())
        head = torch.nn.Linear(8, 1, dtype=F64)
        head.load_state_dict({"weight": twin.head.weight[j].T, "bias": twin.head.bias[j, 0]})
        alone = torch.nn.Sequential(*parts, head)
        out = alone(torch.cat([obs, action], 1))[:, 0]
        torch.testing.assert_close(twin(obs, action)[j], out)
        torch.testing.assert_close(twin(obs, action, members=j + 1)[j], out)
        (out * weights[j]).sum().backward()
        torch.testing.assert_close(twin.hidden[0].weight.grad[j].T, parts[0].weight.grad)
        torch.testing.assert_close(twin.head.weight.grad[j].T, head.weight.grad)
        torch.testing.assert_close(twin.head.bias.grad[j, 0], head.bias.grad)


def test_pixels_are_encoded_once_for_all_members() -> None:
    space = spaces.Dict(cam=spaces.Box(0, 255, (12, 12, 3), np.uint8), goal=spaces.Discrete(4))
    obs = {"cam": torch.randint(0, 256, (5, 12, 12, 3), dtype=torch.uint8), "goal": torch.arange(5) % 4}
    assert QEnsemble(space, 2, num=3, hidden=(8,))(obs, torch.zeros(5, 2)).shape == (3, 5)


def test_bad_input_is_answered() -> None:
    with pytest.raises(ValueError, match="at least 1 critic"):
        QEnsemble(OBS, 2, num=0)
    with pytest.raises(ValueError, match="unknown activation 'rellu'"):
        QEnsemble(OBS, 2, activation="rellu")
