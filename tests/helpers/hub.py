"""A small Hugging Face hub on loopback: the few routes by which its library lists and reads datasets."""

import hashlib
import json
import re
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, unquote, urlsplit


class Hub:
    """Serves the folders ``root/OWNER/NAME/REVISION`` as datasets."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.secret: dict[str, str] = {}  # OWNER/NAME: the token that may read it
        self.gated: set[str] = set()
        self.broken = False  # every request is answered by status 500
        self.away = False  # no request is answered
        self.change: Callable[[bytes], bytes] = bytes  # of what a listing says
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.away = True
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms for the rest of a packet

    def log_message(self, *_: object) -> None:
        """Silent."""

    def answer(self, status: int, body: bytes | list | dict = b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def dataset(self, name: str, revision: str) -> Path | None:
        """The folder of a revision, or None after an answer that says why not."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not (self.hub.root / name).is_dir() or self.hub.secret.get(name, token) != token:
            self.answer(404 if token else 401, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        elif name in self.hub.gated:
            self.answer(403, {"error": "Access is restricted"}, X_Error_Code="GatedRepo")
        elif not (self.hub.root / name / revision).is_dir():
            self.answer(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
        else:
            return self.hub.root / name / revision
        return None

    def entry(self, folder: Path, path: Path) -> dict:
        kind = "directory" if path.is_dir() else "file"
        name = path.relative_to(folder).as_posix()
        size = 0 if path.is_dir() else path.stat().st_size
        return {"type": kind, "path": name, "size": size, "oid": hashlib.sha1(name.encode()).hexdigest()}

    def do_GET(self) -> None:
        """Answer a request for facts, a listing or a file."""
        url = urlsplit(self.path)
        path = unquote(url.path)
        if self.hub.away:
            self.close_connection = True
        elif self.hub.broken:
            self.answer(500, {"error": "out of order"})
        elif found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            if self.dataset(found[1], found[2] or "main"):
                self.answer(200, {"id": found[1], "sha": "0" * 40, "siblings": [], "private": False, "tags": []})
        elif found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/tree/(refs/convert/[^/]+|[^/]+)/?(.*)", path):
            if folder := self.dataset(found[1], found[2]):
                below = folder / found[3]
                if not below.is_dir():
                    self.answer(404, {"error": "not found"}, X_Error_Code="EntryNotFound")
                    return
                recursive = parse_qs(url.query).get("recursive", ["false"])[0].lower() in ("true", "1")
                paths = sorted(below.rglob("*") if recursive else below.iterdir())
                listed = json.dumps([self.entry(folder, path) for path in paths]).encode()
                self.answer(200, self.hub.change(listed), Content_Type="application/json")
        elif found := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/(refs/convert/[^/]+|[^/]+)/(.+)", path):
            if folder := self.dataset(found[1], found[2]):
                self.file(folder / found[3])
        else:
            self.answer(400, {"error": f"no such route: {path}"})

    do_HEAD = do_GET

    def file(self, path: Path) -> None:
        if not path.is_file():
            self.answer(404, {"error": "not found"}, X_Error_Code="EntryNotFound")
            return
        data = path.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked:
            first, last = int(asked[1]), min(int(asked[2]), len(data) - 1)
            self.answer(206, data[first : last + 1], Content_Range=f"bytes {first}-{last}/{len(data)}", ETag='"a"')
        else:
            self.answer(200, data, ETag='"a"')
