"""A server process that answers as OpenAI's API has it, without a model, and wrongly where told:
`python -m tests.benchmarks.smoke_server MODEL [--says WHAT] [--logprob X] [--flag ...]`.

Its tokens are words. --no-chat: no chat template. --thinks: the answer is all thought.
--no-echo: completions without their prompt.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SAYS: dict[str, Callable[[str], str]] = {
    "sense": lambda prompt: f"An answer to: {prompt}",
    "loops": lambda prompt: f"Well, {prompt[:20]} " + "the end of the end of " * 8,
    "marks": lambda prompt: "!" * 96,
    "nothing": lambda prompt: " \n",
    "garbage": lambda prompt: f"{len(prompt)}\ufffd\ufffd\x00\x1b[31m",
    "the same": lambda prompt: "I am a language model.",
}


def scored(text: str, logprob: float | None) -> dict[str, Any]:
    """Log-probabilities of a text of words, as completions have them."""
    tokens = re.findall(r"\S+\s*|\s+", text)
    values = [None, *[logprob] * (len(tokens) - 1)]
    top = [None, *({token: logprob} for token in tokens[1:])]
    return {"tokens": tokens, "token_logprobs": values, "top_logprobs": top}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="+")
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--says", choices=SAYS, default="sense")
    parser.add_argument("--logprob", default="-0.5", help="a number, NaN, or null")
    parser.add_argument("--breaks", choices=["answers", "scores", "floats", "json", "choices"])
    for flag in ("--no-chat", "--thinks", "--no-echo"):
        parser.add_argument(flag, action="store_true")
    asked = parser.parse_args()
    logprob = json.loads(asked.logprob)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/v1/models":
                self.send(200, {"data": [{"id": m, "root": f"/at/{m}"} for m in asked.models]})
            else:
                self.send(200 if self.path == "/health" else 404, {})

        def do_POST(self) -> None:
            question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert question["model"] in asked.models and question["temperature"] == 0
            is_chat = self.path == "/v1/chat/completions"
            is_score = bool(question.get("echo"))
            if is_chat and asked.no_chat:
                self.send(400, {"message": "no chat template"})
            elif asked.breaks == ("scores" if is_score else "answers"):
                self.send(500, {"message": "the engine is dead"})
            elif is_score and asked.breaks == "floats":
                self.send(400, {"message": "Out of range float values are not JSON compliant"})
            elif asked.breaks == "json":
                self.send(200, "{")
            elif asked.breaks == "choices":
                self.send(200, {"error": "later"})
            elif is_chat:
                said = SAYS[asked.says](question["messages"][-1]["content"])
                message = (
                    {"content": None, "reasoning_content": said}
                    if asked.thinks
                    else {"content": said}
                )
                self.send(200, {"choices": [{"message": message}]})
            else:
                said = SAYS[asked.says](question["prompt"].strip())
                echoed = question["prompt"] if is_score and not asked.no_echo else ""
                scores = scored(f"{echoed} {said.split()[0] if said.split() else ''}", logprob)
                self.send(200, {"choices": [{"text": said, "logprobs": scores}]})

        def send(self, code: int, what: object) -> None:
            body = what if isinstance(what, str) else json.dumps(what)
            self.send_response(code)
            self.send_header("Content-Length", str(len(body.encode())))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None:
            pass

    sys.stdout.write("ready\n")
    ThreadingHTTPServer((asked.host, asked.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
