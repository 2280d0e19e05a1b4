"""A small byte-level tokenizer trained on the spot, with the special tokens of several model families."""

import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from alignkit.data.render import Renderer

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|begin|>", "<|head|>", "<|eot|>", "<bos>", "<turn>", "<end>"]
CORPUS = ["the little fish swam near the shore", "one day the big crab said hello", "user assistant system"] * 20


@pytest.fixture(scope="session")
def trained_json() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str()


@pytest.fixture(scope="session")
def make_renderer(trained_json):
    """make(template, stop=..., bos=..., front="<s>", back="") → a renderer; front and back: what the tokenizer adds."""

    def make(template=None, *, stop=("</s>",), bos="<s>", front="<s>", back=""):
        backend = Tokenizer.from_str(trained_json)
        single = " ".join(part for part in (front, "$A", back) if part)
        specials = [(name, backend.token_to_id(name)) for name in (front, back) if name]
        backend.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(single=single, special_tokens=specials),
            ]
        )
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=stop[0])
        ids = [backend.token_to_id(name) for name in stop]
        return Renderer(tokenizer, ids, template, ids[0], backend.token_to_id(bos) if bos else None)

    return make


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real data and models; ALIGNKIT_SHARED names it."""
    folder = os.environ.get("ALIGNKIT_SHARED")
    if not folder:
        pytest.skip("ALIGNKIT_SHARED is unset: no real data")
    return Path(folder)
