"""A byte-level BPE tokenizer of 4,096 tokens, trained on equally many characters of each domain.

Letters, punctuation and runs of spaces are split as GPT-2's rule does, except that a run of line ends or spaces stays
whole (so that an indentation can be one token) and that each digit is a token of its own, as in Mixtral's tokenizer.
A BOS token is put before every text.

Example:
    python training/train_tokenizer.py --corpus WORK/corpus --output WORK/tokenizer
"""

import argparse
from pathlib import Path

from build_corpus import read_documents
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 4_096
CHARACTERS_PER_DOMAIN = 1_200_000
BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
# A contraction; a word with the space before it; one digit; punctuation; line ends with the indentation after them
# are kept apart from it: "\n\n" and "        " are tokens, the last space of a run belongs to the next word.
SPLIT = r"'(?:[sdmt]|ll|ve|re)(?!\p{L})| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\n+| +(?= \S)|[^\S\n]+|\s+"


def train(corpus: Path) -> Tokenizer:
    """Train on the first documents of each domain's (shuffled) training shard."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(corpus), trainer)
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bos)]
    )
    return tokenizer


def _texts(corpus: Path):
    for shard in sorted((corpus / "train").glob("*.jsonl.zst")):
        taken = 0
        for document in read_documents(shard):
            if taken >= CHARACTERS_PER_DOMAIN:
                break
            taken += len(document["text"])
            yield document["text"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    PreTrainedTokenizerFast(
        tokenizer_object=train(arguments.corpus),
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(arguments.output)
