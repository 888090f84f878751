"""Judges: models that look at pictures and answer a text.

Here an OpenAI-compatible endpoint (`POST URL/chat/completions`), asked over HTTP; `local_judge` has one in a
folder. The key comes from the environment (`IOMM_JUDGE_KEY`) and appears in no message, record or file. Every
answer is kept as it came, so a stopped run goes on; reading it is the benchmark's job.
"""

import base64
import hashlib
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, Protocol

from iomm.evaluation.benches.journal import Journal, identity_of
from iomm.evaluation.benches.layout import BenchError

KEY, URL = "IOMM_JUDGE_KEY", "IOMM_JUDGE_URL"
ATTEMPTS = 6
FIRST_WAIT_S = 2.0  # doubled after each attempt
TIMEOUT_S = 180.0
MAX_TOKENS = 2000
_OF_MODELS = {".safetensors", ".bin", ".json", ".jinja", ".txt", ".model"}
_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504}
_FILTERED = {"content_filter", "content_policy_violation", "moderation_blocked"}  # error codes of HTTP 400


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One question to a judge."""

    text: str
    pngs: tuple[bytes, ...]  # pictures, behind the text


class Judge(Protocol):
    """Something that answers. Called from several threads."""

    name: str  # of the model and where it runs; part of every record

    def ask(self, ask: Ask) -> str: ...


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another place."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


class Endpoint:
    """A model behind an OpenAI-compatible endpoint."""

    def __init__(self, url: str, model: str, *, wait: Callable[[float], None] = time.sleep) -> None:
        """
        Args:
            url: the base, such as http://127.0.0.1:8000/v1.
            wait: between attempts, seconds.
        Raises:
            BenchError: no http(s) URL.
        """
        if not url.startswith(("http://", "https://")):
            raise BenchError(
                f"the judge's URL {url} must begin with http:// or https://, like http://host:8000/v1."
            )
        host, _, path = url.split("://", 1)[1].split("?", 1)[0].rstrip("/").partition("/")
        self.name = f"{model} at {host.rpartition('@')[2]}/{path}"
        self._url, self._model, self._wait = f"{url.rstrip('/')}/chat/completions", model, wait
        self._open = urllib.request.build_opener(_NoRedirect).open

    def ask(self, ask: Ask) -> str:
        """The model's answer, with temperature 0. Empty, as one that nobody can read, where a content filter
        stands before the model: asked again it would say the same.

        Raises:
            BenchError: refused, or not to be had after several attempts.
        """
        problem = ""
        for attempt in range(ATTEMPTS):
            if attempt:
                self._wait(FIRST_WAIT_S * 2 ** (attempt - 1))
            try:
                with self._open(self._request(ask), timeout=TIMEOUT_S) as response:
                    return _answer(json.loads(response.read()))
            except urllib.error.HTTPError as error:
                with error:
                    filtered = error.code == 400 and _error_code(error) in _FILTERED
                if filtered:
                    return ""
                problem = f"HTTP {error.code} {error.reason}"
                if error.code not in _AGAIN:
                    wrong = "Are URL and model right, and is the question one that it takes?"
                    wrong = f"Is {KEY} set?" if error.code in (401, 403) else wrong
                    raise BenchError(f"the judge {self.name} refused: {problem}. {wrong}") from None
            except (OSError, HTTPException, ValueError) as error:
                problem = repr(error)
        raise BenchError(
            f"the judge {self.name} gave no answer in {ATTEMPTS} attempts ({problem}). What it said is "
            "kept: run the same command again when it is back."
        )

    def _request(self, ask: Ask) -> urllib.request.Request:
        content: list[dict[str, Any]] = [{"type": "text", "text": ask.text}]
        for png in ask.pngs:
            url = f"data:image/png;base64,{base64.b64encode(png).decode()}"
            content.append({"type": "image_url", "image_url": {"url": url}})
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0.0,
            "max_tokens": MAX_TOKENS,
        }
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        return urllib.request.Request(self._url, json.dumps(body).encode(), headers, method="POST")


def ask_all(
    judge: Judge,
    asks: Mapping[str, Callable[[], Ask]],
    journal: Journal,
    *,
    workers: int = 8,
    on_progress: Callable[[int, int], None] = lambda _done, _of: None,
) -> dict[str, str]:
    """The answers to all questions, by key. Those that are kept are not asked again.

    Args:
        asks: makes each question when it is its turn: pictures are not all held at once.
        workers: questions under way at a time.
    Raises:
        BenchError: the judge gave none, for one of them; the others' answers are kept.
    """
    if workers < 1:
        raise BenchError(f"--workers {workers} must be at least 1.")

    def one(key: str, make: Callable[[], Ask]) -> str:
        ask = make()
        identity = identity_of(judge.name, ask.text, *ask.pngs)
        kept = journal.get(identity)
        if isinstance(kept, str):
            return kept
        try:
            answer = judge.ask(ask)
        except BenchError as error:
            raise BenchError(f"question {key}: {error}") from error
        journal.put(identity, answer)
        return answer

    answers: dict[str, str] = {}
    with ThreadPoolExecutor(workers) as pool:
        waiting = {pool.submit(one, key, make): key for key, make in asks.items()}
        try:
            for future in as_completed(waiting):
                answers[waiting[future]] = future.result()
                on_progress(len(answers), len(asks))
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return answers


def model_identity(folder: Path) -> str:
    """12 hexadecimal digits of the files in a model's folder: weights, settings, tokenizer, chat template."""
    total = hashlib.sha256()
    for file in sorted(path for path in folder.iterdir() if path.is_file() and path.suffix in _OF_MODELS):
        with file.open("rb") as data:
            total.update(f"{file.name}\0".encode() + hashlib.file_digest(data, "sha256").digest())
    return total.hexdigest()[:12]


def _error_code(error: urllib.error.HTTPError) -> str | None:
    """The code that an OpenAI-compatible endpoint gives in the body of a refusal."""
    try:
        code = json.loads(error.read())["error"]["code"]
    except (OSError, HTTPException, ValueError, KeyError, TypeError):
        return None  # another body, or none: the status says what it can
    return code if isinstance(code, str) else None


def _answer(response: Any) -> str:
    try:
        text = response["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        raise ValueError("a response without choices[0].message.content") from None
    if text is None:  # it declines, or thought until its tokens were used up: an answer that nobody can read
        return ""
    if not isinstance(text, str):
        raise ValueError(f"an answer that is no text but {type(text).__name__}")
    return text
