"""`README.md`, the model card: what the model is, how it was made, how to load it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import yaml

from alignkit.core.contracts import Heads
from alignkit.track.text import number

TASKS = {
    "language": ("CausalLM", "text-generation"),
    "sequence": ("SequenceClassification", "text-classification"),
    "token": ("TokenClassification", "token-classification"),
}
"""Kind of heads → what transformers' class is called after, and the hub's name of what the model does."""


class CardFacts(TypedDict):
    """What a model card tells.

    `base_model` is a hub id or a folder, `datasets` are the `path`s of the recipe's data, `peft` says that the folder
    holds an adapter, `conversational` that the model was trained through its chat template. `paper` is the method's
    reference in one line, `versions` package → version, `metrics` the last logged values. `best` is what best.json
    says of the weights in the folder `best`, None where there is none. `heads` are the policy's, `notes` what whoever
    uses the model must know of its data, a paragraph each.
    """

    base_model: str
    datasets: Sequence[str]
    algorithm: str
    paper: str | None
    peft: bool
    conversational: bool
    versions: Mapping[str, str]
    metrics: Mapping[str, float]
    best: Mapping[str, Any] | None
    heads: Heads
    notes: Sequence[str]


def write_card(run_dir: Path, facts: CardFacts) -> Path:
    """Write the model card of a finished run into its folder and return its path."""
    name = run_dir.resolve().name
    front = yaml.safe_dump(_front_matter(name, facts), sort_keys=False, allow_unicode=True)
    parts = [
        f"---\n{front}---",
        f"# {name}",
        _origin(facts),
        "## Quick start",
        f"```python\n{_quick_start(facts)}\n```",
        *facts["notes"],
        *_about_heads(facts["heads"]),
        "## Training procedure",
        _procedure(facts),
        *([_best(facts["best"])] if facts["best"] is not None else []),
        *(["## Last metrics", _markdown_table("metric", facts["metrics"])] if facts["metrics"] else []),
        "## Framework versions",
        "\n".join(f"- {package} {version}" for package, version in facts["versions"].items()),
    ]
    path = run_dir / "README.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def is_hub_id(name: str) -> bool:
    """Whether `name` reads as `owner/name` on the hub and is no file or folder here."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None and not Path(name).exists()


def _front_matter(name: str, facts: CardFacts) -> dict[str, Any]:
    """The fields the hub reads. Local paths are left out: it refuses a card that names one as a model or data set."""
    front: dict[str, Any] = {}
    if is_hub_id(facts["base_model"]):
        front["base_model"] = facts["base_model"]
    if datasets := [path for path in dict.fromkeys(facts["datasets"]) if is_hub_id(path)]:
        front["datasets"] = datasets
    return {
        **front,
        "library_name": "peft" if facts["peft"] else "transformers",
        "model_name": name,
        "tags": ["generated_from_trainer", "alignkit", facts["algorithm"]],
        "pipeline_tag": TASKS[facts["heads"].kind][1],
    }


def _shown(path: str) -> str:
    """A hub id as a link; of a local path only the last part, since the rest is about somebody's machine."""
    return f"`{path}`" if is_hub_id(path) else f"`{Path(path).name}` (a local file or folder)"


def _origin(facts: CardFacts) -> str:
    what = "An adapter for" if facts["peft"] else "Trained from"
    data = ", ".join(_shown(path) for path in dict.fromkeys(facts["datasets"]))
    return f"{what} {_shown(facts['base_model'])} on {data} with alignkit's `{facts['algorithm']}`."


def _quick_start(facts: CardFacts) -> str:
    heads = facts["heads"]
    library, prefix = ("peft", "AutoPeftModelFor") if facts["peft"] else ("transformers", "AutoModelFor")
    loader = "AutoModel" if heads.hidden else prefix + TASKS[heads.kind][0]
    place = "member-0" if heads.members > 1 else "."
    lines = [
        f"from {library} import {loader}",
        "from transformers import AutoTokenizer",
        "",
        f'folder = "{place}"  # this folder, or the model\'s id on the hub'
        if heads.members == 1
        else f'folder = "{place}"  # the first of {heads.members} models',
        f"model = {loader}.from_pretrained(folder)",
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
    ]
    if facts["conversational"]:
        answer = [] if heads.is_language else ['    {"role": "assistant", "content": "Once upon a time, …"},']
        end = "add_generation_prompt=True, " if heads.is_language else ""
        lines += [
            "messages = [",
            '    {"role": "user", "content": "Tell me a story."},',
            *answer,
            "]",
            f'inputs = tokenizer.apply_chat_template(messages, {end}return_dict=True, return_tensors="pt")',
        ]
    elif heads.is_language:
        lines.append('inputs = tokenizer("Once upon a time", return_tensors="pt")')
    else:
        lines.append('inputs = tokenizer("Once upon a time, …" + tokenizer.eos_token, return_tensors="pt")')
    if heads.is_language:
        lines += [
            "output = model.generate(**inputs, max_new_tokens=128, do_sample=True)",
            'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
        ]
    else:
        lines.append("print(model(**inputs).last_hidden_state)" if heads.hidden else "print(model(**inputs).logits)")
    return "\n".join(lines)


def _about_heads(heads: Heads) -> list[str]:
    """What is not seen from the weights that plain transformers loads."""
    names = ", ".join(f"`{name}`" for name in heads.names)
    if heads.is_language and heads.names:
        return [
            f"The output layer is the even mixture of the heads {names}; each by itself is in `heads.safetensors`. "
            "`alignkit export` writes the model with another mixture."
        ]
    if heads.hidden:
        return [
            f"The score layer (hidden → ReLU → {names}) is in `heads.safetensors`: `inner` and `outer`, applied to "
            "the last hidden state in float32."
        ]
    several = f"The {heads.members} models are in folders of their own; the score is their mean. "
    scores = f"It scores {names}" + (", read at the last token." if heads.kind == "sequence" else " at every token.")
    return [] if heads.is_language else [(several if heads.members > 1 else "") + scores]


def _procedure(facts: CardFacts) -> str:
    paper = f" Reference: {facts['paper'].rstrip('.')}." if facts["paper"] else ""
    return (
        f"Method: `{facts['algorithm']}`.{paper} `recipe.resolved.yaml` in this folder is the complete recipe: "
        "`alignkit train recipe.resolved.yaml output_dir=NEW` repeats the training. `report.html` shows its curves."
    )


def _best(best: Mapping[str, Any]) -> str:
    early = ", where training stopped early" if best["stopped_early"] else ""
    found = f"`{best['metric']}` was best: {number(best['value'])}"
    if best["step"] == best["last_step"]:
        return f"This folder and `best` hold the weights of the last step, {best['step']}{early}; there {found}."
    return (
        f"This folder holds the weights of the last step, {best['last_step']}{early}. The folder `best` holds those of "
        f"step {best['step']}, where {found}."
    )


def _markdown_table(head: str, values: Mapping[str, float]) -> str:
    rows = [f"| {name} | {number(value)} |" for name, value in values.items()]
    return "\n".join([f"| {head} | value |", "|---|---|", *rows])
