"""Layouts of other projects: each fixture is recognised and becomes ours; what does not fit says what would."""

import json
from pathlib import Path
from typing import get_args

import pytest

from alignkit.core import DataError
from alignkit.data.config import DataConfig, Format
from alignkit.data.foreign import LAYOUTS, detect_layout
from alignkit.data.shapes import SHAPES, choose_format, to_example
from alignkit.data.sources import read_rows

FIXTURES = Path(__file__).parent / "fixtures"


def read(name, /, **options):
    config = DataConfig(path=str(FIXTURES / name), **options)
    table = read_rows(config)
    return table, choose_format(config.format, table.columns, config.path)


def examples(name, /, **options):
    table, shape = read(name, **options)
    return [to_example(row, shape) for i, row in enumerate(table.rows) if i not in table.faults]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def test_every_shape_and_layout_may_be_asked_for():
    assert set(get_args(Format)) == {"auto", *SHAPES, *LAYOUTS}


@pytest.mark.parametrize(
    ("name", "layout", "shape"),
    [
        ("sharegpt.jsonl", "sharegpt", "messages"),
        ("sharegpt_pairs.jsonl", "sharegpt", "preference"),
        ("sharegpt_feedback.jsonl", "sharegpt", "unpaired"),
        ("alpaca.json", "alpaca", "prompt_completion"),
        ("alpaca_ranking.jsonl", "alpaca", "ranked"),
        ("alpaca_pairs.jsonl", "alpaca", "preference"),
        ("alpaca_feedback.jsonl", "alpaca", "unpaired"),
        ("alpaca_eval.json", "alpaca_eval", "preference"),
        ("hh.jsonl", None, "preference"),
        ("ultrafeedback.jsonl", "ultrafeedback", "ranked"),
        ("ultrafeedback_binarized.jsonl", None, "preference"),
        ("helpsteer.jsonl", "helpsteer", "prompt_completion"),
        ("verl.jsonl", "verl", "prompt"),
        ("open_instruct.jsonl", "open_instruct", "prompt"),
        ("nemo_rl.jsonl", "nemo_rl", "ranked"),
        ("halos_pairs.json", "halos", "preference"),
        ("halos_binary.json", "halos", "unpaired"),
        ("stepwise.jsonl", None, "stepwise"),
        ("unpaired.jsonl", None, "unpaired"),
        ("objectives.jsonl", None, "preference"),
        ("objective_scores.jsonl", None, "ranked"),
    ],
)
def test_detection(name, layout, shape):
    table, found = read(name)
    assert (table.layout, found) == (layout, shape)


def test_sharegpt_turns_speak_our_roles():
    table, _ = read("sharegpt.jsonl")
    assert table.rows[0]["messages"] == [
        {"role": "system", "content": "Be brief."},
        user("Name a crab."),
        assistant("Carla."),
        user("Another?"),
        assistant("Conrad."),
    ]
    assert table.rows[1]["messages"][0] == {"role": "system", "content": "Be kind."}
    call = {"type": "function", "function": {"name": "tide", "arguments": {"at": "noon"}}}
    assert table.rows[2]["messages"][1:3] == [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "low"},
    ]
    assert (table.rows[3], list(table.faults)) == ({"id": "bad"}, [3])
    assert "a turn from 'crab'" in table.faults[3].note
    assert examples("sharegpt.jsonl")[2].tools == [{"name": "tide"}]


def test_sharegpt_pairs_and_feedback():
    first, second = examples("sharegpt_pairs.jsonl")
    assert first.prompt == [user("Name a crab."), assistant("Carla."), user("Another?")]
    assert first.completions == [[assistant("Conrad.")], [assistant("No.")]]
    assert second.completions[1] == [assistant("I cannot.")]
    good, bad = examples("sharegpt_feedback.jsonl")
    assert (good.prompt, good.completions, good.rewards) == ([user("Name a crab.")], [[assistant("Carla.")]], [1.0])
    assert bad.rewards == [0.0]


def test_alpaca():
    first, second = examples("alpaca.json")
    assert first.prompt == [
        {"role": "system", "content": "Be brief."},
        user("Hi."),
        assistant("Hello."),
        user("Turn it round.\ncrab"),
    ]
    assert (second.prompt, second.completions) == ([user("Name a fish.")], [[assistant("Cod.")]])
    ranked = examples("alpaca_ranking.jsonl")[0]
    assert [turns[0]["content"] for turns in ranked.completions] == ["Cod, for one.", "Cod.", "Crab."]
    assert ranked.rewards == [0.0, -1.0, -2.0]
    assert examples("alpaca_pairs.jsonl")[0].completions == [[assistant("Cod.")], [assistant("Crab.")]]
    assert [example.rewards for example in examples("alpaca_feedback.jsonl")] == [[0.0], [1.0]]


