"""Whether torch and fbgemm fit together; a build that does not fails at import with undefined symbols."""

from importlib import metadata

from features.errors import InputError

# https://github.com/pytorch/FBGEMM releases, checked by import for 2.13
FBGEMM_OF_TORCH = {"2.11": "1.6", "2.12": "1.7", "2.13": "1.8"}
_BUILDS = ("fbgemm-gpu", "fbgemm-gpu-cpu")


def check_stack() -> None:
    """InputError naming both versions and the one to install, unless fbgemm fits torch."""
    torch = _version("torch")
    if torch is None:
        raise InputError("torch is not installed; `make setup` installs everything")
    wanted = FBGEMM_OF_TORCH.get(_minor(torch))
    if wanted is None:
        raise InputError(f"torch {torch} is not supported; install one of {', '.join(FBGEMM_OF_TORCH)}")
    build, found = next(((name, v) for name in _BUILDS if (v := _version(name))), (_BUILDS[1], None))
    if found is None or _minor(found) != wanted:
        have = f"{build} {found}" if found else "no fbgemm"
        raise InputError(
            f"torch {torch} needs {build} {wanted}, but there is {have}: pip install '{build}=={wanted}.*'"
        )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])
