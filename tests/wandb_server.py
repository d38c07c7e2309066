"""A local W&B server for tests: it answers the SDK and the CLI, records what they send, and fails on demand."""

import contextlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

API_KEY = "f" * 40


class WandbServer(ThreadingHTTPServer):
    """`history[run]` maps line numbers to rows; `mode` is "ok", "error" (500), "forbidden" (401) or "hang"."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.mode = "ok"
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.operations: list[str] = []  # GraphQL operation names, in order
        self.history: dict[str, dict[int, dict]] = {}
        self.runs: dict[str, dict[str, Any]] = {}  # config, summary, states and exit code, by run id
        self.files: dict[str, int] = {}  # bytes received, by path
        self.artifacts: list[str] = []  # names, in order
        self.stopped: set[str] = set()  # runs to stop
        self.sweep_file = ""  # as sent by `wandb sweep`
        self.trials: list[dict[str, Any]] = []  # parameters to hand to agents, in order
        self.to_stop: dict[str, int] = {}  # number of rows at which the sweep stops a run, by run id
        self.released = threading.Event()  # set to release hanging requests
        self.connections: list[socket.socket] = []
        self.lock = threading.Lock()

    def rows(self, run_id: str) -> list[dict]:
        """The history of a run, in line order."""
        return [row for _, row in sorted(self.history.get(run_id, {}).items())]

    def environment(self) -> dict[str, str]:
        """Variables that point W&B to this server."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": API_KEY, "WANDB_MODE": "online"}

    def die(self) -> None:
        """Stop listening and drop every open connection."""
        self.shutdown()
        self.socket.close()
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # killed clients are expected

    def run(self, run_id: str) -> dict[str, Any]:
        return self.runs.setdefault(run_id, {"config": {}, "summary": {}, "states": [], "exit": None, "tags": []})


