"""A server process with an OpenAI-compatible server's list of models, and no model: `python -m
tests.benchmarks.small_server [MODEL] [--flag ...]`.

--fail: says something and ends with code 3. --never-healthy. --stubborn: it and its child outlive
SIGTERM. Its child process's pid goes to the file of --child.
"""

import argparse
import json
import signal
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="nothing")
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--child", type=Path)
    parser.add_argument("--max-length", type=int, default=4096)
    for flag in ("--fail", "--never-healthy", "--stubborn"):
        parser.add_argument(flag, action="store_true")
    asked = parser.parse_args()
    if asked.stubborn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if asked.child:
        ignoring = (
            "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
            if asked.stubborn
            else ""
        )
        child = subprocess.Popen([sys.executable, "-c", f"{ignoring}import time; time.sleep(600)"])
        asked.child.write_text(str(child.pid))
    sys.stdout.write("looking for a GPU\n")
    sys.stdout.flush()
    if asked.fail:
        sys.stdout.write("there is no GPU\n")
        sys.exit(3)
    model = {
        "id": asked.model,
        "root": asked.model,
        "owned_by": "small",
        "max_model_len": asked.max_length,
    }
    answers = {"/v1/models": {"data": [model]}, "/version": {"version": "1.5"}} | (
        {} if asked.never_healthy else {"/health": {}}
    )

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = answers.get(self.path)
            self.send_response(200 if found is not None else 503)
            self.end_headers()
            self.wfile.write(json.dumps(found).encode())

        def log_message(self, *_: object) -> None:
            pass

    HTTPServer((asked.host, asked.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
