"""A bundle's manifest: what is in the folder, down to the last byte, and in which format."""

from pathlib import Path
from typing import Any

from features.errors import InputError
from features.files import hash_tree, read_json, sha256_file, write_json

FORMAT = 3
READ = (FORMAT, 2)  # 2 knows neither calibration nor several members
MANIFEST, SEAL = "manifest.json", "manifest.sha256"
_KEYS = {"format", "name", "model", "schema_digest", "pipeline_digest", "sampling_rate", "run_id", "metrics", "files"}

Manifest = dict[str, Any]


def seal(folder: Path, facts: Manifest) -> Manifest:
    """Write the manifest of a folder whose other files are all there, and return it."""
    manifest = {"format": FORMAT, **facts, "files": hash_tree(folder)}
    write_json(folder / MANIFEST, manifest)
    (folder / SEAL).write_text(sha256_file(folder / MANIFEST))
    return manifest


def verified_manifest(path: Path) -> Manifest:
    """The manifest of a bundle all of whose files are as they were written; `members` is the run of each, or null.

    Raises:
        InputError: there is no bundle, its format is not read here, or a file is missing, changed or strange.
    """
    for file in (MANIFEST, SEAL):
        if not (path / file).is_file():
            raise InputError(f"{path} is no bundle: {file} is missing")
    if (path / SEAL).read_bytes() != sha256_file(path / MANIFEST).encode():
        raise InputError(f"bundle {path} is damaged: {MANIFEST} does not match {SEAL}")
    manifest = read_json(path / MANIFEST, "bundle")
    if isinstance(manifest, dict) and (found := manifest.get("format", FORMAT)) not in READ:
        update = "update it" if found > FORMAT else "train the model anew"
        raise InputError(f"bundle {path} has format {found}; this program reads {READ[0]} and {READ[1]}: {update}")
    if not isinstance(manifest, dict) or not manifest.keys() >= _KEYS:
        raise InputError(f"bundle {path} is damaged: {MANIFEST} lacks keys")
    if manifest["format"] < FORMAT:
        manifest["members"] = [manifest["run_id"]]
    if not manifest.get("members"):
        raise InputError(f"bundle {path} is damaged: {MANIFEST} names no members")
    _require_files(path, manifest["files"])
    return manifest


def _require_files(path: Path, files: dict[str, str]) -> None:
    found = hash_tree(path)
    strangers = found.keys() - files.keys() - {MANIFEST, SEAL}
    if strangers:
        raise InputError(f"bundle {path} is damaged: {min(strangers)} is not in {MANIFEST}")
    for file, digest in files.items():
        if file not in found:
            raise InputError(f"bundle {path} is damaged: {file} is missing")
        if found[file] != digest:
            raise InputError(f"bundle {path} is damaged: the SHA-256 of {file} is not the one in {MANIFEST}")
