"""docs/ways-out.md: the table is of all doors, kinds and ways that there are, and every word of it is explained."""

from __future__ import annotations

import json
import re

from benchmarks.tables import ROOT
from benchmarks.ways_doors import DOORS
from benchmarks.ways_kinds import KINDS, TRAINING, WAYS
from benchmarks.ways_load import LOADERS
from benchmarks.ways_out import CLOSE, RESULTS, judged
from benchmarks.ways_tables import of_door

TEXT = (ROOT / "docs" / "ways-out.md").read_text()


def test_the_table_is_of_all_that_there_is() -> None:
    kept = json.loads(RESULTS.read_text())["rows"]
    found = {(r["door"], r["kind"], r["way"]) for r in kept}
    ways = [way.name for way in (*WAYS[:-1], TRAINING)]
    assert found >= {(door.name, kind, way) for door in DOORS for kind in KINDS for way in door.ways or ways if way != WAYS[-1].name}
    assert {r["door"] for r in kept} == {door.name for door in DOORS}
    assert {name for door in DOORS for name in (door.load, door.gradient) if name} == {*LOADERS}


def test_every_word_of_the_table_is_explained() -> None:
    words = {r["word"] for r in json.loads(RESULTS.read_text())["rows"]} - {"right", "none"}
    explained = {w for line in re.findall(r"^(- .*(?:\n  .*)*)", TEXT, flags=re.MULTILINE) for w in re.findall(r"\*\*([^*]+)\*\*", line)}
    assert words <= explained, words - explained
    assert {"–", "✓", "✓ …, frozen", "one batch"} <= explained


def test_a_wrong_artifact_gets_its_word() -> None:
    way = WAYS[0]
    right, refused = {"shape": [5, 3, 6], "difference": CLOSE / 2}, {"said": "no"}
    cut, wrong = {"shape": [5, 3, 6], "difference": None}, {"shape": [9, 3, 6], "difference": 1.0}
    for rows, shown in (
        ([right, refused, refused, refused, refused], "✓ 1e-5"),
        ([right, right, refused, refused, refused], "✓ 1e-5"),
        ([right, cut, refused, refused, refused], "✓ 1e-5, frozen"),
        ([right, refused, wrong, refused, right], "✓ 1e-5, frozen"),
        ([wrong, right, right, right], "wrong"),
        ([refused, right, right, right], "does not run"),
    ):
        assert of_door(judged(way, rows)) == shown
    for rows, shown in (
        ([right, cut, right, right], "frozen"),
        ([right, wrong, right, right], "wrong"),
        ([right, refused, refused, right], "example only 1e-5"),
        ([right] * 4, "✓ 1e-5"),
    ):
        assert of_door(judged(WAYS[1], rows)) == shown


def test_no_layer_takes_less_than_its_products() -> None:
    """Of each kind, in the kept table; and the page names the option by which a package takes less."""
    speed = json.loads(RESULTS.read_text())["speed"]
    assert len(speed) == 3
    for rows in speed.values():
        times = {r["what"]: r["microseconds"] for r in rows}
        least = next(time for what, time in times.items() if what.startswith("its products alone"))
        assert all(time > least for what, time in times.items() if "exact" in what or what.startswith(("AOT", "by hand"))), times
    assert 'inductor_configs={"freezing": True}' in TEXT
