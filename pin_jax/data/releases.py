"""Public data sets as they are published: archives and line formats.

MovieLens by GroupLens; the 5-core categories of Amazon Reviews: of 2014 one
review a line (JSON), times in seconds; of 2023 one rating a line (CSV), times
in milliseconds, and only the earliest rating of a user for an item.
"""

import contextlib
import dataclasses
import gzip
import zipfile
from collections.abc import Iterator
from typing import IO

import polars as pl
import tensorflow_datasets as tfds

from pin_jax.types import InputError

MOVIELENS_CITATION = """\
@article{harper2015movielens,
  author = {F. Maxwell Harper and Joseph A. Konstan},
  title = {The MovieLens Datasets: History and Context},
  journal = {ACM Transactions on Interactive Intelligent Systems},
  volume = {5}, number = {4}, year = {2015}, doi = {10.1145/2827872}
}
"""
AMAZON_CITATION = """\
@inproceedings{he2016ups,
  author = {Ruining He and Julian McAuley},
  title = {Ups and Downs: Modeling the Visual Evolution of Fashion Trends with
    One-Class Collaborative Filtering},
  booktitle = {WWW}, year = {2016}
}
@article{hou2024bridging,
  author = {Yupeng Hou and Jiacheng Li and Zhankui He and An Yan and Xiusi Chen
    and Julian McAuley},
  title = {Bridging Language and Items for Retrieval and Recommendation},
  journal = {arXiv preprint arXiv:2403.03952}, year = {2024}
}
"""


@dataclasses.dataclass(eq=False, kw_only=True)
class Release(tfds.core.BuilderConfig):
  """One published file of ratings.

  Attributes:
    url: of the archive.
    ids: int or str, of users and items.
    member: path of the ratings inside a zip archive; None = gzipped text.
    fields: names of user, item, rating and time in the file.
    header: whether they are its first line.
    separator: what stands between them in a line; None = a line is JSON.
  """

  url: str
  ids: type
  member: str | None = None
  fields: tuple[str, ...] = ("user", "item", "rating", "time")
  header: bool = False
  separator: str | None = ","

  @property
  def file_name(self) -> str:
    """Of the archive."""
    return self.url.rpartition("/")[2]

  @property
  def line(self) -> str:
    """What a line of the ratings looks like."""
    if self.separator is None:
      return "a JSON object with " + ", ".join(self.fields)
    return self.separator.join(self.fields)

  @contextlib.contextmanager
  def open(self, archive: IO[bytes]) -> Iterator[IO[bytes]]:
    """Streams the ratings straight from the archive; nothing is extracted."""
    if self.member is None:
      with gzip.GzipFile(fileobj=archive) as stream:
        yield stream
      return
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
      polars.exceptions.PolarsError, ValueError: on a malformed line.
    """
    kind = pl.Int64 if self.ids is int else pl.String
    dtypes = (kind, kind, pl.Float32, pl.Int64)
    columns = ("user", "item", "rating", "time")
    if self.separator is None:
      schema = dict(zip(self.fields, dtypes, strict=True))
      return pl.read_ndjson(block, schema=schema).rename(
        dict(zip(self.fields, columns, strict=True))
      )
    schema = {}
    for name, dtype in zip(columns, dtypes, strict=True):
      # "::" reads as two separators around a column that is always empty.
      if schema and len(self.separator) == 2:
        schema[f"gap before {name}"] = pl.String
      schema[name] = dtype
    frame = pl.read_csv(
      block, has_header=False, schema=schema, separator=self.separator[0],
      quote_char=None,
    )
    if any(gap.count() for gap in frame.drop(columns)):
      raise ValueError(f"fields are not separated by {self.separator!r}")
    return frame.select(columns)


def _movielens(name: str, member: str, description: str) -> Release:
  separators = {".csv": ",", ".dat": "::", ".data": "\t"}
  separator = separators[member[member.index(".") :]]
  of_csv = {
    "fields": ("userId", "movieId", "rating", "timestamp"), "header": True
  }
  return Release(
    name=name, description=description, ids=int, separator=separator,
    url=f"https://files.grouplens.org/datasets/movielens/ml-{name}.zip",
    member=f"ml-{name}/{member}", **(of_csv if separator == "," else {}),
  )


MOVIELENS = [_movielens(*release) for release in (
  ("100k", "u.data", "100 000 ratings by 943 users of 1 682 films, 1997-1998."),
  ("1m", "ratings.dat",
   "1 000 209 ratings by 6 040 users of about 3 900 films, 2000."),
  ("20m", "ratings.csv", "20 000 263 ratings by 138 493 users, 1995-2015."),
  ("25m", "ratings.csv", "25 000 095 ratings by 162 541 users, 1995-2019."),
  ("latest-small", "ratings.csv",
   "100 836 ratings by 610 users; GroupLens may replace it."),
)]

_SHARED = """
  Automotive Books CDs_and_Vinyl Cell_Phones_and_Accessories
  Clothing_Shoes_and_Jewelry Electronics Grocery_and_Gourmet_Food
  Home_and_Kitchen Kindle_Store Movies_and_TV Musical_Instruments
  Office_Products Patio_Lawn_and_Garden Pet_Supplies Sports_and_Outdoors
  Tools_and_Home_Improvement Toys_and_Games Video_Games
"""
CATEGORIES_2014 = sorted(f"""{_SHARED}
  Amazon_Instant_Video Apps_for_Android Baby Beauty Digital_Music
  Health_and_Personal_Care
""".split())
CATEGORIES_2023 = sorted(f"""{_SHARED}
  All_Beauty Arts_Crafts_and_Sewing Baby_Products Beauty_and_Personal_Care
  Gift_Cards Health_and_Household Industrial_and_Scientific
  Magazine_Subscriptions Software Unknown
""".split())
AMAZON = [
  Release(
    name=f"2014_{category}", ids=str, separator=None,
    description=f"Amazon Reviews 2014, 5-core, {category}; times in seconds.",
    url="https://snap.stanford.edu/data/amazon/productGraph/categoryFiles"
    f"/reviews_{category}_5.json.gz",
    fields=("reviewerID", "asin", "overall", "unixReviewTime"),
  )
  for category in CATEGORIES_2014
] + [
  Release(
    name=f"2023_{category}", ids=str, header=True,
    description=f"Amazon Reviews 2023, 5-core, {category}; times in "
    "milliseconds.",
    url="https://mcauleylab.ucsd.edu/public_datasets/data/amazon_2023/benchmark"
    f"/5core/rating_only/{category}.csv.gz",
    fields=("user_id", "parent_asin", "rating", "timestamp"),
  )
  for category in CATEGORIES_2023
]
