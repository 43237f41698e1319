"""`vla-foundry dashboard DIR`: serve the report of a folder, live, and a queue of evaluations, until it is stopped.

/                     the dashboard (page.py)
/files/report/NAME    a file of the report (?models=A&models=B&tasks=C: of these): report.html, rates.csv ...
/files/PLACE          a video or picture below the folder
"""

import io
import os
import socket
import sys
import threading
import time
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from vla_foundry.config.command_line import parse_command
from vla_foundry.evaluation.dashboard.jobs import FOLDER_NAME, PASSWORD_VARIABLE, Queue
from vla_foundry.evaluation.report.command import PAGE_NAME, Compared, compare_folder, find_recordings, is_recording
from vla_foundry.evaluation.report.page import write_markdown, write_page
from vla_foundry.params.commands.evaluation import DashboardParams
from vla_foundry.params.commands.serving import is_loopback
from vla_foundry.serving.guard import Guard

if TYPE_CHECKING:
    from fastapi import FastAPI

ARCHIVE_NAME = "report.zip"


class LiveReport:
    """The comparison of a folder, made again when a result file has changed."""

    def __init__(self, params: DashboardParams) -> None:
        self.params = params
        self.root = Path(params.results)
        self._lock = threading.Lock()
        self._version: str | None = None
        self._made: Compared | str = ""

    def version(self) -> str:
        """Return what changes with the results."""
        found = []
        for folder, _, names in os.walk(self.root):
            for path in (os.path.join(folder, name) for name in names if name.endswith((".json", ".yaml"))):
                # it may be gone meanwhile
                with suppress(FileNotFoundError):
                    status = os.stat(path)
                    found.append((path, status.st_size, status.st_mtime_ns))
        return f"{hash(tuple(sorted(found))):x}"

    def compared(self) -> Compared | str:
        """Return the comparison as of now, or why there is none."""
        with self._lock:
            version = self.version()
            if version != self._version:
                try:
                    self._made = compare_folder(self.params)
                except (ValueError, OSError) as error:
                    self._made = str(error)
                self._version = version
            return self._made

    def write(self, name: str, models: Sequence[str], tasks: Sequence[str]) -> bytes | None:
        """Return a file of the report of what a reader picked; names that are gone are left out; None: no such file."""
        compared = self.compared()
        if isinstance(compared, str):
            return compared.encode("utf-8", "replace") if name == PAGE_NAME else None
        contents = compared.pick(
            [model for model in models if model in compared.models], [task for task in tasks if task in compared.tasks]
        )
        folder = self.root.resolve() / "report"
        if name == PAGE_NAME:
            return write_page(contents, compared.title, find_recordings(self.root), folder).encode()
        if name == "report.md":
            return write_markdown(contents, compared.title).encode()
        if name.removesuffix(".csv") in contents.tables:
            return contents.tables[name.removesuffix(".csv")].to_csv().encode()
        if name != ARCHIVE_NAME:
            return None
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
            for member, content in compared.render(contents, folder).items():
                file.writestr(member, content)
        return archive.getvalue()


def create_app(report: LiveReport, queue: Queue) -> "FastAPI":
    """Return the application: the dashboard at /, and files below /files."""
    # before it is imported: it would report its use, and look for a newer version
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    from fastapi import FastAPI, Request, Response
    from fastapi.responses import FileResponse
    from gradio.routes import mount_gradio_app
    from gradio.themes import Default

    from vla_foundry.evaluation.dashboard.page import SCRIPT, STYLE, create_blocks

    app = FastAPI(openapi_url=None)

    # functions without `async` run in threads
    @app.get("/files/report/{name}")
    def report_file(name: str, request: Request) -> Response:
        query = request.query_params
        content = report.write(name, query.getlist("models"), query.getlist("tasks"))
        if content is None:
            return Response("There is no such file.\n", 404)
        kind = {"html": "text/html", "zip": "application/zip"}.get(name.rpartition(".")[2], "text/plain")
        saved = {"Content-Disposition": f'attachment; filename="{name}"'} if "save" in query else {}
        return Response(content, media_type=kind, headers=saved | {"Cache-Control": "no-store"})

    @app.get("/files/{place:path}")
    def recording(place: str) -> Response:
        root = report.root.resolve()
        path = (root / place).resolve()
        # links that lead elsewhere are not followed
        if not (path.is_relative_to(root) and is_recording(path.name) and path.is_file()):
            return Response("There is no such recording.\n", 404)
        # its scripts would act for the reader
        return FileResponse(path, filename=path.name if path.suffix == ".html" else None)

    theme = Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return mount_gradio_app(
        app,
        create_blocks(report, queue),
        path="/",
        theme=theme,
        css=STYLE,
        head=SCRIPT,
        footer_links=[],
        ssr_mode=False,
    )


def read_password(params: DashboardParams) -> str | None:
    """Return the password that browsers must give; None: none.

    Raises:
        ValueError: it is empty, or there is none and others can reach the dashboard.
    """
    text, where = os.environ.get(PASSWORD_VARIABLE), PASSWORD_VARIABLE
    if params.password_file is not None:
        where = f"password_file {params.password_file}"
        text = Path(params.password_file).read_text(encoding="utf-8", errors="replace").strip()
    if text == "":
        raise ValueError(f"{where} is empty. Write a long random password into it.")
    if text is None and not is_loopback(params.host):
        raise ValueError(
            f"host '{params.host}' can be reached by others, who could start programs here. Give --password_file, or "
            f"set {PASSWORD_VARIABLE}."
        )
    return text


def main(argv: list[str]) -> None:
    """Run `vla-foundry dashboard`."""
    params = parse_command(DashboardParams, argv, prog="vla-foundry dashboard", positional=("results",))
    password = read_password(params)
    if not Path(params.results).is_dir():
        raise ValueError(f"{params.results} is not a folder. Create it, or give the folder of your evaluations.")
    try:
        import uvicorn
    except ImportError:
        raise ValueError(
            "The dashboard needs gradio, which is not installed: uv pip install 'vla-foundry[dashboard]'."
        ) from None
    family = socket.AF_INET6 if ":" in params.host else socket.AF_INET
    try:
        listener = socket.create_server((params.host, params.port), family=family)
    except OSError as error:
        raise ValueError(
            f"port {params.port} of {params.host} cannot be opened: {error.strerror}. Give another."
        ) from None
    queue = Queue(Path(params.results), checkpoints=params.checkpoints, parallel=params.parallel)
    app = create_app(LiveReport(params), queue)
    threading.Thread(target=_run_queue, args=(queue,), daemon=True).start()
    config = uvicorn.Config(
        Guard(app, password=password, is_local=password is None),
        log_level="warning",
        ssl_certfile=params.tls_certificate,
        ssl_keyfile=params.tls_key,
        timeout_graceful_shutdown=2,
    )
    host = f"[{params.host}]" if ":" in params.host else params.host
    scheme = "http" if params.tls_certificate is None else "https"
    sys.stdout.write(f"dashboard of {params.results}: {scheme}://{host}:{listener.getsockname()[1]}\n")
    sys.stdout.flush()
    uvicorn.Server(config).run(sockets=[listener])


def _run_queue(queue: Queue) -> None:
    fault = ""
    while True:
        try:
            queue.step()
        except OSError as error:
            if str(error) != fault:
                sys.stderr.write(f"warning: {queue.root / FOLDER_NAME}: {error}\n")
            fault = str(error)
        time.sleep(1)
