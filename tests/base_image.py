"""A base image without a registry: the files of some Debian packages that this machine has, and of all that
they depend on. `python tests/base_image.py [NAME]` puts it on the engine, for ECHO_MIN_BASE_IMAGE."""

import io
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import docker

from echo_min.terminals.docker_engine import DEFAULT

NAME = "echo_min_base:latest"
PACKAGES = """
base-files base-passwd bash coreutils dash diffutils findutils git grep gzip hostname libpython3-stdlib make
mawk mount procps python3-minimal sed tar util-linux
""".split()
LEFT_OUT = "perl", "git-man", "debconf", "media-types"  # large, and nothing needs them
LINKS = {folder: f"usr/{folder}" for folder in ("bin", "sbin", "lib", "lib64")}
LINKS |= {"usr/bin/awk": "mawk", "usr/bin/sh": "dash"}
FOLDERS = "proc sys dev run tmp root home etc var/tmp usr/local/bin".split()


def make_base_image(name: str = NAME) -> str:
    """-> the image's name. Where the packages are not installed, a registry has to do."""
    client = docker.from_env(timeout=600).api
    try:
        files = sorted({path for package in _closure() for path in _listed(package)})
    except (OSError, RuntimeError):
        needed = "git make procps python3"
        install = f"RUN apt-get update && apt-get install -y --no-install-recommends {needed}"
        said = list(client.build(fileobj=io.BytesIO(f"FROM {DEFAULT}\n{install}\n".encode()), tag=name))
        if not client.images(name):
            raise RuntimeError(f"no image to test with: {said[-3:]}") from None
        return name
    with tempfile.TemporaryFile() as buffer:
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for folder in FOLDERS:
                entry = tarfile.TarInfo(folder)
                entry.type, entry.mode = tarfile.DIRTYPE, 0o1777 if folder.endswith("tmp") else 0o755
                tar.addfile(entry)
            for link, target in LINKS.items():
                entry = tarfile.TarInfo(link)
                entry.type, entry.linkname = tarfile.SYMTYPE, target
                tar.addfile(entry)
            for path in files:
                if path.lstrip("/") not in [*FOLDERS, *LINKS]:
                    tar.add(path, path.lstrip("/"), recursive=False)
            for file in "passwd", "group":
                tar.add(f"/usr/share/base-passwd/{file}.master", f"etc/{file}")
        buffer.seek(0)
        client.import_image_from_data(buffer, repository=name.split(":")[0], tag=name.split(":")[1])
    return name


def _closure() -> set[str]:
    """The packages, and what they depend on, as far as it is installed."""
    query = ["dpkg-query", "-W", "-f", "${Package}\t${Pre-Depends},${Depends}\t${Provides}\n"]
    lines = subprocess.run(query, capture_output=True, text=True, check=True)
    depends, provider = {}, {}
    for line in lines.stdout.splitlines():
        package, needs, provides = line.split("\t")
        depends[package] = [re.split(r"[ (:]", need.strip())[0] for need in re.split(r"[,|]", needs)]
        provider |= {re.split(r"[ (]", name.strip())[0]: package for name in provides.split(",")}
    if missing := [package for package in PACKAGES if package not in depends]:
        raise RuntimeError(f"the test image needs packages: apt-get install {' '.join(missing)}")
    found, todo = set(), list(PACKAGES)
    while todo:
        package = todo.pop()
        package = package if package in depends else provider.get(package, "")
        if package and package not in found and not package.startswith(LEFT_OUT):
            found.add(package)
            todo += depends[package]
    return found


def _listed(package: str) -> list[str]:
    """Its files and links, as they lie in /usr."""
    listed = subprocess.run(["dpkg", "-L", package], capture_output=True, text=True, check=True)
    usr = (f"/usr{p}" if re.match(r"/(bin|sbin|lib|lib64)/", p) else p for p in listed.stdout.split("\n"))
    keep = [p for p in usr if p and not re.match(r"/usr/share/(doc|man|locale|info|bash-comp|perl)", p)]
    return [p for p in keep if os.path.islink(p) or Path(p).is_file()]


if __name__ == "__main__":
    print(make_base_image(*sys.argv[1:]))
