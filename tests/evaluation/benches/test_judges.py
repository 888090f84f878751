"""Judges over HTTP, fake ones: what is asked, what is kept, what is no answer."""

import json
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import pytest

from iomm.evaluation.benches import dpg, imgedit, wise
from iomm.evaluation.benches.generate import write_folder
from iomm.evaluation.benches.journal import Journal, identity_of
from iomm.evaluation.benches.judged import judge_dpg, judge_imgedit, judge_wise, wise_marks, yes_or_no
from iomm.evaluation.benches.judges import ATTEMPTS, KEY, Ask, Endpoint, ask_all
from iomm.evaluation.benches.layout import BenchError, load_prompts
from tests.evaluation.benches import bench_files as small
from tests.small_run import draw_png

SECRET = "sk-never-to-be-seen"


class FakeJudge:
    """Answers by a function of the question's text, and remembers what it was asked."""

    name = "fake"

    def __init__(self, answer):
        self._answer, self.asked = answer, []

    def ask(self, ask: Ask) -> str:
        self.asked.append(ask)
        return self._answer(ask.text)


def by(judge, kept):
    """All questions to this judge, its answers kept in this file."""
    return partial(ask_all, judge, journal=Journal(kept))


@pytest.fixture
def fake_endpoint():
    """A server that says what `replies` holds: a status with a body, one a request, the last for ever."""
    state = SimpleNamespace(replies=[], requests=[], keys=[])

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            state.requests.append((self.path, json.loads(body)))
            state.keys.append(self.headers.get("Authorization"))
            status, reply = state.replies.pop(0) if len(state.replies) > 1 else state.replies[0]
            self.send_response(status)
            self.end_headers()
            self.wfile.write(reply.encode())

        def log_message(self, format, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


def said(text):
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


ASK = Ask(text="Is there a dog?", pngs=(b"png",))


def test_an_endpoint_is_asked_with_the_picture_and_the_key_and_again_when_it_is_busy(
    fake_endpoint, monkeypatch
):
    monkeypatch.setenv(KEY, SECRET)
    fake_endpoint.replies = [(429, "busy"), (200, "torn {"), (503, ""), (200, said("yes"))]
    waits: list[float] = []
    judge = Endpoint(fake_endpoint.url, "model-a", wait=waits.append)
    assert judge.ask(ASK) == "yes"
    assert waits == [2, 4, 8]
    path, body = fake_endpoint.requests[-1]
    assert path == "/v1/chat/completions" and (body["model"], body["temperature"]) == ("model-a", 0)
    text, image = body["messages"][0]["content"]
    assert text["text"] == "Is there a dog?" and image["image_url"]["url"] == "data:image/png;base64,cG5n"
    assert set(fake_endpoint.keys) == {f"Bearer {SECRET}"} and SECRET not in judge.name


def test_a_refusal_is_not_repeated_and_shows_no_key(fake_endpoint, monkeypatch):
    monkeypatch.setenv(KEY, SECRET)
    fake_endpoint.replies = [(401, f"wrong key {SECRET}")]
    with pytest.raises(BenchError, match=f"HTTP 401.*Is {KEY} set") as caught:
        Endpoint(fake_endpoint.url, "m").ask(ASK)
    assert SECRET not in str(caught.value) and len(fake_endpoint.requests) == 1


def test_an_answer_without_content_is_one_that_nobody_can_read(fake_endpoint):
    fake_endpoint.replies = [(200, said(None))]
    assert Endpoint(fake_endpoint.url, "m").ask(ASK) == "" and len(fake_endpoint.requests) == 1


def test_a_question_that_a_content_filter_stops_has_an_empty_answer_and_other_refusals_have_none(
    fake_endpoint,
):
    body = {"error": {"code": "content_filter", "message": "The prompt was filtered."}}
    fake_endpoint.replies = [(400, json.dumps(body))]
    assert Endpoint(fake_endpoint.url, "m").ask(ASK) == "" and len(fake_endpoint.requests) == 1
    for other in (json.dumps({"error": {"code": "model_not_found"}}), '{"error": "no"}', "[]", ""):
        fake_endpoint.replies = [(400, other)]
        with pytest.raises(BenchError, match=r"HTTP 400.*Are URL and model right"):
            Endpoint(fake_endpoint.url, "m").ask(ASK)


def test_judges_of_one_host_are_told_apart_by_their_path():
    one, other = (Endpoint(f"https://user:secret@host:1/{path}/v1/?key=secret", "m") for path in "ab")
    assert (one.name, other.name) == ("m at host:1/a/v1", "m at host:1/b/v1")


def test_a_judge_that_never_answers_or_redirects_is_given_up(fake_endpoint):
    fake_endpoint.replies = [(500, "")]
    with pytest.raises(BenchError, match=f"no answer in {ATTEMPTS} attempts"):
        Endpoint(fake_endpoint.url, "m", wait=lambda _: None).ask(ASK)
    fake_endpoint.replies = [(302, "")]
    with pytest.raises(BenchError, match="HTTP 302"):
        Endpoint(fake_endpoint.url, "m").ask(ASK)
    with pytest.raises(BenchError, match="must begin with http"):
        Endpoint("ftp://host", "m")


def test_answers_are_kept_and_a_stopped_run_asks_only_the_rest(tmp_path):
    path = tmp_path / "answers.jsonl"
    asks = {str(n): lambda n=n: Ask(text=f"{n}?", pngs=()) for n in range(4)}

    def fails_at_3(text):
        if text == "3?":
            raise BenchError("gone")
        return f"said {text}"

    with pytest.raises(BenchError, match="question 3: gone"):
        ask_all(FakeJudge(fails_at_3), asks, Journal(path), workers=1)
    assert path.read_text().count("\n") == 3
    with path.open("a") as file:
        file.write('{"id": "torn')
    judge = FakeJudge(lambda text: f"said {text}")
    assert ask_all(judge, asks, Journal(path), workers=2) == {str(n): f"said {n}?" for n in range(4)}
    assert [ask.text for ask in judge.asked] == ["3?"]
    assert len(Journal(path)._found) == 4
    assert identity_of("ab", "c") != identity_of("a", "bc")


@pytest.mark.parametrize(
    ("answer", "read"),
    [("yes", True), (" No. ", False), ("Yes, there is", None), ("", None), ("y", None)],
)
def test_yes_and_no_are_read_strictly(answer, read):
    assert yes_or_no(answer) is read


def test_wise_marks_are_read_strictly():
    assert wise_marks("Consistency: 2\nRealism: 1\nAesthetic Quality: 0") == pytest.approx(0.8)
    assert wise_marks("**Consistency:** 2\n**Realism:** 1\n\n**Aesthetic Quality**: 0") == pytest.approx(0.8)
    for wrong in (
        "Consistency: 2\nRealism: 1",
        "Consistency: 3\nRealism: 1\nAesthetic Quality: 0",
        "2\n1\n0",
    ):
        assert wise_marks(wrong) is None
    assert wise_marks("Consistency: 2\nRealism: 1\nAesthetic Quality: 0\nConsistency: 1") is None


def generated(bench, items, folder):
    write_folder(bench, items, folder, small.fake_paint(bench), small.settings(), small.one_rank())
    return folder


def test_dpg_asks_all_questions_of_all_tiles_and_a_no_takes_what_depends_on_it(tmp_path):
    items = load_prompts(dpg.DPG, small.dpg_prompts(tmp_path / "prompts"), subset=True)
    folder, csv = generated(dpg.DPG, items, tmp_path / "out"), small.dpg_questions(tmp_path / "q.csv")
    judge = FakeJudge(lambda text: "No." if "Is there" in text else "yes")
    reading = judge_dpg(items, folder, csv, by(judge, tmp_path / "a.jsonl"))
    assert reading.scores == dict.fromkeys(("COCOval0", "COCOval1", "COCOval2"), 0.0) and not reading.unparsed
    assert len(judge.asked) == len({(ask.text, ask.pngs) for ask in judge.asked}) == 3 * 4 * 2
    odd = FakeJudge(lambda text: "maybe" if "brown" in text else "yes")
    reading = judge_dpg(items, folder, csv, by(odd, tmp_path / "b.jsonl"))
    assert not reading.scores and len(reading.unparsed) == 3


def test_wise_and_imgedit_are_told_their_items_and_read_what_is_whole(tmp_path):
    items = load_prompts(wise.WISE, small.wise_prompts(tmp_path / "data"), subset=True)
    folder, template = generated(wise.WISE, items, tmp_path / "w"), tmp_path / "judge.txt"
    template.write_text("PROMPT: {PROMPT} EXPLANATION: {EXPLANATION}")
    whole = "Consistency: 2\nRealism: 2\nAesthetic Quality: 2"
    judge = FakeJudge(lambda text: "I like it" if "prompt 568 EXPLANATION: thing 568" in text else whole)
    reading = judge_wise(items, folder, template, by(judge, tmp_path / "a.jsonl"))
    assert (
        reading.unparsed == ("568",) and reading.scores["1"] == pytest.approx(1) and len(reading.scores) == 5
    )
    template.write_text("no place for it")
    with pytest.raises(BenchError, match="must have {PROMPT}"):
        judge_wise(items, folder, template, by(judge, tmp_path / "a.jsonl"))

    edits = load_prompts(imgedit.IMGEDIT, small.imgedit_prompts(tmp_path / "edits.json"), subset=True)
    folder, told = generated(imgedit.IMGEDIT, edits, tmp_path / "e"), tmp_path / "prompts.json"
    for i, item in enumerate(edits):
        path = tmp_path / "originals" / str(item.source)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(draw_png(i))
    told.write_text(json.dumps({"adjust": "Rate <edit_prompt>.", "style": "Style <edit_prompt>."}))
    judge = FakeJudge(lambda _: "Brief reasoning: good.\nA: 5\nB: 4\nC: 3")
    reading = judge_imgedit(
        edits,
        folder,
        told,
        tmp_path / "originals",
        by(judge, tmp_path / "c.jsonl"),
    )
    assert set(reading.scores.values()) == {4} and {len(ask.pngs) for ask in judge.asked} == {2}
    assert "Rate smooth the shell." in {ask.text for ask in judge.asked}
    told.write_text("{}")
    with pytest.raises(BenchError, match="no instruction for adjust, style"):
        judge_imgedit(
            edits,
            folder,
            told,
            tmp_path / "originals",
            by(judge, tmp_path / "c.jsonl"),
        )
