"""MovieLens as GroupLens publishes it: archives, checksums and line formats."""

import contextlib
import dataclasses
import zipfile
from collections.abc import Iterator
from typing import IO

import polars as pl
import tensorflow_datasets as tfds

from pin_jax.types import InputError

HOMEPAGE = "https://grouplens.org/datasets/movielens/"
CITATION = """\
@article{harper2015movielens,
  author = {F. Maxwell Harper and Joseph A. Konstan},
  title = {The MovieLens Datasets: History and Context},
  journal = {ACM Transactions on Interactive Intelligent Systems},
  volume = {5}, number = {4}, year = {2015}, doi = {10.1145/2827872}
}
"""
_SCHEMA = {
  "user": pl.Int64,
  "item": pl.Int64,
  "rating": pl.Float32,
  "time": pl.Int64,
}


@dataclasses.dataclass(eq=False, kw_only=True)
class MovieLensConfig(tfds.core.BuilderConfig):
  """One MovieLens release.

  Attributes:
    member: path of the ratings inside the archive.
    separator: what stands between user, item, rating and time.
    header: the first line of the ratings, None where there is none.
    size: bytes of the archive.
    checksum: SHA-256 of the archive, as TFDS records it.
  """

  member: str
  separator: str
  header: str | None = None
  size: int
  checksum: str

  ids = int

  @property
  def url(self) -> str:
    """Where GroupLens publishes the archive."""
    return f"https://files.grouplens.org/datasets/movielens/ml-{self.name}.zip"

  @property
  def line(self) -> str:
    """What a line of the ratings looks like."""
    return self.separator.join(["user", "item", "rating", "time"])

  @contextlib.contextmanager
  def open(self, archive: IO[bytes]) -> Iterator[IO[bytes]]:
    """Streams the ratings straight from the archive; nothing is extracted."""
    with zipfile.ZipFile(archive) as members:
      if self.member not in members.namelist():
        raise InputError(
          f"no {self.member!r} inside (found: {members.namelist()[:5]})"
        )
      with members.open(self.member) as stream:
        yield stream

  def parse(self, block: bytes) -> pl.DataFrame:
    """Parses whole lines to columns user, item, rating and time.

    Raises:
      polars.exceptions.PolarsError: on a malformed line.
      ValueError: on a malformed line.
    """
    schema = {}
    for name, dtype in _SCHEMA.items():
      # "::" reads as two separators around a column that is always empty.
      if schema and len(self.separator) == 2:
        schema[f"gap before {name}"] = pl.String
      schema[name] = dtype
    frame = pl.read_csv(
      block,
      has_header=False,
      schema=schema,
      separator=self.separator[0],
      quote_char=None,
    )
    if any(gap.count() for gap in frame.drop(*_SCHEMA)):
      raise ValueError(f"fields are not separated by {self.separator!r}")
    return frame.select(*_SCHEMA)


_HEADER = "userId,movieId,rating,timestamp"

CONFIGS = [
  MovieLensConfig(
    name="100k",
    description="100 000 ratings by 943 users of 1 682 films, 1997-1998.",
    member="ml-100k/u.data",
    separator="\t",
    size=4924029,
    checksum="50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229",
  ),
  MovieLensConfig(
    name="1m",
    description="1 000 209 ratings by 6 040 users of about 3 900 films, 2000.",
    member="ml-1m/ratings.dat",
    separator="::",
    size=5917549,
    checksum="a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20",
  ),
  MovieLensConfig(
    name="20m",
    description="20 000 263 ratings by 138 493 users, 1995-2015.",
    member="ml-20m/ratings.csv",
    separator=",",
    header=_HEADER,
    size=198702078,
    checksum="96f243c338a8665f6bcc89c53edf6ee39162a846940de6b7c8c48aeada765ff3",
  ),
  MovieLensConfig(
    name="25m",
    description="25 000 095 ratings by 162 541 users, 1995-2019.",
    member="ml-25m/ratings.csv",
    separator=",",
    header=_HEADER,
    size=261978986,
    checksum="8b21cfb7eb1706b4ec0aac894368d90acf26ebdfb6aced3ebd4ad5bd1eb9c6aa",
  ),
  MovieLensConfig(
    name="latest-small",
    description="100 836 ratings by 610 users; GroupLens may replace it.",
    member="ml-latest-small/ratings.csv",
    separator=",",
    header=_HEADER,
    size=978202,
    checksum="696d65a3dfceac7c45750ad32df2c259311949efec81f0f144fdfb91ebc9e436",
  ),
]
