"""Shards over processes. A shard's bytes do not depend on who writes it, so neither does the result."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Protocol

import torch

from dsv4.checkpoints.checkpoint import Checkpoint
from dsv4.checkpoints.conversion.plan import ShardPlan
from dsv4.checkpoints.conversion.shards import Advance
from dsv4.errors import CheckpointError, Dsv4Error, StateError


class Work(Protocol):
    """What is done with a shard; it travels to other processes."""

    def __call__(self, checkpoint: Checkpoint, plan: ShardPlan, advance: Advance) -> dict[str, int]: ...


def run_shards(
    checkpoint: Checkpoint,
    reopen: Callable[[], Checkpoint],
    plans: Sequence[ShardPlan],
    work: Work,
    jobs: int,
    *,
    advance: Advance,
    finished: Callable[[ShardPlan, dict[str, int]], None],
) -> None:
    """Do ``work`` on every shard.

    Args:
        checkpoint: the source.
        reopen: opens it again in another process.
        plans: the shards.
        work: what to do.
        jobs: processes; with 1, or a single shard, it is done in this one.
        advance: told of progress, in bytes.
        finished: told of each shard and of what was counted, in this process.

    Raises:
        Dsv4Error: the first error of any shard; the other processes are stopped.
    """
    jobs = min(jobs, len(plans))
    if jobs <= 1:
        for plan in plans:
            finished(plan, work(checkpoint, plan, advance))
        return
    # Started afresh: a fork would take torch's threads for granted, which it does not copy.
    context = multiprocessing.get_context("spawn")
    threads = max(1, (os.cpu_count() or 1) // jobs)
    waiting = sorted(plans, key=lambda plan: -plan.size)  # the largest first, so that none is alone at the end
    running: dict[Connection, tuple[ShardPlan, BaseProcess]] = {}
    started: list[BaseProcess] = []
    try:
        for _ in range(jobs):
            ours, theirs = context.Pipe()
            process: BaseProcess = context.Process(target=_serve, args=(theirs, reopen, work, threads), daemon=True)
            process.start()
            theirs.close()
            started.append(process)
            running[ours] = (_hand_over(ours, waiting.pop(0), process), process)
        while running:
            for ready in wait(list(running)):
                assert isinstance(ready, Connection)
                plan, worker = running[ready]
                try:
                    kind, value = ready.recv()
                except (EOFError, ConnectionResetError):
                    raise _ended(worker, plan) from None
                if kind == "progress":
                    advance(value)
                elif kind == "error":
                    raise value
                else:
                    del running[ready]
                    finished(plan, value)
                    if waiting:
                        running[ready] = (_hand_over(ready, waiting.pop(0), worker), worker)
                    else:
                        ready.close()
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.join()


def _hand_over(connection: Connection, plan: ShardPlan, worker: BaseProcess) -> ShardPlan:
    try:
        connection.send(plan)
    except (BrokenPipeError, ConnectionResetError):
        raise _ended(worker, plan) from None
    return plan


def _ended(worker: BaseProcess, plan: ShardPlan) -> StateError:
    worker.join()
    return StateError(
        f"a worker process ended while it had {plan.name} (exit code {worker.exitcode}; -9 is often a lack of memory); "
        f"what is finished is kept: repeat the command, with fewer --jobs"
    )


def _serve(connection: Connection, reopen: Callable[[], Checkpoint], work: Work, threads: int) -> None:
    """A worker: takes plans until there are no more, or until the process that sends them is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of them; the first process stops the others
    torch.set_num_threads(threads)

    def advance(nbytes: int) -> None:
        connection.send(("progress", nbytes))  # raises where nobody is left to read it, which ends this process

    try:
        with reopen() as checkpoint:
            while True:
                plan = connection.recv()
                connection.send(("done", work(checkpoint, plan, advance)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except (Dsv4Error, OSError) as error:
        try:
            connection.send(("error", error if isinstance(error, Dsv4Error) else CheckpointError(str(error))))
        except OSError:
            return
