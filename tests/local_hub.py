"""A server on this machine with the part of the Hugging Face Hub's interface that an upload of small files uses."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

REVISION = "0" * 40


class Hub(BaseHTTPRequestHandler):
    """Knows no file before it is uploaded. The repository `owner/name` lies in `folder/owner/name`."""

    def __init__(self, *arguments, folder: Path) -> None:
        self.folder = folder
        super().__init__(*arguments)

    def answer(self, content: dict, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        if self.path.startswith("/api/models/"):
            self.answer({"id": "/".join(self.path.split("/")[3:5]), "sha": REVISION, "siblings": [], "tags": []})
        else:
            self.answer({"error": "Entry not found"}, 404)

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        address, parts = f"http://{self.headers['Host']}", self.path.split("/")
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            self.answer({"url": f"{address}/{asked['organization']}/{asked['name']}"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif parts[5] == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            self.answer({"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]})
        else:
            self.commit(f"{parts[3]}/{parts[4]}", body)
            url = f"{address}/{parts[3]}/{parts[4]}/commit/{REVISION}"
            self.answer({"success": True, "commitOid": REVISION, "commitUrl": url, "hookOutput": ""})

    def commit(self, repository: str, body: bytes) -> None:
        (self.folder / repository).mkdir(parents=True, exist_ok=True)
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                file = line["value"]
                (self.folder / repository / file["path"]).write_bytes(base64.b64decode(file["content"]))

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def local_hub(folder: Path) -> Iterator[str]:
    """Its address, for HF_ENDPOINT."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, folder=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
