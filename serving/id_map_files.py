"""The managed ids of a bundle: a file for each table whose rows were given out while training went on."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from features.errors import InputError, one_line
from features.id_maps import IdMap
from features.pipeline import FeaturePipeline
from masknet.model import Table

_IDS, _ROWS, _STEP, _USAGE = "ids", "rows", "step", "usage."


def save_id_maps(folder: Path, tables: tuple[Table, ...], id_maps: Mapping[str, IdMap]) -> None:
    """Write id_maps/ into a bundle's folder; nothing where there are no maps."""
    for index, table in enumerate(tables):
        if table.name in id_maps:
            path = _file(folder, index)
            path.parent.mkdir(exist_ok=True)
            save_file(_tensors(id_maps[table.name]), path, metadata={"field": table.name})


def _tensors(id_map: IdMap) -> dict[str, np.ndarray]:
    usage = {f"{_USAGE}{name}": used_K for name, used_K in id_map.usage.items()}
    return {_IDS: id_map.ids_K, _ROWS: id_map.rows_K, _STEP: np.array([id_map.step], np.int64), **usage}


def load_id_maps(folder: Path, tables: tuple[Table, ...], pipeline: FeaturePipeline) -> dict[str, IdMap]:
    """The maps of a bundle by their tables' names.

    Raises:
        InputError: a file is missing or is no map of its table; names the file.
    """
    managed = set(pipeline.managed.values())
    return {
        table.name: _load(_file(folder, index), table) for index, table in enumerate(tables) if table.name in managed
    }


def _load(path: Path, table: Table) -> IdMap:
    try:
        found = load_file(path)
        usage = {name.removeprefix(_USAGE): found[name] for name in found if name.startswith(_USAGE)}
        id_map = IdMap(found[_IDS], found[_ROWS], usage, int(found[_STEP][0]))
    except (SafetensorError, OSError, KeyError, IndexError) as error:
        raise InputError(f"bundle: {path} is no map of managed ids: {one_line(error)}") from None
    id_map.require_rows_below(table.rows, f"bundle: {path}")
    return id_map


def _file(folder: Path, index: int) -> Path:
    return folder / "id_maps" / f"{index:03d}.safetensors"
