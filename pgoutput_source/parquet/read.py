"""The published files of a `ParquetSink` as one dataset."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from pgoutput_source.errors import SinkError
from pgoutput_source.parquet.folder import table_of


def read(folder: str | Path, *, table: str | None = None) -> ds.FileSystemDataset:
    """The published files of a `ParquetSink` as one dataset, with a schema that fits all versions of the table.

    A column that a file does not have is null in its rows. The dataset is what is published now; call again for more.

    Args:
        folder: The folder.
        table: Schema and table: only the files of its changes.

    Raises:
        SinkError: Two files have a column of types that can't be brought together: read them one by one.

    Example:
        >>> read("out/nothing-yet").count_rows()
        0
    """
    try:
        schemas = {file: pq.read_schema(file) for file in sorted(Path(folder).glob("*.parquet"))}
        if table is not None:
            schemas = {file: kind for file, kind in schemas.items() if table_of(kind) == table}
        schema = pa.unify_schemas([*schemas.values()] or [pa.schema([])], promote_options="permissive")
    except pa.ArrowTypeError as e:
        raise SinkError(
            f"the files in {folder} don't fit together: {e}",
            hint="a column has changed its type; read the files of each version by themselves",
        ) from e
    return ds.dataset([str(file) for file in schemas], schema=schema, format="parquet")
