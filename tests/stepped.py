"""vLLM's scheduler, which takes a step only when a test lets it: `--scheduler-cls tests.stepped.scheduler`.

The test and the scheduler share the folder that TEST_STEPS names. As long as the file `counted` lies there, each step
takes away a file `allowed`, and waits until there is one. A test that is kept waiting for a processor thus never finds
that more has been computed than it has allowed.
"""

import os
import time
from pathlib import Path

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler


def scheduler(vllm_config, *args, **options) -> Scheduler:
    """The scheduler that vLLM would have chosen, with this wait before each of its steps."""
    kind = AsyncScheduler if vllm_config.scheduler_config.async_scheduling else Scheduler
    made = kind(vllm_config, *args, **options)
    folder, schedule = Path(os.environ["TEST_STEPS"]), made.schedule

    def schedule_once_allowed(*args, **options):
        while (folder / "counted").exists():
            try:
                (folder / "allowed").unlink()
                break
            except FileNotFoundError:
                time.sleep(0.002)  # it asks again and again
        return schedule(*args, **options)

    made.schedule = schedule_once_allowed
    return made
