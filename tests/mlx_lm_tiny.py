"""A model, a tokenizer and data for fine-tuning with mlx-lm, all of them tiny, made here."""

import json
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 32,
    "tie_word_embeddings": True,
}
WORDS = [
    "the",
    "cat",
    "dog",
    "bird",
    "sees",
    "hears",
    "wants",
    "a",
    "big",
    "small",
    "red",
    "old",
    "and",
    "but",
    "near",
    "far",
]


def make(folder: Path, **config: object) -> None:
    """``folder/model`` for ``--model`` and ``folder/data`` for ``--data``."""
    from mlx_lm.models import llama
    from tokenizers import Tokenizer, models, pre_tokenizers

    config = {**CONFIG, **config}
    model, data = folder / "model", folder / "data"
    model.mkdir()
    data.mkdir()
    mx.random.seed(7)
    weights = dict(tree_flatten(llama.Model(llama.ModelArgs.from_dict(config)).parameters()))
    mx.save_safetensors(str(model / "model.safetensors"), weights)
    (model / "config.json").write_text(json.dumps(config))

    vocabulary = {word: number for number, word in enumerate(["<unk>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(model / "tokenizer.json"))
    special = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (model / "tokenizer_config.json").write_text(json.dumps(special))

    for number, name in enumerate(("train", "valid", "test")):
        texts = (" ".join(WORDS[(i * i + j + number) % 16] for j in range(9)) for i in range(8))
        lines = [json.dumps({"text": text}) for text in texts]
        (data / f"{name}.jsonl").write_text("\n".join(lines))
