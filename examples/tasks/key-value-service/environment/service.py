"""Named values behind a port: `get NAME`, `set NAME VALUE`."""

import secrets
import socketserver

VALUES = {"left": secrets.token_hex(8), "right": secrets.token_hex(8)}
FIRST = dict(VALUES)


class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        for line in self.rfile:
            command, _, rest = line.decode(errors="replace").strip().partition(" ")
            name, _, value = rest.partition(" ")
            if command == "set" and name in VALUES and value:
                VALUES[name] = value
                answer = "ok"
            elif command == "get" and name in VALUES:
                answer = VALUES[name]
            elif command == "swapped":
                answer = str(VALUES == {"left": FIRST["right"], "right": FIRST["left"]})
            else:
                answer = "what?"
            self.wfile.write(f"{answer}\n".encode())


socketserver.ThreadingTCPServer.allow_reuse_address = True
socketserver.ThreadingTCPServer(("127.0.0.1", 7000), Handler).serve_forever()
