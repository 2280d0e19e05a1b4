"""Counting bytes of live tensors."""

import torch

from alignkit.memory.live import LiveMemory

WORD = 4


def test_storages_count_once_and_until_nobody_holds_them() -> None:
    live = LiveMemory()
    with live:
        x = torch.zeros(10, 10)
        assert live.live == 100 * WORD
        view = x.t()[2:]
        assert live.live == 100 * WORD  # the same storage
        y = x + 1
        assert live.live == 200 * WORD
        del x
        assert live.live == 200 * WORD  # a view holds it
        del view
        assert (live.live, live.peak) == (100 * WORD, 200 * WORD)
        live.restart()
        assert live.peak == 100 * WORD
        del y
    assert live.live == 0


def test_what_was_there_before_counts_once_asked_to() -> None:
    live, weight = LiveMemory(), torch.zeros(8)
    with live:
        weight.add_(1)
        held = live.live
    assert held == 8 * WORD  # an operation in place gave it out, and so it is known
    other = LiveMemory()
    other.count([weight, weight.view(2, 4)])
    assert other.live == 8 * WORD


def test_gradients_are_told_apart_once_they_arrive() -> None:
    weight = torch.zeros(100, requires_grad=True)
    live = LiveMemory()
    live.count([weight])
    live.watch_gradients([weight])
    with live:
        for _ in range(2):  # the second is added to the first
            (weight * 2).sum().backward()
        assert live.gradients == 100 * WORD
        assert live.live == 200 * WORD
        assert live.peak_without_gradients < live.peak
        weight.grad = None
        assert (live.gradients, live.live) == (0, 100 * WORD)
