"""The server: what the page asks for, with limits on size, number and origin.

Each page has a session under a random key, which it sends in a header (a browser sends it to no
other site's requests). The model has one thread, where all work is done; few uploads are in memory
at once. With its limits, the server has at most 16 sessions with 8 images each.
"""

import asyncio
import json
import secrets
import tempfile
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lpovod.apps.serve.overlay import overlay_of
from lpovod.apps.serve.uploads import MAX_BYTES, MAX_PIXELS, file_name
from lpovod.apps.serve.workshop import IMAGES, NO_RUN, Session, Workshop
from lpovod.exceptions import LpovodError
from lpovod.formats.model import write_model
from lpovod.progress import Listener, listening, log

STATIC = Path(__file__).parent / "static"
SESSIONS = 16
UPLOADS = 4  # in memory at once; others wait
JSON_BYTES = 1 << 20
LOCAL = ("127.0.0.1", "localhost")
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "cross-origin-resource-policy": "same-origin",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
ENDED = "the server no longer has the work of this page. Reload the page to start anew"
FAULT = "the program failed; the terminal of lpovod serve shows why"

T = TypeVar("T")


def build_app(workshop: Workshop, host: str = "127.0.0.1") -> Starlette:
    """The application.

    Args:
        workshop: the model and the run.
        host: that it is served at. On this machine alone, requests by another name are refused, so
            that no web page can point its own name at the server.
    """
    server = _Server(workshop)
    middleware = [Middleware(_WithHeaders)]
    if host in LOCAL:
        middleware.append(Middleware(TrustedHostMiddleware, allowed_hosts=list(LOCAL)))
    post, get = ["POST"], ["GET"]
    routes = [
        Route("/", lambda request: FileResponse(STATIC / "index.html"), methods=get),
        Mount("/static", StaticFiles(directory=STATIC)),
        Route("/api/sessions", server.start, methods=post),
        Route("/api/examples/{image:int}.jpg", server.thumbnail, methods=get),
        Route("/api/crops/{region}.jpg", server.crop, methods=get),
        Route("/api/images", server.open_upload, methods=post),
        Route("/api/images/{image:int}", server.detections, methods=get),
        Route("/api/images/{image:int}", server.close, methods=["DELETE"]),
        Route("/api/images/{image:int}.jpg", server.picture, methods=get),
        Route("/api/examples/{image:int}", server.open_example, methods=post),
        Route("/api/state", server.state, methods=get),
        Route("/api/words", server.words, methods=post),
        Route("/api/regions", server.regions, methods=get),
        Route("/api/pictures", server.add_picture, methods=post),
        Route("/api/learn", server.learn, methods=post),
        Route("/api/correct", server.correct, methods=post),
        Route("/api/undo", server.undo, methods=post),
        Route("/api/redo", server.redo, methods=post),
        Route("/api/save/model", server.save_model, methods=get),
        Route("/api/save/overlay", server.save_overlay, methods=get),
        Route("/api/save/detections", server.save_detections, methods=post),
    ]
    handlers: dict[Any, Any] = {
        LpovodError: _explain,
        HTTPException: _refuse,
        ClientDisconnect: _refuse_nobody,
        Exception: _fail,
    }
    return Starlette(
        routes=routes, middleware=middleware, exception_handlers=handlers, lifespan=server.lifespan
    )


