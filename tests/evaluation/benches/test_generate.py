"""Folders that official scorers read: whole, exact, the same whoever writes them."""

import json
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from iomm.evaluation.benches.dpg import DPG
from iomm.evaluation.benches.generate import read_record, record_path, write_folder
from iomm.evaluation.benches.geneval import GENEVAL
from iomm.evaluation.benches.imgedit import IMGEDIT
from iomm.evaluation.benches.layout import BenchError, load_prompts
from iomm.evaluation.benches.wise import WISE
from tests.evaluation.benches import bench_files as small


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in files(folder)}


def pixel(path: Path, at: tuple[int, int] = (0, 0)) -> int:
    with Image.open(path) as image:
        red, green, _ = image.getpixel(at)  # pyright: ignore[reportGeneralTypeIssues]
    return 256 * red + green


@pytest.fixture
def geneval(tmp_path):
    """Seven prompts, painted two at a time: the last group has one."""
    items = load_prompts(GENEVAL, small.geneval_prompts(tmp_path / "prompts.jsonl"), subset=True)
    return SimpleNamespace(items=items, folder=tmp_path / "out", prompts=tmp_path / "prompts.jsonl")


def write(world, **about):
    calls: list[int] = []
    paint = small.fake_paint(GENEVAL, calls)
    write_folder(GENEVAL, world.items, world.folder, paint, small.settings(**about), small.one_rank())
    return calls


def test_geneval_has_a_folder_a_prompt_with_its_line_and_four_pictures_the_last_prompt_too(geneval):
    write(geneval)
    lines = geneval.prompts.read_text().splitlines(keepends=True)
    expected = {f"{n:05d}/samples/{i:05d}.png" for n in range(7) for i in range(4)}
    assert files(geneval.folder) == expected | {f"{n:05d}/metadata.jsonl" for n in range(7)}
    assert [(geneval.folder / f"{n:05d}/metadata.jsonl").read_text() for n in range(7)] == lines
    for n in range(7):
        assert [pixel(geneval.folder / f"{n:05d}/samples/{i:05d}.png") for i in range(4)] == list(
            range(4 * n, 4 * n + 4)
        )


def test_dpg_has_one_grid_a_prompt_row_by_row(tmp_path):
    items = load_prompts(DPG, small.dpg_prompts(tmp_path / "prompts"), subset=True)
    write_folder(DPG, items, tmp_path / "out", small.fake_paint(DPG), small.settings(), small.one_rank())
    assert files(tmp_path / "out") == {f"COCOval{n}.png" for n in range(3)}
    grid = tmp_path / "out" / "COCOval2.png"
    assert [pixel(grid, at) for at in ((0, 0), (8, 0), (0, 8), (8, 8), (15, 15))] == [8, 9, 10, 11, 11]


def test_wise_and_imgedit_have_one_picture_a_prompt_named_by_its_key(tmp_path):
    wise = load_prompts(WISE, small.wise_prompts(tmp_path / "data"), subset=True)
    edits = load_prompts(IMGEDIT, small.imgedit_prompts(tmp_path / "basic_edit.json"), subset=True)
    for bench, items, out in ((WISE, wise, "w"), (IMGEDIT, edits, "e")):
        write_folder(
            bench, items, tmp_path / out, small.fake_paint(bench), small.settings(), small.one_rank()
        )
    assert files(tmp_path / "w") == {f"{i}.png" for i in (1, 401, 568, 701, 801, 901)}
    assert files(tmp_path / "e") == {"1082.png", "1068.png", "673.png"}
    assert [pixel(tmp_path / "w" / f"{i}.png") for i in (1, 401, 901)] == [0, 400, 900]  # a subset's noise


def test_an_image_to_edit_lies_in_the_folder_of_originals(tmp_path):
    edits = small.imgedit_prompts(tmp_path / "basic_edit.json")
    edits.write_text(edits.read_text().replace("animal/1.jpg", "../animal/1.jpg"))
    with pytest.raises(BenchError, match="leaves the folder of originals"):
        load_prompts(IMGEDIT, edits, subset=True)


def test_the_record_lies_beside_the_folder_and_names_every_prompt(geneval):
    write(geneval, sampling={"guidance": 3.0})
    record = read_record(geneval.folder)
    assert record_path(geneval.folder).parent == geneval.folder.parent
    assert record["items"]["00006"] == "single_object" and len(record["items"]) == 7
    assert record["sampling"] == {"guidance": 3.0} and record["complete"] and not record["official"]
    assert not (geneval.folder.parent / "out.part").exists()


