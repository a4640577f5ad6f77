"""Tasks as `--tasks` names them: a generated world (`world:tool`), or a folder in Harbor's format."""

from pathlib import Path

from echo_min.tasks import World
from echo_min.worlds.file import file_world
from echo_min.worlds.python import python_world
from echo_min.worlds.tool import TOOL_WORLDS

WORLDS = TOOL_WORLDS | {"file": file_world, "python": python_world}


def load_world(name: str) -> World:
    """Raises ValueError for an unknown name."""
    if name not in WORLDS:
        raise ValueError(f"world:{name} does not exist; there is {', '.join(f'world:{n}' for n in WORLDS)}")
    return WORLDS[name]()


def load_tasks(name: str, allow_network: bool = False) -> World:
    """`world:NAME`, or a folder. Raises ValueError for one that is neither, or holds a malformed task."""
    if name.startswith("world:"):
        return load_world(name.removeprefix("world:"))
    if not Path(name).is_dir():
        raise ValueError(f"tasks: {name!r} is neither world:NAME nor a folder")
    from echo_min.worlds.harbor import harbor_world  # who plays in a generated world needs none of it

    return harbor_world(Path(name), allow_network)