class _Server:
    """The handlers, and all that they share."""

    def __init__(self, workshop: Workshop):
        self._shop = workshop
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._worker = ThreadPoolExecutor(1, "model")
        self._uploads = asyncio.Semaphore(UPLOADS)

    def lifespan(self, app: Starlette) -> Any:
        """Open the run's files beside the first requests; end the worker with the server."""
        return _Lifespan(self._worker, self._shop)

    # --- sessions

    async def start(self, request: Request) -> Response:
        _check_origin(request)
        key = secrets.token_urlsafe(16)
        self._sessions[key] = session = Session(self._shop)
        while len(self._sessions) > SESSIONS:
            self._sessions.popitem(last=False)
        config = session.content.config
        answer = {
            "session": key,
            "title": self._shop.title,
            "name": config.name,
            "refusal": None if self._shop.run else NO_RUN,
            "examples": self._shop.examples,
            "limits": {"bytes": MAX_BYTES, "pixels": MAX_PIXELS, "images": IMAGES},
        }
        return JSONResponse(answer | session.overview())

    def _session(self, request: Request) -> Session:
        key = request.headers.get("x-session")
        if key is None and request.method == "GET":  # a link or a picture of the page
            key = request.query_params.get("session")
        if key is None or key not in self._sessions:
            raise HTTPException(410, ENDED)
        self._sessions.move_to_end(key)
        return self._sessions[key]

    async def _work(self, function: Callable[..., T], *arguments: Any) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._worker, function, *arguments)

    # --- images

    async def thumbnail(self, request: Request) -> Response:
        jpeg = await self._work(self._shop.thumbnail, request.path_params["image"])
        return _jpeg(jpeg)

    async def crop(self, request: Request) -> Response:
        return _jpeg(await self._work(self._shop.crop, request.path_params["region"]))

    async def picture(self, request: Request) -> Response:
        return _jpeg(self._session(request).image(request.path_params["image"]).jpeg)

    async def open_upload(self, request: Request) -> Response:
        session = self._session(request)
        return await self._with_upload(
            request, lambda content, name: _opened(session, session.open_upload(content, name))
        )

    async def open_example(self, request: Request) -> Response:
        session, image_id = self._session(request), request.path_params["image"]
        return JSONResponse(
            await self._work(lambda: _opened(session, session.open_example(image_id)))
        )

    async def detections(self, request: Request) -> Response:
        session = self._session(request)
        return JSONResponse(await self._work(session.detections, request.path_params["image"]))

    async def close(self, request: Request) -> Response:
        session = self._session(request)
        await self._work(session.close, request.path_params["image"])
        return JSONResponse({})

    async def add_picture(self, request: Request) -> Response:
        session = self._session(request)
        return await self._with_upload(
            request, lambda content, name: {"picture": session.add_picture(content, name)}
        )

    async def _with_upload(
        self, request: Request, function: Callable[[bytes, str], dict[str, Any]]
    ) -> Response:
        name = file_name(unquote(request.headers.get("x-name", "image")))
        async with self._uploads:
            content = await _body(request, MAX_BYTES, name)
            return JSONResponse(await self._work(function, content, name))

    # --- classes

    async def state(self, request: Request) -> Response:
        return JSONResponse(self._session(request).overview())

    async def words(self, request: Request) -> Response:
        session, content = self._session(request), await _json(request)
        words = _texts(content, "words")

        def choose() -> dict[str, Any]:
            session.set_words(words)
            return session.overview()

        return JSONResponse(await self._work(choose))

    async def regions(self, request: Request) -> Response:
        session, name = self._session(request), request.query_params.get("name", "")
        return JSONResponse({"regions": await self._work(session.regions, name)})

    async def learn(self, request: Request) -> Response:
        session, content = self._session(request), await _json(request)
        name, prompt = _text(content, "name"), _text(content, "prompt")
        pictures, by_name = _texts(content, "pictures"), bool(content.get("by_name", True))
        return self._stream(session, lambda: session.learn(name, prompt, pictures, by_name))

    async def correct(self, request: Request) -> Response:
        session, content = self._session(request), await _json(request)
        name, drop = _text(content, "name"), _texts(content, "drop")
        return self._stream(session, lambda: session.correct(name, drop))

    async def undo(self, request: Request) -> Response:
        return await self._move(request, -1)

    async def redo(self, request: Request) -> Response:
        return await self._move(request, 1)

    async def _move(self, request: Request, step: int) -> Response:
        session = self._session(request)
        await self._work(session.move, step)
        return JSONResponse(session.overview())

    def _stream(self, session: Session, job: Callable[[], None]) -> Response:
        """Lines of json: the progress of a job, then the page's state, or the error."""
        loop = asyncio.get_running_loop()
        lines: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()

        def report(step: str, done: int, total: int | None) -> None:
            line = {"step": step, "done": done, "total": total}
            loop.call_soon_threadsafe(lines.put_nowait, line)

        async def follow() -> AsyncIterator[bytes]:
            future = loop.run_in_executor(self._worker, _reported, job, report)
            future.add_done_callback(lambda _: lines.put_nowait(None))
            while (line := await lines.get()) is not None:
                yield _line(line)
            yield _line(_outcome(future) or session.overview())

        return StreamingResponse(follow(), media_type="application/x-ndjson")

    # --- what the page saves

    async def save_model(self, request: Request) -> Response:
        session = self._session(request)
        folder = tempfile.TemporaryDirectory(prefix="lpovod-")
        path = Path(folder.name, "model.safetensors")
        await self._work(lambda: write_model(path, session.content))
        name = f"{session.content.config.name}.safetensors"
        return FileResponse(
            path,
            filename=name,
            media_type="application/octet-stream",
            background=BackgroundTask(folder.cleanup),
        )

    async def save_overlay(self, request: Request) -> Response:
        content = self._session(request).content
        return _download(
            overlay_of(content), f"{content.config.name}_overlay.yaml", "application/yaml"
        )

    async def save_detections(self, request: Request) -> Response:
        session, content = self._session(request), await _json(request)
        threshold = _fraction(content, "threshold")
        classes = None if content.get("classes") is None else _texts(content, "classes")
        results = await self._work(
            session.results, threshold, classes, bool(content.get("refined", True))
        )
        text = json.dumps(results, sort_keys=True, separators=(",", ":")) + "\n"
        return _download(text, "detections.json", "application/json")


