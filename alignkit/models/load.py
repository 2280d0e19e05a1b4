"""Recipe → modules: weights, dtype, adapters, activation checkpointing; tokenizer → renderer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn

from alignkit.core.contracts import Heads
from alignkit.core.errors import DataError, RecipeError
from alignkit.core.rng import key
from alignkit.data.render import Renderer
from alignkit.models.config import ModelConfig
from alignkit.models.heads import HEADS_FILE, Members, attach, fresh_score, head_names, load_heads

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

POLICY_ADAPTER = "default"
REFERENCE_ADAPTER = "reference"
NOISE = ("dropout", "pdrop", "dropout_prob", "layerdrop", "jitter_noise")
"""How config entries end that make a model answer differently in training mode."""
LANGUAGE = Heads()
SCORERS = {"language": "ForCausalLM", "sequence": "ForSequenceClassification", "token": "ForTokenClassification"}
"""How architectures end that have the head already."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def adapter_base(path: str) -> str | None:
    """The base model an adapter folder names, or None when `path` is no adapter folder."""
    config = Path(path) / "adapter_config.json"
    if not config.is_file():
        return None
    base: str = json.loads(config.read_text())["base_model_name_or_path"]
    return base


@contextmanager
def _explained(what: str, path: str) -> Iterator[None]:
    """Turn the hub library's long stories into one sentence."""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RecipeError(
            f"model.name_or_path: cannot load the {what} from {path!r}: {first}. Expected a folder with config.json, "
            "weights and tokenizer, or a hub id this machine can reach."
        ) from error


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer beside the weights, of an adapter's base where the adapter has none."""
    from transformers import AutoTokenizer

    path = config.name_or_path
    base = adapter_base(path)
    if base is not None and not (Path(path) / "tokenizer_config.json").is_file():
        path = base
    with _explained("tokenizer", path):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    if config.chat_template is not None:
        tokenizer.chat_template = Path(config.chat_template).read_text(encoding="utf-8")
    return tokenizer


