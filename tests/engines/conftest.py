"""Fixtures for the tests of this folder, which run models."""

from tiny import bos_tokenizer, checkpoint, documents, tokenizer

__all__ = ["bos_tokenizer", "checkpoint", "documents", "tokenizer"]
