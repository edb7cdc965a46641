"""Reading Parquet files that are not trusted: what their metadata claims is checked before a row is read."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.reading import MIB, one_line, read_bytes

FILE_LIMIT = 256 * MIB
"""Bytes of a file: a recorded meta-step of 8 slots, 1,000 steps and 2 objectives has one."""

UNPACKED_LIMIT = 1024 * MIB
"""Bytes of its columns once they are unpacked, as its metadata have it."""

VALUES_LIMIT = 100_000_000
"""Values of its largest column, those in lists counted one by one."""


def read_table(file: Path, schema: pa.Schema, within: Path | None = None) -> pa.Table:
    """Return those columns of a Parquet file that `schema` has, whole and valid.

    Numbers of another type than `schema` has are converted; the metadata are the file's.

    Raises:
        UserError: it is missing, no Parquet file, torn, too large, claims to become too large, or has a column of
            `schema` in a type that cannot be converted; the line begins "FILE cannot be read: ".
    """
    try:
        content = read_bytes(file, "it", FILE_LIMIT, within)
        parquet = pq.ParquetFile(pa.BufferReader(content))
        _check_claims(parquet.metadata)
        there = parquet.schema_arrow
        names = [field.name for field in schema if field.name in there.names]
        for name in names:
            if len(there.get_all_field_indices(name)) != 1:
                raise UserError(f"it has the column {name} twice")
            found, wanted = there.field(name).type, schema.field(name).type
            if found != wanted and not (_is_number(found) and _is_number(wanted)):
                raise UserError(f"column {name} is of {one_line(found)}, not {one_line(wanted)}")
        table = parquet.read(columns=names)
        table.validate(full=True)
        for i, name in enumerate(table.column_names):
            if (wanted := schema.field(name).type) != table.schema.field(i).type:
                table = table.set_column(i, name, table.column(i).cast(wanted))
    except UserError as error:
        why = str(error).removeprefix(f"it {str(file)!r} ")
        raise UserError(f"{file} cannot be read: {why}") from error
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"{file} cannot be read: {one_line(error)}") from error
    return table


def _check_claims(metadata: pq.FileMetaData) -> None:
    """Raise UserError where the metadata of a file claim more than is read."""
    rows, unpacked, values = metadata.num_rows, 0, 0
    for g in range(metadata.num_row_groups):
        group = metadata.row_group(g)
        columns = [group.column(c) for c in range(group.num_columns)]
        sizes = [(group.num_rows, column.total_uncompressed_size, column.num_values) for column in columns]
        if any(each < 0 for size in sizes for each in size):
            raise UserError("its metadata have a size below 0")
        unpacked += sum(size for _, size, _ in sizes)
        values += max((number for *_, number in sizes), default=0)
        rows -= group.num_rows
    if rows:
        raise UserError("its metadata do not agree on how many rows it has")
    if unpacked > UNPACKED_LIMIT or values > VALUES_LIMIT:
        raise UserError(f"it claims to hold {values:,} values in {unpacked / MIB:,.0f} MiB, more than is read")


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))
