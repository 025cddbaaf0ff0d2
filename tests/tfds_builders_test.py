import concurrent.futures
import gzip
import http.server
import io
import json
import socket
import threading
import zipfile

import numpy as np
import pytest
import tensorflow_datasets as tfds

from pin_jax.data import releases
from pin_jax.data import tfds as pin_tfds
from pin_jax.types import InputError

# user, item, rating, time: user 7 out of time order, with a tie at time 50.
RATINGS = [
  (7, 30, 4, 60),
  (2, 10, 5, 20),
  (7, 20, 3, 50),
  (7, 10, 1, 50),
  (2, 30, 2, 10),
]
RECORDS = {
  "7": ([20, 10, 30], [3, 1, 4], [50, 50, 60]),
  "2": ([30, 10], [2, 5], [10, 20]),
}
MEMBERS = {
  "100k": "ml-100k/u.data",
  "1m": "ml-1m/ratings.dat",
  "20m": "ml-20m/ratings.csv",
  "25m": "ml-25m/ratings.csv",
  "latest-small": "ml-latest-small/ratings.csv",
}
CSV_HEADER = "userId,movieId,rating,timestamp"
HEADER_2023 = "user_id,parent_asin,rating,timestamp"


def movielens_text(config, ratings=RATINGS):
  if config == "100k":
    return "".join(f"{u}\t{i}\t{r}\t{t}\n" for u, i, r, t in ratings)
  if config == "1m":
    return "".join(f"{u}::{i}::{r}::{t}\n" for u, i, r, t in ratings)
  rows = [f"{u},{i},{r}.0,{t}" for u, i, r, t in ratings]
  return "\r\n".join([CSV_HEADER, *rows, ""])


def movielens_zip(config, text=None, member=None):
  buffer = io.BytesIO()
  with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
    archive.writestr(f"ml-{config}/README", "terms of use")
    archive.writestr(
      member or MEMBERS[config],
      movielens_text(config) if text is None else text,
    )
  return buffer.getvalue()


def review_2014(user, item, rating, time):
  return json.dumps({
    "reviewerID": f"A{user}",
    "asin": f"B00{item}",
    "reviewerName": 'J. "Q" Public',
    "helpful": [0, 1],
    "reviewText": "fits, as\nexpected\u2014",
    "overall": float(rating),
    "summary": "ok",
    "unixReviewTime": time,
    "reviewTime": "01 1, 2014",
  })


def text_2014(ratings=RATINGS):
  return "".join(review_2014(*rating) + "\n" for rating in ratings)


def text_2023(ratings=RATINGS):
  rows = [f"A{u},B00{i},{r}.0,{t}\n" for u, i, r, t in ratings]
  return HEADER_2023 + "\n" + "".join(rows)


def archive_bytes(name):
  dataset, config = name.split("/")
  if dataset == "movielens":
    return movielens_zip(config)
  text = text_2014() if config.startswith("2014") else text_2023()
  return gzip.compress(text.encode())


def file_name(name):
  dataset, config = name.split("/")
  if dataset == "movielens":
    return f"ml-{config}.zip"
  year, category = config.split("_", 1)
  if year == "2014":
    return f"reviews_{category}_5.json.gz"
  return f"{category}.csv.gz"


class Place:
  """A data directory and a manual directory."""

  def __init__(self, path):
    self.data_dir = path / "data"
    self.manual_dir = path / "manual"
    self.manual_dir.mkdir()

  def put(self, name, content=None):
    content = archive_bytes(name) if content is None else content
    (self.manual_dir / file_name(name)).write_bytes(content)

  def builder(self, name):
    return pin_tfds._builder(name, self.data_dir)

  def prepare(self, name):
    builder = self.builder(name)
    builder.download_and_prepare(
      download_config=tfds.download.DownloadConfig(manual_dir=self.manual_dir)
    )
    return builder

  def read(self, name, **options):
    return pin_tfds.read_tfds(
      name, data_dir=self.data_dir, manual_dir=self.manual_dir, **options
    )

  def refused(self, name, *expected):
    """Reads what cannot be read; nothing half-prepared stays."""
    with pytest.raises(InputError) as caught:
      self.read(name)
    message = str(caught.value)
    for part in (str(self.manual_dir), file_name(name), *expected):
      assert part in message
    assert "\n" not in message
    assert not [
      path
      for path in self.data_dir.rglob("*")
      if "incomplete" in path.name
      or "array_record" in path.name
      or path.name in ("1.0.0", "dataset_info.json", "features.json")
    ]