def test_alpaca_eval_prefers_one_of_two():
    table, _ = read("alpaca_eval.json")
    assert [(row["chosen"], row["preference"]) for row in table.rows[:2]] == [("Cod.", 1.98), ("La la.", 1.0)]
    assert (table.rows[0]["rejected"], table.rows[0]["prompt"]) == ("Crab.", [user("Name a fish.")])
    assert "`preference` is 1.5" in table.faults[2].note


def test_transcripts_are_text_unless_turns_are_asked_for():
    assert examples("hh.jsonl")[0].completions == [" Conrad.", " No."]
    table, shape = read("hh.jsonl", format="transcripts")
    assert (table.layout, shape) == ("transcripts", "preference")
    [first, second] = examples("hh.jsonl", format="transcripts")
    assert first.prompt == [user("Name a crab."), assistant("Carla."), user("Another?")]
    assert second.completions == [[assistant("La la.")], [assistant("I cannot.")]]


def test_a_speaker_who_goes_on_has_one_turn(tmp_path):
    start = "\n\nHuman: Sing.\n\nAssistant: La."
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"chosen": f"{start}\n\nAssistant: La la.", "rejected": f"{start} No."}) + "\n")
    [row] = read_rows(DataConfig(path=str(path), format="transcripts")).rows
    assert row["chosen"] == [user("Sing."), assistant("La.\n\nLa la.")]


def test_ultrafeedback_takes_the_overall_score_and_keeps_ratings():
    table, _ = read("ultrafeedback.jsonl")
    assert table.rows[0] == {
        "prompt": [user("Name a fish.")],
        "completions": ["Crab.", "Cod."],
        "scores": [3.0, 8.5],
        "source": "sea",
        "models": ["m1", "m2"],
        "ratings": {"helpfulness": [2.0, 5.0], "truthfulness": [None, 4.0]},
    }
    assert table.rows[1]["scores"] == [4.25, 4.0]
    assert "completion 1 has no number in `overall_score`" in table.faults[2].note
    [binarized] = examples("ultrafeedback_binarized.jsonl")
    assert (binarized.prompt, binarized.completions[1]) == ([user("Name a fish.")], [assistant("Crab.")])
    assert binarized.scores == [{"score": 8.5}, {"score": 3.0}]


def test_helpsteer_is_scored_by_helpfulness_and_keeps_every_attribute():
    table, _ = read("helpsteer.jsonl")
    assert table.rows[2] == {
        "prompt": "Sing.",
        "completion": "La la.",
        "score": 3,
        "helpfulness": 3,
        "correctness": None,
        "coherence": 3,
        "complexity": 0,
        "verbosity": 2,
    }
    assert [example.rewards for example in examples("helpsteer.jsonl")] == [[4.0], [1.0], [3.0]]


def test_prompts_of_verl_and_open_instruct_keep_their_ground_truth(tmp_path):
    row = read("verl.jsonl")[0].rows[0]
    assert (row["prompt"], row["ground_truth"], row["data_source"]) == ([user("What is 2 + 3?")], "5", "sums")
    assert row["extra_info"] == {"split": "train", "index": 0}
    row = read("open_instruct.jsonl")[0].rows[0]
    assert row == {"prompt": [user("What is 2 + 3?")], "ground_truth": "5", "dataset": "gsm8k"}
    from datasets import Dataset

    Dataset.from_list([json.loads((FIXTURES / "verl.jsonl").read_text())]).to_parquet(str(tmp_path / "v.parquet"))
    table = read_rows(DataConfig(path=str(tmp_path / "v.parquet")))
    assert (table.layout, table.rows[0]["ground_truth"]) == ("verl", "5")


def test_openrlhf_names_are_mapped():
    fields = {"prompt": "input", "chosen": "good", "rejected": "bad"}
    [example] = examples("openrlhf.jsonl", fields=fields)
    assert (example.prompt, example.completions) == ("Name a fish.", ["Cod.", "Crab."])


def test_nemo_rl_ranks_count_down():
    first, _ = examples("nemo_rl.jsonl")
    assert (first.prompt, first.rewards) == ([user("Name a fish.")], [-1.0, 0.0])
    assert first.completions[1] == [assistant("Cod.")]


def test_halos_feedback():
    first, second = examples("halos_pairs.json")
    assert (first.completions[0], first.scores[0]) == ([assistant("Cod.")], {"score": 2.0})
    assert (second.completions[0], second.scores[1]) == ([assistant("La la.")], {"score": 0.5})
    good, bad = examples("halos_binary.json")
    assert (good.rewards, good.scores, bad.rewards) == ([1.0], [{"score": 2.0}], [0.0])


