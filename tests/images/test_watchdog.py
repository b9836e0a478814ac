from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import ctypes, threading
from pipeline.images import HangGuard

guard = HangGuard({limit})
done = threading.Barrier(3)

def decode(number):
    with guard:
        pass
    done.wait()

for number in range(2):
    threading.Thread(target=decode, args=(number,)).start()
done.wait()
print("decoded", flush=True)
with guard:
    {deed}
print("went on", flush=True)
"""


def run(limit: float, deed: str) -> subprocess.CompletedProcess[str]:
    script = SCRIPT.format(limit=limit, deed=deed)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)


def test_a_decoder_that_hangs_with_the_interpreters_lock_ends_the_process_and_is_named() -> None:
    done = run(1, "ctypes.PyDLL(None).sleep(1000)")
    assert (done.returncode, done.stdout) == (1, "decoded\n")
    assert "Timeout" in done.stderr and 'File "<string>"' in done.stderr


def test_decoders_that_end_leave_the_process_alone() -> None:
    """Also when it then does something else for longer than the limit."""
    done = run(1, "pass\nctypes.PyDLL(None).sleep(3)")
    assert (done.returncode, done.stdout) == (0, "decoded\nwent on\n")