def test_only_what_is_missing_or_damaged_is_painted_again_and_the_same(geneval):
    write(geneval)
    whole = contents(geneval.folder)
    (geneval.folder / "00003/samples/00001.png").unlink()
    torn = geneval.folder / "00006/samples/00002.png"
    torn.write_bytes(torn.read_bytes()[:40])
    (geneval.folder / "00000/metadata.jsonl").write_text("{}")
    kept = (geneval.folder / "00003/samples/00000.png").stat().st_ino
    assert write(geneval) == [0, 8, 24]  # groups of two prompts of four: of prompts 0, 2 (with 3) and 6
    assert contents(geneval.folder) == whole
    assert (geneval.folder / "00003/samples/00000.png").stat().st_ino == kept
    assert write(geneval) == []


def test_other_settings_do_not_go_on_with_a_folder(geneval):
    write(geneval, sampling={"guidance": 3.0})
    with pytest.raises(BenchError, match=r"sampling: .*3\.0.*, now .*4\.0.*new folder"):
        write(geneval, sampling={"guidance": 4.0})


def test_a_file_that_does_not_belong_is_refused_and_the_scorers_own_is_not(geneval):
    write(geneval)
    (geneval.folder / "results.jsonl").write_text("")
    assert write(geneval) == []
    (geneval.folder / "00002/grid.png").write_bytes(b"")
    (geneval.folder / "00007").mkdir()
    with pytest.raises(BenchError, match=r"2 do not belong there \(00002/grid.png, 00007/\): remove them"):
        write(geneval)


def test_a_folder_of_somebody_elses_is_refused(geneval):
    geneval.folder.mkdir()
    (geneval.folder / "00000").mkdir()
    with pytest.raises(BenchError, match="no out.run.json says what they are"):
        write(geneval)


def test_a_file_that_vanishes_while_others_are_written_is_an_error_and_the_folder_unfinished(geneval):
    paint = small.fake_paint(GENEVAL)

    def lose(items, first):
        (geneval.folder / "00000/samples/00003.png").unlink(missing_ok=True)
        return paint(items, first)

    with pytest.raises(BenchError, match=r"1 files are missing or damaged \(00000/samples/00003.png\)"):
        write_folder(GENEVAL, geneval.items, geneval.folder, lose, small.settings(), small.one_rank())
    with pytest.raises(BenchError, match="is unfinished"):
        read_record(geneval.folder)


def test_ranks_write_disjoint_files_that_are_those_of_one_rank(geneval, tmp_path):
    """Three ranks in threads, with a rank 0 that tells the others what it found."""
    write(geneval)
    alone = contents(geneval.folder)
    said, painted, meet = [], [[], [], []], threading.Barrier(3)

    def mesh(rank):
        def broadcast(value):
            if rank == 0:
                said.append(value)
            meet.wait(20)
            found = said[-1]
            meet.wait(20)
            return found

        return SimpleNamespace(
            rank=rank, world_size=3, broadcast_object=broadcast, barrier=lambda: meet.wait(20)
        )

    def work(rank):
        paint = small.fake_paint(GENEVAL, painted[rank])
        write_folder(GENEVAL, geneval.items, tmp_path / "three", paint, small.settings(), mesh(rank))  # pyright: ignore[reportArgumentType]

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert painted == [[0, 24], [8], [16]]
    assert contents(tmp_path / "three") == alone


def test_rewritten_texts_are_painted_and_the_scorer_sees_the_original_line(geneval, tmp_path):
    rewritten = small.geneval_prompts(tmp_path / "long.jsonl", word="a splendid bench")
    items = load_prompts(GENEVAL, geneval.prompts, rewritten, subset=True)
    assert items[3].text == "a photo of a splendid bench 3"
    assert json.loads(items[3].texts[0][1])["prompt"] == "a photo of bench 3"
    short = small.geneval_prompts(tmp_path / "short.jsonl", count=6)
    with pytest.raises(BenchError, match="do not hold the same prompts: 00006"):
        load_prompts(GENEVAL, geneval.prompts, short, subset=True)


def test_another_number_of_prompts_than_the_benchmark_has_needs_a_word(geneval):
    with pytest.raises(BenchError, match="holds 7 prompts, geneval has 553"):
        load_prompts(GENEVAL, geneval.prompts)