class _Lifespan:
    def __init__(self, worker: ThreadPoolExecutor, workshop: Workshop):
        self._worker, self._shop = worker, workshop

    async def __aenter__(self) -> None:
        self._worker.submit(self._shop.warm_up)

    async def __aexit__(self, *_: Any) -> None:
        self._worker.shutdown(wait=False, cancel_futures=True)


class _WithHeaders:
    """Adds the headers that keep the page to itself."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message["headers"], *added]
            await send(message)

        await self._app(scope, receive, with_headers)


def _reported(job: Callable[[], None], report: Listener) -> None:
    report("retrieving regions", 0, None)
    with listening(report):
        job()


def _outcome(future: asyncio.Future[None]) -> dict[str, Any] | None:
    """The error of a job in words, or None."""
    error = future.exception()
    if error is None:
        return None
    if isinstance(error, LpovodError):
        return {"error": str(error)}
    log.error("a page's request failed", exc_info=error)
    return {"error": FAULT}


def _opened(session: Session, opened: Any) -> dict[str, Any]:
    width, height = opened.size
    facts = {"name": opened.name, "width": width, "height": height}
    return facts | session.detections(opened.image_id)


def _check_origin(request: Request) -> None:
    # Another site's page cannot set this header without a permission that is never given.
    if request.headers.get("x-session") != "new":
        raise HTTPException(400, "a session starts with the header x-session: new")


async def _body(request: Request, most: int, name: str) -> bytes:
    too_large = f"{name} is larger than {most >> 20} MB, the most that is read"
    if int(request.headers.get("content-length", 0)) > most:
        raise HTTPException(413, too_large)
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > most:
            raise HTTPException(413, too_large)
    return bytes(content)


async def _json(request: Request) -> dict[str, Any]:
    try:
        content = json.loads(await _body(request, JSON_BYTES, "the request"))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise HTTPException(400, "the request is not a json object")
    return content


def _fraction(content: dict[str, Any], name: str) -> float:
    value = content.get(name)
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise LpovodError(f"{name} {value!r}: expected a number from 0 to 1")
    return float(value)


def _text(content: dict[str, Any], name: str) -> str:
    """A text, empty if there is none."""
    text = content.get(name) or ""
    if not isinstance(text, str):
        raise LpovodError(f"{name}: expected a text")
    return text


def _texts(content: dict[str, Any], name: str) -> list[str]:
    texts = content.get(name, [])
    if not (isinstance(texts, list) and all(isinstance(text, str) for text in texts)):
        raise LpovodError(f"{name}: expected a list of texts")
    return texts


def _line(content: dict[str, Any]) -> bytes:
    return json.dumps(content).encode() + b"\n"


def _jpeg(content: bytes) -> Response:
    return Response(content, media_type="image/jpeg", headers={"cache-control": "no-store"})


def _download(text: str, name: str, media_type: str) -> Response:
    headers = {"content-disposition": f'attachment; filename="{name}"'}
    return Response(text, media_type=media_type, headers=headers)


def _explain(request: Request, error: LpovodError) -> Response:
    return JSONResponse({"error": str(error)}, 400)


def _refuse(request: Request, error: HTTPException) -> Response:
    return JSONResponse({"error": error.detail}, error.status_code)


def _refuse_nobody(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=499)


def _fail(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": FAULT}, 500)
