"""A result as JSON and in the terminal, and the progress towards it; with plain lines where rich is not installed."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from features.errors import InputError

_NUMBERS = {"p20": "p20 ms", "p50": "p50 ms", "p80": "p80 ms", "ratio": "ratio", "copy_share": "of copy"}
_UNSHOWN = {"name", "rival", "unit", "runs", "clock", "baseline", "bytes", "gb_per_second", "fits_l2", "faster_share"}


def check_writable(out: Path) -> None:
    """InputError where a result could not be written to `out`, before it is measured."""
    try:
        if out.is_dir():
            raise IsADirectoryError("it is a folder")
        out.parent.mkdir(parents=True, exist_ok=True)
        part = _part(out)
        part.touch()
        part.unlink()
    except OSError as error:
        raise InputError(f"--out {out}: {error.strerror or error}") from None


def write(out: Path, result: dict[str, Any]) -> None:
    """Write the whole result or nothing."""
    part = _part(out)
    try:
        part.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)


def _part(out: Path) -> Path:
    return out.with_name(f".{out.name}.{os.getpid()}.part")


@contextmanager
def progress(total: int) -> Iterator[Callable[[int, str], None]]:
    """What to call with the number of cases done and the next one's name: a bar on standard error, on a terminal."""
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ModuleNotFoundError:
        yield lambda done, name: None
        return
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        yield lambda done, name: bar.update(task, completed=done, description=name)


def show(result: dict[str, Any]) -> None:
    """The rows, what was skipped, and the line for the dispatcher."""
    heads = ["measured", "case", "rival", *_NUMBERS.values()]
    lines = [_cells(row) for row in result["rows"]]
    try:
        from rich.console import Console
        from rich.table import Table
    except ModuleNotFoundError:
        widths = [max(map(len, column)) for column in zip(heads, *lines, strict=True)]
        for cells in [heads, *lines]:
            print("  ".join(map(str.ljust, cells, widths)).rstrip())
    else:
        table = Table(title=device_line(result), title_justify="left")
        for place, head in enumerate(heads):
            table.add_column(head, justify="right" if place > 2 else "left", no_wrap=place != 1)
        before: list[str] = []
        for cells in lines:  # a case's name and facts once
            table.add_row(*(["", "", *cells[2:]] if cells[:2] == before else cells))
            before = cells[:2]
        terminal = Console()
        (terminal if terminal.is_terminal else Console(width=160)).print(table)
    for entry in result["skipped"]:
        what = ", ".join(str(value) for key, value in entry.items() if key != "reason")
        print(f"skipped: {what}: {entry['reason']}")
    if "measured_gemms" in result:
        print(result["measured_gemms"])


def device_line(result: dict[str, Any]) -> str:
    """The device in a line."""
    device = result["device"]
    copy = result.get("copy_gb_per_second")
    return str(device.get("gpu") or device["cpu"]) + (f", copies at {copy:,.0f} GB/s" if copy else "")


def _cells(row: dict[str, Any]) -> list[str]:
    facts = " ".join(f"{key}={value}" for key, value in row.items() if key not in _UNSHOWN | _NUMBERS.keys())
    numbers = (row.get(key) for key in _NUMBERS)
    return [row["name"], facts, row["rival"], *("–" if each is None else f"{each:g}" for each in numbers)]