class Handler(BaseHTTPRequestHandler):
    server: WandbServer
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.server.connections.append(self.connection)

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, content: Any, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def fails(self) -> bool:
        """Fail the request as `mode` says; return whether it failed."""
        mode = self.server.mode
        if mode == "hang":
            self.server.released.wait()
            self.close_connection = True
        elif mode == "error":
            self.answer({"error": "internal error"}, 500)
        elif mode == "forbidden":
            self.answer({"errors": [{"message": "permission denied"}]}, 401)
        return mode != "ok"

    def do_GET(self) -> None:
        if not self.fails():
            self.answer({})

    def do_PUT(self) -> None:
        content = self.body()
        if not self.fails():
            with self.server.lock:
                self.server.files[self.path] = len(content)
            self.answer({})

    def do_POST(self) -> None:
        body = self.body()
        if self.fails():
            return
        if not self.path.startswith(("/files/", "/graphql")):
            return self.answer({})  # usage statistics
        request = json.loads(body)
        if match := re.fullmatch(r"/files/(.+)/(.+)/(.+)/file_stream", self.path):
            self.answer(self.file_stream(match[3], request))
        else:
            query, variables = request.get("query", ""), request.get("variables") or {}
            name = request.get("operationName") or re.search(r"(?:query|mutation)\s+(\w+)", query)[1]
            with self.server.lock:
                self.server.operations.append(name)
            self.answer({"data": self.graphql(name, variables)})

    def file_stream(self, run_id: str, request: dict[str, Any]) -> dict[str, Any]:
        """Chunks carry the number of their first line; a line sent again overwrites the old one."""
        with self.server.lock:
            run = self.server.run(run_id)
            for name, chunk in request.get("files", {}).items():
                if name == "wandb-history.jsonl":
                    lines = self.server.history.setdefault(run_id, {})
                    lines |= {chunk["offset"] + i: json.loads(line) for i, line in enumerate(chunk["content"])}
                elif name == "wandb-summary.json":
                    run["summary"] = json.loads(chunk["content"][-1])
            if request.get("preempting"):
                run["states"].append("preempting")
            if request.get("complete"):
                run["exit"] = request["exitcode"]
                run["states"].append("complete")
            return {"stopped": run_id in self.server.stopped}

    def graphql(self, name: str, variables: dict[str, Any]) -> dict[str, Any]:
        server, entity = self.server, {"id": "1", "name": "tester"}
        if name == "Viewer":
            return {"viewer": {"id": "1", "entity": "tester", "username": "tester", "flags": "{}", "email": "",
                               "admin": False, "teams": {"edges": []}}}  # fmt: skip
        if name == "ServerFeaturesQuery":
            return {"serverInfo": {"features": []}}
        if name == "RunResumeStatus":
            bucket = self.bucket(variables["name"])
            return {"model": {"id": "1", "name": variables["project"], "entity": entity, "bucket": bucket}}
        if name == "UpsertBucket":
            run_id = variables["name"]
            with server.lock:
                known = run_id in server.runs
                run = server.run(run_id)
                run["config"] |= json.loads(variables.get("config") or "{}")
                run["tags"] = variables.get("tags") or run["tags"]
                run["group"] = variables.get("groupName")
            project = {"id": "1", "name": variables.get("project"), "entity": entity}
            bucket = self.bucket(run_id) | {"displayName": run_id, "sweepName": variables.get("sweep")}
            return {"upsertBucket": {"bucket": bucket | {"description": "", "project": project}, "inserted": not known}}
        if name == "CreateRunFiles":
            files = [{"name": n, "uploadUrl": f"{server.url}/upload/{n}"} for n in variables["files"]]
            return {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": files}}
        if name == "RunStoppedStatus":
            return {"project": {"run": {"stopped": variables["runId"] in server.stopped}}}
        if name == "UpsertSweep":
            server.sweep_file = variables["config"]
            project = {"id": "1", "name": variables.get("projectName"), "entity": entity}
            return {"upsertSweep": {"sweep": {"name": "sweep1", "project": project}, "configValidationWarnings": []}}
        if name == "SweepWithRuns":
            return {"project": {"sweep": {"id": "1", "name": "sweep1", "config": server.sweep_file,
                                          "runs": {"edges": []}}}}  # fmt: skip
        if name == "CreateAgent":
            return {"createAgent": {"agent": {"id": "agent1"}}}
        if name == "Heartbeat":
            commands = self.commands(list(json.loads(variables["runState"])))
            return {"agentHeartbeat": {"agent": {"id": "agent1"}, "commands": json.dumps(commands)}}
        if name == "CreateArtifact":  # claims that it exists already, so nothing is uploaded
            collection = variables["input"]["artifactCollectionName"]
            server.artifacts.append(collection)
            sequence = {"id": collection, "latestArtifact": {"id": collection, "versionIndex": 0}}
            return {
                "createArtifact": {"artifact": {"id": collection, "state": "COMMITTED", "artifactSequence": sequence}}
            }
        return {"project": None}

    def commands(self, running: list[str]) -> list[dict[str, Any]]:
        """The sweep's commands for an agent: stop a run, start the next one, or exit."""
        server = self.server
        for run_id in running:
            if len(server.rows(run_id)) >= server.to_stop.get(run_id, 10**9):
                return [{"type": "stop", "run_id": run_id}]
        if running:
            return []
        if not server.trials:
            return [{"type": "exit"}]
        parameters, run_id = server.trials.pop(0), f"run{len(server.trials)}"
        values = {name: {"value": value} for name, value in parameters.items()}
        program = re.search(r"program: (.*)", server.sweep_file)
        return [{"type": "run", "run_id": run_id, "program": program and program[1], "args": values}]

    def bucket(self, run_id: str) -> dict[str, Any] | None:
        if run_id not in self.server.runs:
            return None
        run, rows = self.server.run(run_id), self.server.rows(run_id)
        return {
            "id": run_id, "name": run_id, "historyLineCount": len(rows), "eventsLineCount": 0, "logLineCount": 0,
            "historyTail": json.dumps([json.dumps(row) for row in rows[-1:]]), "eventsTail": "[]",
            "summaryMetrics": json.dumps(run["summary"]), "config": json.dumps(run["config"]), "tags": run["tags"],
            "wandbConfig": json.dumps({"t": 1}),
        }  # fmt: skip


@contextlib.contextmanager
def serving() -> Iterator[WandbServer]:
    """Run a server until the block ends."""
    server = WandbServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()
        thread.join()
