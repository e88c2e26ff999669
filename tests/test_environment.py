"""What lockkit says of the machine and of its own process."""

import subprocess
import sys

import numpy

from lockkit.environment import peak_resident_bytes


def test_peak_memory_is_this_process_own_not_that_of_the_one_that_started_it():
    held = numpy.ones(400_000_000 // 8)
    assert peak_resident_bytes() > held.nbytes
    code = "from lockkit.environment import peak_resident_bytes; print(peak_resident_bytes())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(child.stdout) < held.nbytes
