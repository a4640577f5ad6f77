"""Tasks as `--tasks` names them: a generated world with its dials (`world:tool,words=2,linked=0.5`), or a
folder in Harbor's format. What a generated world holds is drawn by the run's seed."""

import inspect
from functools import partial
from pathlib import Path

from echo_min.tasks import World
from echo_min.worlds.file import file_world
from echo_min.worlds.filter import filter_world
from echo_min.worlds.gnu import gnu_world
from echo_min.worlds.tool import tool_world

WORLDS = {"tool": tool_world, "hard": partial(tool_world, words=2), "gnu": gnu_world}
WORLDS |= {"file": file_world, "filter": filter_world}


def load_world(name: str, seed: int) -> World:
    """NAME or NAME,DIAL=VALUE,... Raises ValueError that names what does not exist or is out of range."""
    short, *given = name.split(",")
    if short not in WORLDS:
        raise ValueError(f"world:{short} does not exist; there is {', '.join(f'world:{n}' for n in WORLDS)}")
    _, *parameters = inspect.signature(WORLDS[short]).parameters.values()  # the first is the seed
    known, dials = {p.name: p.annotation for p in parameters}, {}
    for dial, _, value in (text.partition("=") for text in given):
        try:
            dials[dial] = known[dial](value)
        except (KeyError, ValueError):
            described = ", ".join(f"{name}={kind.__name__}" for name, kind in known.items()) or "none"
            raise ValueError(f"world:{name}: {dial}={value} is no dial; {short} has {described}") from None
    return WORLDS[short](seed, **dials)


def load_tasks(name: str, allow_network: bool, seed: int) -> World:
    """`world:NAME`, or a folder. Raises ValueError for one that is neither, or holds a malformed task."""
    if name.startswith("world:"):
        return load_world(name.removeprefix("world:"), seed)
    if not Path(name).is_dir():
        raise ValueError(f"tasks: {name!r} is neither world:NAME nor a folder")
    from echo_min.worlds.harbor import harbor_world  # who plays in a generated world needs none of it

    return harbor_world(Path(name), allow_network)
