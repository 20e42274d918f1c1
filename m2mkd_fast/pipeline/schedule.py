"""How long steps that need one another take: on as many workers as they can use, and on a given number."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Mapping, Sequence


def critical_path(seconds: Mapping[str, float], needs: Mapping[str, Sequence[str]]) -> float:
    """The longest way through the steps: their time with a worker for each.

    Args:
        seconds: of every step, in an order in which each comes after what it needs.
        needs: what each step waits for; names that are no steps are passed over.
    """
    ends: dict[str, float] = {}
    for name, own in seconds.items():
        ends[name] = own + max((ends[need] for need in needs[name] if need in ends), default=0.0)
    return max(ends.values(), default=0.0)


def finishing_time(
    seconds: Mapping[str, float], needs: Mapping[str, Sequence[str]], workers: int, running: Collection[str] = ()
) -> float:
    """When the last step ends if ``workers`` take, whenever one is free, the first step that waits for nothing.

    Args:
        seconds, needs: as for :func:`critical_path`.
        workers: at least 1.
        running: steps that are worked on already.
    """
    waiting = {name: {need for need in needs[name] if need in seconds} for name in seconds}
    order = [*(name for name in seconds if name in running), *(name for name in seconds if name not in running)]
    ends: list[tuple[float, str]] = []
    now, finished = 0.0, set()
    while order or ends:
        for name in [name for name in order if waiting[name] <= finished]:
            if len(ends) < max(workers, 1):
                heapq.heappush(ends, (now + seconds[name], name))
                order.remove(name)
        if not ends:
            break  # what is left waits for itself
        now, name = heapq.heappop(ends)
        finished.add(name)
    return now
