"""The command line: before a run, and with the children that `ChildTuner.export` wrote.

ds_childtune check ds_config.json --model bert-base-uncased
ds_childtune plan bert-base-uncased --stage 3 --world-size 8 --reserve-p 0.1
ds_childtune inspect tuned/child
ds_childtune export checkpoints tuned/child --base bert-base-uncased
ds_childtune merge bert-base-uncased tuned/child --output tuned/model
ds_childtune compose bert-base-uncased tuned/a tuned/b --output tuned/both
ds_childtune compare tuned/a tuned/b
ds_childtune convert tuned/child published --to sglang --base bert-base-uncased
"""

from __future__ import annotations

import sys

try:
    import typer
    from rich.console import Console
except ImportError:
    sys.exit("ds_childtune: the command line needs typer and rich. Remedy: pip install typer rich.")

from ds_childtune.commands.before import check_command
from ds_childtune.commands.children import (
    compare_command,
    compose_command,
    convert_command,
    export_command,
    inspect_command,
    merge_command,
)
from ds_childtune.commands.output import show_json
from ds_childtune.commands.planning import plan_command

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
app.command("check")(check_command)
app.command("plan")(plan_command)
app.command("inspect")(inspect_command)
app.command("merge")(merge_command)
app.command("compose")(compose_command)
app.command("compare")(compare_command)
app.command("export")(export_command)
app.command("convert")(convert_command)


def main() -> None:
    """Errors that have a remedy are printed without a traceback, with exit code 1; after --json as a json object."""
    as_json = "--json" in sys.argv[1:]
    try:
        # Left to itself, typer prints what is wrong with a command's words in a box.
        sys.exit(app(standalone_mode=not as_json))
    except Exception as error:
        words = getattr(error, "format_message", None)  # of a usage error: click's, or of typer's copy of click
        if words is None and not isinstance(error, (ValueError, NotImplementedError, RuntimeError)):
            raise
        if as_json:
            message = str(error) if words is None else words()
            show_json({"error": {"type": type(error).__name__, "message": message}})
        else:
            Console(stderr=True).print(f"ds_childtune: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(getattr(error, "exit_code", 1))


if __name__ == "__main__":
    main()
