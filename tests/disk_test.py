"""Our own files: whole or absent, read or refused, wherever they lie."""

import errno
import html
import io
import os
import pathlib
import resource
import subprocess
import sys

import markdown_it
import polars as pl
import pytest
import rich.cells
import rich.console
from etils import epath
from toy_rows import make_rows, make_workdir

from experiments import logs, report, results, serve, workdir
from experiments.report import markdown_text
from pin_jax import disk, serving
from pin_jax.training.checkpoints import Checkpoints
from pin_jax.types import InputError, WriteError
from tests import bad_inputs, faults

FAST = {"num_resamples": 50}
NAMES = (
  "plain", "two words", " led by a space", "br[0-9]ckets", "st*r", "wh?t",
  "new\nline", "ünï-雪", "a'quote\"", "[/red]", "-dash", "%20", "$HOME", "{x}",
)
IN_CHECKPOINTS = [name for name in NAMES if not set(name) & set("*?[")]


@pytest.mark.parametrize("path", ["", "  ", "a\0b"])
def test_a_path_that_is_none_is_refused(path):
  with pytest.raises(InputError, match="output=.*is no path"):
    disk.place("output", path)


def test_a_tilde_is_the_home_directory(monkeypatch, tmp_path):
  monkeypatch.setenv("HOME", str(tmp_path))
  assert os.fspath(disk.place("x", "~/runs")) == f"{tmp_path}/runs"
  assert os.fspath(disk.place("x", epath.Path("a~/~"))) == "a~/~"
  workdir = make_workdir(tmp_path / "job")
  pages = report.write_report(["~/job"], output="~/out", **FAST)
  assert pages[0] == tmp_path / "out" / "report.html" and workdir.exists()


@pytest.mark.parametrize("name", NAMES)
def test_a_job_a_summary_and_a_log_are_read_back(name, tmp_path):
  job = make_workdir(tmp_path / name, make_rows(("base", "pin")))
  results.write_summary(results.read(job), job / name)
  assert results.read(job / name).rows.height == 480
  log = logs.RunLog(epath.Path(job / name))
  log.rewind("toy", -1)
  log.evaluation("toy", 3, {"all": 0.5})
  log.close()
  assert logs.read_log(epath.Path(job / name))[-1]["step"] == 3


def test_a_model_and_its_lists_are_read_back(tmp_path):
  job = tmp_path / " ".join(NAMES)
  job.mkdir(parents=True)
  model, lists = (str(job / f"[a]*?\n.{x}") for x in ("pin", "json"))
  serving.save(bad_inputs._recommender(), model, platforms=("cpu",))
  serve.serve(serve.Options(
    model=model, all_users=True, k=2, mask_history=False, output=lists,
  ), rich.console.Console(file=io.StringIO()))
  assert pl.read_json(pathlib.Path(lists)).height == 4


def test_the_report_reads_and_writes_hostile_paths(tmp_path):
  job = make_workdir(tmp_path / "j[0]*?\n ü")
  out = tmp_path / "o[/b]?\n*"
  pages = report.write_report(
    [job], output=out, pictures=out / "f[1]", **FAST
  )
  assert sorted(p.name for p in out.iterdir() if p.is_file()) == sorted(
    p.name for p in pages if p.parent == out
  )
  assert {p.read_bytes()[:4] for p in (out / "f[1]").iterdir()} == {b"<?xm"}


@pytest.mark.parametrize("name", IN_CHECKPOINTS)
def test_checkpoints_are_read_back_from_any_path(name, tmp_path):
  for _ in range(2):
    store = Checkpoints(tmp_path / name / "run")
    store.save(9, faults._tree(9), {"step": 9})
    store.close()
  faults._restored(tmp_path / name, lambda line: None, 9)
  with workdir.held(epath.Path(tmp_path / name)):
    pass


@pytest.mark.parametrize("name", sorted({*NAMES} - {*IN_CHECKPOINTS}))
def test_a_path_that_orbax_globs_is_refused(name, tmp_path):
  with pytest.raises(InputError, match="could not be read again"):
    Checkpoints(tmp_path / name)
  assert not (tmp_path / name).exists()


