"""Ranks that are not alike are named before they join."""

import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from torch._C._distributed_c10d import HashStore

from iomm.doctor.ranks import render_ranks
from iomm.parallel import agreement, mesh
from iomm.parallel.agreement import Facts, differences, disagreements, facts, settings_digest
from tests.checkpoint.small_engine import config


def rank(host: str, **changes: object) -> Facts:
    same = {"device": "NVIDIA H800", "collectives": "nccl", "code": "c0de", "torch": "2.14.1", "triton": None}
    return {"host": host, **same, **changes}


def test_ranks_that_differ_in_host_and_device_alone_may_train_and_the_device_is_noted() -> None:
    ranks = [rank("node1"), rank("node2", device="NVIDIA H100 PCIe")]
    assert disagreements(ranks) == []
    assert differences(ranks, ("device",)) == [
        "device: NVIDIA H800 on rank 0 (node1); NVIDIA H100 PCIe on rank 1 (node2)"
    ]


def test_every_difference_names_its_values_ranks_and_hosts() -> None:
    ranks = [rank(f"node{n // 8}", torch="2.13.0" if n // 8 == 5 else "2.14.1") for n in range(64)]
    ranks[3] |= {"code": "beef", "triton": "3.8"}
    assert disagreements(ranks) == [
        "code: c0de on ranks 0-2, 4-63 (node0, node1, node2, node3 and 4 more); beef on rank 3 (node0)",
        "torch: 2.14.1 on ranks 0-39, 48-63 (node0, node1, node2, node3 and 3 more); "
        "2.13.0 on ranks 40-47 (node5)",
        "triton: none on ranks 0-2, 4-63 (node0, node1, node2, node3 and 4 more); 3.8 on rank 3 (node0)",
    ]


def test_a_fact_that_only_one_version_of_iomm_knows_is_a_difference_too() -> None:
    assert disagreements([rank("a"), rank("b") | {"NCCL": "2.27"}]) == [
        "NCCL: none on rank 0 (a); 2.27 on rank 1 (b)"
    ]


def test_this_process_agrees_with_itself_and_its_settings_have_a_digest_of_their_own() -> None:
    mine = json.loads(json.dumps(facts(config())))
    assert disagreements([mine, mine]) == []
    assert mine["settings"] == settings_digest(config()) != settings_digest(config(name="other"))
    assert mine["code"] == agreement.code_digest() and mine["collectives"] in ("gloo", "nccl")
    agreement.require_agreement(config())  # alone there is nobody to differ from


def meet(texts: list[str], judge: Callable[[list[str]], str], present: range, wait_s: float) -> list[object]:
    """What each of the ranks that are present gets, a thread each."""
    store = HashStore()
    answers: list[object] = [None] * len(texts)

    def join(number: int) -> None:
        try:
            answers[number] = mesh.ask_rank_0(store, number, len(texts), texts[number], judge, wait_s)
        except Exception as error:
            answers[number] = error

    threads = [threading.Thread(target=join, args=(number,)) for number in present]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    return answers


def test_rank_0_judges_what_all_ranks_say_and_all_hear_it() -> None:
    answers = meet(["a", "b", "c"], lambda texts: "-".join(texts), range(3), wait_s=10)
    assert answers == ["a-b-c"] * 3


def test_ranks_that_do_not_come_are_named() -> None:
    answers = meet(["a"] * 4, "".join, range(2), wait_s=0.2)
    assert isinstance(answers[0], TimeoutError)
    assert "ranks 2, 3 of 4 did not answer within 0.2 s" in str(answers[0])


def test_the_table_says_who_is_where_what_all_have_and_what_differs() -> None:
    shown = render_ranks([rank("node1"), rank("node1"), rank("node2", torch="2.13.0")])
    assert "ranks 0-1 (node1): NVIDIA H800" in shown and "rank 2 (node2): NVIDIA H800" in shown
    same, _, different = shown.partition("DIFFERENT: no training starts with these")
    assert "code: c0de" in same and "torch" not in same
    assert "torch: 2.14.1 on ranks 0-1 (node1); 2.13.0 on rank 2 (node2)" in different


@pytest.mark.multi
def test_two_ranks_with_other_settings_are_both_refused_and_doctor_shows_why(
    torchrun: Callable[..., str], tmp_path: Path
) -> None:
    script = tmp_path / "differing.py"
    script.write_text(
        "import os, sys\n"
        "from dataclasses import replace\n"
        "from iomm.doctor.ranks import run\n"
        "from iomm.parallel.agreement import require_agreement\n"
        "from tests.checkpoint.small_engine import config\n"
        "mine = config(train=replace(config().train, seed=int(os.environ['RANK'])))\n"
        "assert run(mine) == 1\n"
        "sys.stdout.flush()\n"
        "try:\n"
        "    require_agreement(mine)\n"
        "except ValueError as error:\n"
        "    sys.stdout.write(f'refused on rank {os.environ[\"RANK\"]}: {error}\\n')\n"  # in one piece
    )
    printed = torchrun(script)
    assert printed.count("DIFFERENT: no training starts with these") == 1  # rank 0 prints
    assert printed.count("the ranks of this run are not alike") == 2  # all ranks stop
    assert "refused on rank 0" in printed and "refused on rank 1" in printed
    assert "settings: " in printed and "on rank 1 (" in printed
