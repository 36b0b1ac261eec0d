"""The point robot's MuJoCo model, written out as text, and what it sees: a pseudo-lidar per kind of object."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

FRAME_SKIP, TIMESTEP = 10, 0.002
BODY_RADIUS = 0.1
BINS = 16

# Nothing collides: the robot has no vertical joint, so the floor never carries it, and hazards and goals are regions to be in.
_MODEL = """
<mujoco model="point">
  <option timestep="{timestep}"/>
  <visual><headlight ambient="0.45 0.45 0.45" diffuse="0.2 0.2 0.2" specular="0 0 0"/><global offwidth="480" offheight="480"/></visual>
  <default>
    <geom density="1" contype="0" conaffinity="0"/>
    <motor ctrlrange="-1 1" ctrllimited="true" forcerange="-0.05 0.05" forcelimited="true"/>
    <velocity ctrlrange="-1 1" ctrllimited="true" forcerange="-0.05 0.05" forcelimited="true"/>
  </default>
  <asset>
    <texture name="grid" type="2d" builtin="checker" rgb1="0.82 0.84 0.86" rgb2="0.74 0.76 0.79" width="300" height="300"/>
    <material name="floor" texture="grid" texrepeat="{tiles} {tiles}"/>
  </asset>
  <worldbody>
    <light pos="0 0 8" dir="0.2 0.3 -1" directional="true" castshadow="false" diffuse="0.35 0.35 0.35" specular="0 0 0"/>
    <geom name="floor" type="plane" size="{floor} {floor} 0.1" material="floor"/>
    {regions}
    <body name="robot" pos="0 0 {radius}">
      <joint name="x" type="slide" axis="1 0 0" damping="0.01"/>
      <joint name="y" type="slide" axis="0 1 0" damping="0.01"/>
      <joint name="turn" type="hinge" axis="0 0 1" damping="0.005"/>
      <geom name="robot" type="sphere" size="{radius}" rgba="0.78 0.15 0.18 1"/>
      <geom name="nose" type="box" size="0.05 0.05 0.05" pos="{radius} 0 0" rgba="0.78 0.15 0.18 1"/>
      <site name="robot" size="0.01"/>
    </body>
  </worldbody>
  <sensor>
    <accelerometer site="robot"/>
    <velocimeter site="robot"/>
    <gyro site="robot"/>
    <magnetometer site="robot"/>
  </sensor>
  <actuator>
    <motor site="robot" gear="0.3 0 0 0 0 0"/>
    <velocity jointinparent="turn" gear="0.3"/>
  </actuator>
</mujoco>
"""


def disc(name: str, radius: float, rgba: str, height: float = 0.01) -> str:
    """A flat cylinder that lies on the floor; its place is set in `model.geom_pos`."""
    return f'<geom name="{name}" type="cylinder" size="{radius} {height}" pos="0 0 {height}" rgba="{rgba}"/>'


def wall(name: str, along: str, at: float, half: float, rgba: str = "0.95 0.65 0.1 0.6") -> str:
    """A line on the floor at x = `at` (along "y") or y = `at` (along "x"), `half` long to each side of the origin."""
    pos, size = (f"{at} 0 0.05", f"0.02 {half} 0.05") if along == "y" else (f"0 {at} 0.05", f"{half} 0.02 0.05")
    return f'<geom name="{name}" type="box" size="{size}" pos="{pos}" rgba="{rgba}"/>'


def point_model(regions: Sequence[str], floor: float) -> str:
    """MJCF of the robot on a floor of half-length `floor` m, with the given regions."""
    return _MODEL.format(timestep=TIMESTEP, radius=BODY_RADIUS, floor=floor, tiles=max(1, round(2 * floor)), regions="\n    ".join(regions))


def pseudo_lidar(position: np.ndarray, heading: float, targets: np.ndarray, reach: float, bins: int = BINS) -> np.ndarray:
    """(bins,) closeness in [0, 1] of the nearest target per sector, counter-clockwise from straight ahead.

    A target at distance d in sector k, a fraction f of the way to sector k + 1, reads max(0, reach - d) / reach there, f times that in k + 1 and
    1 - f times in k - 1, so that readings move smoothly. position (2,) and targets (n, 2) in m, heading in rad.
    """
    offset = np.asarray(targets, dtype=np.float64).reshape(-1, 2) - position
    closeness = np.maximum(0.0, reach - np.hypot(offset[:, 0], offset[:, 1])) / reach
    sector = ((np.arctan2(offset[:, 1], offset[:, 0]) - heading) % (2 * np.pi)) / (2 * np.pi / bins)
    index = sector.astype(int) % bins  # an angle just below 2 pi can round up to it
    fraction = sector - np.floor(sector)
    out = np.zeros(bins)
    np.maximum.at(out, index, closeness)
    np.maximum.at(out, (index + 1) % bins, fraction * closeness)
    np.maximum.at(out, (index - 1) % bins, (1 - fraction) * closeness)
    return out


def scatter(rng: np.random.Generator, keep_outs: Sequence[float], half: float, fixed: np.ndarray | None = None) -> np.ndarray:
    """(n, 2) random centres in the square of half-length `half`, none closer to another than their two keep-outs together.

    `fixed` (k, 3) are centres with keep-outs that are already there. A layout that gets stuck is thrown away and begun anew.
    """
    base = np.zeros((0, 3)) if fixed is None else np.asarray(fixed, dtype=np.float64)
    for _ in range(1000):
        placed = base
        for keep_out in keep_outs:
            for _ in range(100):
                at = rng.uniform(-half + keep_out, half - keep_out, 2)
                if (np.hypot(*(placed[:, :2] - at).T) >= placed[:, 2] + keep_out).all():
                    placed = np.vstack([placed, [*at, keep_out]])
                    break
            else:
                break
        if len(placed) == len(base) + len(keep_outs):
            return placed[len(base) :, :2]
    raise ValueError(f"{len(keep_outs)} objects with keep-outs up to {max(keep_outs)} m don't fit into a square of {2 * half} m; enlarge it")
