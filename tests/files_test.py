"""Files as people have them: odd names, odd ids, odd times, broken ones."""

import datetime
import gzip
import io
import pathlib
import re
import zipfile

import numpy as np
import polars as pl
import pytest

from pin_jax.data import files, splits
from pin_jax.data.interactions import from_columns
from pin_jax.types import InputError


@pytest.fixture
def write(tmp_path):
  """Returns a function that writes a text file and returns its path."""

  def function(name: str, text: str | bytes) -> pathlib.Path:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path

  return function


ROWS = [("u2", "i7", 1700000005), ("u1", "i8", 1700000006),
        ("u2", "i9", 1700000004)]
RATED = [(user, item, 5.0, time) for user, item, time in ROWS]
HEADER = ("user_id", "item_id", "timestamp")
FRAME = pl.DataFrame(ROWS, schema=HEADER, orient="row")
SEQUENCES = [2, 1, 2], [7, 8, 9], [1, 0, 0]  # times are positions
DAY = datetime.datetime(2024, 3, 31, 13, 5, 9, tzinfo=datetime.UTC)


def text(rows=ROWS, header=HEADER, separator=","):
  """Lines of fields, as bytes."""
  rows = [header, *rows] if header else rows
  lines = [separator.join(map(str, row)) for row in rows]
  return ("\n".join(lines) + "\n").encode()


def dated(form):
  """Text of the same order whose times are dates of a form."""
  days = [DAY + datetime.timedelta(n) for n in (1, 2, 0)]
  return text([(*row[:2], f'"{day.strftime(form)}"')
               for row, day in zip(ROWS, days, strict=True)])


def saved(write, **options):
  """What a frame's method writes to a file."""
  buffer = io.BytesIO()
  getattr(FRAME, write)(buffer, **options)
  return buffer.getvalue()


def packed(**members):
  """A zip archive."""
  buffer = io.BytesIO()
  with zipfile.ZipFile(buffer, "w") as archive:
    for name, content in members.items():
      archive.writestr(name.replace("__", "."), content)
  return buffer.getvalue()


NO_HEADER = "no header: user is column 1, item is column 2, time is column "
SHAPES = {  # file: (contents, what of it must be said)
  "comma.csv": (text(), None),
  "crlf, quotes, a mark.csv": (
    b"\xef\xbb\xbf" + text().replace(b"u2", b'"u2"').replace(b"\n", b"\r\n"),
    None,
  ),
  "no last newline.csv": (text()[:-1], None),
  "tab.tsv": (text(separator="\t"), None),
  "tab without a suffix": (text(separator="\t"), None),
  "semicolon.csv": (text(separator=";"), "separator is ';'"),
  "semicolon, decimal comma.csv": (
    text([(u, i, "3,5", t) for u, i, t in ROWS], ("user", "item", "x", "time"),
         ";"), "separator is ';'"),
  "bar.csv": (text(separator="|"), "separator is '|'"),
  "tab.csv": (text(separator="\t"), r"separator is '\t'"),
  "space.txt": (text(separator=" "), "separator is ' '"),
  "quoted separators.csv": (
    text([(*r, '"a;b;c;d"') for r in ROWS], (*HEADER, "note")), None),
  "headerless.csv": (text(RATED, None), NO_HEADER + "4"),
  "headerless, three.csv": (text(ROWS, None), NO_HEADER + "3"),
  "headerless, time third.csv": (
    text([(*r, 5) for r in ROWS], None), NO_HEADER + "3"),
  "u.data": (text(RATED, None, "\t"), NO_HEADER + "4"),
  "ratings.dat": (text(RATED, None, "::"), NO_HEADER + "4"),
  "header.dat": (text(separator="::"), "separator is '::'"),
  "spelt.csv": (text(header=("User ID", "ITEM-ID", "Time_Stamp")), None),
  "x.inter": (
    text(header=("user_id:token", "item_id:token", "timestamp:float"),
         separator="\t"), None),
  "lines.jsonl": (saved("write_ndjson"), None),
  "array.json": (saved("write_json"), None),
  "gzip.csv.gz": (gzip.compress(text()), None),
  "gzip of JSON.jsonl.gz": (gzip.compress(saved("write_ndjson")), None),
  "gzip, headerless.dat.gz": (
    gzip.compress(text(RATED, None, "::")), NO_HEADER + "4"),
  "zstd.csv.zst": (saved("write_csv", compression="zstd"), None),
  "zip of MovieLens.zip": (
    packed(ml__zip="x", ratings__dat=text(RATED, None, "::")), NO_HEADER + "4"),
  "UTF-16.csv": (text().decode().encode("utf-16"), "encoding is utf-16"),
  "UTF-16 without a mark.csv": (
    text().decode().encode("utf-16-le"), "encoding is utf-16-le"),
  "cp1252.csv": (
    text([(*r, "caf\xe9") for r in ROWS], (*HEADER, "note")).decode()
    .encode("cp1252"), "encoding is cp1252"),
  "sequences.txt": (b"2 9 7\n1 8\n\n", "a line is a user and all items"),
  "columnar.parquet": (saved("write_parquet"), None),
  "Parquet without a suffix": (saved("write_parquet"), None),
}
DATES = {  # form: what of it must be said
  "%Y-%m-%d": "", "%Y-%m-%d %H:%M:%S UTC": "", "%Y-%m-%dT%H:%M:%SZ": "",
  "%m/%d/%Y": "%m/%d/%Y", "%m/%d/%Y %I:%M %p": "%I:%M %p",
  "%d/%m/%Y %H:%M": "%d/%m/%Y %H:%M", "%d.%m.%Y": "%d.%m.%Y",
  "%m/%d/%y": "%m/%d/%y", "%B %d, %Y": "%B %d, %Y", "%d %b %Y": "%d %B %Y",
  "%m %d, %Y": "%m %d, %Y", "%Y/%m/%d %H:%M:%S": "%Y/%m/%d %H:%M:%S",
}


