"""A run as one self-contained Python script and its log, as the NanoGPT speedrun's optimization
track has them.

    python -m studies.export runs/NAME [--out FILE.py] [--log FILE.txt] [--format own|track3]
    python -m studies.export configs/track3_124m.toml --format track3 --out train_gpt_dualized.py

It writes runs/NAME/script.py, or NAME.py in this folder for configs/NAME.toml, unless --out names
another file; --out - prints the script.

The script imports torch and the standard library alone, and has the run's settings written into it.
Parts of plugins (run.plugins) stand in it too, and what they import of other libraries it imports.
It logs its own code first, then the lines that the track's scripts log. It runs alone, or under
torchrun where the number of processes divides its micro-batches. Its one argument, as the track's,
is a number of trials, whose seeds count up from the run's. The step is optim/update.py itself, and
whatever else it needs of optim/ stands there as it stands here. model.py, models/ and
studies/export/script.py are specialised to the run (studies/export/bundle.py). A setting that the
script cannot carry out is refused.

own: the run's own batches and evaluations, of corpora/NAME/ in the current folder, whose files must
have the run's sha256. The script gives the run's losses within 1e-4 on a device of its kind.
track3: the optimization track's order of data (side by side, data/fineweb10B/fineweb_*.bin) and
steps of evaluation. Everything else is the configuration's.
--log: the log of the run that was, in the same form: the script, versions, the lines of
metrics.jsonl. Without --out, it is all that is written.
"""

import argparse
import shlex
import sys
from pathlib import Path

from optim.errors import Refusal, require

from .compose import data_folder, script
from .log import LINE, log_lines
from .run import Run, read
from .specialise import ExportError


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    args = parser().parse_args(argv)
    try:
        run, track = read(args.run), args.format == "track3"
        require(
            not args.log or run.folder,
            "--log",
            got=f"{args.run}, a configuration",
            allowed="with a run's folder",
            fix="leave it out, or train it first",
            error=ExportError,
        )
        code = script(run, track=track)
        if args.out == Path("-"):
            print(code, end="")
        elif args.out or not args.log:
            file = write_script(args.out, code, run)
            print(f"wrote {file}: {len(code.splitlines())} lines")
            print(
                f"run it where {data_folder(run, track=track)}/ is: python {shlex.quote(str(file))}"
            )
        if args.log:
            write("--log", args.log, f"{code}\n{LINE}\n{log_lines(run)}")
    except Refusal as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    options = argparse.ArgumentParser(
        prog="python -m studies.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument("run", type=Path, help="a run's folder, or a configuration file")
    out = "the script, by default script.py in the run's folder; - prints it"
    options.add_argument("--out", type=Path, help=out)
    options.add_argument("--log", type=Path, help="the run's log in this form")
    options.add_argument("--format", choices=("own", "track3"), default="own")
    return options


def write_script(out: Path | None, code: str, run: Run) -> Path:
    """Write the script where it was asked for, or where nobody's other file is; return the file."""
    if out is not None:
        write("--out", out, code)
        return out
    file = run.folder / "script.py" if run.folder else Path(f"{run.name}.py")
    require(
        not file.exists() or (file.is_file() and file.read_bytes() == code.encode()),
        file,
        got="a file that is there already, with other content",
        allowed="a new file, unless --out names it",
        fix=f"--out {shlex.quote(str(file))} to overwrite it, or --out with another name",
        error=ExportError,
    )
    write("the script", file, code)
    return file


def write(flag: str, file: Path, text: str) -> None:
    """Write a file, or raise ExportError with the option that named it."""
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ExportError(
            flag,
            got=f"{file} ({error.strerror})",
            allowed="a file in a folder that is there",
            fix="mkdir, or another path",
        ) from error
