"""Show a page to try a finished run with files or the camera: probabilities, and
where the network looked. Only this machine can open the page. It needs no network,
and images are not stored. Ctrl-C stops the command.

examples:
  tlcli demo outputs/2026-11-24/10-15-00 --port 8080
"""

import io
import os
import socket
from asyncio import Lock
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from tlcli.cli import fast_imports
from tlcli.cli.parser import Parser, whole_number
from tlcli.cli.predict import device_and_store
from tlcli.errors import TlcliError, UsageError
from tlcli.interrupts import handle_signals
from tlcli.text import size_text

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

    from tlcli.predict import Predictor
    from tlcli.runs.load import LoadedRun

HOST = "127.0.0.1"
MAX_UPLOAD_BYTES = 64_000_000
TOP = 10  # classes on the page

PARSER = Parser("demo", __doc__)
PARSER.add_argument("run", metavar="RUN", help="directory of the run")
PARSER.add_argument("--port", type=whole_number, default=8000, metavar="N", help="port of the page (default: 8000)")


def run(argv: list[str]) -> int:
    """Serve the page of a run until a signal ends it; return the exit code."""
    arguments = PARSER.parse_args(argv)
    if not (find_spec("starlette") and find_spec("uvicorn")):
        raise UsageError("Starlette and uvicorn are not installed: pip install 'tlcli[demo]'")
    with handle_signals(), socket.socket() as listener:
        if os.name != "nt":  # connections of the last demo may linger; Windows would share the port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, arguments.port))
            listener.listen()
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or "must be at most 65535"
            raise UsageError(f"--port {arguments.port}: {reason.lower()}; choose another port") from error
        with fast_imports():
            import uvicorn

            from tlcli.predict import Predictor
            from tlcli.runs.load import load_run

        loaded = load_run(arguments.run)
        app = make_app(loaded, Predictor(loaded, *device_and_store("auto")))
        print(f"http://{HOST}:{arguments.port}  (Ctrl-C ends it)", flush=True)
        config = uvicorn.Config(app, log_level="error", lifespan="off", ws="none", timeout_graceful_shutdown=2)
        uvicorn.Server(config).run(sockets=[listener])
    return 0


def make_app(loaded: "LoadedRun", predictor: "Predictor") -> "Starlette":
    """Return the page at / and its POST /classify, for requests that name this machine as their host."""
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import HTMLResponse, JSONResponse
    from starlette.routing import Route

    from tlcli.runs.report import render
    from tlcli.runs.run_dir import RunDir

    too_large = f"larger than {size_text(MAX_UPLOAD_BYTES)}"
    folder, name = RunDir(loaded.path), loaded.path.resolve().name
    view: dict[str, Any] = {"run_name": name, "title": f"Try {name}", "info": loaded.info, "test": folder.test()}
    view |= {"config": folder.config(), "max_bytes": MAX_UPLOAD_BYTES, "too_large": too_large}
    page = render("demo.html.j2", view, script="demo.js")
    lock = Lock()  # the network has one image at a time

    async def show_page(request: "Request") -> "Response":
        return HTMLResponse(page, headers={"Content-Security-Policy": "frame-ancestors 'none'"})

    async def classify_upload(request: "Request") -> "Response":
        own = f"http://{request.headers['host']}"
        if request.headers.get("origin", own) != own:  # a page of another site may post here, too
            return JSONResponse({"error": "sent by another page"}, 403)
        content = bytearray()
        async for chunk in request.stream():
            content += chunk
            if len(content) > MAX_UPLOAD_BYTES:
                return JSONResponse({"error": too_large}, 413)
        async with lock:
            found = await run_in_threadpool(classify, loaded, predictor, bytes(content))
        return JSONResponse(found, 422 if "error" in found else 200)

    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])  # else DNS may lead other sites here
    routes = [Route("/", show_page), Route("/classify", classify_upload, methods=["POST"])]
    return Starlette(routes=routes, middleware=[hosts])


def classify(loaded: "LoadedRun", predictor: "Predictor", content: bytes) -> dict[str, Any]:
    """Return the answer of the page to the bytes of an image file: what `tlcli predict` says, and two pictures.

    The keys are `top`, `unknown_score`, `unknown`, `picture` and `map`, which is None if there is none, or `error`.
    """
    from PIL import Image

    from tlcli.data.decode import BadImage, read_image
    from tlcli.runs.report import image_uri

    try:
        pixels = read_image(io.BytesIO(content), loaded.preprocessing.range)
    except BadImage as error:
        return {"error": str(error)}
    (prediction,) = predictor.predict([pixels], top=TOP, total=1)
    picture = Image.fromarray(pixels)
    picture.thumbnail((1024, 1024), Image.Resampling.LANCZOS)
    answer: dict[str, Any] = {"top": prediction.top, "picture": image_uri(picture, "JPEG", quality=90), "map": None}
    answer |= {"unknown_score": prediction.unknown_score, "unknown": prediction.is_unknown}
    try:
        answer["map"] = image_uri(loaded.explain(pixels, prediction.top[0][0]), "JPEG", quality=90)
    except TlcliError as error:  # a network without positions
        answer["map_error"] = str(error)
    return answer
