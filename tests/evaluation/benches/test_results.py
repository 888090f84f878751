"""What official scorers write, read back: golden files of each form, counts, weights, intervals."""

import json

import pytest

from iomm.evaluation.benches import dpg, geneval, imgedit, wise
from iomm.evaluation.benches.layout import BenchError
from iomm.evaluation.benches.records import read_lines
from iomm.evaluation.benches.summary import Reading, describe, summarise
from tests.evaluation.benches import bench_files as small

GOLDEN_GENEVAL = (
    '{"filename":"out\\/%05d\\/samples\\/%05d.png","tag":"%s","prompt":"a photo of a bench","correct":%s,'
    '"reason":"","metadata":"{\\"tag\\": \\"single_object\\"}",'
    '"details":"{\\"bench\\": [[1.0, 2.0, 30.0, 40.0, 0.99]]}"}\n'
)
GOLDEN_DPG = """out/COCOval0.png, 1.0, 0.5, 1.0, 0.5, 0.75
out/COCOval1.png, 0.0, 0.0, 0.0, 0.0, 0.0
out/COCOval2.png, 1.0, 1.0, 1.0, 1.0, 1.0
Model: out
L1 category scores:
\tentity: 66.66666666666666
\tattribute: 50.0
L2 category scores:
\tattribute - color: 50.0
\tentity - whole: 66.66666666666666
Image path: out
Save results to: out/dpg-bench_20260101-000000_results.txt
DPG-Bench score: 58.333333333333336
"""
GOLDEN_WISE = (
    '{"prompt_id": %d, "Subcategory": "Festival", "consistency": %s, "realism": %s, '
    '"aesthetic_quality": %s}\n'
)
GOLDEN_IMGEDIT = {
    "1082": "Brief reasoning: No change: still textured.\nPrompt Compliance: 1\nVisual Seamlessness: 1\n"
    "Physical & Detail Fidelity: 1",
    "1068": "Brief reasoning: minor.\nPrompt Compliance: 1\nVisual Seamlessness: 4\n"
    "Physical & Detail Fidelity: 4",
    "673": "Brief reasoning: absent.\nStyle Fidelity: 1\nContent Preservation: 5\nRendering Quality: 5",
}
GENERATED_WISE = {
    "1": "culture",
    "401": "time",
    "568": "space",
    "701": "biology",
    "801": "physics",
    "901": "chemistry",
}


def geneval_results(path, right=(0,), images=4):
    """Seven prompts; those in `right` have all images right, prompt 1 has one of four."""
    lines = [
        GOLDEN_GENEVAL % (n, i, small.TAGS[n % 6], "true" if n in right or (n, i) == (1, 2) else "false")
        for n in range(7)
        for i in range(images)
    ]
    path.write_text("".join(lines))
    return path


def generated_geneval():
    return {f"{n:05d}": small.TAGS[n % 6] for n in range(7)}


def test_geneval_is_the_mean_of_task_means_not_of_images(tmp_path):
    reading = geneval.read_results([geneval_results(tmp_path / "results.jsonl")])
    result = summarise(geneval.GENEVAL, generated_geneval(), reading)
    assert result.categories["single_object"].mean == 0.5  # prompt 0 right, prompt 6 wrong
    assert result.categories["two_object"].mean == 0.25
    assert result.overall.mean == pytest.approx((0.5 + 0.25) / 6)  # over images: 5 of 28
    assert result.overall.low <= result.overall.mean <= result.overall.high
    assert result.overall == summarise(geneval.GENEVAL, generated_geneval(), reading).overall


