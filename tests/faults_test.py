"""Every fault is survived, or ends in one line that helps."""

import tempfile

import pytest

from tests import faults

pytestmark = [
  pytest.mark.usefixtures("compile_quickly"),
  pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.mark.parametrize("name", faults.ROWS)
def test_a_fault_is_survived_or_told(name):
  # Not in pytest's own folder, where no other user may look.
  with tempfile.TemporaryDirectory(dir="/tmp") as folder:
    code, text = faults.answer(name, folder)
  _, expected, words = faults.ROWS[name]
  assert code == expected, text
  for word in words:
    assert word in text
  assert "Traceback" not in text