class TestFormats:

  @pytest.mark.parametrize("name", SHAPES)
  def test_shapes(self, write, name):
    """Every shape of the same three rows, none lost and none made."""
    content, said = SHAPES[name]
    data = files.read(str(write(name, content)))
    rows = SEQUENCES if name == "sequences.txt" else FRAME
    assert data.fingerprint == from_columns(*rows).fingerprint
    assert (said or "") in data.notes.get("assumed", "")
    assert (said is None) == ("assumed" not in data.notes)
    assert "warnings" not in data.notes

  @pytest.mark.parametrize("form", DATES)
  def test_dates(self, write, form):
    data = files.read(write("a.csv", dated(form)))
    assert data.item_ids[data.items - 1].tolist() == ["i8", "i9", "i7"]
    exact = DAY.strptime(DAY.strftime(form), form)
    assert data.times[1] == exact.replace(tzinfo=datetime.UTC).timestamp()
    assert DATES[form] in data.notes.get("assumed", "")
    assert "warnings" not in data.notes

  def test_tables_in_memory(self):
    columns = {name: list(FRAME[name]) for name in HEADER}
    arrays = {name: FRAME[name].to_numpy() for name in HEADER}
    for table in (FRAME, FRAME.lazy(), columns, arrays):
      data = files.read(table)
      assert data.fingerprint == from_columns(*FRAME).fingerprint
      assert data.name == "data"
    columns["timestamp"] = ["1/31/2024", "2/1/2024", "1/2/2024"]
    assert files.read(columns).times.tolist() == [
      seconds(2024, 2, 1), seconds(2024, 1, 2), seconds(2024, 1, 31)
    ]
    with pytest.raises(InputError, match="the table row 2: user.*is empty"):
      files.read({"user": ["a", None], "item": [1, 2]})
    with pytest.raises(InputError, match="differ in length"):
      files.read({"user": ["a"], "item": [1, 2]})

  def test_a_frame_of_pandas(self):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(FRAME.to_dict(as_series=False))
    assert files.read(frame).fingerprint == from_columns(*FRAME).fingerprint
    frame["timestamp"] = pandas.to_datetime(frame["timestamp"], unit="s")
    assert files.read(frame).times.tolist() == files.read(FRAME).times.tolist()

  def test_parquet_of_many_row_groups(self, tmp_path):
    rng = np.random.default_rng(0)
    columns = {name: rng.integers(0, 50, 1000) for name in HEADER}
    frame = pl.DataFrame(columns)
    prints = set()
    for size in (64, 1000):
      frame.write_parquet(tmp_path / "a.parquet", row_group_size=size)
      prints.add(files.read(tmp_path / "a.parquet").fingerprint)
    assert prints == {from_columns(*columns.values()).fingerprint}

  def test_inter_has_no_quotes_and_columns_have_two_names(self, write):
    path = write("a.inter", 'user_id:token\titem_id:token\n"a\tx\nb\ty\n')
    for name in ("item_id", "item_id:token"):
      data = files.read(path, item=name)
      assert data.user_ids.tolist() == ['"a', "b"]
      assert data.notes["item_column"] == "item_id:token"

  def test_options_are_passed_on(self, write):
    path = write("a.csv", "user,item\n1,5\n1,5\n2,5\n")
    data = files.read(path, duplicates="first", name="mine", k_core=1)
    assert data.name == "mine"
    assert data.notes["rows_read"] == 3
    assert data.notes["duplicates_dropped"] == 1
    with pytest.raises(TypeError, match="shuffle"):
      files.read(path, shuffle=True)


