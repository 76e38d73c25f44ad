"""Judges that answer, time out, talk nonsense, or are people."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from fastmllm.eval.judge import PAIRWISE, Endpoint, HumanFile, JudgeError, fill, parse_verdict, prompt_hash


@pytest.mark.parametrize(
    "text, verdict",
    [
        ("Both fine.\nVerdict: 1", "1"),
        ("**Verdict:** 2.", "2"),
        ("verdict: TIE", "tie"),
        ("Verdict: 1\nVerdict: 2", None),
        ("Verdict: 1. Yes, Verdict: 1", "1"),
        ("Verdict: 10", None),
        ("1", None),
        ("", None),
    ],
)
def test_verdicts(text, verdict):
    assert parse_verdict(text) == verdict


def test_texts_in_a_prompt_stay_as_they_are():
    said = fill("{first} {second}", first="{second}", second=r"\1 {first}")
    assert said == r"{second} \1 {first}"
    with pytest.raises(ValueError, match=r"no place \{third\}"):
        fill("{first}", first="", third="")
    assert prompt_hash(PAIRWISE) != prompt_hash(PAIRWISE + " ")


class _Server:
    """Replies with what `self.replies` says, in turn: (status, body), or seconds to sleep."""

    def __init__(self, *replies):
        outer, self.replies, self.requests = self, list(replies), []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.requests.append((self.path, self.headers.get("Authorization"), json.loads(body)))
                reply = outer.replies.pop(0)
                if isinstance(reply, float):
                    time.sleep(reply)
                    return
                self.send_response(reply[0])
                self.end_headers()
                self.wfile.write(reply[1])

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def _said(text):
    return 200, json.dumps({"choices": [{"message": {"content": text}}]}).encode()


def test_an_endpoint_is_asked_again_after_what_may_pass():
    with _Server((503, b"busy"), (429, b"slow"), _said("Verdict: 1")) as server:
        judge = Endpoint(server.url, "m", key="k")
        assert judge("Who?") == "Verdict: 1"
    path, key, body = server.requests[-1]
    assert (path, key, body["model"], body["temperature"]) == ("/v1/chat/completions", "Bearer k", "m", 0)
    assert body["messages"] == [{"role": "user", "content": "Who?"}]
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    "replies, tries, requests, reason",
    [
        ([(400, b"no such model")], 3, 1, "status 400: no such model"),
        ([(500, b"a"), (500, b"b")], 2, 2, "status 500: b"),
        ([0.6], 1, 1, "timed out|Timeout"),
        ([(200, b"<html>")], 3, 1, "no chat completion"),
        ([(200, b'{"choices": [{"message": {"content": null}}]}')], 3, 1, "without text"),
        ([(200, b"x" * ((1 << 20) + 1))], 3, 1, "more than"),
    ],
)
def test_an_endpoint_without_a_reply_is_an_error_not_a_score(replies, tries, requests, reason):
    with _Server(*replies) as server, pytest.raises(JudgeError, match=reason):
        Endpoint(server.url, "m", tries=tries, timeout_s=0.3)("Who?")
    assert len(server.requests) == requests


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="write http"):
        Endpoint("file:///etc/passwd", "m")
    with pytest.raises(ValueError, match="must be positive"):
        Endpoint("http://x", "m", timeout_s=0)
    with pytest.raises(JudgeError, match="Connection refused"):
        Endpoint("http://127.0.0.1:1", "m", tries=1)("Who?")


def test_people_write_into_the_file(tmp_path):
    path = tmp_path / "people.jsonl"
    for _ in range(2):
        with pytest.raises(JudgeError, match="waits for a person"):
            HumanFile(path)("Which?\nA or B")
    (line,) = path.read_text().splitlines()
    path.write_text("not JSON\n" + json.dumps(json.loads(line) | {"verdict": "2"}) + "\n")
    assert parse_verdict(HumanFile(path)("Which?\nA or B")) == "2"
