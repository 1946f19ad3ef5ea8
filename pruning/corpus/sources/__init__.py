"""Sources of documents: one frozen dataclass per kind (the interface: document.py).

Libraries for reading (zstandard, pyarrow, TensorFlow) are imported when a source reads.
"""

from pruning.corpus.sources.csv_files import CsvSource
from pruning.corpus.sources.jsonl import JsonlSource
from pruning.corpus.sources.parquet import ParquetSource
from pruning.corpus.sources.python_docs import PythonDocsSource
from pruning.corpus.sources.text import TextSource
from pruning.corpus.sources.tfds import TfdsSource

CONFIGURABLES: dict[str, type] = {
    "CsvSource": CsvSource,
    "JsonlSource": JsonlSource,
    "ParquetSource": ParquetSource,
    "TextSource": TextSource,
    "TfdsSource": TfdsSource,
    "PythonDocsSource": PythonDocsSource,
}
