"""The device of the test suite: what REFLUX_TEST_DEVICE names ("cuda", "cuda:1"), or else the CPU."""

from __future__ import annotations

import os

DEVICE = os.environ.get("REFLUX_TEST_DEVICE", "cpu")
