"""Fixtures of these tests: the fuzzer's modules and those that the algorithms' tests share are found beside them."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "algos" / "pieces")]
