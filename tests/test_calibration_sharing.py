"""Layers that read one tensor share one set of statistics: only where that changes no bit of them."""

import pytest
import torch
from torch import nn

from qgraft.layers import Stats
from qgraft.quantizer import calibration

WIDTH = 24
NEEDS = frozenset({"absmax", "second_moment"})


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.gate, self.up = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x):
        h = self.norm(x)
        x = x + self.o(torch.sigmoid(self.q(h) * self.k(h)) * self.v(h))
        return self.gate(x) * self.up(x)


def gather(model, run, together=True, needs=None) -> dict[str, Stats]:
    """Of all layers in one pass, or of each in a pass of its own, where nothing can be shared."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    needs = needs or dict.fromkeys(layers, NEEDS)
    if together:
        return calibration.collect(model, layers, needs, run)
    found = {}
    for name, module in layers.items():
        found.update(calibration.collect(model, {name: module}, needs, run))
    return found


def assert_same_stats(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].tokens == b[name].tokens, name
        for part in ("absmax", "second_moment", "sample"):
            assert torch.equal(getattr(a[name], part), getattr(b[name], part)), (name, part)


def test_layers_that_read_one_tensor_share_statistics_that_are_those_of_each_alone_bit_for_bit():
    model = Attention()
    data = [torch.randn(2, 7, WIDTH) for _ in range(5)]

    def run(m):
        for x in data:
            m(x)

    shared, alone = gather(model, run), gather(model, run, together=False)
    assert_same_stats(shared, alone)
    assert shared["q"] is shared["k"] is shared["v"] and shared["gate"] is shared["up"]
    assert len({id(s) for s in shared.values()}) == 3


class Odd(nn.Module):
    """a and b read the same tensor, but for what `how` says of call number `step`."""

    def __init__(self, how):
        super().__init__()
        self.how, self.step = how, 0
        self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        self.step += 1
        h = torch.tanh(x)
        return self.how(self, h) + self.c(h)


def late(m, h):  # b joins at the second call only
    return m.a(h) + (m.b(h) if m.step > 1 else 0)


def early(m, h):  # b reads it at the first call only
    return m.a(h) + (m.b(h) if m.step == 1 else 0)


def other(m, h):  # b reads something else at the second call
    return m.a(h) + m.b(h if m.step == 1 else 2 * h)


def skips_one(m, h):
    return m.a(h) + (m.b(h) if m.step != 2 else 0)


def makes_up(m, h):  # as often as a in the end, but not with the same tensors
    return m.a(h) + (0 if m.step == 2 else m.b(h)) + (m.b(h) if m.step == 3 else 0)


def twice(m, h):  # b is called twice in a row
    return m.a(h) + m.b(h) + m.b(h)


def leader_twice(m, h):
    return m.a(h) + m.a(h) + m.b(h)


def in_place(m, h):  # one tensor object that changes in between
    y = m.a(h)
    h.mul_(3)
    return y + m.b(h)


def in_place_later(m, h):
    y = m.a(h)
    if m.step == 2:
        h.mul_(3)
    return y + m.b(h)


def view(m, h):  # another object, the same memory
    return m.a(h) + m.b(h.view(h.shape))


def changed_order(m, h):
    return m.a(h) + m.b(h) if m.step != 2 else m.b(h) + m.a(h)


def swallows(m, h):  # a model that catches whatever happens in it
    try:
        return m.a(h) + m.b(h if m.step == 1 else 2 * h)
    except Exception:
        return h


def inference(m, h):
    with torch.inference_mode():
        h = h * 2
        return m.a(h) + m.b(h.view(h.shape))


ODD = [
    late,
    early,
    other,
    skips_one,
    makes_up,
    twice,
    leader_twice,
    in_place,
    in_place_later,
    view,
    changed_order,
    swallows,
    inference,
]


@pytest.mark.parametrize("how", ODD, ids=lambda how: how.__name__)
def test_layers_that_share_their_input_only_sometimes_get_statistics_of_their_own(how):
    data = [torch.randn(2, 3, WIDTH) for _ in range(4)]
    model = Odd(how)

    def restarting(m):  # counts the steps of each pass from one
        m.step = 0
        for x in data:
            m(x)

    assert_same_stats(gather(model, restarting), gather(model, restarting, together=False))


def test_layers_that_need_different_statistics_do_not_share():
    model = Attention()
    needs = {n: NEEDS for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    needs["k"] = frozenset()
    found = gather(model, lambda m: m(torch.randn(2, 3, WIDTH)), needs=needs)
    assert found["k"].second_moment is None and found["k"].tokens == 6
    assert found["q"] is found["v"]


def test_a_layer_that_joins_late_collects_its_own_without_a_second_pass():
    passes = []

    def run(m):
        passes.append(1)
        for m.step in range(3):
            m(torch.randn(2, WIDTH))

    assert gather(Odd(late), run)["b"].tokens == 4 and passes == [1]
