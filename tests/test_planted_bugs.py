"""The bugs of planted_bugs.py can all still be planted; which are caught, that program says."""
import ast
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from planted_bugs import BUGS, ROOT, Bug, problem

pytestmark = pytest.mark.slow  # CI asks of whoever changes a core to plant its bugs anew, not those who try a change


@pytest.mark.parametrize("bug", BUGS, ids=[f"{number}" for number, _ in enumerate(BUGS, 1)])
def test_it_can_be_planted(bug: Bug) -> None:
    assert problem(bug) == ""
    planted = (ROOT / bug.file).read_text().replace(bug.old, bug.new)
    assert ast.dump(ast.parse(planted)) != ast.dump(ast.parse((ROOT / bug.file).read_text())), "it changes nothing"


def test_there_are_enough() -> None:
    assert len(BUGS) >= 20
    assert len({(bug.file, bug.old, bug.new) for bug in BUGS}) == len(BUGS)
