"""What `serve` reads: ids and histories, exactly as they are stored."""

import io
import json
import uuid

import numpy as np
import polars as pl
import pytest
import rich.console
from absl import flags

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
  return serving.Recommender((), None, users, data.item_ids, *[None] * 4)


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
  with pytest.warns(serving.UnknownWarning, match="1 of 4 users is unknown"):
    found = serving.of_users(known, ["-1", text, "10", str(2**62)])
  assert found.users.tolist() == [0, 3, 4]
  assert found.numbers.tolist() == [0, 2, 3]


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
  items, users = serve.read_histories(path, {})
  assert items == [[]] * 300 + [[3, 4], [4]] and users == [None] * 301 + [7]
  found = serving.of_histories(_knowing([3, 4, 7]), items, users)
  assert [x.tolist() for x in found.histories] == [[]] * 300 + [[1, 2], [2]]
  assert found.users.tolist() == [-1] * 301 + [2]
  table = pl.DataFrame(rows, infer_schema_length=None)
  table.write_parquet(path.with_suffix(".parquet"))
  same = serve.read_histories(path.with_suffix(".parquet"), {})
  assert same == (items, users)


@pytest.mark.parametrize("name", [
  "u3", "07", "7.0", " 7", "", 7.0, True, 2**70, str(2**63), None,
  uuid.UUID(int=7),
])
def test_somebody_new_may_have_any_name(name):
  """Only a known user's own spelling is the known user."""
  found = serving.of_histories(
    _knowing([3, 4, 7]), [[3], [4], [4], [3]], [name, 7, "7", np.int64(7)]
  )
  assert found.users.tolist() == [-1, 2, 2, 2]
  assert found.names == [name, 7, "7", 7]


@pytest.mark.parametrize("item", [
  1.5, 4.0, True, None, [4], {"a": 4}, "4.0", " 4", 2**70, float("nan"), 5,
])
def test_what_is_no_known_item_is_left_out_of_a_history(tmp_path, item):
  path = tmp_path / "h.json"
  path.write_text(json.dumps([{"items": [item, 3, item]}, {"items": [4]}]))
  items, _ = serve.read_histories(path, {})
  with pytest.warns(serving.UnknownWarning, match="2 of 4 items") as caught:
    found = serving.of_histories(_knowing([3, 4]), items)
  assert [x.tolist() for x in found.histories] == [[1], [2]]
  assert "\n" not in str(caught[0].message)
  with pytest.raises(InputError, match="2 of 2 items .* are unknown"):
    serving.of_histories(_knowing(["x"]), [[item, item]])


@pytest.mark.parametrize(("typed", "known", "near"), [
  ("ANN ", ["ann", "bob"], ["ann"]), ("nan", ["ann", "bob"], ["ann"]),
  ("07", [3, 7, 70], [7]), (" 7", [3, 7, 70], [7]), (71, [3, 7, 70], [7]),
  ("B00O2EIJ5W", ["A000", "B0002EIJ5W", "B0002EJI5X"], ["B0002EIJ5W"]),
  ("B0002EJ5W", ["B0002EIJ5W", "C1"], ["B0002EIJ5W"]),
  ("", ["a", "b", "c"], []), (1.5, [8, 9], []), ({"x": 1}, ["a"], []),
  ("Zoë", ["zoe", "zoé"], ["zoe", "zoé"]),
])  # fmt: skip
def test_ids_near_a_slip(typed, known, near):
  found = serving.nearest(typed, _knowing(known).item_ids)
  assert sorted(found)[: len(near)] == near and bool(found) == bool(near)


def test_nobody_known_is_an_error_and_a_few_are_named():
  with pytest.raises(InputError) as caught:
    serving.of_users(_knowing(["ann", "bob"]), ["amn", "bbo", "x", "y", "x"])
  assert str(caught.value) == (
    "5 of 5 users are unknown to the model: 'amn' (near: 'ann'), 'bbo' (near: "
    "'bob'), 'x', …; check them or give histories"
  )


@pytest.mark.parametrize("text", [
  "{}", "[1]", '[{"items": 3}]', '[{"user": 1}]', "[" * 100_000, "", "x",
])
def test_other_json_is_refused_in_one_line(tmp_path, text):
  path = tmp_path / "h.json"
  path.write_text(text)
  with pytest.raises(InputError, match="--history=.*`items`") as error:
    serve.read_histories(path, {})
  assert "\n" not in str(error.value)


def test_flags_are_read_as_their_options_types():
  values = flags.FlagValues()
  serve.define_flags(values)
  defaults = serve.Options()._asdict()
  values(["serve"])
  assert {name: values[name].value for name in defaults} == defaults
  values(["serve", "--seed=1", "--k=3", "--strict", "--users=7"])
  assert (values.seed, values.k, values.strict) == (1, 3, True)
  assert values.users == "7"


def test_an_export_is_a_model_and_says_what_it_holds(tmp_path, monkeypatch):
  monkeypatch.setattr(
    serve, "recommender", lambda *_, **__: bad_inputs._recommender()
  )
  path, console = tmp_path / "m.pin", rich.console.Console(file=io.StringIO())
  serve.serve(serve.Options(workdir="w", export=str(path)), console)
  text = console.file.getvalue()
  assert f"2 users, 6 items, {path.stat().st_size:,} bytes in" in text
  assert serving.load(path).item_ids.tolist() == list("abcdef")
