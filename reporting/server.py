"""Serves the page of runs that go on, and what is new in their files."""

import contextlib
import json
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

from harness.errors import UserError
from reporting.charts import curves, describe
from reporting.page import make_page, show_tables
from reporting.runs import Collection

PERIOD = 2  # seconds between two looks at the files
LOCAL = ("127.0.0.1", "localhost")
GONE = contextlib.suppress(OSError, UserError)  # files, or all runs: the page shows what it had


def news(found: Collection, analysis: dict[str, str], page: dict[str, Any]) -> dict[str, Any]:
    """What a page lacks: sections with another checksum, and the rows that it asks for."""
    sections = {}
    for name, content in {"tables": show_tables(found), **analysis}.items():
        checksum = zlib.crc32(content.encode())
        if page["sections"].get(name) != checksum:
            sections[name] = [checksum, content]
    return {
        **describe(found),
        "sections": sections,
        "curves": curves(found.runs, page["curves"]),
    }


def analysis_of(look: Callable[[], Collection]) -> dict[str, str]:
    """The sections of the page that take seconds to make."""
    from reporting.analysis import analyze

    return analyze(look())


def serve(found: Collection, look: Callable[..., Collection], host: str, port: int) -> None:
    """Serve the page of what was `found`, and of what another `look` finds, until Ctrl-C.

    Other machines need the token in the address that is printed. Raises `UserError` if the address
    can't be used.
    """
    analysis = {}  # sections of the page
    query = "" if host in LOCAL else f"?token={secrets.token_urlsafe(16)}"

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            """Send the page, or to a POST what is new, to those who know the token.

            Without a token, the request must name this machine: the name of another site could
            resolve to it.
            """
            allowed = str(self.headers["Host"]).split(":")[0] in LOCAL
            if query:
                allowed = secrets.compare_digest(self.path.encode(), f"/{query}".encode())
            if not allowed:
                self.send_error(403, "the address that report.py printed has a token")
                return
            if self.command == "POST":
                page = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                kind = "application/json"
                content = json.dumps(news(found, analysis, page))
            else:
                kind = "text/html; charset=utf-8"
                content = make_page(len(found.runs), None)
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(content.encode())

        do_POST = do_GET

    def compare() -> None:
        """Whenever a run has begun or finished, compare them in a process of its own.

        It takes seconds, which would hold up the answers, and the memory of torch.
        """
        vars(sys.modules["__main__"]).setdefault("__spec__")  # IPython's has none; spawning asks
        context = get_context("spawn")
        context.Lock()  # starts multiprocessing's own process, which unblocks signals here
        if hasattr(signal, "pthread_sigmask"):  # Ctrl-C does not reach what this thread spawns
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        analyzed = None
        while found.runs:
            states = [(run.path, run.metrics is None) for run in found.runs]
            if states != analyzed:
                analyzed = states
                with GONE, context.Pool(1) as pool:
                    analysis.update(pool.apply(analysis_of, [look]))
            time.sleep(PERIOD)

    try:
        server = ThreadingHTTPServer((host, port), Handler)
    except (OSError, OverflowError) as error:
        raise UserError(f"--host {host} --port {port}: {error}") from None
    # A line for each request, or for each that is broken off, would flood the terminal.
    Handler.log_message = server.handle_error = lambda *_: None
    for target in (server.serve_forever, compare):
        threading.Thread(target=target, daemon=True).start()
    name = socket.gethostname() if host == "0.0.0.0" else host
    with contextlib.suppress(KeyboardInterrupt):
        print(f"The page: http://{name}:{server.server_port}/{query} (until Ctrl-C)", flush=True)
        while True:
            with GONE:
                found = look(found.runs)
                for run in found.runs:
                    run.log.read(run.config)
            time.sleep(PERIOD)
    found.runs = []  # ends the other thread: IPython lives on
    server.shutdown()
    server.server_close()
