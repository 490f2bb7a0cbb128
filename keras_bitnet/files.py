"""Writing files: whole or not at all, and never over another by accident."""

import contextlib
import os
import pathlib
import tempfile


@contextlib.contextmanager
def replacing(path, overwrite=True):
    """Gives a temporary path, the file of which takes the place of `path` if the block ends well.

    What the block writes beside it goes beside `path`, before it.

    >>> with replacing("plan.json") as temporary:
    ...     temporary.write_text(text)

    Args:
        path: Where the file is to be; the temporary one has the same name.
        overwrite: Whether a file that is there may be replaced.

    Raises:
        FileExistsError: There is one and it may not.
    """
    path = pathlib.Path(path)
    check_absent(path, overwrite)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        temporary = pathlib.Path(folder, path.name)
        yield temporary
        check_absent(path, overwrite)  # another process may have been faster
        for file in sorted(temporary.parent.iterdir(), key=lambda file: file == temporary):
            os.replace(file, path.with_name(file.name))


def check_absent(path, overwrite=False):
    """Raises a `FileExistsError` if there is a file that may not be overwritten."""
    if not overwrite and os.path.lexists(path):
        raise FileExistsError(f"'{path}' exists already: allow to overwrite it, or name another.")
