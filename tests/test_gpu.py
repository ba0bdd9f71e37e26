"""gpu.py: a check that fails is reported and does not stop the others; the script runs without a GPU at small sizes."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import gpu
from conftest import ROOT, pytest_collection_modifyitems

READ = gpu.find("ratio .*")


def test_every_end_of_a_check_is_reported(tmp_path):
    """Passed, another exit status, an exception, too slow; results are read from what is printed."""

    def wrong(folder):
        raise AssertionError("the numbers differ")

    cases = (
        (gpu.Check("a", ["-c", "print('ratio 2.0')\nprint('end')"], 10, READ), True, "ratio 2.0"),
        (gpu.Check("b", ["-c", "print('end')"], 10), True, "end"),
        (gpu.Check("c", ["-c", "print('so far'); raise SystemExit(3)"], 10), False, "exit status 3: so far"),
        (gpu.Check("d", wrong, 10), False, "AssertionError: the numbers differ"),
        (gpu.Check("e", ["-c", "import time; time.sleep(60)"], 1), False, "timed out after"),
    )
    for check, expected, text in cases:
        passed, result, _, _ = gpu.run_check(check, tmp_path, check.seconds)
        assert passed == expected and text in result, check.name


def test_script_writes_a_table(tmp_path):
    """Chosen checks in one table and one JSON; what no time is left for is said to be not run, and counts as failed."""
    command = ["bash", "tests/gpu.sh", tmp_path, "--tiny", "--only", "nccl"]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines[1:]] == ["passed nccl"]
    rows = json.loads((tmp_path / "gpu.json").read_text())["checks"]
    assert [row["check"] for row in rows] == ["nccl"] and rows[0]["passed"]
    assert "| nccl | passed |" in (tmp_path / "gpu.md").read_text()
    assert gpu.main(gpu.Config(tmp_path / "late", tiny=True, only=("nccl",), seconds=1)) == 1
    assert "not run: no time left" in (tmp_path / "late" / "gpu.md").read_text()


def test_tests_of_written_data_are_left_out():
    """With the option that gpu.py gives, and only then: the machine has no TensorFlow."""
    needs, other = SimpleNamespace(fixturenames=["rlds", "written"]), SimpleNamespace(fixturenames=["tmp_path"])
    told = []
    hook = SimpleNamespace(pytest_deselected=lambda items: told.extend(items))
    for options, expected in (({"--no-tensorflow": False}, [needs, other]), ({"--no-tensorflow": True}, [other])):
        items = [needs, other]
        pytest_collection_modifyitems(SimpleNamespace(getoption=options.get, hook=hook), items)
        assert items == expected
    assert told == [needs]
    (tests,) = (check for check in gpu.checks(gpu.Config(Path("out"))) if check.name == "tests")
    assert "--no-tensorflow" in tests.command
