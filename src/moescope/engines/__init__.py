"""Engines: each is one way to get routed tokens out of a running model.

Rule of the folder: an engine knows token ids and layers, no documents and no file of a trace; `protocol` says what one
is, and nothing in it is of a library. `transformers/` runs a model in memory, `streamed/` a layer of it at a time.
`opening` picks one and loads its library; `options` are what a caller may ask of any; `provenance` has the keys by
which every engine describes model and run; `work` is what one keeps beside an unfinished trace. A new engine is a
folder here, with a class of `protocol` and a case in `opening`.
"""
