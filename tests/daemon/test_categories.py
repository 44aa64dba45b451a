import json
from pathlib import Path

import pytest

from blendmaskd.coco.categories import COCO, CategoriesError, Category, load, resolve

LIST = [{"id": 7, "name": "gear", "supercategory": "part"}, {"id": 2, "name": "bolt"}]


def write(path: Path, tree: object) -> Path:
    path.write_text(json.dumps(tree))
    return path


def test_coco_has_eighty_classes_with_the_gaps_of_its_ids() -> None:
    assert len(COCO) == 80
    assert COCO[0] == Category(1, "person")
    assert COCO[11] == Category(13, "stop sign")
    assert COCO[15] == Category(17, "cat")
    assert COCO[79] == Category(90, "toothbrush")
    assert set(range(1, 91)) - {category.id for category in COCO} == {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
    assert [category.id for category in COCO] == sorted(category.id for category in COCO)
    assert len({category.name for category in COCO}) == 80


def test_a_list_and_an_annotation_file_give_the_same_categories_in_ascending_id(tmp_path: Path) -> None:
    wanted = [Category(2, "bolt"), Category(7, "gear")]
    assert load(write(tmp_path / "list.json", LIST)) == wanted
    assert load(write(tmp_path / "whole.json", {"images": [], "annotations": [], "categories": LIST})) == wanted


@pytest.mark.parametrize(
    ("tree", "reason"),
    [
        ([], "expected a list"),
        ({"images": []}, "expected a list"),
        ("bolt", "expected a list"),
        (["bolt"], '"bolt": expected an integer "id"'),
        ([{"id": "1", "name": "bolt"}], 'expected an integer "id"'),
        ([{"id": True, "name": "bolt"}], 'expected an integer "id"'),
        ([{"id": 1, "name": ""}], 'a "name"'),
        ([{"id": 1}], 'a "name"'),
        ([{"id": 1, "name": "bolt"}, {"id": 1, "name": "nut"}], "id 1 is given to both 'bolt' and 'nut'"),
    ],
)
def test_a_list_that_cannot_be_used_is_refused_by_file_and_reason(tmp_path: Path, tree: object, reason: str) -> None:
    path = write(tmp_path / "names.json", tree)
    with pytest.raises(CategoriesError) as refusal:
        load(path)
    assert str(path) in str(refusal.value)
    assert reason in str(refusal.value)


@pytest.mark.parametrize("content", [b"", b"{not json", b"\xff\xfe\x00"])
def test_a_file_that_is_not_json_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "names.json"
    path.write_bytes(content)
    with pytest.raises(CategoriesError, match=r"names\.json"):
        load(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CategoriesError, match="No such file"):
        load(tmp_path / "absent.json")


def test_names_come_from_the_file_then_from_beside_the_weights_then_from_coco_then_from_numbers(tmp_path: Path) -> None:
    weights = tmp_path / "model.pth"
    assert resolve(80) == COCO
    assert resolve(80, weights) == COCO
    assert resolve(2, weights) == [Category(1, "class_0"), Category(2, "class_1")]
    write(tmp_path / "categories.json", LIST)
    assert [category.name for category in resolve(2, weights)] == ["bolt", "gear"]
    given = write(tmp_path / "given.json", [{"id": 1, "name": "a"}, {"id": 3, "name": "b"}])
    assert resolve(2, weights, given) == [Category(1, "a"), Category(3, "b")]


def test_a_wrong_count_is_refused_by_name_wherever_the_list_came_from(tmp_path: Path) -> None:
    path = write(tmp_path / "categories.json", LIST)
    wanted = r"categories\.json: has 2 categories, the network has 80 classes"
    with pytest.raises(CategoriesError, match=wanted):
        resolve(80, tmp_path / "model.pth")
    with pytest.raises(CategoriesError, match=wanted):
        resolve(80, None, path)
