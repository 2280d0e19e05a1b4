"""Documents and reading: text with positions → typed values and one report."""

from typing import Any, Literal

import pytest
from pydantic import Field, model_validator

from alignkit.core.config import Config
from alignkit.core.documents import Block, Mistakes, Place, apply_override, from_python, merge, parse
from alignkit.core.errors import RecipeError
from alignkit.core.reading import ConfigReader, describe_type, edit_distance, nearest, type_scalar


class Inner(Config):
    rank: int = Field(4, ge=1, description="of the adapter")
    scale: float = 1.0


class Outer(Config):
    name: str
    rate: float = Field(0.1, gt=0, lt=1)
    flag: bool = False
    steps: int | None = Field(None, ge=0)
    kind: Literal["fast", "slow", "off"] = "fast"
    names: list[str] = []
    inner: Inner = Inner()
    maybe: Inner | None = None
    parts: list[Inner] = Field([], max_length=2)
    by_name: dict[str, Inner] = {}
    free: dict[str, Any] = {}
    target: str | list[str] = "all"

    @model_validator(mode="after")
    def _cross(self) -> "Outer":
        if self.flag and self.steps == 7:
            raise ValueError("flag and steps 7 exclude each other")
        return self


def read(text: str, *overrides: str) -> Outer:
    mistakes = Mistakes()
    root = parse(text, "x.yaml", mistakes)
    for override in overrides:
        root = apply_override(root, override, mistakes)
    reader = ConfigReader(mistakes, lambda declared, block, path: (declared, {}), lambda path, key: None)
    config = reader.read(root, Outer)
    mistakes.stop_if_any()
    assert config is not None
    return config


def report(text: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        read(text, *overrides)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


@pytest.mark.parametrize(
    ("text", "annotation", "value"),
    [
        ("1e-6", float, 1e-6),
        (".5", float, 0.5),
        ("3", float, 3.0),
        ("1.", float, 1.0),
        ("-.inf", float, float("-inf")),
        ("1_000", int, 1000),
        ("1e3", int, 1000),
        ("010", int, 10),
        ("0x10", int, 16),
        ("1.5", int, 1.5),
        ("true", bool, True),
        ("YES", bool, True),
        ("off", bool, False),
        ("1", bool, "1"),
        ("on", str, "on"),
        ("no", str, "no"),
        ("123", str, "123"),
        ("1e-6", str, "1e-6"),
        ("null", str, "null"),
        ("", str, None),
        ("none", str | None, None),
        ("~", int | None, None),
        ("", float | None, None),
        ("null", float | None, None),
        ("none", Literal["none", "some"], "none"),
        ("off", Literal["fast", "off"], "off"),
        ("2", Literal[1, 2], 2),
        ("5", int | str, 5),
        ("five", int | str, "five"),
        ("1e-6", Any, 1e-6),
        ("7", Any, 7),
        ("0o17", Any, 15),
        ("no", Any, "no"),
        ("true", Any, True),
        ("null", Any, None),
        ("none", Any, "none"),
        ("2024-01-02", Any, "2024-01-02"),
    ],
)
def test_the_schema_types_scalars(text: str, annotation: Any, value: Any) -> None:
    typed = type_scalar(text, annotation)
    assert typed == value
    assert type(typed) is type(value)


def test_a_document_is_read_by_its_schema() -> None:
    text = "name: on\nrate: 1e-2\nflag: yes\nsteps: none\nkind: off\nnames: [1, no]\ninner:\n"
    text += "free: {a: 1e-6, b: '1', c: [x, 2]}\n"
    assert read(text) == Outer(
        name="on",
        rate=0.01,
        flag=True,
        kind="off",
        names=["1", "no"],
        free={"a": 1e-6, "b": "1", "c": ["x", 2]},
    )


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("rate=.2", {"rate": 0.2}),
        ("rate=2e-1", {"rate": 0.2}),
        ("flag=on", {"flag": True}),
        ("steps=null", {"steps": None}),
        ("steps=none", {"steps": None}),
        ("name=a=b: c # d", {"name": "a=b: c # d"}),
        ("name='null'", {"name": "null"}),
        ("names=[a,b]", {"names": ["a", "b"]}),
        ("names.0=z", {"names": ["z"]}),
        ("names.1=z", {"names": ["y", "z"]}),
        ("inner={rank: 2}", {"inner": Inner(rank=2)}),
        ("inner.rank=2", {"inner": Inner(rank=2)}),
        ("maybe.rank=8", {"maybe": Inner(rank=8)}),
        ("maybe=null", {"maybe": None}),
        ("maybe={}", {"maybe": Inner()}),
        ("parts.0.rank=3", {"parts": [Inner(rank=3)]}),
        ("by_name.a.scale=1e-6", {"by_name": {"a": Inner(scale=1e-6)}}),
        ("free.x=1e-6", {"free": {"x": 1e-6}}),
        ("free.x='1'", {"free": {"x": "1"}}),
        ("target=[q, v]", {"target": ["q", "v"]}),
        ("target=q", {"target": "q"}),
    ],
)
def test_overrides_are_typed_by_the_schema(override: str, expected: dict[str, Any]) -> None:
    base = "name: n\nnames: [y]\nmaybe: null\n"
    assert read(base, override) == Outer(**{"name": "n", "names": ["y"], **expected})


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("rate", "an override is written key=value"),
        ("=3", "an override is written key=value"),
        ("inner..rank=3", "an override is written key=value"),
        ("name.x=3", "`name` is a single value ('n') and has no key 'x'"),
        ("names.5=z", "`names` is a list and has the entries 0 to 0; names.1=… appends, got '5'"),
        ("names.first=z", "appends, got 'first'"),
        ("rat=3", "unknown key; did you mean 'rate'?"),
        ("rate=fast", "got 'fast', expected a number > 0 and < 1"),
        ("steps='12'", "got the text '12', expected a whole number ≥ 0 or null"),
        ("flag=1", "got '1', expected true or false"),
        ("names=[a", "this is not YAML"),
    ],
)
def test_bad_overrides_are_named(override: str, said: str) -> None:
    lines = report("name: n\nnames: [y]\n", override)
    assert len(lines) == 1
    assert lines[0].startswith(f"override {override!r}")
    assert said in lines[0]


