"""The fuzzer itself, and the first 500 of the inputs of `make fuzz-data`."""

from pathlib import Path

import pytest

from iomm.data.decoder import dali_installed
from iomm.data.hashing import cache_key
from tests.data.fuzz import broken, kinds, watch
from tests.data.fuzz.cases import Case, Put
from tests.data.fuzz.table import Table
from tests.data.fuzz.trial import Found, judge

IMAGES = [number for number in range(120) if kinds.kind_of(number).startswith(("image", "changes"))]
NO_DALI = pytest.mark.skipif(not dali_installed(), reason="NVIDIA DALI is not installed: iomm[data]")


@pytest.mark.slow
@pytest.mark.multi
@pytest.mark.parametrize(
    ("decode", "numbers"),
    [("cpu", range(500)), pytest.param("dali", IMAGES, marks=NO_DALI)],
    ids=["cpu", "dali"],
)
def test_every_damaged_input_is_accounted_for(decode, numbers):
    table = Table(seed=0)
    for ran in watch.watch(0, numbers, decode):
        table.add(ran, decode)
    assert not table.bad, "\n".join(
        f"input {ran.number} ({kinds.kind_of(ran.number)}, {ran.what}): {ran.problems}"
        for _, ran in table.bad
    )


def test_every_kind_is_among_the_first_hundred_inputs():
    assert {kinds.kind_of(number) for number in range(100)} == set(kinds.KINDS)


def test_an_input_is_a_function_of_seed_and_number(tmp_path):
    def contents(seed: int, number: int, name: str) -> dict[Path, bytes]:
        folder = tmp_path / name
        folder.mkdir()
        case = kinds.build(seed, number, folder)
        assert case.puts
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder): path.read_bytes() for path in files}

    number = list(kinds.KINDS).index("tar: damaged")
    assert contents(1, number, "a") == contents(1, number, "b") != contents(2, number, "c")


IMAGE = b"an image"
USED = [("subject", cache_key(IMAGE))]


@pytest.mark.parametrize(
    ("found", "outcome"),
    [
        (Found(used=USED), "used"),
        (Found(used=[("subject", "of its damaged bytes")]), "used"),
        (Found(reasons=[("subject", "cannot be decoded")]), "rejected"),
        (Found(left_out=1), "rejected"),
        (Found(refused="set.tar: torn"), "refused"),
    ],
)
def test_an_image_is_used_or_rejected_or_its_shard_refused(found, outcome):
    verdict = judge(Case(what="", puts=[Put("subject", IMAGE)]), found)
    assert (verdict.outcome, verdict.problems) == (outcome, [])


@pytest.mark.parametrize(
    ("put", "found", "problem"),
    [
        (Put("subject", IMAGE), Found(), "lost in silence"),
        (Put("subject", IMAGE), Found(used=[("other", "00")], reasons=[("other", "bad")]), "lost in silence"),
        (Put("subject", IMAGE, must=True), Found(reasons=[("subject", "no")]), "sound and was not used"),
        (Put("subject", IMAGE), Found(reasons=[("subject", "")]), "a reason of 0 characters"),
        (Put("subject", IMAGE), Found(reasons=[("subject", "MemoryError: ")]), "memory ran out"),
    ],
)
def test_what_is_not_accounted_for_is_a_problem(put, found, problem):
    [said] = judge(Case(what="", puts=[put]), found).problems
    assert problem in said


def test_bytes_that_nobody_put_in_are_a_problem_where_an_index_vouches_for_them():
    case = Case(what="", puts=[Put("subject", IMAGE)], indexed=True)
    assert "none that were put in" in judge(case, Found(used=[*USED, ("subject", "others")])).problems[0]


@pytest.mark.multi
def test_a_hang_and_a_crash_are_reported_with_their_place_and_the_next_input_runs(monkeypatch):
    monkeypatch.setattr(watch, "_serve", broken.serve)
    hung, crashed, fine = watch.watch(0, (0, 1, 2), "cpu", seconds=1)
    assert "no end after 1 s" in (hung.died or "") and "wait_for_ever" in (hung.died or "")
    assert "exit code -11" in (crashed.died or "")
    assert fine.died is None


def test_an_input_that_is_not_accounted_for_is_kept_with_its_files(tmp_path):
    table = Table(seed=0)
    ran = watch.Ran(list(kinds.KINDS).index("tar: checksum"), died="no end")
    table.add(ran, "cpu")
    assert "1 unaccounted for" in table.text()
    table.keep_bad(tmp_path)
    [folder] = tmp_path.iterdir()
    assert "no end" in (folder / "problems.json").read_text() and list((folder / "input").iterdir())