def test_objectives():
    table, _ = read("objectives.jsonl")
    assert [row["objective"] for row in table.rows] == ["truth", "fun"]
    [example] = examples("objective_scores.jsonl")
    assert example.scores == [{"truth": 1.0, "fun": 0.0}, {"truth": 0.0, "fun": 1.0}, {"fun": 0.2}]
    assert example.rewards == [0.5, 0.5, 0.2]


def test_a_catalogue_of_llama_factory_names_files_columns_and_tags():
    [pair] = examples("llama_factory/dataset_info.json", name="sea")
    assert (pair.prompt, pair.completions) == ([user("Name a fish.")], [[assistant("Cod.")], [assistant("Crab.")]])
    [talk] = examples("llama_factory/dataset_info.json", name="talk")
    assert talk.completions == [[assistant("Cod.")]]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, r"say which with `name: DATASET` \(none is named\). It lists sea, talk"),
        ({"name": "see"}, r"there is no 'see'\). Did you mean 'sea'\?"),
        ({"name": "pictures"}, r"asks for what is not read here \(images\).*fields: \{prompt: THEIR_COLUMN\}"),
        ({"name": "script"}, "it names no `file_name`"),
    ],
)
def test_what_a_catalogue_cannot_give(options, said):
    with pytest.raises(DataError, match=said):
        read("llama_factory/dataset_info.json", **options)


def test_a_folder_with_a_catalogue_says_how_to_name_it():
    with pytest.raises(DataError, match=r"llama_factory/dataset_info\.json`, `name: DATASET`"):
        read("llama_factory")


@pytest.mark.parametrize(
    ("layout", "row", "said"),
    [
        ("sharegpt", {"conversations": "hello"}, "`conversations` is str, expected a list of"),
        ("sharegpt", {"conversations": ["hello"]}, "a turn of `conversations` is str"),
        ("sharegpt", {"conversations": [{"from": "human"}]}, "the human turn of `conversations` has no text"),
        ("sharegpt", {"conversations": [{"from": "function_call", "value": "{"}]}, "not valid JSON"),
        ("sharegpt", {"conversations": [{"from": "gpt", "value": "x"}], "kto_tag": "good"}, "`kto_tag` is 'good'"),
        ("alpaca", {"instruction": "q", "output": 3}, "`output` is int, expected text"),
        ("alpaca", {"instruction": "q", "output": "a", "history": [["q"]]}, "`history` is not a list of"),
        (
            "ultrafeedback",
            {"instruction": "q", "completions": [{"text": "a"}]},
            "entry 1 of `completions` has no `resp",
        ),
        ("helpsteer", {"prompt": "q", "response": "a", "helpfulness": "high"}, "`helpfulness` is 'high'"),
        ("verl", {"prompt": "q", "data_source": "s", "reward_model": "rule"}, "expected {style, ground_truth}"),
        ("nemo_rl", {"context": "q", "completions": [{"completion": "a"}]}, "completion 1 has no number in `rank`"),
        ("halos", {"type": "rating", "prompt": "q", "output": "a"}, "`type` is 'rating'"),
        ("transcripts", {"chosen": "hello", "rejected": "bye"}, "does not begin with '\\n\\nHuman:'"),
        ("sharegpt", {"messages": []}, "no `conversations`"),
    ],
)
def test_rows_that_do_not_fit_name_row_column_and_expected_shape(tmp_path, layout, row, said):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"id": "r7", **row}) + "\n")
    with pytest.raises(DataError) as error:
        read_rows(DataConfig(path=str(path), format=layout))
    for part in (str(path), layout, "line 1 (id r7)", said, LAYOUTS[layout].expected):
        assert part in str(error.value)


@pytest.mark.parametrize(("label", "shape"), [(True, "unpaired"), ("sea", "messages")])
def test_only_a_label_that_is_true_or_false_is_a_verdict(tmp_path, label, shape):
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"conversations": turns, "label": label}) + "\n")
    table = read_rows(DataConfig(path=str(path)))
    assert (table.rows[0]["label"], choose_format("auto", table.columns, "rows")) == (label, shape)


def test_our_own_columns_win():
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "conversations": [], "instruction": "i"}
    assert detect_layout([row]) is None
    assert detect_layout([{"prompt": "p", "completions": ["a", "b"]}]) is None
    assert detect_layout([{"instruction": "i", "answer": "a"}]) is None


def test_the_first_filled_row_decides():
    rows = [{"prompt": "p", "completions": None}, {"prompt": "p", "completions": [{"rank": 0, "completion": "a"}]}]
    assert detect_layout(rows) == "nemo_rl"
