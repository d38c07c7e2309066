"""Serves the page of runs that go on, and what is new in their files."""

import contextlib
import json
import math
import secrets
import signal
import socket
import sys
import threading
import time
import zlib
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from typing import Any
from urllib.parse import parse_qs, urlsplit

from harness.errors import UserError
from reporting.charts import describe, thinned
from reporting.collection import Collection
from reporting.page import make_page, tables

PERIOD = 2  # seconds between two looks at the files
LOCAL = ("127.0.0.1", "localhost")
GONE = contextlib.suppress(OSError, UserError)  # files, or all runs: the page shows what it had


class Watched:
    """What the page shows, as it was at the last look."""

    def __init__(self, found: Collection):
        self.sections = {}
        self.update(found)

    def update(self, found: Collection) -> None:
        """Show what was found."""
        self.runs = found.runs
        self.data = describe(found)
        self.sections["tables"] = tables(found)

    def analyze(self, look: Callable[[], Collection]) -> None:
        """Whenever other runs have finished, compare them in a process of its own.

        It takes seconds, which would hold up the answers, and the memory of torch.
        """
        vars(sys.modules["__main__"]).setdefault("__spec__")  # IPython's has none; spawning asks
        context = get_context("spawn")
        context.Lock()  # starts multiprocessing's own process, which unblocks signals here
        if hasattr(signal, "pthread_sigmask"):  # Ctrl-C does not reach what this thread spawns
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        analyzed = None
        while self.runs:
            finished = [run.path for run in self.runs if run.metrics is not None]
            if finished != analyzed:
                analyzed = finished
                with GONE, context.Pool(1) as pool:
                    self.sections = self.sections | pool.apply(analysis_of, [look])
            time.sleep(PERIOD)

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


def analysis_of(look: Callable[[], Collection]) -> dict[str, str]:
    """The sections of the page that take seconds to make."""
    import torch

    from reporting.analysis import analyze

    torch.set_num_threads(1)  # the tensors are small: several threads would wait for each other
    return analyze(look())


def serve(found: Collection, look: Callable[..., Collection], host: str, port: int) -> None:
    """Serve the page of what was `found`, and of what another `look` finds, until Ctrl-C.

    Other machines need the token in the address that is printed. Raises `UserError` if the address
    can't be used.
    """
    watched = Watched(found)
    token = "" if host in LOCAL else secrets.token_urlsafe(16)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.is_allowed():
                self.answer("text/html; charset=utf-8", make_page("Runs", None, {}))

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
                allowed = str(self.headers["Host"]).split(":")[0] in LOCAL
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

    try:
        server = ThreadingHTTPServer((host, port), Handler)
    except (OSError, OverflowError) as error:
        raise UserError(f"--host {host} --port {port}: {error}") from None
    # A line for each request, or for each that is broken off, would flood the terminal.
    Handler.log_message = server.handle_error = lambda *_: None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    threading.Thread(target=watched.analyze, args=[look], daemon=True).start()
    name = socket.gethostname() if host == "0.0.0.0" else host
    query = f"?token={token}" if token else ""
    with contextlib.suppress(KeyboardInterrupt):
        print(f"The page: http://{name}:{server.server_port}/{query} (until Ctrl-C)", flush=True)
        while True:
            with GONE:
                for run in watched.runs:
                    run.log.read(run.config)
                watched.update(look(watched.runs))
            time.sleep(PERIOD)
    watched.runs = []  # ends the other thread: IPython lives on
    server.shutdown()
    server.server_close()
