"""Times as seconds since 1970 (UTC), and the parts of them that are features."""

import math
from datetime import UTC, datetime, timedelta

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from features.errors import InputError
from features.utf8 import sound_text

_ISO = (
    r"^(?<date>\d{4}-\d{2}-\d{2})(?:[T ](?<time>\d{2}:\d{2})(?<second>:\d{2})?(?<fraction>\.\d{1,9})?"
    r"(?:[Zz]|(?<hours>[+-]\d{2}):?(?<minutes>\d{2}))?)?$"
)
BoolN = npt.NDArray[np.bool_]
_EARLIEST, _LATEST = -62_135_596_800.0, 253_402_300_799.0  # the years 1 to 9999


def as_seconds(column: pa.Array, name: str, form: str | None) -> tuple[pa.Array, BoolN | None]:
    """Seconds as double, and which rows are no time: numbers are seconds; text is read by `form` or as ISO 8601.

    Times without a zone are UTC. Null and empty text are missing.
    """
    if pa.types.is_date(column.type) or pa.types.is_timestamp(column.type):
        seconds = pl.Series("time", column).cast(pl.Datetime("us")).dt.timestamp("us").cast(pl.Float64) / 1e6
        given = seconds.is_not_null()
    elif form is not None or pa.types.is_string(column.type):
        try:
            column, broken_N = sound_text(column.cast(pa.string()))
            text = pl.Series("time", column, dtype=pl.String).str.strip_chars()
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            raise InputError(f"column {name!r} holds {column.type}, which is no time") from None
        given = text.is_not_null() & (text != "")
        given = given if broken_N is None else given | pl.Series(broken_N)
        seconds = _by_format(text, form, name) if form else _by_guess(text)
    else:
        return plain_seconds(column, name)
    bad_N = (given & ~_is_time(seconds)).to_numpy()
    return seconds.to_arrow(), bad_N if bad_N.any() else None


def plain_seconds(column: pa.Array, name: str) -> tuple[pa.Array, BoolN | None]:
    """A numeric column as seconds."""
    try:
        values = pc.cast(column, pa.float64(), safe=False)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise InputError(f"column {name!r} holds {column.type}, which is no time") from None
    seconds = pl.Series("time", values, dtype=pl.Float64).fill_nan(None)
    bad_N = (seconds.is_not_null() & ~_is_time(seconds)).to_numpy()
    return seconds.to_arrow(), bad_N if bad_N.any() else None


def _is_time(seconds: pl.Series) -> pl.Series:
    return seconds.is_between(_EARLIEST, _LATEST).fill_null(False)


def _by_format(text: pl.Series, form: str, name: str) -> pl.Series:
    if "%H" in form and "%M" not in form:  # an hour alone is no time of day to the parser
        text, form = text + "00", form + "%M"
    try:
        times = text.str.to_datetime(form, time_unit="us", strict=False, ambiguous="null")
    except pl.exceptions.PolarsError as error:
        raise InputError(f"column {name!r}: the time format {form!r} cannot be used: {error}") from None
    return times.dt.timestamp("us").cast(pl.Float64) / 1e6


def _by_guess(text: pl.Series) -> pl.Series:
    """Seconds, or ISO 8601: a date, or a date and a time of day, with or without a zone, each value by itself."""
    seconds = text.cast(pl.Float64, strict=False)
    if seconds.null_count() == text.null_count():
        return seconds
    parts = text.str.extract_groups(_ISO).struct.unnest()
    stamp = parts.select(
        pl.concat_str(
            "date", pl.lit("T"), pl.col("time").fill_null("00:00"), pl.col("second").fill_null(":00"),
            pl.col("fraction").fill_null(""),
        )
    ).to_series()  # fmt: skip
    utc = stamp.str.to_datetime("%Y-%m-%dT%H:%M:%S%.f", time_unit="us", strict=False).dt.timestamp("us")
    east = parts.select(
        pl.when(pl.col("hours").is_null())
        .then(0)
        .otherwise(
            pl.col("hours").cast(pl.Int64) * 3600
            + pl.col("minutes").cast(pl.Int64)
            * 60
            * pl.when(pl.col("hours").str.starts_with("-")).then(-1).otherwise(1)
        )
    ).to_series()
    return seconds.fill_null(utc.cast(pl.Float64) / 1e6 - east.cast(pl.Float64))


def part_of(seconds: pa.Array, part: str, timezone: str) -> npt.NDArray[np.int64]:
    """hour 0–23, weekday 0–6 from Monday, day 0–30 or month 0–11 of each time in `timezone`; −1 where it is missing."""
    micros = (pl.Series("time", seconds, dtype=pl.Float64).floor() * 1e6).cast(pl.Int64)
    times = micros.cast(pl.Datetime("us")).dt.replace_time_zone("UTC").dt.convert_time_zone(timezone).dt
    found = {"hour": times.hour, "weekday": times.weekday, "day": times.day, "month": times.month}[part]()
    first = 0 if part == "hour" else 1
    return (found.cast(pl.Int64) - first).fill_null(-1).to_numpy()


def from_seconds(seconds: float) -> datetime:
    """A time in UTC; ValueError or OverflowError where it is none of the years 1 to 9999."""
    if not math.isfinite(seconds):
        raise ValueError(f"{seconds} is no time")
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds)
