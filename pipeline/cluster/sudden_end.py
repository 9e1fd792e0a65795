"""What is said when this process is ended from outside Python, as Ray does when it is gone from this machine.

Ray's native code leaves a driver by `quick_exit` once its raylet or the control store on the head is lost, and an
out-of-memory killer asks nobody: no handler of ours runs. So a small process beside this one waits for it to end, and
speaks if it did not say that it is done. That process runs this file, without the packages of the project.
"""

from __future__ import annotations

import atexit
import signal
import subprocess
import sys
from pathlib import Path

GOES_ON = "What was finished is kept; the same command goes on from there."
DONE = "done"


class _Witness:
    """The process beside this one."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def tell(self, line: str, stderr: int | None = None) -> None:
        """Send a line, and begin the process where there is none."""
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                text=True,
                start_new_session=True,  # Ctrl-C is for the command
            )
            atexit.register(self.end)
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{line}\n")
            self.process.stdin.flush()
        except OSError:  # somebody has killed it: nothing depends on it
            self.process = None

    def end(self) -> None:
        """This process ends as it should."""
        if self.process is not None:
            self.tell(DONE)
        if self.process is not None:
            self.process.communicate()


_witness = _Witness()


def speak_for(pid: int, logs: str, stderr: int | None) -> None:
    """From now on a sudden end of this process is told.

    Args:
        pid: of this process.
        logs: the folder of Ray's logs on this node.
        stderr: the descriptor to tell it on; None for this process's standard error.
    """
    _witness.tell(f"{pid} {logs}", stderr)


def sentence(pid: int, logs: Path) -> str:
    """What can be said about a process that ended without a word.

    Args:
        pid: that it had. logs: Ray's, in which the last lines of its driver tell whether Ray ended it.
    """
    for path in logs.glob(f"python-core-driver-*_{pid}.log"):
        last = path.read_bytes()[-2000:].decode(errors="replace").strip().splitlines()[-1:]
        if last and "erminate" in last[0]:  # both of Ray's sentences: "Terminate the process", "will terminate"
            words = last[0].split("] ", 1)[-1].split(": ", 1)[-1].split(". ", 1)[0]  # behind time, file and line
            return (
                f"failed: Ray has ended this command: {words}. A part of Ray on this machine, or the cluster's head,"
                f" died; its last words are in {logs} (raylet.out; gcs_server.out on the head). {GOES_ON}"
            )
    return (
        "failed: this command was killed from outside: by somebody, or by the system for want of memory (`dmesg` tells"
        f" which). {GOES_ON}"
    )


def _main() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a terminal that closes ends the command, which is told first
    about = ""
    for line in sys.stdin:
        if line.strip() == DONE:
            return
        about = line.strip()
    if about:
        pid, logs = about.split(" ", 1)
        print(sentence(int(pid), Path(logs)), file=sys.stderr)


if __name__ == "__main__":
    _main()
