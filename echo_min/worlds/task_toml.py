"""What a task.toml may hold: how each key that is read, or could change the grade, is checked."""

import math
import os
import re
import tomllib
from pathlib import Path
from posixpath import normpath


def _are_variables(value) -> bool:
    named = isinstance(value, dict) and all(re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) for name in value)
    return named and all(isinstance(text, str) and "\0" not in text for text in value.values())


def _is_artifact(value) -> bool:
    """A path, or a table with one, of neither what grades nor a folder above it."""
    table = value if isinstance(value, dict) else {"source": value}
    path, left_out = table.get("source"), table.get("exclude", [])
    if not isinstance(path, str) or not re.fullmatch(r"/[^/\0][^\0\n]*", path) or "service" in table:
        return False
    path = f"{normpath(path)}/"
    ours = any(path.startswith(f"{p}/") or f"{p}/".startswith(path) for p in ("/tests", "/logs/verifier"))
    return not ours and isinstance(left_out, list) and all(isinstance(text, str) for text in left_out)


def mebibytes(size) -> int:
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?) ?([KMGT])i?B?", str(size))
    return math.ceil(float(match[1]) * 1024.0 ** ("KMGT".index(match[2]) - 1)) if match else 0


NUMBER = "a number above 0", lambda v: type(v) in (int, float) and 1e-3 <= v <= 1e9
WAIT = "a number of at least 0", lambda v: type(v) in (int, float) and 0 <= v <= 1e9
COUNT = "a whole number above 0", lambda v: type(v) is int and 0 < v < 1000
LINE = "a line of text", lambda v: isinstance(v, str) and v.isprintable()
TEXT = "a text", lambda v: isinstance(v, str) and v and "\0" not in v
FLAG = "true or false", lambda v: isinstance(v, bool)
USER = "a name or a number", lambda v: type(v) in (int, str) and re.fullmatch(r"\w[\w.-]*", str(v), re.ASCII)
SIZE = 'a size like "2G"', lambda v: 0 < mebibytes(v) <= 1e9
VARIABLES = "names and texts", _are_variables
VERSION = "1.0 to 1.4", lambda v: v in ("1.0", "1.1", "1.2", "1.3", "1.4")
MODE = '"public" or "no-network"', lambda v: v in ("public", "no-network")
WHERE = '"shared" or "separate"', lambda v: v in ("shared", "separate")
ARTIFACTS = (
    "absolute paths, none of them /tests or /logs/verifier",
    lambda v: isinstance(v, list) and all(map(_is_artifact, v)),
)
LINUX = '"linux"', lambda v: v == "linux"
NOTHING = "nothing: it is not supported", lambda v: not v
# key -> what is expected, in words and as a check; keys that stand in no table here are ignored
CONTAINER = {
    "build_timeout_sec": NUMBER, "docker_image": LINE, "workdir": LINE, "env": VARIABLES, "cpus": NUMBER,
    "memory_mb": NUMBER, "memory": SIZE, "storage_mb": NUMBER, "storage": SIZE, "network_mode": MODE,
    "allow_internet": FLAG, "os": LINUX, "gpus": NOTHING, "tpu": NOTHING, "mcp_servers": NOTHING,
    "skills_dir": NOTHING,
}  # fmt: skip
HEALTH = {
    "command": TEXT, "interval_sec": WAIT, "timeout_sec": NUMBER, "start_period_sec": WAIT,
    "start_interval_sec": WAIT, "retries": COUNT,
}  # fmt: skip
CHECKED = {
    "": {"version": VERSION, "schema_version": VERSION, "steps": NOTHING, "artifacts": ARTIFACTS},
    "agent": {"timeout_sec": NUMBER, "user": USER, "network_mode": MODE},
    "verifier": {
        "timeout_sec": NUMBER, "env": VARIABLES, "environment_mode": WHERE, "user": USER,
        "network_mode": MODE, "collect": NOTHING,
    },
    "environment": CONTAINER, "environment.healthcheck": HEALTH,
    "verifier.environment": CONTAINER, "verifier.environment.healthcheck": HEALTH,
    "solution": {"env": VARIABLES},
}  # fmt: skip


def tables_of(path: Path) -> dict[str, dict]:
    """Those of CHECKED that a task.toml has; what env names of this machine is filled in. Raises ValueError
    that names the file and the key."""
    try:
        settings = tomllib.loads(path.read_bytes().decode())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from None
    tables = {"": settings}
    for name, checks in CHECKED.items():
        above, _, last = name.rpartition(".")
        table = settings if not name else tables.get(above, {}).get(last)
        if table is None:
            continue
        if not isinstance(table, dict):
            raise ValueError(f"{path}: {name}: expected a table [{name}], got {table!r:.80}")
        tables[name] = table
        for key, (expected, holds) in checks.items():
            if key in table and not holds(table[key]):
                place = f"[{name}] {key}" if name else key
                raise ValueError(f"{path}: {place}: expected {expected}, got {table[key]!r:.80}")
        for variable, text in table.get("env", {}).items() if "env" in checks else ():
            table["env"][variable] = _filled_in(text, f"{path}: [{name}] env: {variable}")
        if "command" in checks and "command" not in table:
            raise ValueError(f"{path}: [{name}] command: missing")
    return tables


def _filled_in(text: str, place: str) -> str:
    """Replace ${NAME} and ${NAME:-default} by this machine's variables, as bash does."""

    def value(match: re.Match) -> str:
        found = os.environ.get(match[1], "")
        if match[2] is None and match[1] not in os.environ:
            raise ValueError(f"{place}: this machine has no variable {match[1]}; set it, or give a default")
        return found or match[2] or ""

    return re.sub(r"\$\{([A-Za-z_]\w*)(?::-([^}]*))?\}", value, text)
