"""Work split over processes without pickling what goes in."""

import contextlib
import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


def over_processes(work: Callable[[int], Any], processes: int) -> list[Any]:
    """[work(0), ..., work(processes - 1)], each in a process of its own, work(0) in this one.

    Children are forked where the system can, so that `work` and the text it holds are inherited, not copied; results
    come back through pipes. An exception in a child is raised here, and no child outlives the call.
    """
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else None)
    pipes = [context.Pipe(duplex=False) for _ in range(processes - 1)]
    children = [
        context.Process(target=send_result, args=(work, part, writer, [reader for reader, _ in pipes]), daemon=True)
        for part, (_, writer) in enumerate(pipes, start=1)
    ]
    try:
        for child, (_, writer) in zip(children, pipes, strict=True):
            child.start()
            writer.close()  # the child's end: once it is gone, a dead child reads as end of file
        return [work(0)] + [receive_result(reader) for reader, _ in pipes]
    finally:
        for child in children:
            if child.pid is not None:
                child.terminate()
                child.join()


def send_result(work: Callable[[int], Any], part: int, writer: Connection, readers: list[Connection]) -> None:
    """In a child: send what `work(part)` returns, or the exception it raises; end quietly if the parent is gone."""
    for reader in readers:
        reader.close()  # the parent's ends, inherited: held open, they would let a child write to nobody for ever
    try:
        result = work(part)
    except Exception as error:
        result = error
    with contextlib.suppress(BrokenPipeError):
        writer.send(result)


def receive_result(reader: Connection) -> Any:
    """In the parent: a child's result. Raises what the child raised."""
    try:
        result = reader.recv()
    except EOFError:
        raise RuntimeError("a worker process died: out of memory, or killed") from None
    if isinstance(result, Exception):
        raise result
    return result
