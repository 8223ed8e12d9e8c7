"""Hypothesis profiles: ``ci`` finds the same examples every time, ``nightly`` looks further."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

from tests.support.hub_client import hub

__all__ = ["hub"]

settings.register_profile(
    "ci",
    derandomize=True,
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "nightly",
    max_examples=5_000,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