def test_a_planted_link_is_not_followed(tmp_path, monkeypatch):
  victim = tmp_path / "victim"
  victim.write_text("kept")
  monkeypatch.setattr(disk.secrets, "token_hex", lambda n: "00" * n)
  for name in (".0000000000000000.tmp", ".config.json.tmp", "config.json"):
    (tmp_path / name).symlink_to(victim)
  with pytest.raises(InputError, match="File exists"):
    disk.write({tmp_path / "config.json": "mine"})
  monkeypatch.undo()
  disk.write({tmp_path / "config.json": "mine"})
  assert victim.read_text() == "kept"
  assert (tmp_path / "config.json").read_text() == "mine"


def test_files_appear_together_or_not_at_all(tmp_path):
  old, new = tmp_path / "old", tmp_path / "new"
  old.write_text("before")
  with pytest.raises(WriteError, match="new cannot be written .*free space"):
    with faults._disk_full(500):
      disk.write({old: "after", new: b"x" * 600})
  assert old.read_text() == "before" and os.listdir(tmp_path) == ["old"]
  disk.write({old: "after", new: b"x" * 600})
  assert old.read_text() == "after" and new.stat().st_size == 600
  assert old.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask():
  mask = os.umask(0)
  os.umask(mask)
  return mask


def test_a_device_is_written_to_and_not_replaced(tmp_path):
  pipe = tmp_path / "pipe"
  os.mkfifo(pipe)
  reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
  disk.write({pipe: b"all"})
  assert os.read(reader, 9) == b"all" and pipe.is_fifo()
  os.close(reader)


@pytest.mark.parametrize("number, kind", [
  (errno.ENOSPC, WriteError), (errno.EROFS, WriteError),
  (errno.EDQUOT, WriteError), (errno.EACCES, WriteError),
  (errno.ENOENT, InputError), (errno.ENOTDIR, InputError),
])
def test_what_cannot_be_written_is_told_from_what_cannot_be(number, kind):
  with pytest.raises(kind, match=os.strerror(number)), disk.writing("there"):
    raise OSError(number, os.strerror(number))


KILLED = """
import os, pathlib, sys
from pin_jax import disk
with disk.replacing(pathlib.Path(sys.argv[1]) / "f") as file:
  file.write(b"half")
  file.flush()
  os.kill(os.getpid(), int(sys.argv[2]))
"""


def test_a_kill_leaves_the_old_file_and_its_remains_are_cleared(tmp_path):
  (tmp_path / "f").write_text("before")
  root = pathlib.Path(__file__).parents[1]
  subprocess.run([sys.executable, "-c", KILLED, tmp_path, "9"], cwd=root)
  assert (tmp_path / "f").read_text() == "before"
  assert len(os.listdir(tmp_path)) == 2
  with workdir.held(epath.Path(tmp_path)):
    assert sorted(os.listdir(tmp_path)) == ["checkpoints", "f"]


def _flipped(data, at):
  return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]


