"""A corpus is streamed: what is resident while it is read does not grow with the file."""

import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

DOCUMENTS = 2000
TEXT_BYTES = 50_000  # hexadecimal digits, so half of it remains after compression

PEAK = """
import sys
from pathlib import Path
from moescope.corpus import open_corpus, sample

def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1000

before = peak()
corpus = open_corpus(sys.argv[1], domain_field="d")
assert sum(len(document.text) for document in corpus) == int(sys.argv[2])
chosen = sample(corpus, max_tokens_per_domain=100_000, num_tokens=lambda text: len(text) // 4)
assert len(chosen.documents) == 2 * 8
print(peak() - before)
"""


def write_zstd(path, texts):
    with zstandard.open(path, "wt", cctx=zstandard.ZstdCompressor(level=1)) as file:
        for number, text in enumerate(texts):
            file.write(f'{{"text": "{text}", "d": "{number % 2}"}}\n')


def write_parquet(path, texts):
    texts = list(texts)
    table = pa.table({"text": texts, "d": [f"{number % 2}" for number in range(len(texts))]})
    # one row group; pages of 1 MB, which pyarrow only looks after every so many rows
    pq.write_table(table, path, row_group_size=len(texts), use_dictionary=["d"], write_batch_size=10)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs the peak memory that Linux tells")
@pytest.mark.parametrize(("name", "write"), [("c.jsonl.zst", write_zstd), ("c.parquet", write_parquet)])
def test_a_corpus_of_100_mb_is_read_and_sampled_in_little_memory(tmp_path, name, write):
    write(tmp_path / name, (os.urandom(TEXT_BYTES // 2).hex() for _ in range(DOCUMENTS)))
    assert (tmp_path / name).stat().st_size > 40e6
    command = [sys.executable, "-c", PEAK, tmp_path / name, str(DOCUMENTS * TEXT_BYTES)]
    environment = os.environ | {"ARROW_DEFAULT_MEMORY_POOL": "system"}  # its own keeps some 50 MB, whatever the file
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 50  # MB; found 4 and 34
