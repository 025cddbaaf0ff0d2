"""Every bad input is answered by one line that helps, with exit code 2."""

import pytest

from tests import bad_inputs


def test_there_are_rows_of_every_kind():
  kinds = {name.split(":")[0] for name in bad_inputs.ROWS}
  assert {"file", "config", "flags", "checkpoint", "tfds", "metric"} <= kinds
  assert len(bad_inputs.ROWS) >= 40


@pytest.mark.parametrize("name", bad_inputs.ROWS)
def test_a_bad_input_is_answered_in_one_line(name, tmp_path):
  code, text = bad_inputs.answer(name, tmp_path)
  assert code == 2
  assert text.startswith("error: ") and text.count("\n") == 1, text
  for word in bad_inputs.ROWS[name][1]:
    assert word in text
  assert not (tmp_path / "w").exists()