def test_damaged_parquet_is_told_in_a_line(tmp_path, capfd):
  """Every flip is read, or raises what `reading` tells; nobody cries."""
  job = make_workdir(tmp_path / "job", make_rows(("base", "pin")))
  path = job / "rows.parquet"
  whole = path.read_bytes()
  told = 0
  for at in [*range(0, len(whole), len(whole) // 60)]:
    path.write_bytes(_flipped(whole, at))
    try:
      results.read(job)
    except InputError as error:
      told += 1
      assert "\n" not in str(error)
  for size in (0, 3, 8, len(whole) // 2, len(whole) - 1):
    path.write_bytes(whole[:size])
    with pytest.raises(InputError, match="rows.parquet is damaged"):
      results.read_rows(epath.Path(job))
  assert told and capfd.readouterr() == ("", "")
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  assert peak < 4e6  # kB


def _put(name, text):
  return lambda job: (job / name).write_bytes(text)


@pytest.mark.parametrize("harm", [
  _put("summary.json", b"[1, 2]"), _put("summary.json", b'{"cost": [3]}'),
  _put("summary.json", b'{"cost": {"a": 1}}'), _put("summary.json", b"\xff"),
  _put("summary.json", b'{"base": 3, "num_items": "x"}'),
  _put("summary.json", b'{"fingerprint": "f"}'), _put("summary.json", b""),
  _put("config.json", b"[]"), _put("config.json", b'{"config": 3}'),
  _put("config.json", b"null"), _put("config.json", b"{}"),
  _put("cpu_seconds.json", b"[]"), _put("cpu_seconds.json", b"\x00"),
  _put("log.jsonl", '{"run": "ä"}\n'.encode("utf-16")),
  _put("log.jsonl", b"[1]\n"), _put("log.jsonl", b"\xe9\n"),
  _put("log.jsonl", b'{"conflict_rate": 0, "norms": 3}'),
  _put("log.jsonl", b'{"conflict_rate": 0, "norms": [1, 2]}'),
], ids=range(18))  # fmt: skip
def test_a_damaged_file_of_a_job_is_told_in_a_line(harm, tmp_path):
  job = make_workdir(tmp_path / "job", make_rows(("base", "pin")))
  harm(job)
  console = rich.console.Console(file=open(os.devnull, "w"))
  told = []
  for tell in (
    lambda: report.write_report([job], console=console, **FAST),
    lambda: report.write_report([job], output=tmp_path / "out", **FAST),
  ):
    try:
      tell()
    except InputError as error:
      told.append(str(error))
  assert told
  assert all("\n" not in line and str(job) in line for line in told)


@pytest.mark.parametrize("name, text", [
  ("job.json", b"[]"), ("job.json", b"{}"), ("job.json", b"\xff"),
  ("ranks.parquet", b"PAR1"), ("ranks.parquet", b""),
])
def test_a_damaged_summary_is_told_in_a_line(name, text, tmp_path):
  job = make_workdir(tmp_path / "job", make_rows(("base", "pin")))
  results.write_summary(results.read(job), tmp_path / "out")
  (tmp_path / "out" / name).write_bytes(text)
  with pytest.raises(InputError, match="damaged"):
    results.read(tmp_path / "out")


IDS = "u[/x]1", "[a0]shoe", "[red]r", "i" * 90, "a|b*c_d`e", "<b>雪</b>", "x y"


def test_ids_are_printed_as_they_are_in_a_pipe():
  table = pl.DataFrame({
    "request": range(7), "user": [*IDS[:6], None], "rank": [1] * 7,
    "item": IDS[::-1], "score": [0.5] * 7, "segment": [0] * 7,
    "source": ["model"] * 7,
  })
  console = rich.console.Console(file=io.StringIO(), width=80)
  serve.print_lists(table, console)
  head, *lines = console.file.getvalue().splitlines()
  assert head.split() == ["user", "segment", "source", "rank", "item", "score"]
  for line, user, item in zip(
    lines, [*IDS[:6], "(new)"], IDS[::-1], strict=True
  ):
    assert line.startswith(f"{user}  ") or line.startswith(f"{user} ")
    assert f"  1     {item} " in line and line.endswith("0.5000")
  assert len({rich.cells.cell_len(line) for line in lines}) == 1


@pytest.mark.parametrize("text", [
  "a|b", "`code`", "**bold** *it*", "_it_ __b__", "<b>x</b>", "<script>",
  "a\nb", "a\r\nb", "\\| \\\\", "&lt; & &amp;", "~~gone~~", "[x](http://y)",
  "![x](y)", "[x][y]", "<!-- no -->", "||", "|\n|--|", "<http://a.b>",
])  # fmt: skip
def test_markdown_shows_what_is_given(text):
  """Rendered by another library, a cell and a sentence are what they were."""
  renderer = markdown_it.MarkdownIt("commonmark").enable(
    ["table", "strikethrough"]
  )
  table = report.markdown_table(
    [text, "n"], [[text, "1"], ["x", text]], [True, False]
  )
  shown = html.unescape(renderer.render(table + f"\n\n. {markdown_text(text)}"))
  flat = " ".join(text.splitlines())
  for cell in (
    f">{flat}</th>", f">{flat}</td>\n<td", f"right\">{flat}</td>",
    f"<p>. {flat}</p>",
  ):
    assert cell in shown, shown
  assert shown.count("<tr>") == 3


@pytest.mark.parametrize("count", [1, 3])
def test_the_cores_of_a_cpu_are_among_the_versions(count, monkeypatch):
  monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(count)))
  assert workdir.versions()["cores"] == str(count)