@pytest.fixture
def place(tmp_path):
  return Place(tmp_path)


@pytest.fixture(autouse=True)
def no_network(monkeypatch, request):
  def download(self, url):
    raise ConnectionError(f"no route\nto {url}")

  if "local_host" not in request.fixturenames:
    monkeypatch.setattr(tfds.download.DownloadManager, "download", download)
    monkeypatch.setattr(pin_tfds, "_reach", lambda url: None)


@pytest.fixture
def local_host(tmp_path, monkeypatch):
  """Serves a directory as the upstream of MovieLens 100k."""
  directory = tmp_path / "upstream"
  directory.mkdir()

  class Handler(http.server.SimpleHTTPRequestHandler):
    def __init__(self, *args):
      super().__init__(*args, directory=directory)

    def log_message(self, *args):
      pass

  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
  thread = threading.Thread(target=server.serve_forever, daemon=True)
  thread.start()
  url = f"http://127.0.0.1:{server.server_port}/ml-100k.zip"
  monkeypatch.setenv("NO_PROXY", "127.0.0.1")
  monkeypatch.setattr(releases.MOVIELENS[0], "url", url)
  yield directory
  server.shutdown()
  server.server_close()
  thread.join()


@pytest.mark.parametrize("config", MEMBERS)
def test_movielens_records(place, config):
  place.put(f"movielens/{config}")
  builder = place.prepare(f"movielens/{config}")
  source = builder.as_data_source(split="train")
  assert len(source) == builder.info.splits["train"].num_examples == 2
  for record in source:
    items, ratings, times = RECORDS[record["user_id"].decode()]
    for column, dtype, expected in (
      ("item_ids", np.int64, items),
      ("ratings", np.float32, ratings),
      ("timestamps", np.int64, times),
    ):
      assert record[column].dtype == dtype
      np.testing.assert_array_equal(record[column], expected)
  assert [path.suffix for path in builder.data_path.glob("*array_record*")]


@pytest.mark.parametrize("config", ["2014_Beauty", "2023_All_Beauty"])
def test_amazon_records(place, config):
  place.put(f"amazon_reviews/{config}")
  builder = place.prepare(f"amazon_reviews/{config}")
  records = {
    record["user_id"].decode(): record
    for record in builder.as_data_source(split="train")
  }
  assert set(records) == {"A7", "A2"}
  for user, (items, ratings, times) in RECORDS.items():
    record = records[f"A{user}"]
    assert record["item_ids"].tolist() == [b"B00%d" % item for item in items]
    np.testing.assert_array_equal(record["ratings"], ratings)
    np.testing.assert_array_equal(record["timestamps"], times)


def test_read_again_needs_no_archive(place):
  place.put("movielens/1m")
  with pytest.raises(InputError, match="not prepared"):
    place.read("movielens/1m", download=False)
  first = place.read("movielens/1m")
  (place.manual_dir / "ml-1m.zip").unlink()
  again = place.read("movielens/1m", download=False)
  assert again.fingerprint == first.fingerprint
  part = place.read("movielens/1m", download=False, min_length=3)
  np.testing.assert_array_equal(part.user_ids, [7])


@pytest.mark.parametrize("name", ["movielens/1m", "amazon_reviews/2014_Baby"])
def test_many_users_match_brute_force(place, monkeypatch, name):
  monkeypatch.setattr(pin_tfds, "_BLOCK_BYTES", 100)
  monkeypatch.setattr(pin_tfds, "_RECORDS_AT_ONCE", 7)
  draw = np.random.default_rng(0).integers
  ratings = [
    (int(draw(1, 40)), int(draw(1, 90)), int(draw(1, 6)), int(draw(0, 99)))
    for _ in range(600)
  ]
  expected = {}
  for user, item, _, time in sorted(ratings, key=lambda rating: rating[3]):
    expected.setdefault(user, []).append((item, time))
  prefix = ("", "") if name == "movielens/1m" else ("A", "B00")
  if name == "movielens/1m":
    place.put(name, movielens_zip("1m", movielens_text("1m", ratings)))
  else:
    place.put(name, gzip.compress(text_2014(ratings).encode()))
  data = place.read(name)
  assert data.name == name
  kind = np.int64 if name == "movielens/1m" else object
  assert data.user_ids.dtype == data.item_ids.dtype == kind
  found = {
    str(user): [
      (str(data.item_ids[item - 1]), int(time))
      for item, time in zip(data.items[a:b], data.times[a:b], strict=True)
    ]
    for user, a, b in zip(
      data.user_ids, data.offsets[:-1], data.offsets[1:], strict=True
    )
  }
  assert found == {
    f"{prefix[0]}{user}": [(f"{prefix[1]}{item}", time) for item, time in rows]
    for user, rows in expected.items()
  }


