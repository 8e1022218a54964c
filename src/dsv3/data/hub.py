"""Data sets of Hugging Face's `datasets`, streamed: `hf:NAME`, `hf:NAME:CONFIG`, or `hf:DIRECTORY`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsv3.data.files import FIELD, LONGEST_DOCUMENT, Document, Reader, SkipReport, cut_row
from dsv3.errors import RunError, UserError

PREFIX = "hf:"


def reader(uri: str) -> Reader:
    """The reader of a data set's `train` split: one document a row, its text in the field `text`, its id the row number.

    A directory is one that `save_to_disk` wrote, or files that `datasets` makes a data set of. Raises `UserError` when
    `datasets` is missing, or finds no such data set, or there is no such field.
    """
    rows = load(uri)
    columns = rows.column_names
    if columns is not None and FIELD not in columns:
        raise UserError(f"{uri} has no field {FIELD!r}; expected it among its fields {', '.join(columns)}")

    def every(report: SkipReport) -> Iterator[Document]:
        try:
            for number, row in enumerate(rows):
                yield from cut_row(row.get(FIELD), str(number), report, LONGEST_DOCUMENT)
        except OSError as error:
            raise RunError(f"{uri} cannot be read any more: {error}. Run again: what is complete is kept") from error

    return every


def load(uri: str) -> Any:
    """The rows of the `train` split, not read yet."""
    try:
        import datasets
    except ImportError:
        raise UserError(f"{uri}: reading data sets needs datasets: pip install 'dsv3[datasets]'") from None
    name = uri.removeprefix(PREFIX)
    try:
        if (Path(name) / "state.json").is_file() or (Path(name) / "dataset_dict.json").is_file():
            saved = datasets.load_from_disk(name)
            return saved["train"] if isinstance(saved, datasets.DatasetDict) else saved
        path, config = (name, None) if Path(name).exists() else (name.partition(":")[0], name.partition(":")[2] or None)
        return datasets.load_dataset(path, config, split="train", streaming=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{uri} cannot be opened as a data set with a split named train: {error}") from error
