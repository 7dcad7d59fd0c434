"""A chat model for tests: a real server on this machine whose answers follow from what it is asked, and that fails as told.

Its taste is that of the history in the prompt, so accuracy is known: every word of a chosen response counts for it and every word
of a rejected one against it, over the past choices it is shown (or over `likes: word` in a summary), and of two responses the one
whose words count more wins. Where they count the same it says First: it is biased for a place, as models are. Asked to sum up a
user it names the word that counts most, and asked for a better response it adds that word.
"""

import json
import re
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple, Self

Body = dict[str, Any]
FENCED = re.compile(r"\[(?P<mark>[0-9a-f]{8}) begin (?P<name>[^\]\n]+)\]\n(?P<text>.*?)\n\[(?P=mark) end (?P=name)\]", re.DOTALL)
LINE = re.compile(r"(Verdict|Scores|Percent|Score) ([0-9a-f]{8}):")


class Status(NamedTuple):
    """An answer that is none."""

    code: int
    headers: dict[str, str]
    text: str


def parts(body: Body) -> dict[str, str]:
    """What stands between the lines of the fence, by its name. The mark is that of the instructions, as a model would read it."""
    system, user = body["messages"][0]["content"], body["messages"][-1]["content"]
    mark = re.search(r"\[([0-9a-f]{8}) begin \.\.\.\]", system)
    assert mark is not None, "the instructions name no mark"
    return {found["name"]: found["text"] for found in FENCED.finditer(user) if found["mark"] == mark[1]}


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def taste(body: Body) -> dict[str, int]:
    """How much each word counts, by the history in the prompt."""
    shown = parts(body)
    user = FENCED.sub("", body["messages"][-1]["content"])  # what the caller itself says, outside the fences
    out: dict[str, int] = {}
    for word in re.findall(r"likes: (\w+)", shown.get("summary", "")):
        out[word.lower()] = out.get(word.lower(), 0) + 1
    for name, text in shown.items():  # a writer of summaries is told which response was which
        sign = {"chosen": 1, "rejected": -1}.get(name.split()[0], 0)
        for word in words(text) if sign else ():
            out[word] = out.get(word, 0) + sign
    for number, answer in re.findall(r"^In choice (\d+) the user chose: (First|Second)\.$", user, re.MULTILINE):
        for side in ("first", "second"):
            for word in words(shown[f"{side} response of choice {number}"]):
                out[word] = out.get(word, 0) + (1 if side == answer.lower() else -1)
    return out


def worth(body: Body, response: str) -> int:
    counts = taste(body)
    return sum(counts.get(word, 0) for word in words(response))


def answered(body: Body) -> str:
    """What a faithful model says, in the shape that the instructions ask for."""
    lines = LINE.findall(body["messages"][0]["content"])
    shown = parts(body)
    if not lines:
        favourite = max(taste(body).items(), key=lambda item: item[1], default=("nothing", 0))[0]
        if "response" in shown:
            return f"{shown['response']} And {favourite}."
        heading = "##Summary\n" if "##Summary" in body["messages"][0]["content"] else ""
        return f"{heading}likes: {favourite}"
    kind, mark = lines[0]
    if kind == "Score":
        return f"A critique.\nScore {mark}: {min(max(5 + worth(body, shown['response']), 1), 10)}"
    first, second = worth(body, shown["first response"]), worth(body, shown["second response"])
    if kind == "Verdict":
        return f"Verdict {mark}: {'First' if first >= second else 'Second'}"
    if kind == "Scores":
        sides = [min(max(5 + value, 1), 10) for value in (first, second)]
        return f"The user counts words.\nScores {mark}: first {sides[0]}, second {sides[1]}"
    return f"The user counts words.\nPercent {mark}: {80 if first > second else 20 if first < second else 60}"


class JudgeServer:
    """`with JudgeServer() as server: Chat("stub", base_url=server.url)`.

    Attributes:
        seen: the body of every request, in the order in which they came.
        answer: what it says to a body; a `Status` instead of a text is a failure. `answered` by default.
        planned: failures for the requests to come, one after the other, before it answers again.
        change: what is done to the whole answer before it is sent; `raw`, to its bytes.
        delay: seconds before every answer.
        prompt_tokens, completion_tokens: what it counted in the answers that it sent: the words.
        busiest: the most requests there ever were at once.
    """

    def __init__(self) -> None:
        self.seen: list[Body] = []
        self.answer: Callable[[Body], str | Status] = answered
        self.planned: list[Status] = []
        self.change: Callable[[Body], Body] = lambda answer: answer
        self.raw: Callable[[bytes], bytes] = lambda text: text
        self.delay = 0.0
        self.prompt_tokens = self.completion_tokens = self.busy = self.busiest = 0
        self.lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server.lock:
                    server.seen.append(body)
                    server.busy += 1
                    server.busiest = max(server.busiest, server.busy)
                    out: str | Status | None = server.planned.pop(0) if server.planned else None
                time.sleep(server.delay)
                out = server.answer(body) if out is None else out
                status, headers, text = out if isinstance(out, Status) else (200, {}, server.packed(body, out))
                with server.lock:
                    server.busy -= 1
                try:
                    self.send_response(status)
                    payload = text if isinstance(text, bytes) else text.encode()
                    for name, value in {
                        "Content-Type": "application/json",
                        "Content-Length": str(len(payload)),
                        **headers,
                    }.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(payload)
                except OSError:
                    pass  # the other side was killed, which is what a test is about

            def log_message(self, *_: Any) -> None:
                """Say nothing."""

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"

    def packed(self, body: Body, text: str) -> bytes:
        """An answer in OpenAI's form, cut off where it is longer than `max_tokens` words."""
        kept = re.findall(r"\S+\s*", text)
        most = body.get("max_completion_tokens") or body["max_tokens"]
        finish = "stop" if len(kept) <= most else "length"
        text = "".join(kept[:most]) if finish == "length" else text
        usage = {
            "prompt_tokens": sum(len(m["content"].split()) for m in body["messages"]),
            "completion_tokens": len(text.split()),
        }
        with self.lock:
            self.prompt_tokens += usage["prompt_tokens"]
            self.completion_tokens += usage["completion_tokens"]
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
        return self.raw(json.dumps(self.change({"object": "chat.completion", "choices": [choice], "usage": usage})).encode())

    def __enter__(self) -> Self:
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()
