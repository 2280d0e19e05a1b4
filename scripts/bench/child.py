"""The process of one side: `python -m bench.child SIDE CHANNEL`. The channel is a descriptor that nobody prints on."""

from __future__ import annotations

import sys
import traceback
from multiprocessing.connection import Connection

from bench.gate import Gate
from bench.job import Job
from bench.sides import SIDES


def main() -> int:
    """Take a job from the parent, race, hand over the evidence."""
    side, channel = sys.argv[1:]
    connection = Connection(int(channel))
    job, steps = connection.recv()
    assert isinstance(job, Job)
    gate = Gate(connection, job.device)
    try:
        gate.finished(SIDES[side](job, gate).summary(steps))
    except BaseException:
        gate.failed(traceback.format_exc())
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
