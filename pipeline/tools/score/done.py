"""What a finished command wrote: its settings, and the hashes of the output and of its quarantine.

The record is in the user's cache folder. By it the same command, given again, knows that it is done, and a
file that is in the way is known to be the command's own. Without it, as on another machine, neither is known:
the output then exists already, and only `--force` replaces it.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.artifacts.files import Digest, cache_file, hash_file
from pipeline.errors import UserError


class Done(BaseModel):
    """The record of one output; `quarantine` is None if no row was wrong."""

    model_config = ConfigDict(extra="forbid", strict=True)

    settings: dict[str, Any]
    output: Digest
    quarantine: Digest | None = None


def read_done(output: Path) -> Done | None:
    """Return the record of an output, or None if there is none."""
    with suppress(OSError, ValidationError):
        return Done.model_validate_json(_record(output).read_bytes())
    return None


def write_done(output: Path, done: Done) -> None:
    """Write the record of an output, unless the cache folder cannot be written."""
    with suppress(OSError):
        _record(output).parent.mkdir(parents=True, exist_ok=True)
        _record(output).write_text(done.model_dump_json(), encoding="utf-8")


def _record(output: Path) -> Path:
    return cache_file(f"score {output.absolute()}")


def quarantine_file(output: Path) -> Path:
    """Return the file of the rows that are wrong."""
    return output.with_name(f"{output.name}.quarantine.jsonl")


def check_in_the_way(output: Path, force: bool) -> None:
    """Check that the output and its quarantine replace nothing but what this command wrote, unless `force`.

    An output that is intact is not in the way yet: it is if its settings turn out to be others. Raises
    `UserError`.
    """
    quarantine = quarantine_file(output)
    for path in (output, quarantine):
        if path.is_symlink():
            raise UserError(f"--output {output}: {path} is a symbolic link; name another file")
    if force:
        return
    done = read_done(output)
    if output.exists() and not (done and done.output == hash_file(output)):
        raise UserError(f"--output {output}: exists already; name another file, or add --force to replace it")
    if quarantine.exists() and not (done and done.quarantine == hash_file(quarantine)):
        raise UserError(
            f"--output {output}: {quarantine} exists already; move it away, name another output, or add "
            "--force to replace it"
        )
