"""What `serve` reads: ids and histories, exactly as they are stored."""

import io
import json

import numpy as np
import polars as pl
import pytest
import rich.console

from experiments import serve
from pin_jax import serving
from pin_jax.data.interactions import from_columns
from pin_jax.types import InputError
from tests import bad_inputs


def _knowing(ids):
  """A recommender of these users and items, without a model."""
  data = from_columns(ids, ids)
  users = serving.Users(
    data.user_ids, data.items, data.offsets, {"all": data.lengths}
  )
  return serving.Recommender(None, None, users, data.item_ids, *[None] * 5)


ODD = [" a", "a", "a ", "\ta", "\x0ba", "a\u2028b", "\xa0", "[a]", "7", "07"]


def test_ids_of_a_file_and_of_a_flag_are_found_as_they_are(tmp_path):
  known = _knowing(ODD)
  for end in ("\n", "\r\n"):
    path = tmp_path / "ids"
    path.write_bytes(("\ufeff" + "".join(x + end for x in ODD)).encode())
    for text in (str(path), ",".join(ODD)):
      ids = serve.read_ids("users", text)
      assert ids == ODD
      found = serving.of_users(known, ids)
      assert found.names == ODD
      assert known.users.ids[found.users].tolist() == ODD


def test_many_ids_and_ids_that_look_like_paths(tmp_path, monkeypatch):
  ids = [f"id{n}" for n in range(2000)] + ["s3://b/x", "~nobody", "/", "a\0"]
  assert serve.read_ids("users", ",".join(ids)) == ids
  monkeypatch.setenv("HOME", str(tmp_path))
  (tmp_path / "u.txt").write_text("a\nb")
  assert serve.read_ids("users", "~/u.txt") == ["a", "b"]
  with pytest.raises(InputError, match="does not exist"):
    serve.read_ids("users", "~/v.txt")


@pytest.mark.parametrize("text", [
  "1 ", " 1", "+1", "01", "1.0", "1_0", "\u0661", "--1", "-0", "9" * 30, "",
])
def test_a_number_has_one_spelling(text):
  known = _knowing([-1, 0, 1, 10, 2**62])
  with pytest.raises(InputError, match="no integer"):
    serving.of_users(known, [text])
  assert serving.of_users(known, ["-1", "10", str(2**62)]).users.tolist() == [
    0, 3, 4
  ]


@pytest.mark.parametrize("text", ["", ",", "a,,b", "a,", "FILE"])
def test_no_id_is_refused(text, tmp_path):
  (tmp_path / "empty").write_text("\n\n")
  text = text.replace("FILE", str(tmp_path / "empty"))
  with pytest.raises(InputError, match="--users=.*empty"):
    serve.read_ids("users", text)


@pytest.mark.parametrize("flags", [{"users": ""}, {"history": ""}])
def test_an_unset_variable_is_not_everybody(flags):
  with pytest.raises(InputError, match="--(users|history)="):
    serve.serve(serve.Options(model="m.pin", **flags), console=None)


def test_histories_are_read_whatever_record_first_has_a_key(tmp_path):
  rows = [{"items": []}] * 300 + [{"items": [3, 4]}, {"user": 7, "items": [4]}]
  path = tmp_path / "h.json"
  path.write_text(json.dumps(rows))
  items, users = serve.read_histories(path)
  assert items == [[]] * 300 + [[3, 4], [4]] and users == [None] * 301 + [7]
  found = serving.of_histories(_knowing([3, 4, 7]), items, users)
  assert found.items.tolist() == [1, 2, 2] and found.users[-1] == 2
  table = pl.DataFrame(rows, infer_schema_length=None)
  table.write_parquet(path.with_suffix(".parquet"))
  same = serve.read_histories(path.with_suffix(".parquet"))
  assert same == (items, users)


def test_somebody_new_may_have_a_word_for_a_name():
  """Beside users whose ids are integers; what may be one misspelled may not."""
  found = serving.of_histories(
    _knowing([3, 4, 7]), [[3], [4], [4]], ["u3", None, 7]
  )
  assert found.users.tolist() == [-1, -1, 2]
  assert found.names == ["u3", None, 7]
  for name in ("07", "7.0", " 7", "1e3", "nan", ""):
    with pytest.raises(InputError, match="user .* is no integer"):
      serving.of_histories(_knowing([3, 4, 7]), [[3]], [name])


@pytest.mark.parametrize("item", [
  1.5, 4.0, True, None, [4], {"a": 4}, "4.0", " 4", 2**70, float("nan"),
])
def test_what_is_no_id_is_refused_in_a_history(tmp_path, item):
  path = tmp_path / "h.json"
  path.write_text(json.dumps([{"items": [3, item]}]))
  items, _ = serve.read_histories(path)
  with pytest.raises(InputError, match="item .* is no integer") as error:
    serving.of_histories(_knowing([3, 4]), items)
  assert "\n" not in str(error.value)
  if not isinstance(item, str | int):
    with pytest.raises(InputError, match="item .* is no text"):
      serving.of_histories(_knowing(["3", "4"]), items)


def test_fractional_items_of_parquet_are_refused(tmp_path):
  path = tmp_path / "h.parquet"
  pl.DataFrame({"items": [[1.0, 2.7]]}).write_parquet(path)
  with pytest.raises(InputError, match="no integer"):
    serving.of_histories(_knowing([1, 2]), serve.read_histories(path)[0])


@pytest.mark.parametrize("text", [
  "{}", "[1]", '[{"items": 3}]', '[{"user": 1}]', "[" * 100_000, "", "x",
])
def test_other_json_is_refused_in_one_line(tmp_path, text):
  path = tmp_path / "h.json"
  path.write_text(text)
  with pytest.raises(InputError, match="--history=.*`items`") as error:
    serve.read_histories(path)
  assert "\n" not in str(error.value)


def test_numpy_integers_are_ids():
  found = serving.of_users(_knowing([5, 6]), np.array([6], np.int32))
  assert found.users.tolist() == [1]


def test_an_export_is_a_model_and_says_what_it_holds(tmp_path, monkeypatch):
  monkeypatch.setattr(
    serve, "recommender", lambda *_, **__: bad_inputs._recommender()
  )
  path, console = tmp_path / "m.pin", rich.console.Console(file=io.StringIO())
  serve.serve(serve.Options(workdir="w", export=str(path)), console)
  text = console.file.getvalue()
  assert f"2 users, 6 items, {path.stat().st_size:,} bytes in" in text
  assert serving.load(path).item_ids.tolist() == list("abcdef")
