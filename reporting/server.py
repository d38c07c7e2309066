"""Serves the page of runs that go on, and what is new in their files."""

import contextlib
import json
import math
import secrets
import socket
import threading
import time
import zlib
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from harness.errors import UserError
from reporting.charts import describe, thinned
from reporting.collection import Collection
from reporting.page import analysis, make_page, sweeps, tables
from reporting.runs import RunFiles

PERIOD = 2  # seconds between two looks at the files
LOCAL = ("127.0.0.1", "localhost")


class Watched:
    """What the page shows, as it was at the last look."""

    def __init__(self):
        self.runs: list[RunFiles] = []
        self.data: dict[str, Any] = {}
        self.sections: dict[str, str] = {}
        self._analyzed: Any = None

    def look(self, collect: Callable[[list[RunFiles]], Collection]) -> None:
        """Read what is new. What takes seconds is made anew only if other runs have finished."""
        try:
            found = collect(self.runs)
        except UserError as error:
            self.sections["tables"] = tables(self.runs, {}, [str(error)])
            return
        self.runs = found.runs
        self.sections["tables"] = tables(found.runs, found.seed_groups, found.problems)
        self.data = describe(found.runs, found.seed_groups)
        finished = [run.path for run in found.runs if run.metrics is not None]
        if finished != self._analyzed:
            self._analyzed = finished
            self.sections["sweeps"] = sweeps(found.studies)
            self.sections["analysis"] = analysis(found.runs, found.seed_groups)
        for run in found.runs:
            run.log.read()

    def news(self, page: dict[str, Any]) -> dict[str, Any]:
        """What a page lacks: sections with another checksum, and points after its last ones.

        Or in place of these, the points of a range of steps, from one to the other.
        """
        sections = {}
        for name, content in self.sections.items():
            checksum = zlib.crc32(content.encode())
            if page["sections"].get(name) != checksum:
                sections[name] = [checksum, content]
        curves = {}
        for metric, last_steps in page["curves"].items():
            curves[metric] = {}
            for run in self.runs:
                column = run.columns.get(metric)
                if column is None:
                    continue
                low, high = page["range"] or (last_steps.get(str(run.path), -math.inf), math.inf)
                chosen = (low < column[:, 0]) & (column[:, 0] <= high)
                if chosen.any():
                    curves[metric][str(run.path)] = thinned(column[chosen])
        return {**self.data, "sections": sections, "curves": curves}


def serve(collect: Callable[[list[RunFiles]], Collection], host: str, port: int) -> None:
    """Serve the page of what `collect` finds until Ctrl-C.

    Other machines need the token in the address that is printed. Raises `UserError` if the address
    can't be used.
    """
    watched = Watched()
    token = "" if host in LOCAL else secrets.token_urlsafe(16)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.is_allowed():
                self.answer("text/html; charset=utf-8", make_page("Runs"))  # it asks for the rest

        def do_POST(self) -> None:
            if self.is_allowed():
                page = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self.answer("application/json", json.dumps(watched.news(page)))

        def is_allowed(self) -> bool:
            """Whether the token is right, or without one the name of this machine.

            A page from elsewhere could have its own name lead here.
            """
            if token:
                given = parse_qs(urlsplit(self.path).query).get("token", [""])[0]
                allowed = secrets.compare_digest(given.encode(), token.encode())
            else:
                allowed = urlsplit(f"//{self.headers['Host']}").hostname in LOCAL
            if not allowed:
                self.send_error(403, "the address that report.py printed has a token")
            return allowed

        def answer(self, kind: str, content: str) -> None:
            encoded = content.encode()
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(encoded)))
            self.end_headers()
            self.wfile.write(encoded)

        def log_message(self, *_: Any) -> None:
            """Nothing: a line per request would flood the terminal."""

    try:
        server = ThreadingHTTPServer((host, port), Handler)
    except (OSError, OverflowError) as error:
        raise UserError(f"--host {host} --port {port}: {error}") from None
    watched.look(collect)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    name = socket.gethostname() if host == "0.0.0.0" else host
    query = f"?token={token}" if token else ""
    print(f"\nThe page: http://{name}:{server.server_port}/{query} (until Ctrl-C)", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            time.sleep(PERIOD)
            watched.look(collect)
