"""The playlists: a small folder worked out by hand, what is refused, and the real one."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from genret.catalogue.playlists import read
from genret.types import InputError

DATA = Path(__file__).parents[3] / "shared" / "data" / "playlists"

TRACKS = """\
id,title,artists,album,length
a,Rain,Ann; Bob,One,3:20
b,"Hello, Again",Cy,Two,2:44
c,rain,ANN; Bob,One (deluxe),3:21
d,Rain,Dee,Three,2:00
e,Snow,Eve,Four,2:01
"""
LISTS = [
    {
        "name": "Rainy Day",
        "description": 'For <a href="x:y">rain</a> &amp; tea.',
        "track_ids": ["a", "d", "c"],
    },
    {"name": "Top 50 - Iceland", "description": "Daily.", "track_ids": ["e"]},
    {"name": "Snow", "description": "", "track_ids": ["e", "e"]},
    {"name": "Eve Radio", "description": "With Eve.", "track_ids": ["e"]},
    {"name": "Discover Weekly (@x)", "description": "Yours.", "track_ids": ["e"]},
    {"name": "Cy Recent Favorites", "description": None, "track_ids": ["b"]},
    {"name": "Radio Hits", "description": None, "track_ids": ["b", "a"]},
    {"name": "Top Hits", "description": "Big.", "track_ids": ["d"]},
]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tracks.csv").write_text(TRACKS, encoding="utf-8")
    lines = (json.dumps(each) for each in LISTS)
    (tmp_path / "playlists.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path


def test_by_hand(folder):
    texts = read(folder)
    assert texts.contents == ["Rain - Ann; Bob", "Hello, Again - Cy", "Rain - Dee", "Snow - Eve"]
    assert texts.queries == ["Rainy Day. For rain & tea.", "Snow", "Radio Hits", "Top Hits. Big."]
    assert [rows.tolist() for rows in texts.references] == [[0, 2], [3], [0, 1], [2]]
    assert sorted(texts.split) == [0, 0, 1, 2]
    assert texts.card["contents"] == "4 texts of 5 tracks" and texts.card["queries"].startswith(
        "4 of 8 lists"
    )
    splits = {tuple(read(folder, seed=seed).split) for seed in range(9)}
    assert len(splits) > 2 and tuple(texts.split) in splits


@pytest.mark.parametrize(
    "file, old, new, match",
    [
        ("tracks", "artists", "artist", "artists: data row 1 of tracks.csv has none"),
        ("tracks", "d,Rain,Dee,Three,2:00", "d,Rain", "artists: data row 4 of tracks.csv has none"),
        ("tracks", "e,Snow", ",Snow", "id: data row 5 of tracks.csv has none"),
        ("tracks", "e,Snow", "a,Snow", "id: not unique"),
        ("tracks", '"Hello, Again"', '"Hello"x', "not a UTF-8 CSV table"),
        ("tracks", TRACKS, TRACKS.splitlines()[0], "holds no tracks"),
        ("tracks", TRACKS, "", "holds no tracks"),
        ("playlists", '"b", "a"', '"b", "z"', "line 7 of .*: track 'z' is not in tracks.csv"),
        ("playlists", '["d"]}', '["d"', "line 8 of .*: not a playlist"),
        ("playlists", '["d"]', "[]", "line 8 of .*: a playlist without a name or without"),
        ("playlists", '["d"]', "[4]", "line 8 of .*: not a playlist"),
        ("playlists", '["d"]', "7", "line 8 of .*: not a playlist"),
        ("playlists", '"Snow"', '" "', "line 3 of .*: a playlist without a name"),
        ("playlists", '"Snow"', "null", "line 3 of .*: not a playlist"),
        ("playlists", '"description": ""', '"note": ""', "line 3 of .*: not a playlist"),
        ("playlists", '"Snow"', '"Radio Hits"', "'Radio Hits' is there twice"),
    ],
)
def test_refused(folder, file, old, new, match):
    path = folder / {"tracks": "tracks.csv", "playlists": "playlists.jsonl"}[file]
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(InputError, match=match):
        read(folder)


def test_charts_alone_and_truncated_and_missing_files(folder):
    lists = folder / "playlists.jsonl"
    content = lists.read_bytes()
    lists.write_text(json.dumps(LISTS[1]))
    with pytest.raises(InputError, match="no list but charts"):
        read(folder)
    lists.write_bytes(content[:-40])
    with pytest.raises(InputError, match="line 8 of playlists.jsonl: not a playlist"):
        read(folder)
    lists.write_bytes(content + b"\xff")
    with pytest.raises(InputError, match="not UTF-8"):
        read(folder)
    lists.unlink()
    with pytest.raises(InputError, match="playlists.jsonl: no such file"):
        read(folder)
    (folder / "tracks.csv").unlink()
    with pytest.raises(InputError, match="tracks.csv: no such file"):
        read(folder)


@pytest.mark.shared
def test_real_playlists():
    """Counts taken by hand with json and csv; the reference sets rebuilt here from the raw ids."""
    texts = read(DATA)
    assert len(texts.contents) == 18_665 and len(texts.queries) == 173
    assert np.bincount(texts.split).tolist() == [137, 18, 18]
    assert sum(map(len, texts.references)) == 20_026
    assert not any("<a" in q or "&#" in q or q.startswith("Top 50 -") for q in texts.queries)
    with open(DATA / "tracks.csv", newline="", encoding="utf-8") as file:
        title = {row["id"]: f"{row['title']} - {row['artists']}".casefold() for row in csv.DictReader(file)}
    raw = {}
    for line in (DATA / "playlists.jsonl").read_text(encoding="utf-8").splitlines():
        each = json.loads(line)
        raw[each["name"]] = {" ".join(title[track].split()) for track in each["track_ids"]}
    for query, rows in zip(texts.queries, texts.references, strict=True):
        names = [name for name in raw if query == name or query.startswith(f"{name}. ")]
        got = {" ".join(texts.contents[row].casefold().split()) for row in rows}
        assert got == raw[max(names, key=len)]
