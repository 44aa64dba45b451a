"""Forms: what is written is read back, and nothing else is taken for it."""
from hypothesis import given
from hypothesis import strategies as st

from blendmaskd_workers.evaluation.forms import Form

ROW = Form("batch={batch:2d}: {median_ms:.2f}ms | {note}")
BLOCK = Form("[{name}]\n  rel_diff={rel_diff:.3e} ({percent:.2f}%)")


def test_a_line_in_the_form_of_the_original_record() -> None:
    line = "batch= 2: 38.90ms | 51.41 imgs/s"
    assert ROW.read(line) == [{"batch": 2, "median_ms": 38.9, "note": "51.41 imgs/s"}]
    assert ROW.write({"batch": 2, "median_ms": 38.9, "note": "51.41 imgs/s", "more": 1}) == line


def test_lines_of_other_forms_are_left_alone() -> None:
    text = "batch=1: 5.00ms | a\nbatch=x: 5.00ms | b\n  batch=1: 5.00ms | c\nbatch=10: 7.25ms | d"
    assert [row["note"] for row in ROW.read(text)] == ["a", "d"]


def test_lines_that_belong_together_are_found_in_order() -> None:
    rows = [{"name": "p3", "rel_diff": 1.5e-7, "percent": 0.0}, {"name": "p4", "rel_diff": 2.0, "percent": 21.81}]
    assert BLOCK.read("\n".join(BLOCK.write(row) for row in rows)) == rows


@given(st.floats(allow_nan=False), st.integers(-999, 999))
def test_any_number_is_read_back(number: float, whole: int) -> None:
    form = Form("{whole:d} {number:.17e}")
    assert form.read(form.write({"whole": whole, "number": number})) == [{"whole": whole, "number": number}]


def test_a_number_that_is_none_is_read_back() -> None:
    form = Form("{number:.2f}")
    [row] = form.read(form.write({"number": float("nan")}))
    assert row["number"] != row["number"]
