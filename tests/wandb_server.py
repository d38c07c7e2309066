"""A local W&B server for tests: it answers the SDK and the CLI, records what they send, and fails on demand."""

import contextlib
import dataclasses
import json
import re
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import quote, unquote

API_KEY = "f" * 40
MANIFEST = "wandb_manifest.json"  # where an artifact's manifest stands among its files


@dataclasses.dataclass
class Artifact:
    """A version of an artifact, and what was uploaded of it."""

    id: str
    kind: str
    place: tuple[str, str, str]  # entity, project and name
    version: int
    digest: str
    aliases: list[str]
    state: str = "PENDING"
    files: dict[str, bytes] = dataclasses.field(default_factory=dict)

    @property
    def manifest(self) -> dict[str, Any]:
        return json.loads(self.files[MANIFEST])


class WandbServer(ThreadingHTTPServer):
    """`history[run]` maps line numbers to rows; `mode` is "ok", "error" (500), "forbidden" (401) or "hang"."""

    daemon_threads = True
    request_queue_size = (
        1000  # W&B opens dozens of connections at once, and tries again seconds after a refused one
    )

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.mode = "ok"
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.operations: list[str] = []  # GraphQL operation names, in order
        self.history: dict[str, dict[int, dict]] = {}
        self.runs: dict[
            str, dict[str, Any]
        ] = {}  # config, summary, states and exit code, by run id
        self.files: dict[str, int] = {}  # bytes received, by path
        self.artifacts: dict[str, Artifact] = {}  # by id, in order
        self.used: list[tuple[str, str]] = []  # run id and artifact id: who used what
        self.stopped: set[str] = set()  # runs to stop
        self.sweep_file = ""  # as sent by `wandb sweep`
        self.trials: list[dict[str, Any]] = []  # parameters to hand to agents, in order
        self.to_stop: dict[
            str, int
        ] = {}  # number of rows at which the sweep stops a run, by run id
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

    def find_artifact(self, entity: str, project: str, called: str) -> Artifact | None:
        """The version called NAME:ALIAS or NAME:v0 in a project."""
        name, _, alias = called.partition(":")
        for artifact in self.artifacts.values():
            known = artifact.place == (entity, project, name) and artifact.state == "COMMITTED"
            if known and alias in (*artifact.aliases, f"v{artifact.version}"):
                return artifact
        return None

    def run(self, run_id: str) -> dict[str, Any]:
        return self.runs.setdefault(
            run_id, {"config": {}, "summary": {}, "states": [], "exit": None, "tags": []}
        )


