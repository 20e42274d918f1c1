"""Datasets of the Hugging Face Hub, or saved by its library, read in any order."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from m2mkd_fast.data.image_dataset import ImageDataset
from m2mkd_fast.data.picture_dataset import PictureOptions, make_picture_dataset
from m2mkd_fast.data.picture_split import PictureSource
from m2mkd_fast.errors import M2MKDError, UnknownNameError

_ROWS = 1000  # at a time
_TEST_NAMES = ("validation", "val", "valid", "test")


def create_huggingface(
    name: str,
    options: PictureOptions,
    *,
    config: str | None = None,
    train: str = "train",
    test: str | None = None,
    ood: str | None = None,
    image: str | None = None,
    label: str | None = None,
    cache_dir: str | Path | None = None,
) -> ImageDataset:
    """A dataset of images and classes that the library `datasets` reads.

    Args:
        name: a folder that `save_to_disk` wrote, or whatever `load_dataset` takes: a name on the Hub
            ("uoft-cs/cifar10"), a folder of Parquet files or images.
        options: see `PictureOptions`.
        config: the dataset's configuration, where it has several.
        train, test, ood: the names of its splits; for testing by default validation, val, valid or test, the first that
            there is.
        image: the column of the images; by default the only one.
        label: the column of the labels, classes or numbers from 0 on; by default the only one of classes, or "label".
        cache_dir: where the library keeps what it downloads and converts; by default its own folder.

    Raises M2MKDError when the dataset cannot be loaded, and UnknownNameError for a split or column that it has not.
    """
    try:
        import datasets
    except ImportError as error:
        raise M2MKDError(f'Hugging Face datasets need the library: pip install "m2mkd-fast[data]" ({error})') from error
    loaded = _load(name, config, cache_dir)
    if isinstance(loaded, datasets.Dataset):
        raise M2MKDError(
            f"dataset {name!r} is a single split; save a DatasetDict with one for training and one for testing, for "
            "instance of dataset.train_test_split()"
        )
    if test is None:
        test = next((split for split in _TEST_NAMES if split in loaded), None)
        if test is None:
            raise UnknownNameError("split of the dataset for test=", "validation", loaded)
    tables = {}
    for split, source in (("train", train), ("test", test), ("ood", ood)):
        if source is None:
            continue
        if source not in loaded:
            raise UnknownNameError(f"split of dataset {name!r}:", source, loaded)
        tables[split] = loaded[source]
    image = image or _image_column(name, tables["train"])
    label = label or _label_column(name, tables["train"])
    pictures = {split: _pictures(name, split, table, image, label) for split, table in tables.items()}
    return make_picture_dataset(
        f"huggingface:{name}", _class_names(tables["train"], label, pictures), pictures, options
    )


class TableRows(PictureSource):
    """The column `image` of a table of `datasets`, its images still encoded."""

    def __init__(self, table: Any, image: str) -> None:
        import datasets

        self.table, self.image = table.select_columns([image]).cast_column(image, datasets.Image(decode=False)), image

    def __len__(self) -> int:
        return len(self.table)

    def _row(self, index: int) -> dict[str, Any]:
        return self.table[index][self.image]

    def open(self, index: int) -> Image.Image:
        row = self._row(index)
        return Image.open(row["path"] if row["bytes"] is None else io.BytesIO(row["bytes"]))

    def name(self, index: int) -> str:
        return f"{self._row(index)['path'] or 'without a name'} in row {index}"

    def identities(self) -> Iterator[str]:
        import pyarrow.compute as pc

        rows = self.table.with_format("arrow")
        for first in range(0, len(rows), _ROWS):
            column = rows[first : first + _ROWS][self.image]
            # Sizes are differences of offsets: the images themselves, in a mapped file, are not read.
            sizes = pc.binary_length(pc.struct_field(column, "bytes")).to_pylist()
            for path, size in zip(pc.struct_field(column, "path").to_pylist(), sizes, strict=True):
                yield f"{os.path.basename(path or '')}/{os.stat(path).st_size if size is None else size}"

    def subset(self, indices: Tensor) -> TableRows:
        return TableRows(self.table.select(indices.tolist()), self.image)


def _load(name: str, config: str | None, cache_dir: str | Path | None) -> Any:
    import datasets

    folder = Path(name).expanduser()
    try:
        if any((folder / fact).is_file() for fact in ("dataset_dict.json", "state.json")):
            return datasets.load_from_disk(str(folder))
        cache = None if cache_dir is None else str(Path(cache_dir).expanduser())
        return datasets.load_dataset(str(folder) if folder.is_dir() else name, config, cache_dir=cache)
    except Exception as error:  # the library raises its own, the Hub's, the connection's and pandas' errors
        raise M2MKDError(
            f"dataset {name!r} cannot be loaded ({type(error).__name__}: {error}); expected a folder that save_to_disk "
            "wrote, or a name on the Hub and a connection"
        ) from error


def _image_column(name: str, table: Any) -> str:
    import datasets

    columns = [column for column, kind in table.features.items() if isinstance(kind, datasets.Image)]
    if len(columns) != 1:
        raise M2MKDError(
            f"dataset {name!r} has {len(columns)} columns of images among {', '.join(table.column_names)}; name one "
            "with image="
        )
    return columns[0]


def _label_column(name: str, table: Any) -> str:
    import datasets

    columns = [column for column, kind in table.features.items() if isinstance(kind, datasets.ClassLabel)]
    if len(columns) == 1:
        return columns[0]
    if "label" in table.column_names:
        return "label"
    raise M2MKDError(
        f"dataset {name!r} has {len(columns)} columns of classes among {', '.join(table.column_names)}; name one with "
        "label="
    )


def _pictures(name: str, split: str, table: Any, image: str, label: str) -> tuple[TableRows, Tensor]:
    for column in (image, label):
        if column not in table.column_names:
            raise UnknownNameError(f"column of dataset {name!r}:", column, table.column_names)
    values = table[label][:]
    wrong = next((value for value in values if not isinstance(value, int) or value < 0), None)
    if wrong is not None:
        raise M2MKDError(
            f"dataset {name!r}: column {label!r} of split {split!r} has {wrong!r}; labels are numbers from 0 on (of "
            "texts, class_encode_column makes such)"
        )
    return TableRows(table, image), torch.tensor(values, dtype=torch.int64)


def _class_names(table: Any, label: str, pictures: dict[str, tuple[TableRows, Tensor]]) -> list[str]:
    import datasets

    kind = table.features[label]
    if isinstance(kind, datasets.ClassLabel):
        return list(kind.names)
    return [str(number) for number in range(1 + max(int(labels.max()) for _, labels in pictures.values()))]
