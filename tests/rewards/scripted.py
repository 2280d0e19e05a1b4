"""Models that say what a test has them say."""

import torch

from alignkit.core.types import RewardBatch


class Scripted:
    """`write(prompt, n)` gives n texts, `likely(prompt, answers)` log-probabilities; `versions` are models' weights.

    `asked` holds (model, prompt) of every question.
    """

    def __init__(self, write=None, likely=None, versions=None):
        self.write, self.likely = write, likely
        self.versions = {"policy": "0"} if versions is None else versions
        self.asked = []

    def identity(self, model="policy"):
        return f"{model} {self.versions[model]}"

    def generate(self, prompts, model="policy", *, n=1, temperature=0.0, max_tokens=512, stop=()):
        self.asked += [(model, prompt) for prompt in prompts]
        self.sampling = {"n": n, "temperature": temperature, "max_tokens": max_tokens, "stop": stop}
        found = [self.write(prompt) for prompt in prompts]
        return [[text] * n if isinstance(text, str) else text for text in found]

    def choices(self, prompts, answers, model="policy"):
        self.asked += [(model, prompt) for prompt in prompts]
        return [self.likely(prompt, answers) for prompt in prompts]


def rows(*groups, step=0, **columns):
    """One batch of groups of completions, each to a prompt of its own; columns have one value a group."""
    flat = [(number, text) for number, texts in enumerate(groups) for text in texts]
    return RewardBatch(
        prompts=[[{"role": "user", "content": f"question {number}"}] for number, _ in flat],
        completions=[text for _, text in flat],
        completion_ids=None,
        completion_mask=None,
        group=torch.tensor([number for number, _ in flat]),
        columns={name: [values[number] for number, _ in flat] for name, values in columns.items()},
        step=step,
        ended=torch.ones(len(flat), dtype=torch.bool),
    )


def between(prompt, number=""):
    """The answer that a prompt shows between its fences."""
    name = f"answer {number}".strip()
    return prompt.partition(f"<<{name}>>\n")[2].partition(f"\n<<end of {name}>>")[0]
