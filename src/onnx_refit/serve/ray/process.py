"""The process of a replica: whether it lives, and how to be certain that it does not."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from onnx_refit.serve.cluster.messages import Member
from onnx_refit.serve.logs import log

_PROBE_SECONDS = 5.0
_KILL_SECONDS = 30.0
_AGAIN_SECONDS = 0.5


def here() -> dict[str, str]:
    """How ``end`` finds the process that calls."""
    pid = os.getpid()
    return {"node": ray.get_runtime_context().get_node_id(), "pid": str(pid), "started": start_time(pid) or ""}


async def alive(member: Member) -> bool:
    """Whether a replica's process lives. Only Ray's word that it has died counts as dead."""
    try:
        actor = await asyncio.to_thread(_find, member)
        if actor is None:
            return False
        async with asyncio.timeout(_PROBE_SECONDS):
            await actor.__ray_ready__.remote()
    except ActorDiedError:
        return False
    except (RayError, TimeoutError):
        return True
    return True


async def end(member: Member) -> None:
    """Kill a replica, and return when its process is gone.

    Ray calls an actor that is killed, by us or by Serve's health check, dead a moment before its process has ended, and
    until then that may answer. So a task on its node looks after the process itself, whatever Ray says of the actor. If
    the whole node has died there is nothing to look after.
    """
    if await alive(member):
        log("a replica is ended", level=logging.WARNING, replica=member.name)
        with contextlib.suppress(RayError):
            actor = await asyncio.to_thread(_find, member)
            if actor is not None:
                ray.kill(actor, no_restart=True)
    node = member.address["node"]
    where = NodeAffinitySchedulingStrategy(node, soft=False)
    task = ray.remote(_bury).options(num_cpus=0, max_retries=0, scheduling_strategy=where)
    while any(known["NodeID"] == node and known["Alive"] for known in await asyncio.to_thread(ray.nodes)):
        with contextlib.suppress(RayError, TimeoutError):
            async with asyncio.timeout(_KILL_SECONDS):
                await task.remote(int(member.address["pid"]), member.address["started"])
                return
        await asyncio.sleep(_AGAIN_SECONDS)


def _find(member: Member) -> Any:
    """The replica's actor; None if Ray knows no living one of this name."""
    try:
        return ray.get_actor(member.address["actor"], namespace=member.address["namespace"])
    except ValueError:
        return None


def _bury(pid: int, started: str) -> None:
    """Kill a process of this machine, and wait until it is gone."""
    while (start_time(pid) or "") == started:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        time.sleep(0.01)


def start_time(pid: int) -> str | None:
    """When a process was started, in ticks since boot; None if it is gone (or there is no /proc).

    The field after the name, which may hold spaces and brackets: see proc(5), ``/proc/pid/stat``, field 22.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
