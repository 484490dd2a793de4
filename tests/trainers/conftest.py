"""Settings that keep the tests of training steady on a busy machine."""

from __future__ import annotations

import os

from hypothesis import settings

# Before torch is imported: idle threads of tiny products spin and stall each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# How long an example takes says more of the machine than of us.
settings.register_profile("trainers", deadline=None, max_examples=40)
settings.load_profile("trainers")
