"""A Hugging Face hub on this machine: models and data sets under names like the real ones', each a list of revisions.

``huggingface_hub``, ``datasets`` and ``transformers`` are the real ones. They read its environment when they are imported, so
``conftest.py`` sets it before. Without a revision they take the newest one.
"""

import atexit
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, unquote

REPOSITORY = r"/(?:api/)?(?:(datasets|models)/)?([^/]+/[^/]+)"  # what is downloaded of a model has no prefix
PATH = re.compile(rf"{REPOSITORY}(?:/(revision|tree|paths-info|resolve)/([^/]+)(?:/(.*))?)?")
TIME = "2026-01-01T00:00:00.000Z"


class StandInHub:
    """A server, which has its address from the beginning and answers from ``with`` to its end."""

    def __init__(self):
        self._repositories = {}  # by kind and id: its revisions, the newest last, by hash: its files' contents by path
        handler = type("Handler", (_Handler,), {"repositories": self._repositories})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler, bind_and_activate=False)
        self._server.server_bind()
        atexit.register(self._server.server_close)

    def __enter__(self):
        self._server.server_activate()
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def environment(self, cache):
        """The environment of a process that knows this hub alone, and a folder for what it downloads and prepares."""
        ours = {"HF_ENDPOINT": f"http://127.0.0.1:{self._server.server_port}", "NO_PROXY": "127.0.0.1"}
        folders = {"HF_HOME": cache, "HF_HUB_CACHE": f"{cache}/hub", "HF_DATASETS_CACHE": f"{cache}/datasets"}
        return ours | folders | {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}

    def add(self, kind, name, files):
        """Adds a revision of ``datasets`` or ``models`` and returns its hash; files: contents by path, or a folder."""
        if isinstance(files, Path):
            files = {path.relative_to(files).as_posix(): path.read_bytes() for path in files.rglob("*") if path.is_file()}
        revision = _hash(repr(sorted(files.items())).encode())
        self._repositories.setdefault((kind, name), {})[revision] = files
        return revision


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # a connection is used for many requests
    disable_nagle_algorithm = True  # else the client's acknowledgement of the headers is waited for: 40 ms a request

    def do_GET(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        path, _, query = self.path.partition("?")
        if (found := PATH.fullmatch(path)) is None:
            return self._send_json({}) if path == "/" else self._refuse("RepoNotFound")
        kind, name, endpoint, revision, place = (part and unquote(part) for part in found.groups())
        if (revisions := self.repositories.get((kind or "models", name))) is None:
            return self._refuse("RepoNotFound")
        revision = next(reversed(revisions)) if revision in (None, "main") else revision
        if revision not in revisions:
            return self._refuse("RevisionNotFound")
        files = revisions[revision]
        if endpoint == "resolve":
            return self._send_file(files.get(place), revision)
        if endpoint == "tree":
            is_recursive = parse_qs(query).get("recursive") in (["true"], ["True"], ["1"])
            inside = [entry for entry in _entries(files) if _is_inside(entry["path"], place, is_recursive=is_recursive)]
            return self._send_json(inside) if inside else self._refuse("EntryNotFound")
        if endpoint == "paths-info":
            requested = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
            return self._send_json([entry for entry in _entries(files) if entry["path"] in requested])
        about = {"id": name, "sha": revision, "private": False, "gated": False, "disabled": False, "tags": []}
        return self._send_json(
            about | {"lastModified": TIME, "createdAt": TIME, "siblings": [{"rfilename": path} for path in files]}
        )

    do_HEAD = do_POST = do_GET

    def _send_file(self, content, revision):
        if content is None:
            return self._refuse("EntryNotFound")
        headers = {"ETag": f'"{_hash(content)}"', "X-Repo-Commit": revision, "Accept-Ranges": "bytes"}
        if (part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))) is None:
            return self._send(content, 200, headers)
        first, last = int(part[1]), min(int(part[2] or len(content)), len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        return self._send(content[first : last + 1], 206, headers)

    def _refuse(self, code):
        self._send(json.dumps({"error": code}).encode(), 404, {"X-Error-Code": code})

    def _send_json(self, value):
        self._send(json.dumps(value).encode(), 200, {})

    def _send(self, content, status, headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_):
        """Nothing: the server's lines would be among the test's."""


def _hash(content):
    return hashlib.sha1(content).hexdigest()


def _entries(files):
    """What the hub says of each file, and of each folder that has one."""
    folders = {str(folder) for path in files for folder in PurePosixPath(path).parents} - {"."}
    entries = [{"type": "directory", "path": path, "size": 0, "oid": _hash(path.encode())} for path in sorted(folders)]
    return entries + [{"type": "file", "path": path, "size": len(one), "oid": _hash(one)} for path, one in files.items()]


def _is_inside(path, folder, *, is_recursive):
    parents = [str(parent) for parent in PurePosixPath(path).parents]
    return (folder or ".") in (parents if is_recursive else parents[:1])


HUB = StandInHub()
