"""MovieLens-100k as one flat table of impressions (Harper and Konstan, 2015, doi:10.1145/2827872).

The files ship inside the PyPI wheel recbole==1.2.1, of which nothing is imported; where it is not installed, the
official archive is downloaded.
"""

import io
import urllib.error
import urllib.request
import zipfile
from importlib import metadata
from importlib.resources import files
from pathlib import Path

import polars as pl

from features.errors import InputError
from features.files import file_written_whole

SCHEMA = Path(str(files("features.schemas") / "movielens.yaml"))
ARCHIVE = "https://files.grouplens.org/datasets/movielens/ml-100k.zip"
_WHEEL_FOLDER = "recbole/dataset_example/ml-100k"
_GENRES = [
    "unknown",
    "Action",
    "Adventure",
    "Animation",
    "Children's",
    "Comedy",
    "Crime",
    "Documentary",
    "Drama",
    "Fantasy",
    "Film-Noir",
    "Horror",
    "Musical",
    "Mystery",
    "Romance",
    "Sci-Fi",
    "Thriller",
    "War",
    "Western",
]


def write_flat(path: Path) -> int:
    """Write 100,000 rated impressions with their user's and film's columns to a Parquet file; return the rows.

    Raises:
        InputError: neither the wheel nor the download is to be had.
    """
    flat = _from_wheel()
    if flat is None:
        flat = _from_archive()
    with file_written_whole(path) as aside:
        flat.write_parquet(aside)
    return flat.height


def _join(ratings: pl.DataFrame, users: pl.DataFrame, films: pl.DataFrame) -> pl.DataFrame:
    columns = ["user_id", "item_id", "rating", "timestamp", "age", "gender", "occupation", "title", "year", "genres"]
    joined = ratings.join(users, on="user_id", how="left").join(films, on="item_id", how="left")
    return joined.select(columns).with_columns(pl.col("rating", "timestamp", "age").cast(pl.Float64).cast(pl.Int64))


def _from_wheel() -> pl.DataFrame | None:
    try:
        folder = Path(str(metadata.distribution("recbole").locate_file(_WHEEL_FOLDER)))
    except metadata.PackageNotFoundError:
        return None
    if not folder.is_dir():
        return None

    def read(kind: str, names: dict[str, str]) -> pl.DataFrame:
        table = pl.read_csv(folder / f"ml-100k.{kind}", separator="\t", quote_char=None, infer_schema=False)
        return table.select(pl.col(old).alias(new) for old, new in names.items())

    ratings = {"user_id:token": "user_id", "item_id:token": "item_id", "rating:float": "rating"}
    users = {"user_id:token": "user_id", "age:token": "age", "gender:token": "gender", "occupation:token": "occupation"}
    films = {"movie_title:token_seq": "title", "release_year:token": "year", "class:token_seq": "genres"}
    return _join(
        read("inter", ratings | {"timestamp:float": "timestamp"}),
        read("user", users),
        read("item", {"item_id:token": "item_id"} | films),
    )


def _from_archive() -> pl.DataFrame:
    try:
        with urllib.request.urlopen(ARCHIVE, timeout=30) as answer:
            archive = zipfile.ZipFile(io.BytesIO(answer.read()))
    except (urllib.error.URLError, OSError, zipfile.BadZipFile) as error:
        raise InputError(
            f"MovieLens-100k is not here: install it with `pip install --no-deps recbole==1.2.1`, or make {ARCHIVE} "
            f"reachable ({error})"
        ) from None

    def read(name: str, separator: str, names: list[str]) -> pl.DataFrame:
        text = archive.read(f"ml-100k/{name}").decode("latin-1").encode()
        table = pl.read_csv(text, separator=separator, has_header=False, quote_char=None, infer_schema=False)
        return table.rename(dict(zip(table.columns, names, strict=True)))

    films = read("u.item", "|", ["item_id", "title", "date", "video", "url", *_GENRES])
    genres = pl.concat_str(
        [pl.when(pl.col(name) == "1").then(pl.lit(name)) for name in _GENRES], separator=" ", ignore_nulls=True
    )
    films = films.select(
        "item_id",
        pl.col("title").str.replace(r" \(\d{4}\)$", ""),
        pl.col("date").str.slice(-4).alias("year"),
        genres.alias("genres"),
    )
    return _join(
        read("u.data", "\t", ["user_id", "item_id", "rating", "timestamp"]),
        read("u.user", "|", ["user_id", "age", "gender", "occupation", "zip"]),
        films,
    )
