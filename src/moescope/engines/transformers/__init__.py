"""The engine that runs a model of transformers in memory, and the reading of routers that others build on.

Rule of the folder: it never changes what a model computes and leaves no hook behind; it records the experts that ran,
and what it cannot read exactly it refuses. `routers` says where a model routes, by `adapters` where need be; `hooks`
notes what comes by, and `lookahead` asks routers before their turn; `model` loads a checkpoint and `tokenizer` its
tokenizer, `provenance` describes both; `batches` groups sequences; `attention` and `rows` make a CPU faster, bit for
bit the same, by `replacing` functions of torch; `engine` puts them together.
"""

from moescope.errors import require

require("torch", extra="record")
require("transformers", extra="record")
