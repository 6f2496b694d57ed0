"""Rows of Parquet and Arrow files."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from k2jax.config import ConfigError
from k2jax.data.optional import import_optional
from k2jax.data.tally import Tally
from k2jax.data.values import Value, noun, to_value

BATCH = 1_024  # rows read at once
REMEDY = "pip install 'k2jax[parquet]'"


def read_parquet(
    file: Path, field: str, share: tuple[int, int], tally: Tally
) -> Iterator[tuple[int, Value]]:
    """Rows of every `share[1]`-th row group, from number `share[0]` on, with their places."""
    parquet = import_optional("pyarrow.parquet", REMEDY)
    table = parquet.ParquetFile(file)
    columns = _choose_columns(table.schema_arrow.names, field, file)
    number, of = share
    place = 0
    for group in range(table.num_row_groups):
        count = table.metadata.row_group(group).num_rows
        if group % of == number:
            at = place
            for batch in table.iter_batches(BATCH, row_groups=[group], columns=columns):
                yield from _read_rows(batch, columns, field, (file, at), tally)
                at += batch.num_rows
        place += count


def read_arrow(
    file: Path, field: str, share: tuple[int, int], tally: Tally
) -> Iterator[tuple[int, Value]]:
    """Rows of every `share[1]`-th batch, from number `share[0]` on, with their places."""
    arrow = import_optional("pyarrow", REMEDY)
    importlib.import_module("pyarrow.ipc")
    number, of = share
    with arrow.memory_map(str(file)) as source:
        try:
            batches: Any = arrow.ipc.open_stream(source)  # what the datasets package saves
        except arrow.ArrowInvalid:
            table = arrow.ipc.open_file(source)
            batches = (table.get_batch(i) for i in range(table.num_record_batches))
        place = 0
        for i, batch in enumerate(batches):
            if i % of == number:
                columns = _choose_columns(batch.schema.names, field, file)
                yield from _read_rows(batch, columns, field, (file, place), tally)
            place += batch.num_rows


def _choose_columns(names: list[str], field: str, file: Path) -> list[str]:
    if field not in names and "messages" not in names:
        raise ConfigError(
            f'{file} has no column "{field}" or "messages"; it has: {", ".join(names)}'
        )
    return [name for name in (field, "messages", "tools") if name in names]


def _read_rows(
    batch: Any, columns: list[str], field: str, start: tuple[Path, int], tally: Tally
) -> Iterator[tuple[int, Value]]:
    """Rows of an Arrow batch. An empty row keeps its place, so that names do not move."""
    file, place = start
    if columns == [field]:
        for at, cell in enumerate(batch[field].to_pylist(), place):
            text = tally.decode(cell, f"{file} record {at}") if isinstance(cell, bytes) else cell
            yield (
                at,
                text
                if isinstance(text, str)
                else to_value({field: text}, field, f"{file} record {at}"),
            )
        return
    cells = [batch[name].to_pylist(maps_as_pydicts="strict") for name in columns]
    for at, row in enumerate(zip(*cells, strict=True), place):
        where = f"{file} record {at}"
        record = dict(zip(columns, row, strict=True))
        if isinstance(record.get(field), bytes):
            record[field] = tally.decode(record[field], where)
        for name in ("messages", "tools"):
            record[name] = _drop_nulls(record.get(name), where)
        yield at, to_value(record, field, where)


def _drop_nulls(value: Any, where: str) -> Any:
    """A value without the members that only other rows of the column have.

    Raises:
        ConfigError: it has something that JSON cannot say.
    """
    if isinstance(value, dict):
        return {k: _drop_nulls(v, where) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_drop_nulls(item, where) for item in value]
    if value is not None and not isinstance(value, str | int | float):
        raise ConfigError(f"{where} has {noun(value)} in a conversation, which JSON cannot say")
    return value
