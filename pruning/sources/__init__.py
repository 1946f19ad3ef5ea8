"""Where documents come from: one frozen dataclass per kind of source (the interface: document.py).

What a source needs to read (zstandard, pyarrow, TensorFlow) is imported when it reads.
"""

from pruning.sources.jsonl import JsonlSource
from pruning.sources.parquet import ParquetSource
from pruning.sources.python_docs import PythonDocsSource
from pruning.sources.text import TextSource
from pruning.sources.tfds import TfdsSource

AnySource = JsonlSource | ParquetSource | TextSource | TfdsSource | PythonDocsSource

CONFIGURABLES: dict[str, type] = {
    "JsonlSource": JsonlSource,
    "ParquetSource": ParquetSource,
    "TextSource": TextSource,
    "TfdsSource": TfdsSource,
    "PythonDocsSource": PythonDocsSource,
}
