"""Fixtures: the manifests of each variant."""
from __future__ import annotations

import functools

import pytest
from manifests import VARIANTS, Manifests

manifests_of = functools.cache(Manifests)


@pytest.fixture(params=VARIANTS)
def manifests(request: pytest.FixtureRequest) -> Manifests:
    return manifests_of(request.param)


@pytest.fixture
def cpu_manifests() -> Manifests:
    return manifests_of("cpu")
