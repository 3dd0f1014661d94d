"""Several functions side by side, one running at a time, that wait for each other where they ask for something.

Each function is ordinary code with branches of its own; where it needs an answer that is cheaper for many at once it
calls ``ask``, and is held until every other one has asked or ended. Then all that was asked is answered together.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Meet = Callable[[Mapping[int, Any]], Mapping[int, Any]]
"""``{place: request} -> {place: answer}`` of all functions that are waiting."""


class _Closed(BaseException):
    """Ends a function whose context was left."""


class Lockstep:
    """``n`` threads of which one runs at a time, in order; open it as a context.

    The order does not depend on timing, so that two runs do the same things in the same order.
    """

    def __init__(self, n: int):
        self._turns = [threading.Lock() for _ in range(n + 1)]  # the last one is the caller's
        for turn in self._turns:
            turn.acquire()
        self._next = [n] * n
        self._calls: Sequence[Callable[[], Any]] = ()
        self._asked: dict[int, Any] = {}
        self._answers: dict[int, Any] = {}
        self._results: dict[int, Any] = {}
        self._errors: dict[int, BaseException] = {}
        self._closed = False
        self._threads = [threading.Thread(target=self._work, args=(i,), daemon=True) for i in range(n)]

    def __enter__(self) -> Lockstep:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """End the threads: a function that an exception has left waiting ends where it asked."""
        self._closed = True
        for turn, thread in zip(self._turns, self._threads, strict=False):
            if turn.locked():
                turn.release()
            thread.join(1.0)  # one that computes ends when it asks next

    def ask(self, place: int, request: Any) -> Any:
        """Inside function ``place``: the answer to a request, once all others have asked or ended."""
        if self._closed:
            raise _Closed
        self._asked[place] = request
        self._turns[self._next[place]].release()
        self._turns[place].acquire()
        if self._closed:
            raise _Closed
        answer = self._answers.pop(place)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def run(self, calls: Sequence[Callable[[], Any]], meet: Meet) -> list[Any]:
        """What every function returns.

        An exception of ``meet`` is raised inside all functions that are waiting; the first one that a function ends
        with is raised here, after all have ended.
        """
        self._calls, self._results, self._errors, self._asked = calls, {}, {}, {}
        waiting = list(range(len(calls)))
        while waiting:
            self._round(waiting)
            waiting = sorted(self._asked)
            if waiting:
                try:
                    self._answers = dict(meet(self._asked))
                except Exception as error:
                    self._answers = dict.fromkeys(waiting, error)
                self._asked = {}
        for place in sorted(self._errors):
            raise self._errors[place]
        return [self._results[i] for i in range(len(calls))]

    def _round(self, places: list[int]) -> None:
        """Let these functions run, one after the other, each until it asks or ends."""
        for place, following in zip(places, [*places[1:], len(self._threads)], strict=True):
            self._next[place] = following
        self._turns[places[0]].release()
        self._turns[-1].acquire()

    def _work(self, place: int) -> None:
        while True:
            self._turns[place].acquire()
            if self._closed:
                return
            try:
                self._results[place] = self._calls[place]()
            except BaseException as error:
                self._errors[place] = error
            if self._closed:
                return
            self._turns[self._next[place]].release()
