"""Maryland Polyvore: a folder of the published layout, written here and worked out by hand."""

from __future__ import annotations

import json

import pytest

from genret.catalogue import polyvore
from genret.catalogue.polyvore import read
from genret.types import InputError

CATEGORIES = "3 Dresses\n17 Blouses\n37 Shoulder Bags\n261 Ankle Booties\n4495 Sweatshirts\n"


def item(index, name, categoryid, **changed):
    """An item with every published key."""
    fields = {"index": index, "name": name, "price": 25.5, "likes": 3, "categoryid": categoryid}
    fields["image"] = f"http://img2.example/cgi/img-thing?.out=jpg&size=m&tid={categoryid}{index}"
    return fields | changed


def outfit(set_id, name, desc, items, **changed):
    """An outfit with every published key."""
    fields = {"set_id": set_id, "name": name, "desc": desc, "items": items, "views": 150, "likes": 12}
    fields |= {"image": f"http://ak1.example/{set_id}.jpg", "set_url": f"http://www.example/set?id={set_id}"}
    return fields | {"date": "One month"} | changed


# Indices need not be consecutive: the publishers dropped items that are no fashion.
FILES = {
    "train_no_dup.json": [
        outfit("101", "Autumn walk", "Wool &amp; leather", [
            item(1, "Wool  Dress", 3), item(3, "Ankle boots", 261), item(4, "", 37),
        ]),
        outfit("102", "My set", "", [item(1, "red blouse", 17), item(2, "", 9999)]),
        outfit("103", "my  SET", None, [item(2, "Grey sweatshirt", 4495)]),
        outfit("104", "", "", [item(1, "Lonely hat", 55)]),
        outfit("105", "Nothing left", "", [item(1, "", 9999)]),
    ],
    "valid_no_dup.json": [
        outfit("201", "", "For <b>the</b> office", [item(1, "WOOL dress", 3), item(2, "Red Blouse", 17)]),
    ],
    "test_no_dup.json": [
        outfit("301", "Weekend", "", [item(5, "Shoulder Bags", "37"), item(6, "Shoulder Bags", 37)]),
        outfit("302", "My set", "", [item(1, "Denim jacket", 25)]),
    ],
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    for name, outfits in FILES.items():
        (tmp_path / name).write_text(json.dumps(outfits), encoding="utf-8")
    (tmp_path / "category_id.txt").write_text(CATEGORIES, encoding="utf-8")
    return tmp_path


def test_by_hand(folder):
    texts = read(folder)
    assert texts.contents == [
        "Wool Dress",
        "Ankle boots",
        "Shoulder Bags",  # a nameless item goes by its category
        "red blouse",  # items of outfits without a query are in the pool all the same
        "Grey sweatshirt",
        "Lonely hat",
        "Denim jacket",
    ]
    # "My set" names three outfits, in two files: none of them is a query.
    assert texts.queries == ["Autumn walk. Wool & leather", "For the office", "Weekend"]
    assert texts.split.tolist() == [0, 1, 2]
    assert [rows.tolist() for rows in texts.references] == [[0, 1, 2], [0, 3], [2]]
    assert texts.card["queries"] == "3 outfits; 3 share their text with another, 2 lack text or items"
    assert texts.card["contents"] == "7 distinct names of 11 items in 8 outfits"


@pytest.mark.parametrize(
    "file, old, new, match",
    [
        ("train", '"desc": "Wool', '"text": "Wool', r"outfit 1 of train_no_dup.json: not an outfit .*'desc'"),
        ("train", '"categoryid": 17', '"category": 17', "outfit 2 of train_no_dup.json: not an outfit"),
        ("train", '"name": "My set"', '"name": 7', "outfit 2 of train_no_dup.json: not an outfit"),
        ("valid", '"categoryid": 3', '"categoryid": "x"', "outfit 1 of valid_no_dup.json: not an outfit"),
        ("valid", '"items": [', '"items": 3, "other": [', "outfit 1 of valid_no_dup.json: not an outfit"),
        ("test", '"likes": 3', '"likes" 3', "test_no_dup.json: not readable as JSON"),
        ("category_id.txt", "17 Blouses", "Blouses", "not lines of an id and a name"),
        ("category_id.txt", "17 Blouses", "17", "not lines of an id and a name"),
    ],
)
def test_refused(folder, file, old, new, match):
    path = folder / (file if file.endswith(".txt") else f"{file}_no_dup.json")
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(InputError, match=match):
        read(folder)


@pytest.mark.parametrize("name", [*polyvore.FILES, polyvore.CATEGORIES])
def test_missing_and_truncated_files(folder, name):
    path = folder / name
    content = path.read_bytes()
    if name.endswith(".json"):
        for size in (0, 1, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:size])
            with pytest.raises(InputError, match=f"{name}: not readable as JSON"):
                read(folder)
        for odd in (b"{}", b"[]", b"7"):
            path.write_bytes(odd)
            with pytest.raises(InputError, match=f"{name}: not a list of outfits"):
                read(folder)
        path.write_text(json.dumps([outfit("1", "", "", [item(1, "hat", 55)])]))
        with pytest.raises(InputError, match=f"{name}: has no outfit with items and a text of its own"):
            read(folder)
        path.write_text("[1]")
        with pytest.raises(InputError, match=f"outfit 1 of {name}: not an outfit"):
            read(folder)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=name):
        read(folder)
    path.unlink()
    with pytest.raises(InputError, match=f"{name}: no such file"):
        read(folder)
