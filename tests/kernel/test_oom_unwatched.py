"""The kernel kills at a job's own limit while no agent lives, and the job goes on; nobody else is to be blamed."""

import signal
import subprocess
import sys
import time
from pathlib import Path

from acctd.cgroup.layout import discover
from tests.kernel.served import Served

MIB = 1 << 20
PATIENCE = 60.0  # s until a wait is a failure

# Its child takes too much once a line comes, and dies of it; it does not.
_FATHER = (
    "import subprocess, sys\n"
    "print('here', flush=True)\n"
    "sys.stdin.readline()\n"
    "hog = 'x = bytearray(60 << 20); import time; time.sleep(1000)'\n"
    "print(subprocess.run([sys.executable, '-c', hog]).returncode, flush=True)\n"
    "sys.stdin.readline()\n"
)


def test_a_kill_while_no_agent_lives_is_the_jobs_own(served: Served) -> None:
    served.ok("Create", job="own", network="host", limits={"memory": 40 * MIB, "swap": 0})
    father = subprocess.Popen([sys.executable, "-c", _FATHER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert father.stdin is not None and father.stdout is not None
    try:
        assert father.stdout.readline() == "here\n"
        served.ok("Attach", job="own", pid=father.pid)
        served.stop(signal.SIGKILL)
        father.stdin.write("\n")
        father.stdin.flush()
        assert father.stdout.readline() == "-9\n"
        memory = discover().of("memory")
        assert memory is not None
        if memory.version == 1:
            control = Path(memory.job(served.node.base, "job_own").path / "memory.oom_control")
            deadline = time.monotonic() + PATIENCE
            while "oom_kill 1" not in control.read_text():
                assert time.monotonic() < deadline
        served.start()
        (shortage,) = served.ok("Usage", job="own")["job"]["shortages"]
        assert (shortage["level"], shortage["action"], shortage["kills"]) == ("job", "killed by the kernel", 1)
        (again,) = served.ok("Finish", job="own", exit_code=0)["record"]["shortages"]
        assert again == shortage
    finally:
        father.kill()
        father.communicate()
