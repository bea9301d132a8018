"""The command line: one file a command. Heavy imports happen inside commands, so that --help answers at once."""

from __future__ import annotations

import errno
import sys

import typer

from halobench.cli import (
    checkpoints,
    convert,
    demo,
    doctor,
    evaluate,
    lists,
    oracle,
    plan,
    profile,
    report,
    select,
    teacher,
    tune_scale,
)
from halobench.errors import HalobenchError, is_out_of_memory

INTERRUPTED = 130  # the shell's number for it
app = typer.Typer(
    name="halobench",
    help="Turn any Hugging Face decoder into an attention/RNN hybrid, and prove what came out.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("demo")(demo.demo)
app.command("convert")(convert.convert)
app.command("plan")(plan.plan)
app.command("select")(select.select)
app.command("tune-scale")(tune_scale.tune_scale)
app.command("oracle")(oracle.oracle)
app.command("eval")(evaluate.evaluate)
app.command("profile")(profile.profile)
app.command("report")(report.report)
app.command("import")(checkpoints.import_checkpoint)
app.command("export")(checkpoints.export_checkpoint)
app.add_typer(teacher.app, name="teacher")
app.command("doctor")(doctor.doctor)
app.command("recipes")(lists.recipes)
app.command("mixers")(lists.mixers)
app.command("selectors")(lists.selectors)


def main() -> None:
    """Runs a command. An error is one line on stderr: exit 2 for a wrong request, 1 for a failure, 130 for Ctrl-C."""
    sys.exit(_run())


def _run() -> int:
    try:
        code = app(standalone_mode=False)
        if code == INTERRUPTED:  # typer turns Ctrl-C into this
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted; run the same command again to resume", INTERRUPTED)
    except HalobenchError as error:
        return _fail(str(error), error.exit_code)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _fail("no space left on the disk; free some room and run again to resume", 1)
        raise
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            return _fail(f"out of memory: {str(error).splitlines()[0] if str(error) else 'no detail'}", 1)
        raise
    except Exception as error:
        message = getattr(error, "format_message", None)  # what the parser says of wrong options and arguments
        if message is None:
            raise
        return _fail(f"{message()}; see `halobench --help`", 2)


def _fail(message: str, code: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code
