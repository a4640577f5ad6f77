"""The generated worlds by name, as in `--tasks world:tool`."""

from echo_min.file_world import file_world
from echo_min.python_world import python_world
from echo_min.tasks import World
from echo_min.tool_world import TOOL_WORLDS

WORLDS = TOOL_WORLDS | {"file": file_world, "python": python_world}


def load_world(name: str) -> World:
    """Raises ValueError for an unknown name."""
    if name not in WORLDS:
        raise ValueError(f"world:{name} does not exist; there is {', '.join(f'world:{n}' for n in WORLDS)}")
    return WORLDS[name]()
