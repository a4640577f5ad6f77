"""Serves files. The settings, NAME = VALUE a line, are in server.conf."""

import functools
import http.server
import pathlib

here = pathlib.Path(__file__).parent
lines = [line for line in (here / "server.conf").read_text().splitlines() if line and line[0] != "#"]
settings = dict(map(str.strip, line.split("=", 1)) for line in lines)
if settings.get("enabled") != "yes":
    raise SystemExit("not enabled")
folder = here / settings["folder"]
if not folder.is_dir():
    raise SystemExit(f"no folder {folder}")
handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
http.server.ThreadingHTTPServer((settings["address"], int(settings["port"])), handler).serve_forever()