def test_geneval_with_a_lost_image_or_prompt_is_an_error_not_a_lower_score(tmp_path):
    path = geneval_results(tmp_path / "results.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    with pytest.raises(BenchError, match=r"have not 4 judged images: 00006 \(3\)"):
        geneval.read_results([path])
    path.write_text("".join(lines[:-4]))  # the last prompt, as a sampler that drops it would
    with pytest.raises(BenchError, match="1 of 7 generated prompts were not judged: 00006"):
        summarise(geneval.GENEVAL, generated_geneval(), geneval.read_results([path]))
    path.write_text("".join([*lines, lines[0]]))
    with pytest.raises(BenchError, match=r"line 29: 00000/00000.png was judged before"):
        geneval.read_results([path])


def test_geneval_results_of_other_prompts_are_refused(tmp_path):
    reading = geneval.read_results([geneval_results(tmp_path / "results.jsonl")])
    with pytest.raises(BenchError, match="never generated: 00006"):
        summarise(geneval.GENEVAL, {k: v for k, v in generated_geneval().items() if k != "00006"}, reading)
    with pytest.raises(BenchError, match="another category than what was generated: 00000"):
        summarise(geneval.GENEVAL, generated_geneval() | {"00000": "colors"}, reading)


GENERATED_DPG = {f"COCOval{n}": "prompts" for n in range(3)}


def test_dpg_is_the_mean_of_prompts_and_agrees_with_what_its_scorer_printed(tmp_path):
    path = tmp_path / "results.txt"
    path.write_text(GOLDEN_DPG)
    result = summarise(dpg.DPG, GENERATED_DPG, dpg.read_results([path]))
    assert result.overall.mean == pytest.approx(0.5833333)
    assert "as printed, last tile only: entity - whole 66.66666666666666" in describe(result)
    path.write_text(GOLDEN_DPG.replace("DPG-Bench score: 58.3", "DPG-Bench score: 60.3"))
    with pytest.raises(BenchError, match=r"printed 0.603333, its lines have a mean of 0.583333"):
        summarise(dpg.DPG, GENERATED_DPG, dpg.read_results([path]))


def test_dpg_may_lose_the_prompt_of_the_first_row_and_no_other(tmp_path):
    lost = dpg.first_prompt(dpg.read_questions(small.dpg_questions(tmp_path / "dpg_bench.csv")))
    assert lost == ("COCOval0",)
    path, lines = tmp_path / "results.txt", GOLDEN_DPG.splitlines(keepends=True)
    path.write_text("".join(lines[1:]).replace("score: 58.333333333333336", "score: 50.0"))
    result = summarise(dpg.DPG, GENERATED_DPG, dpg.read_results([path], lost))
    assert (result.overall.mean, result.scored, result.lost) == (0.5, 2, ("COCOval0",))
    with pytest.raises(BenchError, match="not judged: COCOval0"):
        summarise(dpg.DPG, GENERATED_DPG, dpg.read_results([path]))
    path.write_text("".join([lines[0], *lines[2:]]).replace("score: 58.333333333333336", "score: 87.5"))
    with pytest.raises(BenchError, match="not judged: COCOval1"):
        summarise(dpg.DPG, GENERATED_DPG, dpg.read_results([path], lost))


def test_dpg_without_an_end_or_with_other_tiles_is_refused(tmp_path):
    path = tmp_path / "results.txt"
    path.write_text(GOLDEN_DPG[: GOLDEN_DPG.index("Model")])
    with pytest.raises(BenchError, match="did not finish"):
        dpg.read_results([path])
    path.write_text(GOLDEN_DPG.replace("1.0, 0.5, 1.0, 0.5, 0.75", "1.0, 1.0"))
    with pytest.raises(BenchError, match="COCOval0 has 1 tiles. Score with --pic-num 4"):
        dpg.read_results([path])


def test_a_dpg_question_that_depends_on_a_no_is_a_no():
    asked = [
        dpg.Question(number=n, text="?", depends=of) for n, of in ((1, ()), (2, (1,)), (3, (2,)), (4, ()))
    ]
    assert dpg.tile_score(asked, {1: True, 2: True, 3: True, 4: False}) == 0.75
    assert dpg.tile_score(asked, {1: False, 2: True, 3: True, 4: True}) == 0.25  # 3 through 2


def wise_results(path, marks):
    path.write_text("".join(GOLDEN_WISE % (i, *of) for i, of in marks.items()))
    return path


def test_wise_legacy_weighs_marks_and_categories_as_published(tmp_path):
    assert wise.wiscore(2, 2, 2) == pytest.approx(1) and wise.wiscore(1, 0, 2) == pytest.approx(0.45)
    marks = {1: (2, 2, 2), 401: (0, 0, 0), 568: (2, 0, 0), 701: (0, 0, 0), 801: (0, 0, 0), 901: (0, 0, 2)}
    reading = wise.read_results_legacy([wise_results(tmp_path / "scores.jsonl", marks)])
    result = summarise(wise.WISE, GENERATED_WISE, reading)
    assert result.overall.mean == pytest.approx(0.4 * 1 + 0.133 * 0.7 + 0.1 * 0.1)
    assert wise.LEGACY_WEIGHTS["time"] == 0.167 and sum(wise.LEGACY_WEIGHTS.values()) == pytest.approx(1)


def test_a_subset_of_wise_has_a_score_of_the_categories_that_it_has(tmp_path):
    reading = wise.read_results_legacy([wise_results(tmp_path / "s.jsonl", {1: (2, 2, 2), 401: (0, 0, 0)})])
    result = summarise(wise.WISE, {"1": "culture", "401": "time"}, reading)
    assert result.overall.mean == pytest.approx(0.4 / 0.567) and list(result.categories) == [
        "culture",
        "time",
    ]


def test_lines_end_where_json_lines_end(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text(json.dumps({"prompt": "a\u2028b\u0085c"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert [record for _, record in read_lines(path)] == [{"prompt": "a\u2028b\u0085c"}]


def test_wise_marks_that_could_not_be_read_are_counted_and_never_a_score(tmp_path):
    marks: dict[int, tuple[float, ...]] = dict.fromkeys((1, 2, 401, 568, 701, 801, 901), (2.0, 2.0, 2.0))
    marks[2] = (999, 999, 999)
    reading = wise.read_results_legacy([wise_results(tmp_path / "scores.jsonl", marks)])
    result = summarise(wise.WISE, GENERATED_WISE | {"2": "culture"}, reading)
    assert (result.overall.mean, result.scored, result.unparsed) == (pytest.approx(1), 6, ("2",))
    marks[901] = (9.9, 2, 2)
    reading = wise.read_results_legacy([wise_results(tmp_path / "scores.jsonl", marks)])
    with pytest.raises(BenchError, match="nothing in chemistry has a score"):
        summarise(wise.WISE, GENERATED_WISE | {"2": "culture"}, reading)
    with pytest.raises(BenchError, match="are no marks of WISE"):
        wise.read_results_legacy([wise_results(tmp_path / "scores.jsonl", {1: (3, 0, 0)})])


def test_wise_verified_has_its_own_weights_and_categories(tmp_path):
    path = tmp_path / "scores.jsonl"
    path.write_text(
        "".join(f'{{"prompt_id": {i}, "Subcategory": "s", "score": {i % 2}}}\n' for i in (1, 401, 640, 641))
    )
    reading = wise.read_results_verified([path])
    assert reading.scores == {"1": 1, "401": 1, "640": 0, "641": 1}
    folder = small.wise_prompts(tmp_path / "data_verified", (1, 401, 521, 640, 641, 761, 881), "_verified")
    found = {item.key: item.category for item in wise.read_verified(folder)}
    assert found["640"] == "space" and found["641"] == "biology"
    assert list(wise.VERIFIED_WEIGHTS.values()) == [0.4, *[0.12] * 5]
    generated = {key: category for key, category in found.items() if key != "521"}
    whole = Reading(scores={"1": 1, "401": 1, "640": 0, "641": 0, "761": 0, "881": 0})
    assert summarise(wise.WISE_VERIFIED, generated, whole).overall.mean == pytest.approx(0.52)


def test_the_two_wises_are_not_mixed_up(tmp_path):
    legacy = small.wise_prompts(tmp_path / "data")
    verified = small.wise_prompts(tmp_path / "data_verified", suffix="_verified")
    with pytest.raises(BenchError, match="Use --bench wise:"):
        wise.read_verified(legacy)
    with pytest.raises(BenchError, match="Use --bench wise_verified:"):
        wise.read_legacy(verified)
    with pytest.raises(BenchError, match="Are these legacy's results"):
        wise.read_results_verified([wise_results(tmp_path / "scores.jsonl", {1: (1, 1, 1)})])


def test_imgedit_is_the_mean_of_kinds_and_takes_only_three_marks(tmp_path):
    path = tmp_path / "result.json"
    path.write_text(json.dumps(GOLDEN_IMGEDIT))
    generated = {"1082": "adjust", "1068": "adjust", "673": "style"}
    result = summarise(imgedit.IMGEDIT, generated, imgedit.read_results([path]))
    assert result.overall.mean == pytest.approx(((1 + 3) / 2 + 11 / 3) / 2)
    broken = GOLDEN_IMGEDIT | {"1068": {"error": "timeout"}}
    path.write_text(json.dumps(broken))
    result = summarise(imgedit.IMGEDIT, generated, imgedit.read_results([path]))
    assert (result.categories["adjust"].mean, result.unparsed) == (1, ("1068",))
    assert imgedit.read_answer("Compliance: 5\nSeamlessness: 5") is None
    assert imgedit.read_answer("Compliance: 9\nSeamlessness: 5\nFidelity: 5") is None


@pytest.mark.parametrize(
    ("read", "text"),
    [
        (geneval.read_results, '{"tag": "colors"}\n'),
        (geneval.read_results, "no json\n"),
        (dpg.read_results, "something else\n"),
        (wise.read_results_legacy, '{"prompt_id": 1, "consistency": "2"}\n'),
        (wise.read_results_legacy, '{"prompt_id": 1001, "consistency": 2}\n'),
        (imgedit.read_results, "[]"),
        (imgedit.read_results, '{"1": 3.5}'),
    ],
)
def test_files_of_another_form_are_refused_by_name(tmp_path, read, text):
    path = tmp_path / "results"
    path.write_text(text)
    with pytest.raises(BenchError, match=str(path)):
        read([path])
