"""How every script starts, fails and writes: flags, one-line errors, folders that are whole or absent.

Floor 0: it imports nothing of the project, and any file may import it.
"""

import contextlib
import io
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import tyro


class UserError(Exception):
    """A mistake of the user's. The message says what, where (file and line) and the mend, in one line."""


def run(main: Callable[[Any], None], config_type: Any) -> None:
    """Parse the command line into `config_type`, call `main` with it, and exit.

    A user's mistake (`UserError`, an unreadable or missing file, a full disk, a bad flag) ends with one `error: ` line
    on stderr and status 2. Ctrl-C ends with 130. Anything else is a bug and keeps its traceback.
    """
    try:
        main(parse_flags(config_type))
    except UserError as error:
        fail(str(error))
    except BrokenPipeError:  # the reader of our output has left, as in `generate.py ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        fail(f"{error.filename or 'input or output'}: {error.strerror or error}")
    except KeyboardInterrupt:
        sys.exit(130)


def fail(message: str) -> None:
    """Print `message` as one `error: ` line on stderr and exit with status 2."""
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


def parse_flags(config_type: Any, arguments: list[str] | None = None) -> Any:
    """The command line as an instance of the dataclass `config_type`. Tyro's boxed complaint becomes one line."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(config_type, args=arguments, config=(tyro.conf.OmitArgPrefixes,))
    except SystemExit as stop:
        if stop.code:
            box = re.split("For full helptext|Argument helptext", complaint.getvalue())[0]
            fail(re.sub(r"╭.*╮|[╰╯│─]", " ", box))
        raise


@contextlib.contextmanager
def whole_folder(out: Path, *ours: str) -> Iterator[Path]:
    """A temporary folder that becomes `out` when the block ends well, and vanishes when it does not.

    An `out` that already stands is replaced only if the name of all that lies in it matches one of the patterns `ours`,
    the files that this command writes: no other file of the user's is ever touched.
    """
    out = Path(os.path.realpath(out))
    partial, old = out.with_name(f".{out.name}.partial"), out.with_name(f".{out.name}.old")
    put_back(old, out)  # a run was killed while it replaced `out`
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: name a folder with --out")
    for path in out.iterdir() if out.exists() else ():
        if not any(fnmatch(path.name, pattern) for pattern in ours):
            raise UserError(f"{out} holds other files, such as {path.name}: name a new or empty folder with --out")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        sync_folder(partial)
        if out.exists():
            out.rename(old)  # deleted under its own name, a kill could leave half of it there
        partial.rename(out)
        sync_path(out.parent)
    finally:
        put_back(old, out)
        shutil.rmtree(partial, ignore_errors=True)


def put_back(old: Path, out: Path) -> None:
    """End a replacement of `out` that moved what stood there to `old`: delete it if the new folder came, else undo."""
    if old.exists() and not out.exists():
        old.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Flush every file and folder under `folder`, so that a rename publishes whole files even across a power cut."""
    for path in [*folder.rglob("*"), folder]:
        sync_path(path)


def sync_path(path: Path) -> None:
    """fsync one file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
