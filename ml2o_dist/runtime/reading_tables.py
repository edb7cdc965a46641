"""Reads Parquet files that are not trusted: the claims of their metadata are checked before a row is read."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.reading import MIB, one_line, read_bytes

FILE_LIMIT = 256 * MIB
"""Most bytes of a file, such as that of a recorded meta-step with 8 slots, 1,000 steps and 2 objectives."""

UNPACKED_LIMIT = 1024 * MIB
"""Most bytes of a file's unpacked columns, according to its metadata."""

VALUES_LIMIT = 100_000_000
"""Most values of a file's largest column, with those in lists counted one by one."""


def read_table(file: Path, schema: pa.Schema, within: Path | None = None) -> pa.Table:
    """Return the columns of a Parquet file that are in `schema`, complete and validated.

    Numbers are converted to the types in `schema`; the metadata are the file's.

    Raises:
        UserError: the file is missing, no Parquet file, torn, too large, claims to become too large, or has a column of
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
    """Raise UserError if a file's metadata claim more than the limits allow."""
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
