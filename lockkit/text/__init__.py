"""Text for training, distillation, validation and evaluation.

Text is divided into documents. Every document belongs to exactly one split, the same in every command and on every
machine. So no text serves two purposes.

1. A source (`stdlib`, a file, a folder, a Hub dataset) is read as an iterator of `Document(name, text)` (sources.py). Text
   files are cut into passages. In files of rows (tables.py), each row is a document.
2. A hash puts each document into a split (splits.py).
3. `read_rows` tokenizes the documents of each split and packs them into rows of equal length, which start as the
   tokenizer starts a text (rows.py).
"""

from lockkit.text.reading import decoded, read_text
from lockkit.text.rows import (
    Need,
    read_rows,
    require_embedded,
    rows_sha256,
    start_tokens,
    token_blocks,
    without_embedding,
)
from lockkit.text.sources import (
    documents,
    documents_by_split,
    file_documents,
    hub_documents,
    require_columns,
    stdlib_documents,
)
from lockkit.text.splits import (
    FILLED_CHARACTERS,
    HELD_OUT_PERCENT,
    SPLITS,
    Document,
    fill_shares,
    split_of,
    with_splits,
)
from lockkit.text.tables import DataColumn

__all__ = [
    "FILLED_CHARACTERS",
    "HELD_OUT_PERCENT",
    "SPLITS",
    "DataColumn",
    "Document",
    "Need",
    "decoded",
    "documents",
    "documents_by_split",
    "file_documents",
    "fill_shares",
    "hub_documents",
    "read_rows",
    "read_text",
    "require_columns",
    "require_embedded",
    "rows_sha256",
    "split_of",
    "start_tokens",
    "stdlib_documents",
    "token_blocks",
    "with_splits",
    "without_embedding",
]
