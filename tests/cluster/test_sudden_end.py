"""A process that ends without a word is spoken for by the process beside it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BEGIN = "import os, signal, sys; from pipeline.cluster.sudden_end import speak_for; "
LAST = {
    "raylet": "[2026-11-27 04:08:21,391 W 7 7] connection.cc:216: The connection to the plasma store is failed."
    " Terminate the process. Status: IOError: Broken pipe",
    "head": "[2026-11-27 04:12:40,669 E 7 8] rpc_client.h:204: Failed to connect to GCS within 60 seconds. GCS may have"
    " been killed. The program will terminate.",
    "other": "[2026-11-27 04:12:40,669 W 7 8] retryable_grpc_client.cc:85: GCS has been unavailable for a while",
}  # as Ray 2.60 leaves them at the end of a driver's log


def ends(end: str, logs: Path) -> subprocess.CompletedProcess[str]:
    """A process that has begun, and then does that."""
    code = f"{BEGIN}speak_for(7, {str(logs)!r}, None); {end}"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("end", ["pass", "sys.exit(2)", "speak_for(7, 'elsewhere', None)"])
def test_who_ends_as_python_does_is_not_spoken_for(tmp_path, end):
    assert ends(end, tmp_path).stderr == ""


def test_an_error_is_told_by_python_alone(tmp_path):
    assert "failed" not in ends("1 / 0", tmp_path).stderr


@pytest.mark.parametrize("end", ["os._exit(1)", "os.kill(os.getpid(), signal.SIGKILL)", "os.abort()"])
def test_a_sudden_end_is_told_once(tmp_path, end):
    done = ends(end, tmp_path)
    assert done.returncode in (1, -signal.SIGKILL, -signal.SIGABRT)
    assert done.stderr.startswith("failed: this command was killed from outside")
    assert done.stderr.count("the same command goes on") == 1


@pytest.mark.parametrize(
    ("last", "words"),
    [
        ("raylet", "Ray has ended this command: The connection to the plasma store is failed. A part of Ray"),
        ("head", "Ray has ended this command: Failed to connect to GCS within 60 seconds. A part of Ray"),
        ("other", "this command was killed from outside"),
    ],
)
def test_the_log_of_rays_driver_tells_whether_ray_did_it(tmp_path, last, words):
    (tmp_path / "python-core-driver-01ff_7.log").write_text(f"earlier\n{LAST[last]}\n")
    (tmp_path / "python-core-driver-02ff_8.log").write_text(LAST["raylet"])  # of another command
    said = ends("os._exit(1)", tmp_path).stderr
    assert words in said and (str(tmp_path) in said) == (last != "other")


def test_ctrl_c_leaves_the_end_to_the_command(tmp_path):
    """The process beside it has no terminal: a signal to the command's group does not reach it."""
    code = f"{BEGIN}speak_for(7, {str(tmp_path)!r}, None); os.killpg(0, signal.SIGINT)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, start_new_session=True
    )
    assert "KeyboardInterrupt" in done.stderr and "failed" not in done.stderr


def test_native_words_go_to_a_file_and_pythons_to_the_terminal(tmp_path):
    path = tmp_path / "native.err"
    code = (
        "import os, sys; from pipeline.cluster.native_words import native_words_to, part_stderr; part_stderr();"
        f" print('before', file=sys.stderr); native_words_to({str(path)!r});"
        " os.write(2, b'a stack\\n'); print('after', file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stderr == "before\nafter\n" and path.read_text() == "a stack\n"


def test_a_process_whose_stderr_is_not_parted_keeps_its_native_words(tmp_path):
    code = (
        "import os; from pipeline.cluster.native_words import native_words_to;"
        f" native_words_to({str(tmp_path / 'native.err')!r}); os.write(2, b'a stack\\n')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stderr == "a stack\n" and not os.listdir(tmp_path)
