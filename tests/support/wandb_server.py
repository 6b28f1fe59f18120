"""The part of W&B's server that an online run talks to, on this machine: it keeps what it is sent."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server(ThreadingHTTPServer):
    """Attributes: ``runs``, what each id was sent; ``forgetful``: runs that end are deleted, and refused (409)."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """wandb drops its connections when it ends."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.runs: dict[str, dict[str, Any]] = {}
        self.forgetful = False

    def environment(self) -> dict[str, str]:
        """Return the variables that send wandb here."""
        address = f"http://127.0.0.1:{self.server_port}"
        return {"WANDB_BASE_URL": address, "WANDB_API_KEY": "0" * 40, "WANDB_INIT_TIMEOUT": "60"}

    def summary(self, run_id: str) -> dict[str, Any]:
        """Return the last summary that a run sent."""
        return json.loads(self.runs[run_id]["files"]["wandb-summary.json"][0])


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        stream = re.search(r"/files/([^/]+)/([^/]+)/([^/]+)/file_stream", self.path)
        if stream:
            run, sent = self.server.runs[stream[3]], json.loads(body)
            if "exitcode" in sent:
                run["exitcode"] = sent["exitcode"]
            for name, lines in sent.get("files", {}).items():
                run["files"].setdefault(name, {}).update(enumerate(lines["content"], lines["offset"]))
            return self.answer({})
        query = json.loads(body)
        if self.path == "/graphql":
            return self.graphql(query["query"], query.get("variables") or {})
        self.answer({})

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer({})

    def graphql(self, query: str, variables: dict[str, Any]) -> None:
        name = variables.get("name")
        if "upsertBucket" in query and name is not None:
            if self.server.forgetful and "exitcode" in self.server.runs.get(name, ()):
                said = f"run me/{variables['project']}/{name} was previously created and deleted; try a new run name"
                return self.answer({"errors": [{"message": said}]}, 409)
            run = self.server.runs.setdefault(name, {"files": {}, "sent": {}})
            run["sent"].update({key: value for key, value in variables.items() if value is not None})
            project = {"name": variables["project"], "entity": {"name": variables.get("entity") or "me"}}
            bucket = {"id": name, "name": name, "displayName": variables.get("displayName"), "config": "{}"}
            bucket |= {"sweepName": variables.get("sweep"), "project": project, "historyLineCount": 0}
            return self.answer({"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}})
        if "createRunFiles" in query:
            address = f"http://127.0.0.1:{self.server.server_port}/up"
            files = [{"name": file, "uploadUrl": address} for file in variables["files"]]
            return self.answer({"data": {"createRunFiles": {"runID": "x", "uploadHeaders": [], "files": files}}})
        viewer = {"id": "me", "entity": "me", "username": "me", "email": "me@x", "flags": "{}", "teams": {"edges": []}}
        self.answer({"data": {"viewer": viewer, "serverInfo": {"features": []}, "model": None, "project": None}})

    def answer(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def wandb_server() -> Iterator[Server]:
    """A server for the length of a block."""
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
