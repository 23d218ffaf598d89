"""A CLIPTokenizer whose vocabulary is the miniature's English: other text splits, into letters at worst."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from moa.miniature import corpus
from moa.miniature.captions import web_caption

MAX_LENGTH = 64  # tokens, start and end included
VOCABULARY = Path(__file__).parent / "vocabulary"
START, END = "<|startoftext|>", "<|endoftext|>"
SPLIT = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def learn_vocabulary(folder: Path, captions: int = 20000) -> None:
    """Learn byte-level BPE merges, with CLIP's word splitting, and write vocab.json and merges.txt."""
    rng = np.random.default_rng(0)
    texts = (web_caption(corpus.scene("pretrain", i, 1), rng).text for i in range(captions))
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=END))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(__import__("tokenizers").Regex(SPLIT), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=1024, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
        ),
    )
    learned = json.loads(bpe.to_str())["model"]
    merges = [m if isinstance(m, list) else m.split(" ") for m in learned["merges"]]
    # CLIP's order: letters, letters that end a word, merges, specials
    tokens = [*sorted(alphabet), *(c + "</w>" for c in sorted(alphabet)), *("".join(m) for m in merges)]
    vocabulary = {t: i for i, t in enumerate(dict.fromkeys([*tokens, START, END]))}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n")


@lru_cache(maxsize=1)
def load_tokenizer() -> CLIPTokenizer:
    """The tokenizer of the prior, of both CLIPs and of the captioner."""
    vocabulary = json.loads((VOCABULARY / "vocab.json").read_text())
    merges = [tuple(m.split(" ")) for m in (VOCABULARY / "merges.txt").read_text().splitlines()[1:] if m]
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_LENGTH)  # type: ignore[arg-type]
