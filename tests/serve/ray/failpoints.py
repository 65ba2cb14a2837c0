"""Processes that end in a certain phase: a file says which, and whose process.

``fail`` is the deployment's observer. A file ``replica-publishing`` that holds ``0`` ends the first replica that comes
to publish; one that holds a process id ends that process, from whoever comes there; a negative one stops it.
"""

import os
import signal
from pathlib import Path

VARIABLE = "ONNX_REFIT_TEST_FAILPOINTS"


def arm(role, phase, pid=0):
    (Path(os.environ[VARIABLE]) / f"{role}-{phase}").write_text(str(pid))


def armed():
    return [path.name for path in Path(os.environ[VARIABLE]).iterdir()]


def fail(phase, transaction):
    # Only where it runs: environments without Ray collect these tests too.
    import ray

    name = ray.get_runtime_context().get_actor_name() or ""
    role = "coordinator" if name.startswith("coordinator of") else "replica"
    path = Path(os.environ[VARIABLE]) / f"{role}-{phase}"
    try:
        pid = int(path.read_text())
        path.unlink()
    except FileNotFoundError:
        return
    if pid < 0:
        os.kill(-pid, signal.SIGSTOP)
    else:
        os.kill(pid or os.getpid(), signal.SIGKILL)
