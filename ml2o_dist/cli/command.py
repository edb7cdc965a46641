"""What commands have in common: --json, --quiet, one line for what went wrong, the exit codes; options of a run."""

from __future__ import annotations

import errno
import functools
import json
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import click

from ml2o_dist.plugins import load_installed, load_plugin
from ml2o_dist.runtime.errors import Aborted, Incomplete, Interrupted, Refused, UserError
from ml2o_dist.runtime.shown_text import ForeignTextConsole, visible
from ml2o_dist.runtime.stopping import exit_on_signals, stop_on_signals

USAGE, INCOMPLETE, ABORTED, REFUSED = 2, 3, 4, 5


def command(body: Callable[..., Any]) -> Callable[..., None]:
    """Add --json and --quiet, print the answer, and turn what went wrong into one line and its exit code."""

    @click.option("--json", "as_json", is_flag=True, help="One JSON value on stdout, everything else on stderr.")
    @click.option(
        "--plugin",
        "plugins",
        multiple=True,
        metavar="FILE.py|MODULE",
        help="Bring problems, rules, optimizers ... of your own; repeatable.",
    )
    @click.option("--quiet", is_flag=True, help="No progress, no tables; errors only.")
    @functools.wraps(body)
    def run(*args: Any, as_json: bool, quiet: bool, plugins: tuple[str, ...], **kwargs: Any) -> None:
        console = ForeignTextConsole(stderr=as_json, quiet=quiet, width=None if sys.stdout.isatty() else 120)
        try:
            # Ray's driver prints what its hosts say of a process that died, and libraries print what they like.
            with redirect_stdout(sys.stderr if as_json else sys.stdout), stop_on_signals(at_once=True):
                _check_words(kwargs | {"plugin": plugins})
                load_installed()
                for plugin in plugins:
                    load_plugin(plugin)
                answer = body(*args, console=console, **kwargs)
        except UserError as error:
            _fail(str(error), USAGE)
        except OSError as error:
            # What no reader or writer has put into words: a name that is too long, links in a circle, a full disk.
            if error.errno == errno.EPIPE:
                raise  # click's: who reads the answer has gone
            _fail(_file_error(error), USAGE)
        except Interrupted as error:
            exit_on_signals(128 + error.signal_number)
            _fail(str(error), 128 + error.signal_number)
        except Aborted as error:
            _fail(str(error), ABORTED)
        except Refused as error:
            _fail(str(error), REFUSED)
        except Incomplete as error:
            if as_json:
                click.echo(json.dumps(error.answer))
            _fail(str(error), INCOMPLETE)
        if as_json:
            click.echo(json.dumps(answer))

    return run


def _check_words(words: Mapping[str, Any]) -> None:
    """Raise UserError for a name with a control character: no file, run or model is called so on purpose."""
    for option, value in words.items():
        for each in value if isinstance(value, tuple) else (value,):
            allowed = "\n\t" if option == "overrides" else ""  # YAML may have them
            if isinstance(each, str | Path) and any(c < " " or c == "\x7f" for c in str(each) if c not in allowed):
                raise UserError(f"{option.replace('_', '-')} {str(each)!r} has a control character in it")


def _file_error(error: OSError) -> str:
    why = error.strerror or " ".join(str(error).split()) or type(error).__name__
    return f"{str(error.filename)!r}: {why}" if error.filename is not None else why


def run_options(*, config: str, run_dir: str, seed: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add what every command has that runs something on Ray and tracks it; the help texts of three options differ."""
    options = [
        click.option("--config", type=click.Path(path_type=Path), help=config),
        click.option(
            "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a dotted key; repeatable."
        ),
        click.option("--run-dir", help=run_dir),
        click.option("--seed", type=int, help=seed),
        click.option("--address", default="auto", show_default=True, help="Ray: auto, local, or HOST:PORT."),
        click.option("--tracking-uri", help="Short for --set tracking.uri=URI."),
    ]
    return lambda body: functools.reduce(lambda inner, option: option(inner), reversed(options), body)


def say(message: str) -> None:
    """Print one line on stderr: what went wrong, whether or not the command goes on."""
    click.echo(f"ml2o: {visible(' '.join(message.split()))}", err=True)


def _fail(message: str, code: int) -> None:
    say(message)
    sys.stderr.flush()
    sys.exit(code)
