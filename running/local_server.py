"""A web server for one page on this machine: what keeps others out, and nothing about images.

It listens to 127.0.0.1. A request needs the token of the address that was printed, so that no other
page can send one; the Host and the Origin have to be this server's, so that no other name leads
here. The page may load from here alone.
"""

import json
import mimetypes
import secrets
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote

HEADERS = {"Cache-Control": "no-store", "Referrer-Policy": "no-referrer",
           "X-Content-Type-Options": "nosniff",
           "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'"}


class LocalServer(ThreadingHTTPServer):
    """Serves the files of the folder `page`, and what `handler` has methods for.

    port: 0 takes any that is free. Raises OSError for one that is taken.
    """

    daemon_threads = True

    def __init__(self, port: int, handler: type, page: Path, session: object):
        super().__init__(("127.0.0.1", port), handler)
        self.session = session
        self.page = {path.name: path for path in page.iterdir()}
        self.token = secrets.token_urlsafe(16)
        self.hosts = (f"127.0.0.1:{self.server_port}", f"localhost:{self.server_port}")
        self.address = f"http://{self.hosts[0]}/{self.token}/"


class LocalHandler(BaseHTTPRequestHandler):
    """GET /TOKEN/word/a/b calls get_word("a", "b"), POST post_word; other words are page files.

    Whatever they raise becomes {"error": one line}, status 400.
    """

    timeout = 60  # seconds without a byte end a connection

    def do_GET(self):
        self.serve("get")

    def do_POST(self):
        self.serve("post")

    def serve(self, method):
        token, *parts = [unquote(part) for part in self.path.split("/")[1:]]
        origin = self.headers.get("Origin", f"http://{self.server.hosts[0]}")
        known = secrets.compare_digest(token.encode(), self.server.token.encode())
        ours = self.headers.get("Host") in self.server.hosts and \
            origin.removeprefix("http://") in self.server.hosts
        if not (known and ours and parts):
            return self.reply(b"Open the address that app.py printed.", "text/plain", 403)
        try:
            getattr(self, f"{method}_{parts[0]}", self.send_page)(*parts[1:])
        except (BrokenPipeError, ConnectionResetError, TimeoutError):
            pass  # the page was closed, or does not read
        except Exception as error:  # a hostile request must not end the server
            with suppress(OSError):  # it may have hung up
                self.reply_json({"error": self.words(error)}, 400)

    def words(self, error):
        """One line about an exception."""
        return " ".join(str(error).split()) or type(error).__name__

    def send_page(self, *unknown):
        path = self.server.page.get(self.path.split("/")[2] or "index.html")
        if unknown or not path or self.command != "GET":
            return self.reply(b"There is no such page.", "text/plain", 404)
        self.reply(path.read_bytes(), mimetypes.guess_type(path.name)[0])

    def begin(self, status=200, **headers):
        """Send the headers; the body follows, and ends where the connection does."""
        self.send_response(status)
        for name, value in {**HEADERS, **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def reply(self, content, kind="application/octet-stream", status=200, **headers):
        self.begin(status, Content_Type=kind, Content_Length=len(content), **headers)
        self.wfile.write(content)

    def reply_file(self, path):
        """Have a file saved under its name."""
        saved = f"attachment; filename*=UTF-8''{quote(path.name)}"
        self.reply(path.read_bytes(), Content_Disposition=saved)

    def reply_json(self, value, status=200):
        self.reply(json.dumps(value).encode(), "application/json", status)

    def length(self):
        """Bytes that the request announces. Raises ValueError for less than 0."""
        length = int(self.headers.get("Content-Length") or 0)
        if length < 0:  # would be read without end
            raise ValueError(f"a request of {length} bytes")
        return length

    def log_request(self, code="-", size="-"):
        """Say nothing of what went well."""