def test_all_mistakes_come_in_one_report_in_the_order_of_the_file() -> None:
    text = "rate: 7\nflg: true\ninner:\n  rnak: 1\n  scale: big\nparts:\n  - {rank: 0}\n  - 3\nkind: quick\n"
    assert report(text, "maybe.rank=0") == [
        "x.yaml:1:1  name  missing key; it is required",
        "x.yaml:1:7  rate  got '7', expected a number > 0 and < 1",
        "x.yaml:2:1  flg  unknown key; did you mean 'flag'?",
        "x.yaml:4:3  inner.rnak  unknown key; did you mean 'rank'?",
        "x.yaml:5:10  inner.scale  got 'big', expected a number",
        "x.yaml:7:12  parts.0.rank  got '0', expected a whole number ≥ 1 (of the adapter)",
        "x.yaml:9:7  kind  got 'quick', expected one of fast, slow, off",
        "override 'maybe.rank=0'  maybe.rank  got '0', expected a whole number ≥ 1 (of the adapter)",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: n\nparts: [3]\n", "x.yaml:2:9  parts.0  got '3', expected a mapping with the keys rank, scale"),
        ("name: n\nparts: [{}, {}, {}]\n", "x.yaml:2:8  parts  got a list of 3, expected a list of at most 2"),
        ("name: n\nnames: abc\n", "x.yaml:2:8  names  got 'abc', expected a list, each entry text"),
        ("name: n\ninner: 3\n", "x.yaml:2:8  inner  got '3', expected a mapping with the keys rank, scale"),
        ("name:\n", "x.yaml:1:6  name  got nothing (null), expected text"),
        ("name: {a: 1}\n", "x.yaml:1:7  name  got a mapping with a, expected text"),
        ("name: n\nname: m\n", "x.yaml:2:1  name  the key is given twice; the first is in line 1"),
        ("name: n\nflag: true\nsteps: 7\n", "x.yaml:1:1  flag and steps 7 exclude each other"),
        ("name: n\n? [a]\n: 1\n", "x.yaml:2:3  a key must be plain text"),
        ("name: !foo n\n", "the tag '!foo' means nothing here"),
        ("name: &a [*a]\n", "an alias that contains itself"),
    ],
)
def test_single_mistakes(text: str, said: str) -> None:
    lines = report(text)
    assert any(line.startswith(said) or said in line for line in lines), lines


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("a: [1\nb: 2\n", "x.yaml:2:"),
        ("a:\n\tb: 1\n", "x.yaml:2:1"),
        ("a: 1\n\x07\n", "x.yaml:2:1"),
        ("a: b: c\n", "x.yaml:1:5"),
    ],
)
def test_syntax_errors_have_a_position(text: str, place: str) -> None:
    (line,) = report(text)
    assert line.startswith(place)
    assert "this is not YAML" in line


def test_merge_is_deep_in_mappings_and_replaces_lists() -> None:
    place = Place("p")
    base = from_python({"a": {"x": 1, "y": [1, 2]}, "b": 1}, place)
    top = from_python({"a": {"y": [3]}, "c": 2}, place)
    assert merge(base, top) == from_python({"a": {"x": 1, "y": [3]}, "b": 1, "c": 2}, place)
    assert isinstance(merge(base, from_python({"a": None}, place)), Block)


def test_empty_document_is_an_empty_mapping() -> None:
    assert report("") == ["x.yaml:1:1  name  missing key; it is required"]


@pytest.mark.parametrize(
    ("word", "names", "expected"),
    [
        ("lerning_rate", ["learning_rate", "lr"], ["learning_rate"]),
        ("modelt", ["model", "models"], ["models"]),
        ("adam_beta", ["adam_beta1", "adam_beta2", "beta"], ["adam_beta1", "adam_beta2"]),
        ("q", ["r", "alpha"], ["r"]),
        ("batch", ["batch_size", "seed"], ["batch_size"]),
        ("zzzz", ["seed"], []),
    ],
)
def test_nearest_names(word: str, names: list[str], expected: list[str]) -> None:
    assert nearest(word, names) == expected


def test_edit_distance_counts_a_swap_once() -> None:
    assert edit_distance("rnak", "rank") == 1
    assert edit_distance("kitten", "sitting") == 3


def test_types_in_words() -> None:
    assert describe_type(int | None, Outer.model_fields["steps"].metadata) == "a whole number ≥ 0 or null"
    assert describe_type(dict[str, str]) == "a mapping of names to text"
    assert describe_type(str | list[str]) == "text or a list, each entry text"
