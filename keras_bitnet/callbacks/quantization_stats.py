"""Watching what quantization does while a model trains."""

import keras
import numpy as np

from keras_bitnet.callbacks.common import find_bit_layers
from keras_bitnet.callbacks.statistics import (
    ACTIVATION_STATISTICS,
    WEIGHT_STATISTICS,
    activation_statistics,
    layer_codes,
    layer_statistics,
)
from keras_bitnet.callbacks.writers import CSVWriter, check_tensorboard, open_tensorboard
from keras_bitnet.filters import layer_filter

STATISTICS = WEIGHT_STATISTICS + ACTIVATION_STATISTICS


class QuantizationStats(keras.callbacks.Callback):
    """Measures weights, codes and activations of every quantized layer at the end of an epoch.

    What is measured is said at `keras_bitnet.callbacks.layer_statistics` and
    `activation_statistics`. `flip_rate` is the share of codes that changed during the epoch: high
    and constant, the learning rate is too high for the codes to settle; zero from the start, it
    is too low for them to move. To compare codes, one byte a weight of host memory is kept.

    Effects: adds to the logs, and so to the history, the mean over the layers under the name of
    the statistic, and with `log_layers` also each layer's as `path/statistic`. Files get all
    statistics of all layers, whatever goes to the logs. Reads the model only.

    Args:
        data: A small batch of inputs of the model, to measure activations on, or `None`.
        log: Names of the statistics that go to the logs.
        log_layers: Whether they go there for each layer, too.
        csv_path: CSV file with a row for each epoch and layer, or `None`. A file that is there
            is continued; an epoch that runs again after an interruption appears again.
        log_dir: Folder of TensorBoard files, or `None`. Needs tensorboardX, or tensorboard with
            torch, or TensorFlow.
        filters: Which layers, see `keras_bitnet.quantize_model`; all by default.

    Attributes:
        statistics: Those of the last epoch: a list with a dict for each layer, of `"epoch"`,
            `"layer"` and the statistics.

    Raises:
        ValueError: A name in `log` is unknown or needs `data`; `csv_path` holds other columns;
            or, when training begins, the model has no layer to measure.
        ImportError: `log_dir` is given and nothing is installed that writes there.
    """

    def __init__(
        self,
        data=None,
        log=("share_zero", "flip_rate", "weight_sqnr"),
        log_layers=False,
        csv_path=None,
        log_dir=None,
        filters=None,
    ):
        super().__init__()
        self.columns = WEIGHT_STATISTICS if data is None else STATISTICS
        unknown = [name for name in log if name not in self.columns]
        if isinstance(log, str) or unknown:
            raise ValueError(
                f"`log` must be a list of names out of {self.columns}"
                f"{' (activations need `data`)' if data is None else ''}. Received: log={log!r}"
            )
        layer_filter(filters)  # says now what is wrong with it
        if log_dir is not None:
            check_tensorboard()
        self.data = data
        self.log = tuple(log)
        self.log_layers = log_layers
        self.csv_path = csv_path
        self.log_dir = log_dir
        self.filters = filters
        self.statistics = []
        self._layers = {}
        self._codes = {}
        self._csv = self._tensorboard = None

    def on_train_begin(self, logs=None):
        """Finds the layers and opens the files."""
        found = find_bit_layers(self.model, self.filters)
        self._layers = {path: layer for layer, path in found.items()}
        self._codes = {}
        if self.csv_path is not None:
            self._csv = CSVWriter(self.csv_path, ["epoch", "layer", *self.columns])
        if self.log_dir is not None:
            self._tensorboard = open_tensorboard(self.log_dir)

    def on_epoch_begin(self, epoch, logs=None):
        """Remembers the codes; not when training begins, where a backup may yet be restored."""
        if not self._codes:
            self._codes = {label: layer_codes(layer) for label, layer in self._layers.items()}

    def on_epoch_end(self, epoch, logs=None):
        """Measures, and writes to the logs and files."""
        self.statistics = self._measure(epoch)
        values = self._values_to_log()
        if logs is not None:
            logs.update(values)
        if self._csv is not None:
            self._csv.write(self.statistics)
        if self._tensorboard is not None:
            for row in self.statistics:
                for name in self.columns:
                    if row.get(name) is not None:
                        self._tensorboard.add_scalar(f"{row['layer']}/{name}", row[name], epoch)
            self._tensorboard.flush()

    def on_train_end(self, logs=None):
        """Closes the files."""
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None

    def _measure(self, epoch):
        model = self.model  # on JAX this brings the state back into the variables
        rows = []
        for label, layer in self._layers.items():
            found = layer_statistics(layer, self._codes.get(label))
            self._codes[label] = layer_codes(layer)
            rows.append({"epoch": epoch, "layer": label, **found})
        if self.data is not None:
            layers = list(self._layers.values())
            found = activation_statistics(model, self.data, layers)
            rows = [{**row, **more} for row, more in zip(rows, found, strict=True)]
        return rows

    def _values_to_log(self):
        values = {}
        for name in self.log:
            known = [row for row in self.statistics if row.get(name) is not None]
            if known:
                values[name] = float(np.mean([row[name] for row in known]))
            if self.log_layers:
                values.update({f"{row['layer']}/{name}": row[name] for row in known})
        return values