class TestHeaders:

  @pytest.mark.parametrize("lines, asked, users", [
    ("a,x\nb,y\n", {"user": "1", "item": "2"}, ["a", "b"]),
    ("who,what\n1,2\n", {"user": "1", "item": "2"}, [1]),
    ("who,what\na,b\n", {"user": "who", "item": "what"}, ["a"]),
    ("7,x\n8,y\n", {}, [7, 8]),
    ("7,x\n8,y\n", {"user": "2", "item": "1"}, ["x", "y"]),
    ("user,item,2023\na,b,c\n", {}, ["a"]),
  ])
  def test_a_header_is_neither_lost_nor_made(self, write, lines, asked, users):
    data = files.read(write("a.csv", lines), **asked)
    assert data.user_ids.tolist() == users

  @pytest.mark.parametrize("lines, says", [
    ("a,x\nb,y\n", r"only \['a', 'x'\]; give user=<column>, its name or num"),
    ("0,1,2\n5,6,7\n", "line 1 is 0,1,2, a header of numbers or a row"),
    ("7,x\n8,y\n", "no column 'who', only .'1', '2'.; give user="),
  ])
  def test_what_cannot_be_told(self, write, lines, says):
    asked = {"user": "who"} if "who" in says else {}
    with pytest.raises(InputError, match=says):
      files.read(write("a.csv", lines), **asked)


class TestWarnings:

  @pytest.mark.parametrize("columns, says", [
    ({"bought": ["2024-03-01"] * 5}, r"'bought' \(2024-03-01\) looks like"),
    ({"when": [1700000000.5] * 5}, "'when'.*give time=when"),
    ({"day_time": [*range(5)]}, "'day_time'"),
    ({"date": ["1/2/2024", "3/4/2024"] * 2 + ["5/6/2024"]},
     "read as %m/%d/%Y, though every one may be day before month"),
    ({"time": [1, 1, 2, 3, 3], "item": [1, 1, 2, 1, 2]},
     "1 of 5 rows repeat.*duplicates='exact'"),
    ({"time": [1, 1, 1, 3, 3], "item": [1, 2, 3, 1, 2]},
     "100% of a user's successive interactions have equal times"),
    ({"user": [1, 2, 3, 4, 5]}, "all users have 1 interactions: none is more"),
    ({"user": [1, 2, 3, 4, 4]}, None),
    ({"user": [1, 1, 3, 4, 5]}, None),
    ({"price": [1, 2, 3, 4, 5], "isbn13": [4006381333931] * 5}, None),
  ])
  def test_of_what_makes_results_mean_little(self, columns, says):
    good = {"user": [1, 1, 1, 2, 2], "item": [1, 2, 3, 1, 2]}
    data = files.read(good | columns)
    if says is None:
      assert "equal times" not in data.notes.get("warnings", "")
      assert "looks like" not in data.notes.get("warnings", "")
      return
    assert re.search(says, data.notes["warnings"])
    assert repr(data).splitlines()[-1].endswith(data.notes["warnings"])

  def test_most_users_are_equally_active(self):
    users = [*range(9), 8, 8]
    data = files.read({"user": users, "item": users})
    assert "89% of the users have 1 inter" in data.notes["warnings"]


