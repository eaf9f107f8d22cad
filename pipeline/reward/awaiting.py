"""Wait for `async` reward functions, also while another event loop runs, as in a notebook."""

import asyncio
import inspect
import threading
from collections.abc import Awaitable, Sequence
from functools import cache
from typing import Any


def await_all(values: Sequence[Any]) -> list[Any]:
    """Return the values, with the result of each awaitable in its place, or the exception that it raised.

    The awaitables run concurrently.
    """
    results = list(values)
    places = [place for place, value in enumerate(values) if inspect.isawaitable(value)]
    if places:
        gathering = _gather([values[place] for place in places])
        finished = asyncio.run_coroutine_threadsafe(gathering, _event_loop()).result()
        for place, result in zip(places, finished, strict=True):
            results[place] = result
    return results


def close_all(values: Sequence[Any]) -> None:
    """Close coroutines that nothing will await."""
    for value in filter(inspect.iscoroutine, values):
        value.close()


async def _gather(awaitables: Sequence[Awaitable[Any]]) -> list[Any]:
    return await asyncio.gather(*map(_outcome, awaitables))


async def _outcome(awaitable: Awaitable[Any]) -> Any:
    """Return the result or the exception; one that exits would end the loop, which all wait for."""
    try:
        return await awaitable
    except (Exception, SystemExit) as error:
        return error


@cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """Start the one loop of this process, in a thread; clients that a function keeps stay usable on it."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="reward functions", daemon=True).start()
    return loop
