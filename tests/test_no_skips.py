"""CI fails where a test is skipped."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

SKIPS = {
    "mark": "@pytest.mark.skipif(True, reason='needs a browser')\ndef test(): pass",
    "call": "def test(): pytest.skip('needs a browser')",
    "fixture": "@pytest.fixture\ndef page(): pytest.skip('needs a browser')\ndef test(page): pass",
    "import": "pytest.importorskip('no_such_module', reason='needs a browser')\ndef test(): pass",
}
WANTED = {
    "pass": "def test(): pass",
    "expected_failure": "@pytest.mark.xfail\ndef test(): raise ValueError",
}


def run(folder, source, *options):
    (folder / "test_it.py").write_text(f"import pytest\n{source}\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-m", "pytest", "-p", "no_skips", "-p", "no:cacheprovider", *options, "test_it.py"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("parallel", [(), ("-n", "1")], ids=["", "parallel"])
@pytest.mark.parametrize("how", SKIPS)
def test_a_skip_fails_and_says_why(how, parallel, tmp_path):
    finished = run(tmp_path, SKIPS[how], "--no-skips", *parallel)
    assert finished.returncode != 0
    assert "needs a browser; --no-skips makes this a failure" in finished.stdout
    assert "1 skipped" in run(tmp_path, SKIPS[how]).stdout


@pytest.mark.parametrize("how", WANTED)
def test_what_was_run_does_not(how, tmp_path):
    assert run(tmp_path, WANTED[how], "--no-skips").returncode == 0
