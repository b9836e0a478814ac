"""Settings for all tests."""

from __future__ import annotations

import os

# The models of tests are tiny, and `make test` has a worker a core: more threads would wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
