"""A version's files, brought here whole: a transfer may break off without an error, or change a byte."""

import shutil
from collections.abc import Callable
from pathlib import Path

from features.errors import InputError
from features.files import hash_tree
from serving.manifest import verified_manifest
from serving.models import NotNow, Registered

Download = Callable[[Registered, Path], Path]


def download_whole(found: Registered, files: Path, download: Download) -> Path:
    """A bundle that is as its digests say; what is not is downloaded once more.

    Args:
        found: the version.
        files: a folder for its files, which is made.
        download: copies them into it and returns the path of the bundle among them.

    Raises:
        InputError: the same has arrived twice, and is no bundle or not as its digests say: so it is in the registry.
        NotNow: what has arrived was damaged twice, and not alike.
    """
    arrived: dict[str, str] | None = None
    while True:
        bundle = download(found, files)
        reason = _damage(bundle, found)
        if reason is None:
            return bundle
        before, arrived = arrived, hash_tree(bundle)
        if before == arrived:
            raise InputError(reason)
        if before is not None:
            raise NotNow(f"{found.uri} was downloaded twice, and damaged twice, each time in another way")
        shutil.rmtree(files, ignore_errors=True)


def _damage(bundle: Path, found: Registered) -> str | None:
    """What is wrong with what was downloaded, told without paths."""
    if not bundle.is_dir():
        return f"{found.uri} holds no bundle"
    try:
        verified_manifest(bundle)
    except InputError as error:
        return str(error).replace(str(bundle), found.uri)
    return None
