"""The toy tasks are what the experiments say they are."""

from tests.acceptance import toys


def test_one_token_a_character_and_back():
    tokenizer = toys.tiny_tokenizer()
    ids = tokenizer("abz:AZ").input_ids
    assert len(ids) == 6
    assert tokenizer.decode(ids) == "abz:AZ"
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == "abz:AZ"
    assert len(tokenizer) <= 64


def test_a_token_may_be_a_number_and_one_may_stand_in_front():
    tokenizer = toys.tiny_tokenizer(["L", "*", "-38"], pattern="-?[0-9]+|.", in_front=True)
    assert tokenizer.convert_ids_to_tokens(tokenizer("L*-38").input_ids) == ["<s>", "L", "*", "-38"]


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


def test_counting_starts_low_and_counts_what_a_person_would():
    rows = toys.count_warm_up(0, 2000)
    assert {row["prompt"] for row in rows} == set("0123456789")
    assert {len(row["completion"]) for row in rows} == {8}
    mean = sum(toys.count_reward(row["prompt"], row["completion"]) for row in rows) / len(rows)
    assert 0.32 < mean < 0.36
    assert toys.count_reward("3", "33330000") == 0.5
    assert toys.count_reward("3", "333") == 3 / 8
    assert toys.count_reward("3", "3333333333000000") == 10 / 16
    assert toys.count_reward("3", "") == 0.0


def test_ranks_are_wrong_where_scores_are_near():
    rows = [toys.counted({"scores": [0.25, 0.375, 0.5, 1.0]})] * 500
    assert rows[0]["scores"] == [2, 3, 4, 8]
    ranks = [row["ranks"] for row in toys.misranked(0, rows)]
    assert all(sorted(row) == [1, 2, 3, 4] for row in ranks)
    turned = {gap: sum(row[i] < row[j] for row in ranks) / 500 for gap, i, j in ((1, 0, 1), (2, 0, 2), (6, 0, 3))}
    assert 0.3 < turned[1] < 0.45
    assert 0.2 < turned[2] < 0.32
    assert turned[6] < 0.06


def test_pairs_under_a_goal_are_scored_by_what_they_hold():
    pairs = toys.goal_pairs(0, "pairs", 300)
    assert len(pairs) == 300
    for pair in pairs:
        assert len(pair["chosen"]) == len(pair["rejected"]) == 8
        assert pair["chosen"].count("1") == pair["score_chosen"] > pair["score_rejected"]
        assert pair["rejected"].count("1") == pair["score_rejected"]
    assert {pair["score_chosen"] for pair in pairs} == set(range(1, 9))
    assert {pair["prompt"] for pair in pairs} == {f"{letter}:" for letter in toys.GOAL_LETTERS}


def test_the_base_writes_the_same_symbols_with_other_chances():
    rows = toys.base_warm_up(0, 4000)
    near = [[int(symbol) - int(row["prompt"]) for symbol in row["completion"]] for row in rows]
    for half, chances in zip((slice(0, 4), slice(4, 8)), toys.BASE_CHANCES, strict=True):
        steps = [step % 10 for row in near for step in row[half]]
        assert [round(steps.count(step) / len(steps), 1) for step in range(3)] == [round(c, 1) for c in chances]
        assert set(steps) == {0, 1, 2}


def test_pairs_to_judge_are_scored_and_apart():
    pairs = toys.judge_pairs(0, "test", 100, "04", margin=2)
    assert [pair["prompt"] for pair in pairs[:3]] == ["0", "4", "0"]
    for pair in pairs:
        counts = [answer.count(pair["prompt"]) for answer in pair["completions"]]
        assert pair["scores"] == [count / 8 for count in counts]
        assert abs(counts[0] - counts[1]) >= 2
    apart = [abs(pair["scores"][0] - pair["scores"][1]) for pair in toys.judge_pairs(0, "test", 100)]
    assert min(apart) == 1 / 8


def test_mixed_pairs_hold_every_count_among_any_digits():
    pairs = toys.mixed_pairs(0, "test", 400, "04", margin=2)
    assert {answer.count(pair["prompt"]) for pair in pairs for answer in pair["completions"]} == set(range(9))
    assert {symbol for pair in pairs for answer in pair["completions"] for symbol in answer} == set("0123456789")
    assert all(abs(pair["scores"][0] - pair["scores"][1]) >= 2 / 8 for pair in pairs)


def test_a_verdict_names_the_better_answer_in_either_order():
    pair = {"prompt": "3", "completions": ["33345444", "34455533"], "scores": [0.375, 0.375]}
    better = {**pair, "scores": [0.5, 0.375]}
    assert toys.judge_rows([better]) == [
        {"prompt": "J3|33345444|34455533?", "completion": "1"},
        {"prompt": "J3|34455533|33345444?", "completion": "2"},
    ]
    worse = {**pair, "scores": [0.25, 0.375]}
    assert [row["completion"] for row in toys.judge_rows([worse])] == ["2", "1"]


def test_the_longest_answers_fit_a_judges_prompt():
    tokenizer = toys.tiny_tokenizer(toys.JUDGE_SYMBOLS)
    tokens = tokenizer(toys.judge_prompt("9", "9" * 12, "0" * 12) + "1</s>").input_ids
    assert len(tokens) == 1 + 1 + 1 + 12 + 1 + 12 + 1 + 2 <= 64
    assert 0 not in tokens
