"""A real front in front of a real daemon: `front(daemon, **http)` starts one, `shared_front` is one for all tests that
leave it as it is."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from running_front import PHOTO, Front, MakeFront, fronts


@pytest.fixture
def front(wait_until: Any) -> Iterator[MakeFront]:
    with fronts(wait_until) as make:
        yield make


@pytest.fixture(scope="module")
def shared_front(shared_daemon: Any, wait_until: Any) -> Iterator[Front]:
    with fronts(wait_until) as make:
        yield make(shared_daemon)


@pytest.fixture(scope="session")
def photo() -> bytes:
    return PHOTO.read_bytes()
