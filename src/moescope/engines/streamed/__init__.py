"""The engine for models larger than memory: the whole corpus passes through one layer after the other.

Rule of the folder: the choices are those of `engines.transformers`, whose reading, batches and checks it uses, to the
bit. `shards` reads a checkpoint, `layerwise` has one layer of it in memory, `spool` keeps what lies between two layers,
`rehearsal` makes sure, on a small model (`shrinking`), that a family comes out the same, `estimate` says beforehand
what it will take, and `engine` puts them together.
"""
