"""The hub's HTTP API as far as a pull asks it, on a loopback port; it can misbehave on order."""

import hashlib
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_LARGE = (".safetensors", ".bin", ".pt", ".onnx", ".onnx_data", ".h5", ".msgpack", ".ot", "tokenizer.json")


@dataclass
class Repository:
    """Files by name, and what goes wrong with them.

    revisions: branch, tag or commit → commit. gated: files only with a token. arriving: other bytes than stated.
    ranges: whether it heeds the Range header. cut: after how many bytes the connection drops, once. stall: after how
    many it stops for good.
    """

    files: Mapping[str, bytes]
    revisions: Mapping[str, str] = field(default_factory=lambda: {"main": COMMIT, COMMIT: COMMIT})
    licence: str | None = "mit"
    gated: bool = False
    ranges: bool = True
    arriving: dict[str, bytes] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)
    stall: dict[str, int] = field(default_factory=dict)


class Hub:
    """The stand-in. `asked` has (file, value of its Range header or None) of each download, in order."""

    def __init__(self, **repositories: Repository) -> None:
        self.repositories: dict[str, Repository] = dict(repositories)
        self.asked: list[tuple[str, str | None]] = []
        self.broken = 0
        self._ended = threading.Event()
        routes = [
            Route("/api/models/{organisation}/{name}", self._info),
            Route("/api/models/{organisation}/{name}/revision/{revision:path}", self._info),
            Route("/{organisation}/{name}/resolve/{revision}/{file:path}", self._file),
            Route("/cdn/{organisation}/{name}/{file:path}", self._content),
        ]
        config = uvicorn.Config(Starlette(routes=routes), port=0, log_config=None, lifespan="off", ws="none")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run)

    def __enter__(self) -> "Hub":
        self._thread.start()
        until = time.monotonic() + 20
        while not self._server.started:
            assert time.monotonic() < until
            time.sleep(0.01)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._server.should_exit = True
        self._server.force_exit = True
        self._thread.join(20)

    @property
    def names(self) -> list[str]:
        """The files that were asked for."""
        return [name for name, _ in self.asked]

    def _find(self, request: Request) -> Repository | Response:
        if self.broken:
            return JSONResponse({"error": "broken"}, self.broken)
        found = self.repositories.get("{organisation}/{name}".format(**request.path_params))
        if found is None:
            return JSONResponse({"error": "no"}, 404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "not found"})
        revision = request.path_params.get("revision", "main")
        if revision not in found.revisions:
            return JSONResponse({"error": "no"}, 404, {"X-Error-Code": "RevisionNotFound"})
        return found

    async def _info(self, request: Request) -> Response:
        found = self._find(request)
        if isinstance(found, Response):
            return found
        commit = found.revisions[request.path_params.get("revision", "main")]
        assert request.query_params["blobs"] in ("true", "True")
        siblings: list[dict[str, Any]] = []
        for name, content in found.files.items():
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            entry: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": blob}
            if name.endswith(_LARGE):
                entry["blobId"] = "f" * 40  # of the pointer, as on the real hub
                entry["lfs"] = {
                    "sha256": hashlib.sha256(content).hexdigest(),
                    "size": len(content),
                    "pointerSize": 130,
                }
            siblings.append(entry)
        id_ = "{organisation}/{name}".format(**request.path_params)
        card = {"license": found.licence} if found.licence else {}
        return JSONResponse({"id": id_, "sha": commit, "siblings": siblings, "cardData": card, "tags": []})

    async def _file(self, request: Request) -> Response:
        found = self._find(request)
        if isinstance(found, Response):
            return found
        if found.gated and request.headers.get("Authorization") != "Bearer hf_right":
            return JSONResponse({"error": "gated"}, 403, {"X-Error-Code": "GatedRepo"})
        if request.path_params["file"] not in found.files:
            return JSONResponse({"error": "no"}, 404, {"X-Error-Code": "EntryNotFound"})
        if request.path_params["file"].endswith(_LARGE):
            return RedirectResponse("/cdn/{organisation}/{name}/{file}".format(**request.path_params), 302)
        return await self._content(request)

    async def _content(self, request: Request) -> Response:
        name = request.path_params["file"]
        found = self.repositories["{organisation}/{name}".format(**request.path_params)]
        content = found.arriving.get(name, found.files[name])
        ranged = request.headers.get("Range")
        self.asked.append((name, ranged))
        if not found.ranges:
            ranged = None
        start = int(ranged.removeprefix("bytes=").removesuffix("-")) if ranged else 0
        headers = {"Content-Length": str(len(content) - start)}
        if ranged:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        body = self._body(content[start:], found.cut.pop(name, None), found.stall.get(name))
        return StreamingResponse(body, 206 if ranged else 200, headers)

    def _body(self, content: bytes, cut: int | None, stall: int | None) -> Iterator[bytes]:
        yield content[: cut or stall or len(content)]
        if cut is not None:
            raise ConnectionResetError
        if stall is not None:
            self._ended.wait(60)
