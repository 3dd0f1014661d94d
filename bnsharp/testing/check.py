"""Named checks: how they are chosen, run and reported.

A check runs a few deterministic Hypothesis examples. Its failure is one sentence with the numbers that disagree.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from bnsharp.checks import unknown
from bnsharp.errors import InputError

try:
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import strategies as st
except ImportError as error:
    raise ImportError("bnsharp.testing needs hypothesis: pip install 'bnsharp[testing]'") from error

T = TypeVar("T")

STEP = 1e-3
"""Of five-point differences; their error is ``O(STEP⁴)``."""


class CheckFailed(AssertionError):
    """The subject breaks a property it declares; the message is one sentence."""


class UnexpectedPass(AssertionError):
    """A check that was expected to fail passed: take it out of ``expected_failures``."""


@dataclass(frozen=True)
class Check:
    """One named property of one subject; calling it runs it.

    Attributes:
        name: the property.
        run: raises :class:`CheckFailed` if the property does not hold.
        subject: what is checked, for messages and pytest's ids.
        reason: why it is expected to fail; None if it is not. A check that is expected to fail must fail.
    """

    name: str
    run: Callable[[], None]
    subject: str = ""
    reason: str | None = None

    def __call__(self) -> None:
        """Run it.

        Raises:
            CheckFailed: the property does not hold, and was not expected to fail.
            UnexpectedPass: it was expected to fail, and holds.
        """
        if self.reason is None:
            return self.run()
        try:
            self.run()
        except CheckFailed:
            return None
        raise UnexpectedPass(
            f"{self.subject}: check {self.name} passed but is expected to fail ({self.reason}); "
            "take it out of expected_failures"
        )

    def __str__(self) -> str:
        return f"{self.subject}-{self.name}" if self.subject else self.name


@dataclass(frozen=True)
class Rule(Generic[T]):
    """A check of every subject whose declaration ``applies`` to it."""

    name: str
    body: Callable[[T], None]
    applies: Callable[[T], bool] = lambda declared: True


def choose(
    rules: Sequence[Rule[T]], declared: T, subject: str, expected_failures: Mapping[str, str] | None
) -> list[Check]:
    """The checks that a declaration asks for, in the order of the rules.

    Raises:
        InputError: an expected failure that is not among them, or one without a reason.
    """
    expected = dict(expected_failures or {})
    chosen = [rule for rule in rules if rule.applies(declared)]
    for name, reason in expected.items():
        if name not in {rule.name for rule in chosen}:
            raise unknown(f"check of {subject}", name, [rule.name for rule in chosen])
        if not isinstance(reason, str) or not reason.strip():
            raise InputError(f"expected_failures[{name!r}] is {reason!r}; expected a reason in words")

    def bound(body: Callable[[T], None]) -> Callable[[], None]:
        return lambda: body(declared)

    return [Check(rule.name, bound(rule.body), subject, expected.get(rule.name)) for rule in chosen]


def known_names(what: str, given_names: Collection[str], known: Collection[str]) -> frozenset[str]:
    """The names given as a set.

    Raises:
        InputError: a string in place of a collection, or a name that is not known.
    """
    if isinstance(given_names, str):
        raise InputError(f"{what}={given_names!r}; expected a collection of names: pass ({given_names!r},)")
    for name in given_names:
        if name not in known:
            raise unknown(what, name, sorted(known))
    return frozenset(given_names)


def for_all(strategy: st.SearchStrategy[T], body: Callable[[T], None], examples: int) -> None:
    """Run ``body`` on deterministic examples; the first :class:`CheckFailed` is raised as it is.

    Failures are kept from Hypothesis, which would run a failing example again: a subject that is random where it
    should not be would then be reported as flaky.
    """
    failures: list[CheckFailed] = []

    @settings(
        max_examples=examples, derandomize=True, deadline=None, database=None,
        suppress_health_check=list(HealthCheck), phases=(Phase.explicit, Phase.generate),
    )
    @given(strategy)
    def test(example: T) -> None:
        if not failures:
            try:
                body(example)
            except CheckFailed as failure:
                failures.append(failure)

    test()
    if failures:
        raise failures[0]


@contextmanager
def calling(what: str) -> Iterator[None]:
    """The subject's own code: whatever it raises is its failure."""
    try:
        yield
    except CheckFailed:
        raise
    except Exception as error:
        first = (str(error).strip().splitlines() or ["no message"])[0]
        raise CheckFailed(f"{what} raised {type(error).__name__}: {first}") from error


def agree(a: float, b: float, allowed: float, sentence: str) -> None:
    """Raise :class:`CheckFailed` unless ``|a − b| ≤ allowed`` and both are finite.

    ``sentence`` names both numbers: it may use ``{a}``, ``{b}``.
    """
    difference = abs(a - b)
    if not difference <= allowed:  # NaN fails too
        told = sentence.format(a=f"{a:.9g}", b=f"{b:.9g}")
        raise CheckFailed(f"{told}: they differ by {difference:.2g}, allowed {allowed:.2g}")


def require(condition: bool, sentence: str) -> None:
    """Raise :class:`CheckFailed` with the sentence unless the condition holds."""
    if not condition:
        raise CheckFailed(sentence)


def refusal(what: str, call: Callable[[], Any]) -> str:
    """The message of the :class:`ValueError` that a bad call must raise, which must be one line of words."""
    expected = "expected a ValueError with a one-line message"
    try:
        call()
    except ValueError as error:
        message = str(error)
        require(bool(message.strip()) and "\n" not in message, f"{what} raised {message!r}; {expected}")
        return message
    except Exception as error:
        raise CheckFailed(f"{what} raised {type(error).__name__}; {expected}") from error
    raise CheckFailed(f"{what} raised nothing; {expected}")


def five_point(fn: Callable[[float], float]) -> float:
    """``df/dh`` at 0 from four values."""
    far, near = fn(2 * STEP) - fn(-2 * STEP), fn(STEP) - fn(-STEP)
    return (8 * near - far) / (12 * STEP)