class TestColumns:

  @pytest.mark.parametrize("header, used", [
    ("userId,movieId,rating,timestamp", ("userId", "movieId", "timestamp")),
    ("reviewerID,asin,overall,unixReviewTime",
     ("reviewerID", "asin", "unixReviewTime")),
    ("review_id,USER_ID,Business_Id,date", ("USER_ID", "Business_Id", "date")),
    ("user,uid,user_id,item", ("user_id", "item", "none")),
    ("parent_asin,asin,uid,Time", ("uid", "asin", "Time")),
  ])
  def test_guesses(self, write, header, used):
    path = write("a.csv", header + "\n1,2,3,4\n")
    notes = files.read(path).notes
    assert used == tuple(
      notes[f"{role}_column"] for role in ("user", "item", "time")
    )

  def test_names_given(self, write):
    path = write("a.csv", "user,who,what,when\n1,2,3,4\n")
    data = files.read(path, user="who", item="what", time="when")
    assert data.user_ids.tolist() == [2]
    assert data.times.tolist() == [4]

  def test_without_time_the_file_order_decides(self, write):
    data = files.read(write("a.csv", "user,item\n2,1\n1,9\n2,0\n"))
    assert data.times is None
    assert data.item_ids[data.items - 1].tolist() == [9, 1, 0]
    assert "row order" in data.notes["order"]
    assert data.notes["time_column"] == "none"


class TestIds:

  @pytest.mark.parametrize("texts, expected", [
    (["10", "9"], [9, 10]),
    (["-3", "0"], [-3, 0]),
    (["007", "7"], ["007", "7"]),
    (["12", "B00X"], ["12", "B00X"]),
    (["+1", "2"], ["+1", "2"]),
    (["-0", "0"], ["-0", "0"]),
    (["1.0", "2"], ["1.0", "2"]),
    (["9223372036854775808", "1"], ["1", "9223372036854775808"]),
    (["1e3", "2"], ["1e3", "2"]),
    (["nan", "NA"], ["NA", "nan"]),
    (["é", "z"], ["z", "é"]),
  ])
  def test_integers_only_if_they_survive(self, write, texts, expected):
    rows = "".join(f"{text},{text}\n" for text in texts)
    data = files.read(write("a.csv", "user,item\n" + rows))
    assert data.user_ids.tolist() == expected
    assert data.item_ids.tolist() == expected
    kind = np.int64 if isinstance(expected[0], int) else object
    assert data.user_ids.dtype == kind

  @pytest.mark.parametrize("name, text", [
    ("a.csv", 'user,item\n"u","i"\n"","j"\n'),
    ("a.csv", 'user,item\r\nu,i\r\n"",j\r\n'),
    ("a.tsv", 'user\titem\nu\ti\n""\tj\n'),
    ("a.csv", 'item,user\ni,u\n"j",""'),
  ])
  def test_quoted_empty_ids_are_empty(self, write, name, text):
    with pytest.raises(InputError, match="line 3: user column 'user' is empty"):
      files.read(write(name, text))

  @pytest.mark.parametrize("kind, digits", [
    (pl.Float64, 53), (pl.Float32, 24),
  ])
  @pytest.mark.parametrize("role", ["user", "item"])
  def test_floats_that_have_merged(self, tmp_path, kind, digits, role):
    path = tmp_path / "a.parquet"
    for last, sign in ((-1, 1), (0, 1), (0, -1)):
      ids = pl.Series([1.0, sign * float(2**digits + last)], dtype=kind)
      frame = pl.DataFrame({"user": [1, 2], "item": [3, 4]})
      frame.with_columns(ids.alias(role)).write_parquet(path)
      if last:
        found = getattr(files.read(path), f"{role}_ids").tolist()
        assert found == [1, 2**digits - 1]
        continue
      said = rf"row 2: {role} column '{role}'.*2\^{digits}.*strings"
      with pytest.raises(InputError, match=said):
        files.read(path)

  def test_a_late_string_counts(self, write):
    rows = "".join(f"{n},1\n" for n in range(5000))
    data = files.read(write("a.csv", "user,item\n" + rows + "x,1\n"))
    assert data.num_users == 5001
    assert data.user_ids.dtype == object


def seconds(*args):
  return int(
    datetime.datetime(*args, tzinfo=datetime.UTC).timestamp()
  )


