"""TFDS builders of public data sets, one record a user, without TensorFlow."""

import bisect
import gzip
import threading
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from typing import IO, Any

import numpy as np
import polars as pl
import tensorflow_datasets as tfds
from etils import epath

from pin_jax import disk
from pin_jax.data import releases
from pin_jax.data.interactions import Interactions, from_columns
from pin_jax.data.releases import Release
from pin_jax.types import InputError

_BLOCK_BYTES = 1 << 25
_EXPANSION = 100  # ratings in text shrink to a tenth at most
_LEAST_BYTES = 1 << 26  # an archive may always expand to so much
_RECORDS_AT_ONCE = 4096
_PATIENCE = 8  # seconds
_DAMAGE = (
  zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError,
  RuntimeError,  # zipfile: encrypted or of an unknown compression
)


class _UserSequences(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Prepares one record a user: items, ratings and times in time order.

  Ties in time keep the order of the file. The archive is taken from the manual
  directory if it is there, else downloaded, and read without extracting it.
  """

  VERSION = tfds.core.Version("1.0.0")
  HOMEPAGE: str
  CITATION: str

  def _info(self) -> tfds.core.DatasetInfo:
    item_dtype = np.int64 if self.builder_config.ids is int else np.str_
    return tfds.core.DatasetInfo(
      builder=self,
      description=self.builder_config.description,
      features=tfds.features.FeaturesDict({
        "user_id": tfds.features.Text(),
        "item_ids": tfds.features.Tensor(shape=(None,), dtype=item_dtype),
        "ratings": tfds.features.Tensor(shape=(None,), dtype=np.float32),
        "timestamps": tfds.features.Tensor(shape=(None,), dtype=np.int64),
      }),
      homepage=self.HOMEPAGE,
      citation=self.CITATION,
    )

  def _split_generators(
    self, dl_manager: tfds.download.DownloadManager
  ) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
    archive = _fetch(self.builder_config, dl_manager)
    return {"train": self._generate_examples(archive)}

  def _generate_examples(
    self, archive: epath.Path
  ) -> Iterator[tuple[str, dict[str, Any]]]:
    frame = _read_ratings(archive, self.builder_config)
    frame = frame.sort("user", "time", maintain_order=True)
    for (user,), rows in frame.group_by("user", maintain_order=True):
      yield str(user), {
        "user_id": str(user),
        "item_ids": rows["item"].to_numpy(),
        "ratings": rows["rating"].to_numpy(),
        "timestamps": rows["time"].to_numpy(),
      }


class MovieLens(_UserSequences, skip_registration=True):
  """MovieLens ratings; ids are integers, times are in seconds."""

  # TFDS has a `movielens` of its own (one record a rating); ours is therefore
  # not registered under that name but found through `BUILDERS`.
  name = "movielens"
  BUILDER_CONFIGS = releases.MOVIELENS
  HOMEPAGE = "https://grouplens.org/datasets/movielens/"
  CITATION = releases.MOVIELENS_CITATION
  url_infos = tfds.download.checksums.load_url_infos(
    tfds.core.tfds_path() / "url_checksums" / "movielens.txt"
  )


class AmazonReviews(_UserSequences, skip_registration=True):
  """Amazon Reviews, 5-core; ids are strings."""

  name = "amazon_reviews"
  BUILDER_CONFIGS = releases.AMAZON
  HOMEPAGE = "https://amazon-reviews-2023.github.io/"
  CITATION = releases.AMAZON_CITATION
  url_infos = {}  # no published checksums are known to us


BUILDERS: dict[str, type[_UserSequences]] = {
  "movielens": MovieLens,
  "amazon_reviews": AmazonReviews,
}


def read_tfds(
  name: str,
  *,
  data_dir: epath.PathLike | None = None,
  download: bool = True,
  manual_dir: epath.PathLike | None = None,
  **options: Any,
) -> Interactions:
  """Reads a public data set, preparing it on first use.

  Args:
    name: `movielens/100k`, `amazon_reviews/2014_Beauty` and the like.
    data_dir: where prepared data sets are; None = the default of TFDS.
    download: whether to prepare a data set that is not in `data_dir` yet.
    manual_dir: directory of archives that were downloaded by hand; None =
      `downloads/manual` in `data_dir`.
    **options: those of `from_columns`.

  Returns:
    The interactions with their original ids and times; ratings are left out.

  Raises:
    InputError: on an unknown name, a damaged archive or a failed download
      (within seconds where nobody answers). Of several processes that read it
      first, one prepares it and the others wait.
  """
  data_dir, manual_dir = (
    path if path is None else disk.place(key, path, here=True)
    for key, path in (("data_dir", data_dir), ("manual_dir", manual_dir))
  )
  if data_dir is not None and set(str(data_dir)) & set("*?["):
    raise InputError(
      f"data_dir={data_dir} has one of *, ? and [, which TFDS takes for "
      "patterns; use another"
    )
  builder = _builder(name, data_dir)
  if not builder.is_prepared():
    if not download:
      raise InputError(
        f"{name} is not prepared in {builder.data_path}: pass download=True,"
        " or the data_dir it was prepared in"
      )
    place = builder.data_path.parent
    place.mkdir(parents=True, exist_ok=True)
    with disk.locked(place.with_name(f".{place.name}.lock")):
      builder = _builder(name, data_dir)  # another process may have done it
      if not builder.is_prepared():
        builder.download_and_prepare(
          download_config=tfds.download.DownloadConfig(manual_dir=manual_dir)
        )
  source = builder.as_data_source(split="train")
  columns = _read_columns(source, builder.builder_config.ids)
  return from_columns(
    columns["user"], columns["item"], columns["time"], name=name, **options
  )


def _builder(name: str, data_dir: epath.PathLike | None) -> _UserSequences:
  dataset, _, config = str(name).partition("/")
  if dataset not in BUILDERS:
    raise InputError(f"unknown data set {name!r}: use one of {list(BUILDERS)}")
  configs = [config.name for config in BUILDERS[dataset].BUILDER_CONFIGS]
  if config not in configs:
    raise InputError(
      f"unknown config in {name!r}: follow {dataset + '/'!r} by one of"
      f" {configs}"
    )
  return BUILDERS[dataset](
    config=config, data_dir=data_dir, file_format="array_record"
  )


def _read_columns(source: Sequence[dict[str, Any]], ids: type) -> pl.DataFrame:
  """Gathers the records of a data source to columns user, item and time."""
  frames = []
  for start in range(0, len(source), _RECORDS_AT_ONCE):
    stop = min(start + _RECORDS_AT_ONCE, len(source))
    records = source.__getitems__(list(range(start, stop)))
    lengths = [len(record["timestamps"]) for record in records]
    users = _id_series([record["user_id"] for record in records], ids)
    items = np.concatenate([record["item_ids"] for record in records])
    frames.append(
      pl.DataFrame({
        "user": users.gather(np.repeat(np.arange(len(records)), lengths)),
        "item": items if ids is int else _id_series(items.tolist(), ids),
        "time": np.concatenate([record["timestamps"] for record in records]),
      })
    )
  return pl.concat(frames)


def _id_series(values: list[bytes], ids: type) -> pl.Series:
  series = pl.Series(values, dtype=pl.Binary).cast(pl.String)
  return series.cast(pl.Int64) if ids is int else series


def _fetch(
  config: Release, dl_manager: tfds.download.DownloadManager
) -> epath.Path:
  """Finds the archive in the manual directory, else downloads it."""
  # The public property refuses a directory that is absent or empty.
  manual_dir = dl_manager._manual_dir
  archive = manual_dir / config.file_name
  if archive.exists():
    return archive
  try:
    _reach(config.url)
    return dl_manager.download(config.url)
  except Exception as error:
    raise InputError(
      f"cannot download {config.url} ({disk.brief(error)}): try again, or "
      f"download it by hand and save it as {config.file_name} in manual_dir,"
      f" {manual_dir}"
    ) from error


def _reach(url: str) -> None:
  """Raises OSError where nobody answers: TFDS would try for minutes."""
  failures = [TimeoutError(f"no answer in {_PATIENCE} seconds")]

  def ask() -> None:
    request = urllib.request.Request(url, method="HEAD")
    try:
      urllib.request.urlopen(request, timeout=_PATIENCE).close()
    except urllib.error.HTTPError:  # an answer, of which TFDS says more
      pass
    except OSError as error:
      failures[0] = error
      return
    failures.clear()

  asking = threading.Thread(target=ask, daemon=True)
  asking.start()
  asking.join(_PATIENCE)  # a name server is not bound by the timeout
  if failures:
    raise failures[0]


def _read_ratings(archive: epath.Path, config: Release) -> pl.DataFrame:
  """Reads the ratings in file order, or says what is wrong with the archive."""
  frames, num_lines = [], 0
  try:
    with archive.open("rb") as file, config.open(file) as stream:
      if config.header:
        line = stream.readline()
        if line.strip() != config.line.encode():
          said = f"line 1 is {_shown(line)}, expected {config.line!r}"
          raise InputError(said)
        num_lines += 1
      most = max(_EXPANSION * archive.stat().length, _LEAST_BYTES)
      for block in _blocks(stream, most):
        frames.append(_parse(block, num_lines, config))
        num_lines += frames[-1].height
    if not frames:
      raise InputError("no ratings inside")
    return pl.concat(frames)
  except InputError as error:
    reason, cause = str(error), error
  except _DAMAGE as error:
    reason, cause = f"is damaged or cut short ({disk.brief(error)})", error
  raise InputError(
    f"{archive}: {reason}; delete it and download {config.url} again"
  ) from cause


def _blocks(stream: IO[bytes], most: int) -> Iterator[bytes]:
  """Cuts a stream into blocks of whole lines, each ended by a newline.

  Raises:
    InputError: if it holds more bytes than `most`.
  """
  rest, read = b"", 0
  while chunk := stream.read(_BLOCK_BYTES):
    read += len(chunk)
    if read > most:
      raise InputError(f"expands to more than {most:,} bytes, as no ratings do")
    lines, newline, tail = (rest + chunk).rpartition(b"\n")
    if newline:
      yield lines + newline
    rest = tail
  if rest:
    yield rest + b"\n"


def _parse(block: bytes, lines_before: int, config: Release) -> pl.DataFrame:
  """Parses a block of lines; names the first that is malformed."""
  frame = _try_parse(block, config)
  if frame is not None:
    return frame
  lines = block.split(b"\n")[:-1]
  is_bad = lambda n: (
    _try_parse(b"\n".join(lines[: n + 1]) + b"\n", config) is None
  )
  bad = bisect.bisect_left(range(len(lines)), True, key=is_bad)
  raise InputError(
    f"line {lines_before + bad + 1} is {_shown(lines[bad])}, expected "
    f"{config.line}"
  )


def _try_parse(block: bytes, config: Release) -> pl.DataFrame | None:
  """Parses a block; None unless every line is a complete rating."""
  try:
    frame = config.parse(block)
  except (pl.exceptions.PolarsError, ValueError):
    return None
  texts = frame.select(pl.col(pl.String))
  complete = (
    frame.height == block.count(b"\n")
    and not any(column.null_count() for column in frame)
    and frame["rating"].is_finite().all()
    and not any((column == "").any() for column in texts)
  )
  return frame if complete else None


def _shown(line: bytes) -> str:
  return repr(line.decode("utf-8", "replace").rstrip("\r\n")[:80])
