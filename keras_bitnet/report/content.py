"""What the reports have in common: their content as data, as JSON and as tables."""

import dataclasses

from keras_bitnet import valid_json
from keras_bitnet.report.table import print_table, text_table


class Content:
    """Mixin of a dataclass with `tables()`, which gives the arguments of `print_table` for each."""

    def to_dict(self):
        """The content as dictionaries and lists."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    def to_json(self, **kwargs):
        """The content as JSON, `null` for infinities; arguments go to `json.dumps`."""
        return valid_json.dumps(self.to_dict(), **kwargs)

    def show(self):
        """Prints the tables, by `rich` where that is installed."""
        for content in self.tables():
            print_table(**content)

    def __str__(self):
        return "\n\n".join(text_table(**content) for content in self.tables())

    def tables(self):
        """The tables, a list of arguments of `print_table`."""
        raise NotImplementedError
