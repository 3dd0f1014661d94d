"""The ``bnsharp`` command. Torch is imported only when a command needs it."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import typer

from bnsharp.cli import compare, demo, groups, invariance, listing, measure, train

app = typer.Typer(
    name="bnsharp",
    help="Sharpness of neural-network minima, measured and regularised so that equal functions get equal values.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def alone(command: Callable[..., None]) -> Callable[..., None]:
    """A command that several processes would each run as a whole: refused there."""

    @functools.wraps(command)
    def checked(*arguments: Any, **options: Any) -> None:
        from bnsharp.errors import InputError

        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ:
            raise InputError("several processes were started; expected one: only train runs in several")
        command(*arguments, **options)

    return checked


def told(command: Callable[..., None]) -> Callable[..., None]:
    """A command in a process of its own; interrupted while it says nothing of that itself (imports, reading data): one
    line."""

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        from bnsharp.allocator import keep_freed_memory

        keep_freed_memory()
        try:
            command(*arguments, **options)
        except KeyboardInterrupt:
            raise typer.Abort from None
        except ImportError as error:  # what an interruption of a compiled module's import is made into
            if not _interrupted(error):
                raise
            raise typer.Abort from None

    return run


def _interrupted(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


app.command("demo")(told(alone(demo.demo)))
app.command("train")(told(train.train))
app.command("compare")(told(alone(compare.compare)))
app.command("measure")(told(alone(measure.measure)))
app.command("invariance")(told(alone(invariance.invariance)))
app.command("groups")(told(alone(groups.groups)))
app.command("list")(told(alone(listing.listing)))


_python_shows = warnings.showwarning


def main() -> None:
    """Run the command line: exit code 0 on success, 2 on bad usage with one line, 1 where training failed.

    Of several processes (``torchrun``) the first speaks for all, except about what befell one alone.
    """
    from bnsharp.errors import DataError, DivergedError, InputError, Notice, RankLostError, StorageError

    code: object = 0
    try:
        with _quiet_unless_first(), warnings.catch_warnings():
            warnings.simplefilter("always", Notice)
            warnings.showwarning = _show
            code = app(standalone_mode=False)
    except InputError as error:
        _stop(str(error), 2)
    except DivergedError as error:
        _stop(f"training stopped: {error}", 1)
    except (StorageError, DataError, RankLostError) as error:
        _stop(f"training stopped: {error}", 1, everywhere=True)
    except OSError as error:
        # a folder that cannot be made or written, a full disk
        _stop(f"{error.filename or 'a file'}: {error.strerror or error}; expected a path that can be used", 2)
    except typer.Abort:
        _stop("stopped", 130)
    except Exception as error:
        # what the option parser raises says its exit code and its line itself
        message = getattr(error, "format_message", None)
        if message is None or not hasattr(error, "exit_code"):
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()  # type: ignore[attr-defined]
            sys.exit(error.exit_code)
        _stop(" ".join(message().split()), error.exit_code)
    sys.exit(code if isinstance(code, int) else 0)


def _is_first() -> bool:
    return "WORLD_SIZE" not in os.environ or os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def _quiet_unless_first() -> Iterator[None]:
    if _is_first():
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def _stop(line: str, code: int, everywhere: bool = False) -> NoReturn:
    if everywhere or _is_first():
        print(f"bnsharp: {line}", file=sys.stderr, flush=True)
    sys.exit(code)


def _show(message: Warning | str, category: type[Warning], *where: Any, **rest: Any) -> None:
    """A notice as one line; any other warning as Python shows it."""
    from bnsharp.errors import Notice

    if issubclass(category, Notice):
        print(f"bnsharp: {message}", file=sys.stderr)
    else:
        _python_shows(message, category, *where, **rest)