class TestTimes:

  @pytest.mark.parametrize("texts, expected", [
    (["20", "3"], [3, 20]),
    (["2.5", "1"], [1.0, 2.5]),
    (["1e9", "1"], [1.0, 1e9]),
    (["2020-02-29", "1999-12-31"],
     [seconds(1999, 12, 31), seconds(2020, 2, 29)]),
    (["2020-01-01 10:00:01", "2020-01-01"],
     [seconds(2020, 1, 1), seconds(2020, 1, 1, 10, 0, 1)]),
    (["2020-01-01T10:00:00Z", "2020-01-01T10:00:00+02:00"],
     [seconds(2020, 1, 1, 8), seconds(2020, 1, 1, 10)]),
    (["1970-01-01 00:00:00.25", "1970-01-01 00:00:01"], [0.25, 1.0]),
  ])
  @pytest.mark.parametrize("suffix", ["csv", "parquet"])
  def test_parsed(self, tmp_path, texts, expected, suffix):
    frame = pl.DataFrame({"user": [1, 1], "item": [1, 2], "date": texts})
    path = tmp_path / f"a.{suffix}"
    getattr(frame, f"write_{suffix}")(path)
    data = files.read(path)
    assert data.times.tolist() == expected
    assert data.times.dtype == type(expected[0])

  def test_parquet_dates(self, tmp_path):
    day = datetime.date(2020, 1, 2)
    path = tmp_path / "a.parquet"
    pl.DataFrame({"user": [1], "item": [1], "date": [day]}).write_parquet(path)
    assert files.read(path).times.tolist() == [seconds(2020, 1, 2)]

  @pytest.mark.parametrize("late, early", [
    ("2023-11-14 22:13:20.000009", "2023-11-14T22:13:20.000008"),
    ("1700000000000000001", "1700000000000000000"),
    ("1700000000.0000005", "1700000000.0000001"),
    ("1700000001.5", "1700000000"),
  ])
  @pytest.mark.parametrize("suffix", ["csv", "inter", "parquet"])
  def test_order_that_seconds_as_floats_would_lose(
    self, tmp_path, late, early, suffix
  ):
    frame = pl.DataFrame({
      "user:token": [1, 1], "item:token": ["l", "e"],
      "date:float": [late, early],
    })
    path = tmp_path / f"a.{suffix}"
    if suffix == "inter":
      frame.write_csv(path, separator="\t")
    else:
      frame = frame.rename(lambda name: name.split(":")[0])
      getattr(frame, f"write_{suffix}")(path)
    data = files.read(path)
    assert data.item_ids[data.items - 1].tolist() == ["e", "l"]
    assert data.notes["tied_share"] == 0

  @pytest.mark.parametrize("times", [
    pl.Series([10**18 + 1, 10**18]).cast(pl.Datetime("ns")),
    pl.Series([10**16 + 1, 10**16]).cast(pl.Datetime("us", "UTC")),
    pl.Series([2**53 + 1, 2**53]).cast(pl.Datetime("ms")),
    pl.Series([2**62 + 1, 2**62]),
    pl.Series([2**63 - 1, 2**63 - 2], dtype=pl.UInt64),
  ])
  def test_order_of_typed_times(self, tmp_path, times):
    path = tmp_path / "a.parquet"
    frame = pl.DataFrame({"user": [1, 1], "item": ["l", "e"], "time": times})
    frame.write_parquet(path)
    data = files.read(path)
    assert data.item_ids[data.items - 1].tolist() == ["e", "l"]
    assert data.notes["tied_share"] == 0

  @pytest.mark.parametrize("times", [
    ["1700000000000000001", "1700000000000000000", "0.5"],
    ["99999999999999999999", "99999999999999999998"],
    ["1700000000.123456789", "1700000000.123456788"],
    ["2023-11-14 22:13:20.0000001", "2023-11-14 22:13:20"],
    pl.Series([1.7e18, 1.6e18]),
    pl.Series([1.7e9, 1.6e9], dtype=pl.Float32),
    pl.Series([2**63, 1], dtype=pl.UInt64),
    pl.Series([2**70, 1], dtype=pl.Int128),
  ])
  def test_what_loses_order_asks_for_a_coarser_unit(self, tmp_path, times):
    frame = pl.DataFrame({"time": times}).with_columns(
      user=pl.lit(1), item=pl.int_range(pl.len())
    )
    path = tmp_path / "a.parquet"
    frame.write_parquet(path)
    with pytest.raises(InputError, match="coarser unit") as error:
      files.read(path)
    assert "\n" not in str(error.value)

  @pytest.mark.parametrize("texts, line, value", [
    (["1", "soon"], 3, "'soon'"),
    (["soon", "1"], 2, "'soon'"),
    (["2020-01-01", "2020-13-01"], 3, "'2020-13-01'"),
    (["2020-13-01", "2020-01-01"], 2, "'2020-13-01'"),
    (["2020-01-01", "5"], 3, "'5'"),
    (["5", "2020-01-01"], 3, "'2020-01-01'"),
    (["13/31/2020", "02/02/2020"], 2, "'13/31/2020'"),
    (["01/31/2020", "31/01/2020"], 3, "'31/01/2020'"),
    (["2020-01-01T00:00:00Z", "2020-01-01"], 3, "'2020-01-01'"),
    (["2020-01-01x", "2020-01-01y"], 2, "'2020-01-01x'"),
    (["1", "nan"], 3, "nan"),
    (["inf", "1"], 2, "inf"),
  ])
  def test_bad(self, write, texts, line, value):
    rows = "".join(f"1,2,{text}\n" for text in texts)
    with pytest.raises(InputError, match=f"line {line}: time.*= {value}"):
      files.read(write("a.csv", "user,item,time\n" + rows))


