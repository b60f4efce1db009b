"""The console command `lpovod`: one subcommand per program, imported only when needed."""

import gc
import sys
from importlib import import_module

from lpovod.exceptions import did_you_mean

COMMANDS = {
    "adopt": (
        "lpovod.apps.adopt",
        "look at a folder of photographs and write the overlay of a run on them",
    ),
    "detect": ("lpovod.apps.detect", "detect objects in images, folders and data sets"),
    "learn": ("lpovod.apps.learn", "add a class to a trained model, by its name or by examples"),
    "serve": ("lpovod.apps.serve", "a page to detect, correct and learn in the browser"),
    "export": ("lpovod.apps.export", "a finished run as one file that detects, or as ONNX graphs"),
    "search": ("lpovod.apps.search", "show the regions of a finished run that match any words"),
    "score": (
        "lpovod.apps.score",
        "AP50 of any detector's results, for base and novel classes separately",
    ),
    "plan": ("lpovod.apps.plan", "hours, disk and memory of a run, before it starts"),
    "convert": (
        "lpovod.apps.convert",
        "detections or pseudo-labels as COCO, YOLO or Pascal VOC files, for labelling tools",
    ),
    "config": ("lpovod.apps.config", "check a configuration, print it, or list every key"),
}
"""Module and one line of help. The module's function has the command's name; `main` prints the text
that it returns."""

USAGE = """usage: lpovod COMMAND [OPTIONS]

Programs beside the workflow; to run the workflow itself: `snakemake --cores all`.

commands:
{commands}

`lpovod COMMAND --help` lists the options of a command."""


def main() -> None:
    """Run the subcommand named on the command line.

    Raises:
        SystemExit: 0 after help, 1 for wrong data or settings, 2 for wrong usage.
    """
    gc.disable()  # until `run`
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in COMMANDS:
        from lpovod.command_line import run, show

        module, _ = COMMANDS[name]
        function = getattr(import_module(module), name)
        result = run(function, program=f"lpovod {name}", arguments=sys.argv[2:])
        if isinstance(result, str):
            show(result)
    elif name in ("--help", "-h"):
        print(_usage())
    elif name == "--version":
        from lpovod import __version__

        print(f"lpovod {__version__}")
    else:
        hint = did_you_mean(name, COMMANDS)
        hint = f"; {hint}" if hint else ""
        problem = f"error: there is no command {name!r}{hint}\n\n" if name else ""
        print(problem + _usage(), file=sys.stderr)
        sys.exit(2)


def _usage() -> str:
    lines = [f"  {name:8}{help_}" for name, (_, help_) in COMMANDS.items()]
    return USAGE.format(commands="\n".join(lines))


if __name__ == "__main__":
    main()
