"""The threads of a refit: who does a batch of moves and the tasks of Python's writers, and when more than one does."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from onnx_refit.engine.onnxruntime.batch import Ready
from onnx_refit.engine.onnxruntime.crew import Crew, Task
from onnx_refit.engine.onnxruntime.helpers import Helpers
from onnx_refit.engine.onnxruntime.traffic import Traffic
from onnx_refit.moves.library import Absent, Library
from onnx_refit.threads import step_back

_PARALLEL = 1 << 18  # elements; less than this is not worth waking a thread for
_MOVED = 1 << 19  # elements; the same for native code
_ALONE = 1 << 14  # elements; smaller tasks are done several by one thread
_BUNDLES = 4
_MOST = 16  # threads that move weights: more do not make memory faster, and calling each takes microseconds


class Workers:
    """Does the work of one refit at a time.

    Args:
        library: the native code, or why there is none.
        threads: how many threads work, the caller's included.
    """

    def __init__(self, library: Library | Absent, threads: int) -> None:
        self._library = library
        self._threads = threads
        self._helpers: Helpers | None = None
        self._pool: ThreadPoolExecutor | None = None
        if threads > 1:
            # Requests go first: with as many threads as cores they wait for a refit's otherwise.
            self._pool = ThreadPoolExecutor(threads - 1, "onnx-refit-derive", initializer=step_back)
            if isinstance(library, Library) and library.helped:
                self._helpers = Helpers(library, min(threads, _MOST) - 1)

    def rouse(self, elements: int) -> None:
        """A batch of so many elements is about to come, with no requests beside it."""
        if self._helpers is not None and elements >= _MOVED:
            self._helpers.rouse()

    def do(self, tasks: list[Task], ready: Ready | None, beside: Traffic | None) -> None:
        """Do tasks, and a batch; nobody works on either any more when this returns, or raises.

        Args:
            tasks: what Python does.
            ready: what native code does, if anything.
            beside: the requests to let go first; None where there are none.
        """
        batch: list[Task] = []
        if ready is not None and isinstance(self._library, Library):
            if beside is not None:
                beside.carry(self._library, ready)
            elif self._helpers is not None and not tasks and ready.elements >= _MOVED:
                self._helpers.work(ready.address)
            elif self._pool is None and not tasks:
                self._library.work(ready.address)
                return
            else:
                batch = [(ready.elements, _moved, (self._library, ready))]
        if beside is not None or self._pool is None or not _worth(batch, tasks):
            _do(batch + tasks)
            return
        # Each thread works on the same batch until nothing of it is left to begin.
        crew = Crew(batch * self._threads + _shared(tasks))
        try:
            for _ in range(self._threads - 1):
                self._pool.submit(crew.help)
            crew.work()
        finally:
            crew.finish()  # nobody may write any more once this returns, failed or not
        crew.check()

    def close(self) -> None:
        """End the threads."""
        if self._helpers is not None:
            self._helpers.close()
        if self._pool is not None:
            self._pool.shutdown()


def _moved(library: Library, ready: Ready) -> None:
    """In a thread of many. Native code knows addresses only: each thread that is in it holds the batch.

    An interrupt may take whoever waits for the threads away.
    """
    library.work(ready.address)


def _worth(batch: list[Task], tasks: list[Task]) -> bool:
    """Whether there is enough to do to wake a thread."""
    return sum(task[0] for task in batch) >= _MOVED or sum(task[0] for task in tasks) >= _PARALLEL


def _shared(tasks: list[Task]) -> list[Task]:
    """The tasks for several threads: the largest first, the small ones as few.

    Threads that do many small things wait for the interpreter's lock more than they work.
    """
    small = [task for task in tasks if task[0] < _ALONE]
    large = [task for task in tasks if task[0] >= _ALONE]
    large += [(sum(task[0] for task in part), _do, (part,)) for k in range(_BUNDLES) if (part := small[k::_BUNDLES])]
    return sorted(large, key=lambda task: -task[0])


def _do(tasks: list[Task]) -> None:
    for _, call, arguments in tasks:
        call(*arguments)
