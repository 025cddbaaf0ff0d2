"""Amazon Reviews as UCSD and Stanford publish them: the 5-core categories.

The 2014 files hold one review a line (JSON) with times in seconds; the 2023
files hold one rating a line (CSV) with times in milliseconds, and only the
earliest rating of a user for an item.
"""

import contextlib
import dataclasses
import gzip
from collections.abc import Iterator
from typing import IO

import polars as pl
import tensorflow_datasets as tfds

HOMEPAGE = "https://amazon-reviews-2023.github.io/"
CITATION = """\
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
CATEGORIES_2014 = (
  "Amazon_Instant_Video",
  "Apps_for_Android",
  "Automotive",
  "Baby",
  "Beauty",
  "Books",
  "CDs_and_Vinyl",
  "Cell_Phones_and_Accessories",
  "Clothing_Shoes_and_Jewelry",
  "Digital_Music",
  "Electronics",
  "Grocery_and_Gourmet_Food",
  "Health_and_Personal_Care",
  "Home_and_Kitchen",
  "Kindle_Store",
  "Movies_and_TV",
  "Musical_Instruments",
  "Office_Products",
  "Patio_Lawn_and_Garden",
  "Pet_Supplies",
  "Sports_and_Outdoors",
  "Tools_and_Home_Improvement",
  "Toys_and_Games",
  "Video_Games",
)
CATEGORIES_2023 = (
  "All_Beauty",
  "Arts_Crafts_and_Sewing",
  "Automotive",
  "Baby_Products",
  "Beauty_and_Personal_Care",
  "Books",
  "CDs_and_Vinyl",
  "Cell_Phones_and_Accessories",
  "Clothing_Shoes_and_Jewelry",
  "Electronics",
  "Gift_Cards",
  "Grocery_and_Gourmet_Food",
  "Health_and_Household",
  "Home_and_Kitchen",
  "Industrial_and_Scientific",
  "Kindle_Store",
  "Magazine_Subscriptions",
  "Movies_and_TV",
  "Musical_Instruments",
  "Office_Products",
  "Patio_Lawn_and_Garden",
  "Pet_Supplies",
  "Software",
  "Sports_and_Outdoors",
  "Tools_and_Home_Improvement",
  "Toys_and_Games",
  "Unknown",
  "Video_Games",
)
_URL_2014 = "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles"
_URL_2023 = (
  "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_2023/benchmark"
  "/5core/rating_only"
)
_COLUMNS = ("user", "item", "rating", "time")
_DTYPES = (pl.String, pl.String, pl.Float32, pl.Int64)
_FIELDS_2014 = ("reviewerID", "asin", "overall", "unixReviewTime")
_FIELDS_2023 = ("user_id", "parent_asin", "rating", "timestamp")


@dataclasses.dataclass(eq=False, kw_only=True)
class AmazonConfig(tfds.core.BuilderConfig):
  """One 5-core category of one release.

  Attributes:
    url: where the file is published.
    header: the first line of the file, None where there is none.
    line: what a line of the file looks like.
  """

  url: str
  header: str | None = None
  line: str

  # No published checksums of these files are known to us.
  size = None
  checksum = None
  ids = str

  @contextlib.contextmanager
  def open(self, archive: IO[bytes]) -> Iterator[IO[bytes]]:
    """Streams the decompressed file."""
    with gzip.GzipFile(fileobj=archive) as stream:
      yield stream

  def parse(self, block: bytes) -> pl.DataFrame:
    """Parses whole lines to columns user, item, rating and time.

    Raises:
      polars.exceptions.PolarsError: on a malformed line.
    """
    if self.header is None:
      schema = dict(zip(_FIELDS_2014, _DTYPES, strict=True))
      frame = pl.read_ndjson(block, schema=schema)
      return frame.rename(dict(zip(_FIELDS_2014, _COLUMNS, strict=True)))
    schema = dict(zip(_COLUMNS, _DTYPES, strict=True))
    return pl.read_csv(block, has_header=False, schema=schema, quote_char=None)


def _config_2014(category: str) -> AmazonConfig:
  return AmazonConfig(
    name=f"2014_{category}",
    description=f"Amazon Reviews 2014, 5-core, {category}; times in seconds.",
    url=f"{_URL_2014}/reviews_{category}_5.json.gz",
    line="a JSON object with " + ", ".join(_FIELDS_2014),
  )


def _config_2023(category: str) -> AmazonConfig:
  return AmazonConfig(
    name=f"2023_{category}",
    description=(
      f"Amazon Reviews 2023, 5-core, {category}; times in milliseconds."
    ),
    url=f"{_URL_2023}/{category}.csv.gz",
    header=",".join(_FIELDS_2023),
    line=",".join(_FIELDS_2023),
  )


CONFIGS = [
  *map(_config_2014, CATEGORIES_2014),
  *map(_config_2023, CATEGORIES_2023),
]
