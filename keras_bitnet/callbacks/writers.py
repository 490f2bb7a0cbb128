"""Where statistics go: CSV files and TensorBoard."""

import csv
import io
from importlib.util import find_spec
from pathlib import Path


class CSVWriter:
    """Appends rows to a CSV file, whose header is written once.

    A file that is there already goes on: a last line cut short by an interruption is removed.

    Args:
        path: Where; folders are made.
        columns: Names of the columns.

    Raises:
        ValueError: The file holds other columns.
    """

    def __init__(self, path, columns):
        self.path = Path(path)
        self.columns = list(columns)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        old = self.path.read_bytes() if self.path.exists() else b""
        whole = old[: old.rfind(b"\n") + 1]
        if len(whole) < len(old):
            self.path.write_bytes(whole)
        if not whole:
            self._append([self.columns])
            return
        header = next(csv.reader(io.StringIO(whole.decode())))
        if header != self.columns:
            raise ValueError(
                f"The file '{self.path}' holds other columns; take another `csv_path`. "
                f"Expected: {self.columns}. Received: {header}"
            )

    def write(self, rows):
        """Appends dicts; what is missing or `None` becomes an empty field."""
        self._append([[row.get(name) for name in self.columns] for row in rows])

    def _append(self, rows):
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        with open(self.path, "a", encoding="utf-8", newline="") as file:
            file.write(text.getvalue())  # one write, so that epochs are whole


def open_tensorboard(log_dir):
    """Opens a TensorBoard writer with `add_scalar(tag, value, step)`, `flush` and `close`.

    Takes the first of tensorboardX, torch with tensorboard, and TensorFlow that is installed.

    Raises:
        ImportError: None is.
    """
    check_tensorboard()
    if find_spec("tensorboardX"):
        from tensorboardX import SummaryWriter

        return SummaryWriter(str(log_dir))
    if find_spec("torch") and find_spec("tensorboard"):
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(log_dir))
    return _TensorFlowWriter(log_dir)


def check_tensorboard():
    """Raises an `ImportError` if nothing can write TensorBoard files."""
    torch_writer = find_spec("torch") and find_spec("tensorboard")
    if not (find_spec("tensorboardX") or torch_writer or find_spec("tensorflow")):
        raise ImportError(
            "`log_dir` needs one of: tensorboardX, tensorboard with torch, or tensorflow. "
            "Install one, such as `pip install tensorboardX`."
        )


class _TensorFlowWriter:
    """Writes what `tf.summary.scalar` does, which itself needs the package tensorboard."""

    def __init__(self, log_dir):
        import tensorflow as tf

        self.tf = tf
        self.writer = tf.summary.create_file_writer(str(log_dir))
        self.metadata = tf.compat.v1.SummaryMetadata(
            plugin_data=tf.compat.v1.SummaryMetadata.PluginData(plugin_name="scalars")
        )

    def add_scalar(self, tag, value, step):
        with self.writer.as_default():
            value = self.tf.constant(value, "float32")
            self.tf.summary.write(tag, value, step=step, metadata=self.metadata)

    def flush(self):
        self.writer.flush()

    def close(self):
        self.writer.close()
