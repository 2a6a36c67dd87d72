"""Documents with a domain, streamed from files.

``open_corpus`` determines what is at a path and returns a ``Corpus``, which yields one ``Document`` per record and can
be iterated repeatedly in the same order; ``sample`` draws from it. Each rule has one place:

    layout                             which files a path means, and their format
    json_lines, parquet, tables, text_files
                                       a file -> its records
    records                            what a record is, and how a field is found in it
    corpora                            a record -> a document, or one of the ``problems``
    sampling                           which documents a quota selects

Text is never repaired: a record that cannot be read exactly is left out, reported with its file and line, and counted.
This package imports nothing of moescope but the errors.
"""

from moescope.corpus.corpora import MAX_RECORD_BYTES, Corpus, open_corpus
from moescope.corpus.documents import Document
from moescope.corpus.problems import Problems
from moescope.corpus.sampling import Sample, sample

__all__ = ["MAX_RECORD_BYTES", "Corpus", "Document", "Problems", "Sample", "open_corpus", "sample"]
