"""Forks of the server are programs of their own, and nothing is in it but what was imported."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.processes import Program, ran

pytestmark = pytest.mark.ddp

TELLS = """
import atexit, os, sys, torch
atexit.register(print, "the end")
print(__name__, sys.argv, os.getcwd(), os.environ.get("ONLY"), "PATH" in os.environ, torch.get_num_threads())
print("behind", file=sys.stderr)
sys.exit(3)
"""


def test_a_program_has_words_a_folder_an_environment_and_an_end_of_its_own(tmp_path):
    (tmp_path / "tells.py").write_text(TELLS)
    (tmp_path / "there").mkdir()
    starts = {("-c", TELLS): "-c", (str(tmp_path / "tells.py"),): str(tmp_path / "tells.py")}
    for start, name in starts.items():
        done = ran(
            [sys.executable, *start, "a", "b"],
            cwd=tmp_path / "there",
            env={"ONLY": "x", "OMP_NUM_THREADS": "2"},
            timeout=60,
        )
        assert done.returncode == 3, done.stderr
        assert done.stdout == f"__main__ {[name, 'a', 'b']} {tmp_path / 'there'} x False 2\nthe end\n"
        assert done.stderr == "behind\n"
    assert "ONLY" not in os.environ


def test_signals_find_a_program_as_python_starts_it():
    code = "import sys, time\nprint('up', flush=True)\ntime.sleep(60)"
    for number, said in ((signal.SIGINT, "KeyboardInterrupt"), (signal.SIGTERM, ""), (signal.SIGKILL, "")):
        program = Program([sys.executable, "-c", code])
        while program.poll() is None and not (Path(program.out).is_file() and Path(program.out).read_text()):
            time.sleep(0.01)
        with pytest.raises(subprocess.TimeoutExpired):
            program.wait(timeout=0.01)
        program.send_signal(number)
        _, err = program.communicate(timeout=60)
        assert program.returncode == (1 if said else -number), err
        assert said in err


def test_the_server_has_imported_everything_and_computed_nothing():
    code = "import os, sys\nprint(len(os.listdir('/proc/self/task')), 'lightning_modules.hsg' in sys.modules)\n"
    code += "import torch, random\nprint(torch.cuda.is_initialized(), torch.initial_seed())"
    first, second = (ran([sys.executable, "-c", code], timeout=60).stdout for _ in range(2))
    assert first == second
    if sys.platform == "linux":
        assert first.startswith("1 True\nFalse "), first
