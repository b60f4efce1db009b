"""`lpovod serve`: a page to detect, correct and learn in the browser."""

import socket
from pathlib import Path

from lpovod.devices import own_device
from lpovod.exceptions import LpovodError, UsageError


def serve(
    run: Path | None = None,
    model: Path | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    device: str | None = None,
) -> None:
    """Serve a page that detects objects in your images, shows why, and learns classes.

    With a run, a class shows the regions that its name retrieved; click wrong ones away, or type a
    new class, and it is learned in seconds. A model file alone detects. Nothing leaves this machine
    and the run's own model stays as it is: save the new one from the page.

    Args:
        run: folder of a finished run: results/mini
        model: a model file; beside --run, the one to start from: what an earlier page saved
        host: address to listen at; 0.0.0.0 lets other machines in, without any password
        port: to listen at; 0 for any free one
        device: cpu or cuda; by default the GPU if there is one
    """
    if run is None and model is None:
        raise UsageError("give a finished run (--run results/mini) or a model file (--model FILE)")
    listener = _listen(host, port)  # a busy port shows before the model is loaded
    import uvicorn

    from lpovod.apps.serve.app import build_app
    from lpovod.apps.serve.workshop import Workshop

    app = build_app(Workshop(run, model, own_device(device)), host)
    settings = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2)
    listener.listen()
    shown = f"[{host}]" if ":" in host else host
    print(f"http://{shown}:{listener.getsockname()[1]} (Ctrl-C ends it)", flush=True)
    uvicorn.Server(settings).run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        raise LpovodError(
            f"cannot listen at {host}, port {port} ({error}). Choose another --port, or 0 for any "
            "free one"
        ) from None
    return listener