def stop_ids(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokenizer EOS and every EOS of generation_config: chat models end a turn with another token than a text."""
    from transformers import GenerationConfig

    ids: set[int] = set()
    if tokenizer.eos_token_id is not None:
        ids.add(int(tokenizer.eos_token_id))
    try:
        generation = GenerationConfig.from_pretrained(
            adapter_base(config.name_or_path) or config.name_or_path, revision=config.revision
        )
    except OSError:  # a model without the file has only its tokenizer's EOS
        generation = None
    if generation is not None and generation.eos_token_id is not None:
        eos = generation.eos_token_id
        ids.update(eos if isinstance(eos, list) else [int(eos)])
    if not ids:
        raise DataError(
            f"model {config.name_or_path!r} names no end-of-text token: neither its tokenizer nor its "
            "generation_config.json has an eos token, so no completion could stop. Set one in tokenizer_config.json."
        )
    return frozenset(ids)


def load_renderer(config: ModelConfig) -> Renderer:
    """The tokenizer with the rules by which rows become tokens."""
    tokenizer = load_tokenizer(config)
    stops = stop_ids(config, tokenizer)
    eos = tokenizer.eos_token_id
    return Renderer(
        tokenizer,
        stop_ids=stops,
        chat_template=None,
        eos_id=int(eos) if eos is not None else min(stops),
        bos_id=tokenizer.bos_token_id,
    )


def load_base(
    config: ModelConfig, dtype: torch.dtype, heads: Heads = LANGUAGE, seed: int = 0, *, weights: bool = True
) -> Any:
    """The transformers model with dropout off: log-ratios at step 0 must be exactly 0.

    A score layer that the weights lack is drawn from `seed`; one that they have stays. Without `weights` only the
    config is read, and the model is on the meta device.
    """
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.disable_progress_bar()  # a bar for every shard read or written would bury the run's own

    path = adapter_base(config.name_or_path) or config.name_or_path
    with _explained("model", path):
        settings = AutoConfig.from_pretrained(
            path, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
        noise = {
            name: value
            for name, value in settings.to_dict().items()
            if name.endswith(NOISE) and isinstance(value, float) and value > 0
        }
        for name in noise:
            setattr(settings, name, 0.0)
        has_score = any(name.endswith(SCORERS[heads.kind]) for name in settings.architectures or ())
        if not heads.is_language:
            settings.id2label = dict(enumerate(heads.names))
            settings.label2id = {name: i for i, name in settings.id2label.items()}
        extra: dict[str, Any] = (
            {"attn_implementation": config.attn_implementation} if config.attn_implementation else {}
        )
        if config.quantization is not None and weights:
            extra |= _quantized(config.quantization, dtype)
        verbosity = logging.get_verbosity()
        if not heads.is_language:
            logging.set_verbosity_error()  # that the score layer is new is no news
        try:
            if weights:
                model = _model_class(heads).from_pretrained(
                    path,
                    config=settings,
                    revision=config.revision,
                    trust_remote_code=config.trust_remote_code,
                    dtype=dtype,
                    **extra,
                )
            else:
                with torch.device("meta"):
                    model = _model_class(heads).from_config(
                        settings, trust_remote_code=config.trust_remote_code, dtype=dtype, **extra
                    )
        finally:
            logging.set_verbosity(verbosity)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if not heads.is_language and not heads.hidden:
        model.score.float()
        if not has_score:
            fresh_score(model, seed)
            if heads.zero:
                nn.init.zeros_(model.score.weight)
    if Path(path).is_dir():  # an adapter remembers its base by this, and is loaded from anywhere
        model.name_or_path = str(Path(path).resolve())
    for name, value in noise.items():  # what is exported must say what the original said
        setattr(model.config, name, value)
    return model


def _quantized(kind: str, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments with which transformers quantizes the linear layers of a model while it loads them.

    Raises:
        RecipeError: bitsandbytes is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise RecipeError(
            f"model.quantization: {kind} needs bitsandbytes: pip install 'alignkit[qlora]', or remove the key"
        )
    from transformers import BitsAndBytesConfig

    settings = (
        BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        if kind == "nf4"
        else BitsAndBytesConfig(load_in_8bit=True)
    )
    device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    return {"quantization_config": settings, "device_map": {"": device}}


def _model_class(heads: Heads) -> Any:
    import transformers

    if heads.hidden:
        return transformers.AutoModel
    return {
        "language": transformers.AutoModelForCausalLM,
        "sequence": transformers.AutoModelForSequenceClassification,
        "token": transformers.AutoModelForTokenClassification,
    }[heads.kind]


def load_policy(config: ModelConfig, seed: int = 0, heads: Heads = LANGUAGE, *, weights: bool = True) -> Any:
    """The trainable model, on the CPU.

    Full training keeps float32 weights whatever the compute dtype: steps of 1e-6 vanish in bfloat16. With `lora` the
    frozen weights have the recipe's dtype and the adapter float32. `name_or_path` may be an adapter folder: with `lora`
    its adapter goes on training and a frozen copy of it is the reference; without, it is merged into the weights.
    Without `weights` the model is on the meta device, and an adapter is a new one.

    Raises:
        RecipeError: the model cannot be loaded, or cannot carry these heads.
    """
    if heads.members > 1:
        one = replace(heads, members=1)
        return Members(
            [load_policy(config, key(seed, "member", i), one, weights=weights) for i in range(heads.members)]
        )
    adapter = config.name_or_path if weights and adapter_base(config.name_or_path) is not None else None
    dtype = torch.float32 if config.lora is None else DTYPES[config.dtype]
    model = load_base(config, dtype, heads, seed, weights=weights)
    if config.lora is None:
        if adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
            model.requires_grad_(True)  # peft froze it
    else:
        with nullcontext() if weights else torch.device("meta"):
            model = _with_adapter(model, config, adapter, seed, heads)
    attach(model, heads, seed)
    if heads.hidden and (Path(config.name_or_path) / HEADS_FILE).is_file():
        load_heads(model, Path(config.name_or_path))
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def load_writer(config: ModelConfig, folder: Path) -> Any:
    """The language model `config` names, with the several heads that were saved in `folder`, if any were."""
    model = load_policy(config, heads=Heads(names=tuple(head_names(folder))))
    load_heads(model, folder)
    return model


def _with_adapter(model: Any, config: ModelConfig, adapter: str | None, seed: int, heads: Heads) -> Any:
    from peft import LoraConfig as PeftLoraConfig
    from peft import PeftModel, get_peft_model

    assert config.lora is not None
    lora = config.lora
    if adapter is None:
        with torch.random.fork_rng():
            torch.manual_seed(key(seed, "adapter"))
            return get_peft_model(
                model,
                PeftLoraConfig(
                    r=lora.r,
                    lora_alpha=lora.alpha,
                    lora_dropout=lora.dropout,
                    target_modules=lora.target_modules,
                    exclude_modules=["score"] if heads.kind == "token" else None,  # trained whole, as peft sees to
                    task_type={"language": "CAUSAL_LM", "sequence": "SEQ_CLS", "token": "TOKEN_CLS"}[heads.kind],
                ),
            )
    saved = PeftLoraConfig.from_pretrained(adapter)
    if not heads.is_language and saved.task_type == "CAUSAL_LM":
        raise RecipeError(
            f"model.name_or_path: {adapter!r} is an adapter that writes text, and this method scores it. Merge it "
            "first (`alignkit export RUN DIR`) and name that folder, or name its base model."
        )
    if (saved.r, saved.lora_alpha) != (lora.r, lora.alpha):
        raise RecipeError(
            f"model.lora: the adapter {adapter!r} has r={saved.r}, alpha={saved.lora_alpha}, the recipe "
            f"r={lora.r}, alpha={lora.alpha}. Give the adapter's numbers to go on training it, or `lora: null` to "
            "merge it and train all weights."
        )
    saved.lora_dropout = lora.dropout  # how it goes on training is the recipe's word, not the past's
    saved.inference_mode = False
    wrapped = PeftModel.from_pretrained(model, adapter, adapter_name=POLICY_ADAPTER, is_trainable=True, config=saved)
    wrapped.load_adapter(adapter, adapter_name=REFERENCE_ADAPTER, is_trainable=False)
    wrapped.set_adapter(POLICY_ADAPTER)  # the active adapter trains, and no other
    return wrapped


def set_padding(models: Sequence[Any], renderer: Renderer) -> None:
    """Give classifiers and their tokenizer a token for padding that ends no text.

    transformers scores the last token that is not padding: with the end-of-text token as padding it would read the one
    before. A vocabulary without such a token gets none, and transformers then takes one row at a time.
    """
    tokenizer: Any = renderer.tokenizer
    candidates = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id)
    found = next((token for token in candidates if token is not None and token not in renderer.stop_ids), None)
    for model in models:
        for config in {id(config): config for config in (model.config, model.config.get_text_config())}.values():
            config.pad_token_id = found
    if found is not None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(found)


def fingerprint(model: nn.Module) -> str:
    """A hash of every weight: two models with the same fingerprint give the same log-probabilities."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_context(model: Any, max_length: int) -> None:
    """Refuse rows longer than the positions a model has been built for.

    Raises:
        RecipeError: `train.max_length` exceeds the model's context.
    """
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and max_length > context:
        raise RecipeError(
            f"train.max_length: {max_length} tokens, but the model was built for {context}. Set train.max_length to at "
            f"most {context}."
        )
