"""``python -m tests.chaos.services proxy PORT UPSTREAM FLAG`` or ``hub PORT MODEL [FLAG]``: a faulty server.

The servers are for `tests.chaos.faults`. ``proxy`` forwards requests to an object store, but answers 503
while the file FLAG exists. ``hub`` serves one model directory as a Hugging Face hub, but answers 429 while
FLAG exists.
"""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.chaos.arguments import described
from tests.s3_server import FaultyProxy

COMMIT = "0" * 40


def proxy(port: str, upstream: str, flag: str) -> None:
    with FaultyProxy(upstream, int(port)) as faulty:
        faulty.choose = lambda method, path: "503" if Path(flag).exists() else None
        threading.Event().wait()


def hub(port: str, model: str, flag: str = "") -> None:
    ThreadingHTTPServer(("0.0.0.0", int(port)), _handler(Path(model), flag)).serve_forever()  # noqa: S104


def _handler(model: Path, flag: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if flag and Path(flag).exists():
                return self._send(429, b"too many requests")
            if path.startswith("/api/models/"):
                siblings = [{"rfilename": file.name} for file in sorted(model.iterdir())]
                files = [
                    {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "0" * 40}
                    for file in sorted(model.iterdir())
                ]
                name = "/".join(path.split("/")[3:5])
                model_info = {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings, "tags": []}
                return self._send(200, json.dumps(files if "/tree/" in path else model_info).encode())
            file = model / path.rpartition("/")[2]
            return self._send(200, file.read_bytes()) if file.is_file() else self._send(404, b"")

        do_HEAD = do_GET

        def _send(self, code: int, body: bytes) -> None:
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')  # noqa: S324
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    return Handler


def main() -> None:
    parser = described(__doc__)
    services = parser.add_subparsers(required=True)
    for function, names in ((proxy, ("port", "upstream", "flag")), (hub, ("port", "model"))):
        service = services.add_parser(function.__name__)
        service.set_defaults(start=function)
        for name in names:
            service.add_argument(name)
    services.choices["hub"].add_argument("flag", nargs="?", default="")
    arguments = vars(parser.parse_args())
    arguments.pop("start")(**arguments)


if __name__ == "__main__":
    main()