class Handler(BaseHTTPRequestHandler):
    server: WandbServer
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.server.connections.append(self.connection)

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, content: Any, status: int = 200) -> None:
        """Answer with bytes as they are, or with JSON."""
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
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
        if self.fails():
            return
        if not self.path.startswith("/artifact"):
            return self.answer({})
        artifact, name = self.artifact_file() or (
            None,
            None,
        )  # after a 404, the SDK tries /artifactsV2/
        found = artifact and name in artifact.files
        self.answer(artifact.files[name] if found else {}, 200 if found else 404)

    def do_PUT(self) -> None:
        content = self.body()
        if not self.fails():
            with self.server.lock:
                self.server.files[self.path] = len(content)
                if file := self.artifact_file():
                    artifact, name = file
                    artifact.files[name] = content
            self.answer({})

    def artifact_file(self) -> tuple[Artifact, str] | None:
        """The artifact and the name of the file that the path /artifact/ID/NAME stands for."""
        match = re.fullmatch("/artifact/(.+?)/(.+)", self.path)
        return match and (self.server.artifacts[match[1]], unquote(match[2]))

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
            name = (
                request.get("operationName") or re.search(r"(?:query|mutation)\s+(\w+)", query)[1]
            )
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
                    lines |= {
                        chunk["offset"] + i: json.loads(line)
                        for i, line in enumerate(chunk["content"])
                    }
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
            return {
                "model": {
                    "id": "1",
                    "name": variables["project"],
                    "entity": entity,
                    "bucket": bucket,
                }
            }
        if name == "UpsertBucket":
            run_id = variables["name"]
            with server.lock:
                known = run_id in server.runs
                run = server.run(run_id)
                run["config"] |= json.loads(variables.get("config") or "{}")
                run["tags"] = variables.get("tags") or run["tags"]
                run["group"] = variables.get("groupName")
            project = {"id": "1", "name": variables.get("project"), "entity": entity}
            bucket = self.bucket(run_id) | {
                "displayName": run_id,
                "sweepName": variables.get("sweep"),
            }
            return {
                "upsertBucket": {
                    "bucket": bucket | {"description": "", "project": project},
                    "inserted": not known,
                }
            }
        if name == "CreateRunFiles":
            files = [
                {"name": n, "uploadUrl": f"{server.url}/upload/{n}"} for n in variables["files"]
            ]
            return {
                "createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": files}
            }
        if name == "RunStoppedStatus":
            return {"project": {"run": {"stopped": variables["runId"] in server.stopped}}}
        if name == "UpsertSweep":
            server.sweep_file = variables["config"]
            project = {"id": "1", "name": variables.get("projectName"), "entity": entity}
            return {
                "upsertSweep": {
                    "sweep": {"name": "sweep1", "project": project},
                    "configValidationWarnings": [],
                }
            }
        if name == "SweepWithRuns":
            return {"project": {"sweep": {"id": "1", "name": "sweep1", "config": server.sweep_file,
                                          "runs": {"edges": []}}}}  # fmt: skip
        if name == "CreateAgent":
            return {"createAgent": {"agent": {"id": "agent1"}}}
        if name == "Heartbeat":
            commands = self.commands(list(json.loads(variables["runState"])))
            return {"agentHeartbeat": {"agent": {"id": "agent1"}, "commands": json.dumps(commands)}}
        if "rtifact" in name:
            return self.artifact_graphql(name, variables)
        return {"project": None}

    def artifact_graphql(self, name: str, given: dict[str, Any]) -> dict[str, Any]:
        """An artifact is created, its files and then its manifest are uploaded, and it is committed.

        To use one, the SDK looks it up by its name, tells which run uses it, and fetches its manifest and its files.
        """
        server = self.server
        if name == "CreateArtifact":
            return {"createArtifact": {"artifact": self.create(given["input"])}}
        if name == "CreateArtifactFiles":
            files = [
                {"storagePath": file["name"], "artifact": {"id": file["artifactID"]}, "uploadMultipartUrls": None,
                 "uploadUrl": self.url(file["artifactID"], file["name"]), "uploadHeaders": []}
                for file in given["input"]["artifactFiles"]
            ]  # fmt: skip
            return {"createArtifactFiles": {"files": {"edges": [{"node": file} for file in files]}}}
        if name == "CreateArtifactManifest":
            id = given["artifactID"]
            file = {"id": id, "uploadUrl": self.url(id, MANIFEST), "uploadHeaders": []}
            return {"createArtifactManifest": {"artifactManifest": {"id": id, "file": file}}}
        if name == "CommitArtifact":
            return {
                "commitArtifact": {"artifact": self.commit(server.artifacts[given["artifactID"]])}
            }
        if name == "ArtifactMembershipByName":
            if not any(
                (given["entity"], given["project"]) == a.place[:2]
                for a in server.artifacts.values()
            ):
                return {"project": None}
            artifact = server.find_artifact(given["entity"], given["project"], given["name"])
            return {
                "project": {"artifactCollectionMembership": artifact and self.membership(artifact)}
            }
        if name == "UseArtifact":
            server.used.append((given["runName"], given["artifactID"]))
            return {"useArtifact": {"artifact": {"id": given["artifactID"]}}}
        if name == "FetchArtifactManifest":
            return {
                "artifact": {
                    "currentManifest": {"file": {"directUrl": self.url(given["id"], MANIFEST)}}
                }
            }
        if name == "GetArtifactMembershipFileUrls":
            called = f"{given['collection']}:{given['alias']}"
            artifact = server.find_artifact(given["entity"], given["project"], called)
            files = [
                {
                    "node": {
                        "__typename": "File",
                        "name": name,
                        "directUrl": self.url(artifact.id, name),
                    }
                }
                for name in artifact.manifest["contents"]
            ]
            page = {
                "files": {"pageInfo": {"endCursor": None, "hasNextPage": False}, "edges": files}
            }
            return {
                "project": {
                    "artifactCollection": {
                        "__typename": "ArtifactSequence",
                        "artifactMembership": page,
                    }
                }
            }
        return {"project": None}

    def create(self, given: dict[str, Any]) -> dict[str, Any]:
        """A new version, or the one of the same content."""
        server = self.server
        place = (given["entityName"], given["projectName"], given["artifactCollectionName"])
        with server.lock:
            versions = [
                artifact for artifact in server.artifacts.values() if artifact.place == place
            ]
            same = [artifact for artifact in versions if artifact.digest == given["digest"]]
            id, aliases = (
                f"artifact{len(server.artifacts)}",
                [alias["alias"] for alias in given["aliases"]],
            )
            new = Artifact(
                id, given["artifactTypeName"], place, len(versions), given["digest"], aliases
            )
            artifact = same[0] if same else new
            server.artifacts[artifact.id] = artifact
        latest = {"latestArtifact": {"id": versions[-1].id} if versions else None}
        return {"id": artifact.id, "state": artifact.state, "artifactSequence": latest}

    def commit(self, artifact: Artifact) -> dict[str, Any]:
        """The version takes its aliases from those before."""
        with self.server.lock:
            for other in self.server.artifacts.values():
                if other.place == artifact.place and other is not artifact:
                    other.aliases = [
                        alias for alias in other.aliases if alias not in artifact.aliases
                    ]
            artifact.state = "COMMITTED"
        return {"id": artifact.id, "digest": artifact.digest}

    def membership(self, artifact: Artifact) -> dict[str, Any]:
        """What the SDK asks of a version."""
        entity, project, collection = artifact.place
        place = {"id": "1", "internalId": "1", "name": project, "entity": {"name": entity}}
        sequence = {"__typename": "ArtifactSequence", "name": collection, "project": place}
        version = {
            "id": artifact.id,
            "versionIndex": artifact.version,
            "createdAt": "2025-01-01T00:00:00",
        }
        content = {
            "__typename": "Artifact", "artifactSequence": sequence, "artifactType": {"name": artifact.kind},
            "state": artifact.state, "digest": artifact.digest, "size": sum(map(len, artifact.files.values())),
            "fileCount": len(artifact.files) - 1, "tags": [], "ttlDurationSeconds": -2, "ttlIsInherited": True,
            **dict.fromkeys(("description", "metadata", "historyStep", "commitHash", "updatedAt")),
        }  # fmt: skip
        aliases = [
            {"__typename": "ArtifactAlias", "id": alias, "alias": alias}
            for alias in artifact.aliases
        ]
        return version | {"__typename": "ArtifactCollectionMembership", "aliases": aliases,
                          "artifactCollection": sequence, "artifact": version | content}  # fmt: skip

    def url(self, artifact_id: str, file: str) -> str:
        """Where a file of an artifact is uploaded and downloaded."""
        return f"{self.server.url}/artifact/{artifact_id}/{quote(file)}"

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
        return [
            {"type": "run", "run_id": run_id, "program": program and program[1], "args": values}
        ]

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