def flipped(content):
  damaged = bytearray(content)
  damaged[content.index(b"u.data") + 20] ^= 255
  return bytes(damaged)


GOOD_100K = movielens_text("100k")
DAMAGED = {
  "truncated zip": (
    "movielens/100k", movielens_zip("100k")[:-40], "cut short"
  ),
  "zip that is a web page": ("movielens/100k", b"<html>404</html>", "damaged"),
  "corrupt member": (
    "movielens/100k", flipped(movielens_zip("100k")), "damaged"
  ),
  "missing member": (
    "movielens/1m",
    movielens_zip("1m", member="ml-1m/movies.dat"),
    "no 'ml-1m/ratings.dat' inside",
  ),
  "empty member": ("movielens/100k", movielens_zip("100k", ""), "no ratings"),
  "missing field": (
    "movielens/100k",
    movielens_zip("100k", GOOD_100K + "7\t30\t4\n"),
    r"line 6 is '7\t30\t4'",
  ),
  "not a number": (
    "movielens/1m",
    movielens_zip("1m", movielens_text("1m") + "7::x::4::1\n7::1::4::1\n"),
    "line 6 is '7::x::4::1'",
  ),
  "wrong separator": (
    "movielens/1m",
    movielens_zip("1m", movielens_text("1m") + "7:1:9:1:4:1:1\n"),
    "line 6 is '7:1:9:1:4:1:1'",
  ),
  "rating that is no number": (
    "movielens/20m",
    movielens_zip("20m", CSV_HEADER + "\n1,2,nan,4\n"),
    "line 2 is '1,2,nan,4'",
  ),
  "other header": (
    "movielens/25m",
    movielens_zip("25m", "movieId,userId,rating,timestamp\n1,2,3,4\n"),
    "line 1 is 'movieId,userId,rating,timestamp'",
  ),
  "blank line": (
    "movielens/100k", movielens_zip("100k", GOOD_100K + "\n"), "line 6 is ''"
  ),
  "truncated gzip": (
    "amazon_reviews/2014_Baby",
    gzip.compress(text_2014().encode())[:-12],
    "cut short",
  ),
  "not gzip": ("amazon_reviews/2023_Books", b"user_id,parent", "damaged"),
  "broken JSON": (
    "amazon_reviews/2014_Baby",
    gzip.compress((text_2014() + '{"reviewerID": "A7"\n').encode()),
    """line 6 is '{"reviewerID": "A7"'""",
  ),
  "empty user": (
    "amazon_reviews/2014_Baby",
    gzip.compress(
      (text_2014() + review_2014(1, 2, 3, 4).replace("A1", "")).encode()
    ),
    "line 6 is",
  ),
  "CSV without an item": (
    "amazon_reviews/2023_Books",
    gzip.compress((text_2023() + "A1,,5.0,3\nA1,B,5.0,3\n").encode()),
    "line 7 is 'A1,,5.0,3'",
  ),
  "bytes that are not UTF-8": (
    "amazon_reviews/2023_Books",
    gzip.compress(text_2023().encode() + b"\xff\xfe,B,5.0,3\n"),
    "line 7 is",
  ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_archive(place, case):
  name, content, expected = DAMAGED[case]
  place.put(name, content)
  place.refused(name, expected, "delete it and download https://")
  if case == "truncated zip":  # and mended
    place.put(name)
    assert place.read(name).num_interactions == 5


def test_malformed_line_is_numbered_across_blocks(place, monkeypatch):
  monkeypatch.setattr(pin_tfds, "_BLOCK_BYTES", 64)
  lines = [f"{user}\t1\t3\t{user}\n" for user in range(1, 200)]
  lines[149] = "150\t1\tbad\t150\n"
  place.put("movielens/100k", movielens_zip("100k", "".join(lines)))
  place.refused("movielens/100k", r"line 150 is '150\t1\tbad\t150'")


def test_last_line_may_lack_a_newline(place):
  text = movielens_text("100k").rstrip("\n")
  place.put("movielens/100k", movielens_zip("100k", text))
  assert place.read("movielens/100k").num_interactions == 5


@pytest.mark.parametrize(
  "name", ["movielens/25m", "amazon_reviews/2014_Beauty"]
)
def test_failed_download_says_what_to_do(place, name):
  place.refused(name, place.builder(name).builder_config.url)


def test_where_nobody_answers_it_ends_at_once(place, monkeypatch):
  """A server that accepts and never speaks; TFDS would ask ten times."""
  monkeypatch.undo()
  monkeypatch.setenv("NO_PROXY", "127.0.0.1")
  monkeypatch.setattr(pin_tfds, "_PATIENCE", 0.2)
  with socket.create_server(("127.0.0.1", 0)) as silent:
    url = f"http://127.0.0.1:{silent.getsockname()[1]}/ml-100k.zip"
    monkeypatch.setattr(releases.MOVIELENS[0], "url", url)
    place.refused("movielens/100k", "cannot download", "TimeoutError")


def test_downloads_what_the_manual_directory_lacks(place, local_host):
  (local_host / "ml-100k.zip").write_bytes(movielens_zip("100k"))
  assert place.read("movielens/100k").num_interactions == 5


def test_missing_upstream_says_what_to_do(place, local_host):
  place.refused("movielens/100k", "404")


def test_download_with_another_checksum_is_refused(
  place, local_host, monkeypatch
):
  (local_host / "ml-100k.zip").write_bytes(movielens_zip("100k"))
  config = place.builder("movielens/100k").builder_config
  infos = {config.url: next(iter(pin_tfds.MovieLens.url_infos.values()))}
  monkeypatch.setattr(pin_tfds.MovieLens, "url_infos", infos)
  place.refused("movielens/100k", "NonMatchingChecksum")


@pytest.mark.parametrize(
  "name, expected",
  [
    ("netflix/1", "movielens"),
    ("movielens", "latest-small"),
    ("movielens/2m", "latest-small"),
    ("amazon_reviews/Beauty", "2014_Beauty"),
  ],
)
def test_unknown_name(place, name, expected):
  with pytest.raises(InputError, match=expected):
    place.read(name)


def test_checksums_are_known():
  assert {x.url for x in releases.MOVIELENS} <= {*pin_tfds.MovieLens.url_infos}
  assert pin_tfds.AmazonReviews.url_infos == {}


def test_configs_are_complete_and_distinct():
  assert [config.name for config in releases.MOVIELENS] == list(MEMBERS)
  names = {config.name for config in releases.AMAZON}
  assert len(names) == len(releases.AMAZON) == 24 + 28
  files = {config.url.rsplit("/", 1)[1] for config in releases.AMAZON}
  assert len(files) == 24 + 28


def test_two_first_reads_at_once(place):
  """Both would prepare what neither finds."""
  place.put("movielens/1m")
  barrier = threading.Barrier(2)

  def read(_):
    barrier.wait()
    return place.read("movielens/1m").fingerprint

  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    both = set(pool.map(read, range(2)))
  assert both == {place.read("movielens/1m").fingerprint}


@pytest.mark.parametrize("name", ["a b", "a\nb", "é", "x@3", "d[1]", "a*b"])
def test_a_data_directory_of_any_name_is_read_back_or_refused(tmp_path, name):
  sibling = tmp_path / "d1"
  sibling.mkdir()
  other = Place(sibling)
  other.put("movielens/1m", movielens_zip("1m", movielens_text("1m", [
    RATINGS[0]
  ])))
  other.read("movielens/1m")
  (tmp_path / name).mkdir()
  place = Place(tmp_path / name)
  place.put("movielens/1m")
  if set(name) & set("[*"):
    with pytest.raises(InputError, match="patterns; use another"):
      place.read("movielens/1m")
    return
  prints = {place.read("movielens/1m").num_interactions for _ in range(2)}
  assert prints == {len(RATINGS)}
