"""Raw inputs: which files a path, a folder, a glob or a URI (s3://, gs://, file://) names."""

import glob
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import quote, unquote, urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from features.errors import InputError, one_line

_TEXT = (".csv", ".tsv", ".txt", ".data", ".libfm")
_PACKED = (".gz", ".zst")
_NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"

Kind = Literal["text", "packed", "parquet"]


@dataclass(frozen=True)
class Source:
    """A file, and the columns that its folders' names give (`dt=2026-01-01/`)."""

    path: str
    kind: Kind
    size: int
    partitions: tuple[tuple[str, str | None], ...] = ()

    def filesystem(self) -> tuple[pafs.FileSystem, str]:
        """Arrow's file system for the path, and the path on it."""
        return _filesystem(self.path)


def find_sources(sources: list[str]) -> list[Source]:
    """The files that `sources` name, in sorted order for a folder or a glob.

    Raises:
        InputError: a source names nothing or a file twice, or a file is of a kind that cannot be read.
    """
    found: list[Source] = []
    for given in sources:
        # a file on this machine is known by its path, whatever it was called
        source = unquote(urlsplit(given).path) if given.startswith("file://") else given
        try:
            files = _find_remote(source) if "://" in source else _find_local(source)
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"input {source} cannot be listed: {one_line(error)}") from None
        if not files:
            raise InputError(f"input {source} names no file")
        found.extend(files)
    refuse_twice(found)
    return found


def _find_local(source: str) -> list[Source]:
    path = Path(source)
    if path.is_dir():
        inside = (file for file in path.rglob("*") if file.is_file() and file.stat().st_size)
        files = sorted(file for file in inside if not _is_hidden(file.relative_to(path).parts))
        return [_source(str(file), file.stat().st_size, str(path)) for file in files]
    if path.exists():
        return [_source(source, path.stat().st_size, str(path.parent))]
    base = re.split(r"[*?\[]", source, maxsplit=1)[0].rpartition("/")[0]
    files = sorted(Path(name) for name in glob.glob(source, recursive=True) if Path(name).is_file())
    return [_source(str(file), file.stat().st_size, base) for file in files]


def _find_remote(source: str) -> list[Source]:
    address, mark, options = source.partition("?")
    filesystem, path = _filesystem(source)
    prefix = unquote(address).removesuffix(path)
    fixed, star, _ = path.partition("*")
    base = fixed.rpartition("/")[0] if star else path.rstrip("/")
    info = None if star else filesystem.get_file_info(path)
    if info is not None and info.type == pafs.FileType.File:
        return [_source(source, info.size, base)]
    listed = filesystem.get_file_info(pafs.FileSelector(base, allow_not_found=True, recursive=True))
    pattern = _pattern(path)
    return [
        _source(f"{prefix}{quote(info.path)}{mark}{options}", info.size, f"{prefix}{base}")
        for info in sorted(listed, key=lambda info: str(info.path))
        if info.type == pafs.FileType.File
        and info.size
        and not _is_hidden(tuple(info.path[len(base) :].strip("/").split("/")))
        and (not star or pattern.fullmatch(info.path))
    ]


def _pattern(path: str) -> re.Pattern[str]:
    """A glob of an address as a pattern; there is no "?", which begins the address's options."""
    parts = re.split(r"(\*\*/|\*\*|\*)", path)
    wild = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*"}
    return re.compile("".join(wild.get(part, re.escape(part)) for part in parts))


def _source(path: str, size: int, base: str) -> Source:
    """A file found below `base`, whose folders between there and the file may be named after columns."""
    plain = unquote(path.split("?", 1)[0]) if "://" in path else path
    suffixes = [suffix.lower() for suffix in Path(plain).suffixes[-2:]]
    packed = bool(suffixes) and suffixes[-1] in _PACKED
    last = (suffixes[:-1] if packed else suffixes)[-1:] or [""]
    if last[0] in _TEXT or last[0] == "":  # Criteo's day_0 and Avazu's train.gz say no more
        kind: Kind = "packed" if packed else "text"
    elif last[0] == ".parquet" and not packed:
        kind = "parquet"
    else:
        raise InputError(f"input {path} is neither .parquet nor {', '.join(_TEXT)} (plain, .gz or .zst)")
    below = plain.removeprefix(base).strip("/").split("/")[:-1]
    folders = [part.partition("=") for part in below]
    values = [(name, unquote(value)) for name, equals, value in folders if equals and name]
    if len({name for name, _ in values}) < len(values):
        raise InputError(f"input {path}: two of its folders are named after the same column")
    return Source(
        path, kind, size, tuple((name, None if value == _NULL_PARTITION else value) for name, value in values)
    )


def refuse_twice(sources: list[Source]) -> None:
    """InputError for a file that is named twice: its rows would count twice, or stand in two splits."""
    seen: set[str] = set()
    for source in sources:
        place = source.path if "://" in source.path else str(Path(source.path).resolve())
        if place in seen:
            raise InputError(f"input {source.path} is named twice")
        seen.add(place)


def _is_hidden(parts: tuple[str, ...]) -> bool:
    return any(part.startswith((".", "_")) for part in parts)  # as Spark and Arrow have it


def _filesystem(path: str) -> tuple[pafs.FileSystem, str]:
    if "://" not in path:
        return pafs.LocalFileSystem(), path
    try:
        filesystem, inside = pafs.FileSystem.from_uri(path.replace("*", "%2A"))
    except (pa.ArrowException, ValueError) as error:
        raise InputError(f"input {path} is no address of a file system: {one_line(error)}") from None
    return filesystem, unquote(inside)
