"""The bugs of planted_bugs.py can all still be planted; which are caught, that program says."""
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from planted_bugs import BUGS, ROOT, Bug, CannotPlant, drop, planted, problem, swap

pytestmark = pytest.mark.slow  # CI asks of whoever changes a core to plant its bugs anew, not those who try a change


@pytest.mark.parametrize("bug", BUGS, ids=[f"{number}" for number, _ in enumerate(BUGS, 1)])
def test_it_can_be_planted(bug: Bug) -> None:
    assert problem(bug) == ""


def test_there_are_enough() -> None:
    assert len(BUGS) >= 20
    assert len({planted(bug, (ROOT / bug.file).read_text()) for bug in BUGS}) == len(BUGS)


def test_the_documents_table_has_them_all_and_tests_that_are_there() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text()
    rows = re.findall(r"^\| (\d+) \| `(.+?)` \| (.+?) \| `(.+?)::(\w+)", page, re.MULTILINE)
    assert [(int(number), file, why) for number, file, why, *_ in rows] == [
        (number, bug.file, bug.why) for number, bug in enumerate(BUGS, 1)
    ]
    for *_, file, test in rows:
        [found] = (ROOT / "tests").glob(f"*/{file}")
        assert re.search(rf"\b{test}\b", found.read_text()), f"{file} has no {test}"


FUNCTION = """
class Queue:
    def take(self, now):
        if self.jobs:
            return self.jobs.pop(
                0)  # the oldest
        return None
"""


def test_how_the_code_is_laid_out_does_not_matter() -> None:
    bug = Bug("queue.py", "Queue.take", swap("self.jobs.pop(0)", "self.jobs.pop()"), "the youngest is first")
    assert "return self.jobs.pop()\n" in planted(bug, FUNCTION)


@pytest.mark.parametrize(
    ("where", "what", "says"),
    [
        ("Queue.give", "pop", "Queue.give is there 0 times"),
        ("Queue.take", "push", "mentions push: found 0 times"),
        ("Queue.take", "now + 1", "mentions now + 1: found 0 times"),
    ],
)
def test_what_cannot_be_planted_says_so(where: str, what: str, says: str) -> None:
    with pytest.raises(CannotPlant, match=says.replace("+", r"\+")):
        planted(Bug("queue.py", where, drop(what), ""), FUNCTION)


def test_what_changes_nothing_is_refused() -> None:
    with pytest.raises(CannotPlant, match="changes nothing"):
        planted(Bug("queue.py", "Queue.take", swap("None", "None"), ""), FUNCTION)
