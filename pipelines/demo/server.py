"""Serving the demo page to this machine alone: what Gradio may do is decided here."""

import ipaddress
import math
import os
import socket
import sys
import tempfile
import threading
from pathlib import Path

from PIL import Image

from pipelines.demo.actions import Limits
from pipelines.demo.canvas import canvas_size
from pipelines.demo.page import CSS, build_page
from pipelines.two_stage import Pipeline


def import_gradio():
    """Gradio, told before it is imported to report to nobody. Raises ValueError where it is not installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "*"  # it asks its own server whether it is there
    try:
        import gradio
    except ImportError as error:
        raise ValueError(f"the demo needs gradio: pip install 'tessera-codes[demo]' ({error})") from error
    return gradio


def is_loopback(host: str) -> bool:
    """Whether only this machine itself can reach a server bound to `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def refuse_outgoing_connections() -> None:
    """From here on this process connects to itself alone. It cannot be undone.

    Gradio fetches addresses that a request names; nothing here needs it to.
    """

    def check(event: str, arguments: tuple) -> None:
        if event == "socket.connect" and isinstance(arguments[1], tuple):
            host = arguments[1][0]
        elif event == "socket.getaddrinfo":
            host = arguments[0]
        else:
            return
        host = host.decode() if isinstance(host, bytes) else host
        if host is not None and not is_loopback(str(host)):
            raise PermissionError(f"the demo connects to no other machine, but a connection to {host} was asked for")

    sys.addaudithook(check)


def check_port(host: str, port: int | None) -> None:
    """Raises ValueError for a port that is none, or a host or port that cannot be listened at."""
    if port is not None and not 1 <= port <= 65535:
        raise ValueError(f"port must lie in [1, 65535], got {port}")
    try:
        address = host.strip("[]")
        family = socket.getaddrinfo(address, port or 0, type=socket.SOCK_STREAM)[0][0]
        socket.create_server((address, port or 0), family=family).close()
    except OSError as error:
        if port is None:  # Gradio would try a hundred ports, some seconds each, and say that none is free
            raise ValueError(
                f"host '{host}' cannot be listened at ({error.strerror}); give an address of this machine"
            ) from error
        raise ValueError(
            f"port {port} of {host} cannot be listened at ({error.strerror}); give another --port, or none to take the "
            "first free one from 7860 on"
        ) from error


def serve(pipeline: Pipeline, limits: Limits, name: str, *, host: str, port: int | None) -> None:
    """Serves the page until interrupted.

    Args:
        limits: what one visitor may ask for.
        name: of the pipeline, for people.
        host: address to bind to.
        port: None takes the first free one from 7860 on.
    Raises:
        OSError: the port is in use.
    """
    gradio = import_gradio()
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    # Pillow refuses what has more than twice as many, wherever Gradio opens an image before `open_upload` can
    Image.MAX_IMAGE_PIXELS = max(limits.max_pixels, math.prod(canvas_size(pipeline.tokenizer)))
    with tempfile.TemporaryDirectory(prefix="tessera-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # uploads and pictures; gone when the server is
        os.environ.pop("GRADIO_ALLOWED_PATHS", None)
        page = build_page(gradio, pipeline, limits, name, Path(folder))
        # A page of the internet whose name is made to point here must not be answered
        hosts = ["localhost", "127.0.0.1", host, host.strip("[]")] if is_loopback(host) else ["*"]
        page.launch(
            server_name=host,
            server_port=port,
            share=False,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            run_history=False,
            enable_monitoring=False,
            footer_links=[],
            prevent_thread_lock=True,
            quiet=True,
            _frontend=False,  # or it gives up where its first page takes more than 3 s, as on a busy machine
            show_error=True,
            max_file_size=limits.max_upload_bytes,
            state_session_capacity=100,
            theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
            css=CSS,
            app_kwargs={"middleware": [Middleware(TrustedHostMiddleware, allowed_hosts=hosts)]},
        )
        refuse_outgoing_connections()
        if not is_loopback(host):
            print(f"anyone who reaches {host} can use this page: it has no password", file=sys.stderr)
        print(f"the demo is at {page.local_url} (Ctrl-C ends it)", flush=True)
        try:
            threading.Event().wait()
        finally:
            page.close(verbose=False)