class TestBadFiles:

  @pytest.mark.parametrize("name, text, message", [
    ("a.csv", "", "0 bytes"),
    ("a.parquet", "", "0 bytes"),
    ("a.inter", "", "0 bytes"),
    ("a.csv", "user,item\n", "no rows"),
    ("a.inter", "user_id:token\titem_id:token\n", "no rows"),
    ("a.csv", "\n\n", "a.csv"),
    ("a.csv", "user,thing\n1,2\n", r"no item column, only \['user', 'thing'\]"),
    ("a.csv", "users\n1\n2\n", r"\['users'\]; give separator="),
    ("a.csv", "user,item\n1,2\n,3\n", "line 3: user column 'user' is empty"),
    ("a.csv", "user,item\n1,2\n3\n", "line 3: item column 'item' is empty"),
    ("a.csv", "user,item\n1,2\n\n3,4\n", "line 3: user"),
    ("a.csv", "user,item,time\n1,2,\n", "line 2: time column 'time' is empty"),
    ("a.csv", "user,item\n1,2,3\n", "cannot be read .*separator"),
    ("a.csv", b"user,item\n\x81,3\n", "no text in UTF-8, UTF-16 or cp1252"),
    ("a.xls", b"\xd0\xcf\x11\xe0\0\0\0\xff", "no text in UTF-8.*save it as"),
    ("a.xlsx", packed(a__xml="", b__xml=""), "archive of .*a table as CSV"),
    ("a.zip", packed(a__csv=text())[:-9], "cannot be read .*zip"),
    ("a.parquet", "user,item\n1,2\n", "cannot be read"),
    ("a.csv.gz", gzip.compress(text() * 99)[:-9], "cannot be read"),
    ("a.json", '{"user": 1}\n{"user"\n', "cannot be read"),
    ("a.json", "{}", "no user column"),
  ])
  def test_one_line_that_says_what_and_where(self, write, name, text, message):
    path = write(name, text)
    with pytest.raises(InputError, match=message) as error:
      files.read(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)

  @pytest.mark.parametrize("suffix", [".csv", ".inter", ".parquet"])
  def test_missing_and_directory(self, tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    with pytest.raises(InputError, match="does not exist"):
      files.read(path)
    path.mkdir()
    with pytest.raises(InputError, match="is a directory"):
      files.read(path)

  @pytest.mark.parametrize("separator", ["", "\n", '"', "\0", 5])
  def test_bad_separator(self, write, separator):
    path = write("a.csv", "user,item,time\n1,2,3\n")
    with pytest.raises(InputError, match="give one character or more"):
      files.read(path, separator=separator)

  @pytest.mark.parametrize("columns, says", [
    ({"item": ["a", ""]}, "row 2: item column 'item' is empty"),
    ({"user": [1, None]}, "row 2: user column 'user' is empty"),
    ({"time": [1.0, None]}, "row 2: time column 'time' is empty"),
    ({"time": [1.0, float("nan")]}, "row 2: time column 'time' = nan"),
    ({"user": [], "item": []}, "no rows"),
  ])
  def test_bad_parquet(self, tmp_path, columns, says):
    path = tmp_path / "a.parquet"
    good = {"user": [1, 2], "item": ["a", "b"]}
    pl.DataFrame(good | columns).write_parquet(path)
    with pytest.raises(InputError, match=says):
      files.read(path)


class TestPaths:

  NAMES = [
    "a b", "a\nb", "é漢", "a%41", "x@3", "~x", "d[1]", "a*b", "a?b", "{a,b}",
    "a'\"b", "a\\b", "-", "a:b", "#a", "a.parquet", "p[0:9]",
  ]

  @pytest.mark.parametrize("name", NAMES)
  @pytest.mark.parametrize("suffix", [".csv", ".inter", ".parquet", "/"])
  def test_a_path_is_taken_literally(self, tmp_path, name, suffix):
    """Siblings fit the names as patterns and hold other users."""

    def put(name, user):
      frame = pl.DataFrame({"user_id:token": [user], "item_id:token": [1]})
      path = tmp_path / (name + suffix)
      if suffix == ".inter":
        frame.write_csv(str(path), separator="\t")
        return path
      frame = frame.rename(lambda name: name.split(":")[0])
      if suffix == "/":
        path.mkdir()
        frame.write_parquet(path / "part-[0].parquet")
      else:
        getattr(frame, f"write_{suffix[1:]}")(path)
      return path

    for sibling in ("d1", "aXb", "a", "b", "p0"):
      put(sibling, 9)
    path = put(name, 5)
    for form in (path, str(path)):
      assert files.read(form).user_ids.tolist() == [5]

  def test_the_home_directory(self, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.csv").write_text("user,item\n1,2\n")
    assert files.read("~/a.csv").num_users == 1

  @pytest.mark.parametrize("path, says", [
    ("", "source='' is no path"), ("a\0.csv", "is no path"), (5, "source=5"),
    ("s3://bucket/a.csv", "not on this machine"),
    ("https://x.org/a.csv", "not on this machine"), (None, "source=None"),
  ])
  def test_what_is_no_path(self, path, says):
    with pytest.raises(InputError, match=says):
      files.read(path)


@pytest.mark.shared_data
class TestRealData:

  def test_a_whole_data_set_a_user_a_line(self, write, shared_data):
    want = files.read(shared_data / "amazon_beauty_s3rec.parquet")
    lines = [
      " ".join(map(str, [user, *want.item_ids[want.items[a:b] - 1]]))
      for user, a, b in zip(
        want.user_ids, want.offsets[:-1], want.offsets[1:], strict=True
      )
    ]
    data = files.read(write("Beauty.txt", "\n".join(lines) + "\n"))
    assert data.fingerprint == want.fingerprint

  # users, items, interactions, lengths min/median/mean/max, head's share (%)
  @pytest.mark.parametrize("name, counts, lengths, head", [
    ("ml-100k.inter", (943, 1682, 100000), (20, 65, 106, 737), 51),
    ("ml-1m.parquet", (6040, 3706, 1000209), (20, 96, 166, 2314), 57),
    ("amazon_beauty_s3rec.parquet", (22363, 12101, 198502),
     (5, 6, 8.9, 204), 43),
    ("amazon_toys_s3rec.parquet", (19412, 11924, 167597),
     (5, 6, 8.6, 550), 43),
    ("yelp_llmesr.parquet", (15720, 11383, 192214), (3, 5, 12.2, 588), 65),
  ])
  def test_counts(self, shared_data, name, counts, lengths, head):
    data = files.read(shared_data / name)
    assert counts == (data.num_users, data.num_items, data.num_interactions)
    found = data.lengths
    assert (found.min(), found.max()) == (lengths[0], lengths[3])
    assert np.median(found) == lengths[1]
    np.testing.assert_allclose(found.mean(), lengths[2], atol=0.5)
    top = np.sort(found)[::-1][:round(0.2 * len(found))]
    np.testing.assert_allclose(100 * top.sum() / found.sum(), head, atol=0.6)
    split = splits.leave_one_out(data)
    assert split.notes["users_dropped"] == 0

  def test_movielens_ties(self, shared_data):
    data = files.read(shared_data / "ml-100k.inter")
    np.testing.assert_allclose(data.notes["tied_share"], 0.5, atol=0.02)
    last = data.offsets[1:] - 1
    tied = (data.times[last] == data.times[last - 1]).mean()
    np.testing.assert_allclose(tied, 0.44, atol=0.005)

  def test_tied_items_keep_the_file_order(self, shared_data):
    path = shared_data / "ml-100k.inter"
    data = files.read(path)
    rows = [line.split("\t") for line in path.read_text().splitlines()[1:]]
    rows = [row for row in rows if row[0] == "196"]
    rows.sort(key=lambda row: float(row[3]))
    u = data.user_ids.tolist().index(196)
    items = data.items[data.offsets[u]:data.offsets[u + 1]]
    assert data.item_ids[items - 1].tolist() == [int(row[1]) for row in rows]
