"""The toy tasks are what the experiments say they are."""

from tests.acceptance import toys


def test_one_token_a_character_and_back():
    tokenizer = toys.tiny_tokenizer()
    ids = tokenizer("abz:AZ").input_ids
    assert len(ids) == 6
    assert tokenizer.decode(ids) == "abz:AZ"
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == "abz:AZ"
    assert len(tokenizer) <= 64


def test_the_model_is_tiny_and_the_seed_decides_it():
    first, again, other = (toys.tiny_model(seed) for seed in (0, 0, 1))
    assert 130_000 < sum(p.numel() for p in first.parameters()) < 160_000
    assert all(a.equal(b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not first.lm_head.weight.equal(other.lm_head.weight)


def test_prompts_are_distinct_and_held_out_ones_are_new():
    train = toys.style_prompts(0, "train", 500)
    held_out = toys.style_prompts(0, "held-out", 500, without=train)
    assert len({*train, *held_out}) == 1000
    assert toys.style_prompts(0, "train", 500) == train


def test_warm_up_is_half_and_half_and_all_valid():
    prompts = toys.style_prompts(0, "train", 100)
    answers = [row["completion"] for row in toys.style_warm_up(0, prompts)]
    assert toys.upper_share(prompts, answers) == 0.5
    assert toys.valid_share(prompts, answers) == 1.0


def test_swapped_pairs_are_an_exact_share():
    prompts = toys.style_prompts(0, "train", 100)
    assert toys.upper_share(prompts, [row["chosen"] for row in toys.style_pairs(0, prompts)]) == 1.0
    noisy = toys.style_pairs(0, prompts, swapped=0.3)
    assert toys.upper_share(prompts, [row["chosen"] for row in noisy]) == 0.7
    assert toys.upper_share(prompts, [row["rejected"] for row in noisy]) == 0.3


def test_shares_count_what_a_person_would():
    prompts, answers = ["abcd:"] * 4, ["ABCD", "abcd", "ABCC", "AbCD"]
    assert toys.upper_share(prompts, answers) == 0.5
    assert toys.valid_share(prompts, answers) == 0.5
