"""The operation `direction`: which directions it draws, what it writes, and the text of one and back."""

from math import atan2, cos, degrees, hypot, radians, sin

import pytest
from pydantic import ValidationError

from alignkit.core import DataError
from alignkit.data.operations import Item
from alignkit.data.operations.direction import Direction, DirectionConfig, clamped, parse_weights, weights_text
from alignkit.data.shapes import BadRow, to_example

NAMES = ["helpfulness", "verbosity"]
CHAT = [{"role": "user", "content": "q"}]


def direction(**keys) -> Direction:
    return Direction(DirectionConfig(name="direction", **keys))


def made(operation: Direction, prompt="q", name="id", **fields) -> Item:
    (one,) = operation.apply(Item(name, to_example({"prompt": prompt}, "prompt"), fields))
    return one


def angles(operation: Direction, count: int) -> list[float]:
    vectors = [made(operation, CHAT, f"row {i}").fields["direction"] for i in range(count)]
    assert all(hypot(*vector) == pytest.approx(1.0) for vector in vectors)
    return [degrees(atan2(vector[1], vector[0])) for vector in vectors]


def test_angles_fill_the_range_and_belong_to_the_row():
    found = angles(direction(lowest=-30, highest=60), 400)
    assert -30 <= min(found) < -27
    assert 57 < max(found) <= 60
    assert sum(angle < 15 for angle in found) == pytest.approx(200, abs=40)  # four deviations
    assert angles(direction(lowest=-30, highest=60), 400) == found
    assert angles(direction(lowest=-30, highest=60, seed=1), 3) != found[:3]


def test_it_stands_as_system_turn_or_before_a_text_and_in_the_columns():
    asked = {"direction": [0.97, -0.26], "text": "best by {weights}", "separator": " | "}
    one = made(direction(**asked), CHAT, topic="x")
    weights = "helpfulness*97 + verbosity*-26"
    assert one.example.prompt == [{"role": "system", "content": f"best by {weights}"}, *CHAT]
    assert one.fields == {"topic": "x", "weights_text": weights, "direction": one.fields["direction"]}
    assert one.fields["direction"] == pytest.approx([0.97 / hypot(0.97, 0.26), -0.26 / hypot(0.97, 0.26)])
    spoken = [{"role": "system", "content": "be kind"}, *CHAT]
    assert made(direction(**asked), spoken).example.prompt[0]["content"] == f"best by {weights} | be kind"
    before = direction(**asked, placement="user_prefix")
    assert made(before, "q").example.prompt == f"best by {weights} | q"
    assert made(before, spoken).example.prompt == [
        spoken[0],
        {"role": "user", "content": f"best by {weights} | q"},
    ]
    with pytest.raises(DataError, match="direction: plain-text prompts have no system turn"):
        made(direction(), "q")
    with pytest.raises(BadRow, match="no user turn to put the text of direction before"):
        made(before, spoken[:1])


@pytest.mark.parametrize("angle", range(-180, 181, 7))
def test_weights_are_whole_hundredths_and_come_back(angle):
    vector = cos(radians(angle)), sin(radians(angle))
    text = made(direction(lowest=-180, highest=180, direction=list(vector)), CHAT).example.prompt[0]["content"]
    assert parse_weights(text, NAMES) == [round(100 * x) for x in vector]
    assert weights_text(vector, NAMES) in text


def test_a_text_without_weights_has_none():
    assert parse_weights("helpfulness*9 + brevity*1", NAMES) is None
    assert weights_text((0.705, -0.004), ["a.b", "c"]) == "a.b*70 + c*0"
    assert parse_weights("axb*1 + c*2", ["a.b", "c"]) is None


@pytest.mark.parametrize(
    ("angle", "lowest", "highest", "expected"),
    [(10, -45, 45, 10), (60, -45, 45, 45), (-170, -45, 45, -45), (-170, 90, 180, 180), (0, 90, 180, 90)],
)
def test_what_is_outside_becomes_the_nearest_angle(angle, lowest, highest, expected):
    assert clamped(angle, lowest, highest) == pytest.approx(expected)


def test_a_direction_that_was_not_trained_is_moved_and_says_so(recwarn):
    made(direction(direction=[2, 2]), CHAT)
    made(direction(lowest=90, highest=180, direction=[-1, -1e-12]), CHAT)
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"stands at 63\.43 degrees, outside -45 to 45, .* asking for 45 degrees"):
        operation = direction(direction=[1, 2])
    assert made(operation, CHAT).fields["weights_text"] == "helpfulness*71 + verbosity*71"


def test_the_model_card_says_how_to_ask():
    note = direction(lowest=0, text="rate {weights}").note()
    assert "as system turn" in note
    assert "from 0 to 45 degrees" in note
    assert "rate helpfulness*A + verbosity*B" in note


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"text": "none"}, "needs one {weights}"),
        ({"objectives": ["a", "a"]}, "two names that differ"),
        ({"objectives": ["a", "b", "c"]}, "at most 2"),
        ({"lowest": 45}, "must be below"),
        ({"direction": [0, 0]}, "points nowhere"),
        ({"direction": [1, float("nan")]}, "points nowhere"),
    ],
)
def test_mistakes_are_told(keys, message):
    with pytest.raises(ValidationError, match=message):
        direction(**keys)
