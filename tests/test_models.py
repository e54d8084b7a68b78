"""Parameter counts of the released network, shapes, seeds, merge and restrict bit for bit."""

import pytest
import torch
from torch import nn

from mas_core.config import UserError
from mas_core.models import MultiTaskNet, forward_tasks, merge, restrict_state
from mas_core.tasks import TASKS, task_losses


def count(module):
    return sum(p.numel() for p in module.parameters())


def same(a, b):
    """Whether two states are equal bit for bit: names, kinds, shapes, values."""
    return list(a) == list(b) and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a
    )


def scrambled(net, seed=0):
    """The network with every weight and every buffer moved: nothing has its initial value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in net.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand(tensor.shape, generator=generator))
            else:
                tensor.add_(7)
    return net


def test_parameter_counts_are_the_released_codes():
    nine = MultiTaskNet("sdnkterca", "full")
    assert count(nine.encoder) == 4_089_192
    expected = dict.fromkeys("dkter", 115_808) | {
        "s": 116_624, "n": 115_904, "a": 115_904, "c": 115_856
    }  # fmt: skip
    assert {a: count(d) for a, d in nine.decoders.items()} == expected
    assert count(MultiTaskNet("sdnkt", "full")) == 4_669_144
    half = MultiTaskNet("sdnkterca", "half")
    assert count(half.encoder) == 2_051_632 and count(half) == 3_094_960


@pytest.mark.parametrize("stride", [2, 4, 8, 16])
@pytest.mark.parametrize("size", ["full", "half", "small", "tiny"])
def test_shapes(size, stride):
    net = MultiTaskNet("scd", size, stride)
    with torch.no_grad():
        image = torch.rand(2, 3, 32, 32)
        assert net.encoder(image).shape[2:] == (32 // stride, 32 // stride)
        outputs = net(image)
    assert list(outputs) == ["s", "d", "c"]  # the table's order
    assert {a: tuple(o.shape) for a, o in outputs.items()} == {
        a: (2, TASKS[a].channels, 32, 32) for a in "sdc"
    }


def test_smaller_sizes_are_smaller():
    counts = [count(MultiTaskNet("sdnkt", size, 4)) for size in ("full", "half", "small", "tiny")]
    assert counts == sorted(counts, reverse=True) and len(set(counts)) == 4


def test_every_output_pixel_depends_on_the_image():
    """A deconvolution or a resize that misses rows or columns would leave pixels untouched."""
    net = MultiTaskNet("d", "tiny", 4).train()
    image = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        change = (net(image)["d"] - net(1 - image)["d"]).abs()
    assert (change > 0).all()


def test_initial_weights_come_from_the_seed_part_by_part():
    one, other = MultiTaskNet("dkt", "tiny", 4, seed=3), MultiTaskNet("skt", "tiny", 4, seed=3)
    assert same(one.encoder.state_dict(), other.encoder.state_dict())
    assert same(one.decoders["k"].state_dict(), other.decoders["k"].state_dict())
    assert not same(one.decoders["k"].state_dict(), one.decoders["t"].state_dict())
    fresh = MultiTaskNet("dkt", "tiny", 4, seed=4)
    for (name, a), b in zip(one.named_parameters(), fresh.parameters(), strict=True):
        constant = (a == a.flatten()[0]).all()  # BatchNorm starts at one and zero
        assert constant or not torch.equal(a, b), name
    assert same(one.state_dict(), MultiTaskNet("tkd", "tiny", 4, seed=3).state_dict())


def test_building_leaves_the_global_generator_alone():
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    first = MultiTaskNet("dk", "tiny", 4, seed=0)
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(12)
    assert same(first.state_dict(), MultiTaskNet("dk", "tiny", 4, seed=0).state_dict())


def test_merging_the_restricted_parts_gives_the_whole_bit_for_bit():
    whole = scrambled(MultiTaskNet("sdnkt", "tiny", 4))
    parts = [whole.restrict_to("tk"), whole.restrict_to("sdn")]
    assert [p.tasks for p in parts] == ["kt", "sdn"]
    again = merge(parts)
    assert again.tasks == "sdnkt" and same(again.state_dict(), whole.state_dict())
    image = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected, found = whole.eval()(image), parts[0].eval()(image)
    assert all(torch.equal(found[a], expected[a]) for a in "kt")


def test_a_restricted_network_shares_no_memory():
    whole = MultiTaskNet("dk", "tiny", 4)
    before = {k: t.clone() for k, t in whole.state_dict().items()}
    scrambled(whole.restrict_to("d"))
    assert same(whole.state_dict(), before)


def test_merge_refuses_other_encoders_and_tasks_twice():
    net = MultiTaskNet("dk", "tiny", 4)
    with pytest.raises(UserError, match="encoders of 'dk' and 't' differ"):
        merge([net, MultiTaskNet("t", "tiny", 4, seed=1)])
    with pytest.raises(UserError, match="differ"):
        merge([net, MultiTaskNet("t", "small", 4)])
    statistics = MultiTaskNet("t", "tiny", 4)
    next(m for m in statistics.encoder.modules() if isinstance(m, nn.BatchNorm2d)).running_mean += 1
    with pytest.raises(UserError, match="differ"):
        merge([net, statistics])
    with pytest.raises(UserError, match="'k' is repeated"):
        merge([net, MultiTaskNet("k", "tiny", 4)])
    with pytest.raises(UserError, match="'s' is not in this network of 'dk'"):
        net.restrict_to("s")


def test_restrict_state_keeps_the_encoder_and_the_named_decoders():
    whole = MultiTaskNet("dkt", "tiny", 4)
    part = restrict_state(whole.state_dict(), "kt")
    assert list(part) == list(MultiTaskNet("kt", "tiny", 4).state_dict())


def test_one_pass_gives_the_losses_and_gradients_of_the_plain_network(batch):
    net, made = MultiTaskNet("snk", "tiny", 4).train(), batch("snk")
    step = forward_tasks(net, made)
    at_features = step.backward_decoders(torch.tensor([1.0, 2.0, 3.0]))
    decoders = {k: p.grad.clone() for k, p in net.decoders.named_parameters()}

    features = net.encoder(made.image)
    outputs = {a: net.decoders[a](features) for a in net.tasks}
    losses = task_losses(outputs, made)
    torch.testing.assert_close(step.losses, losses)
    weighted = losses * torch.tensor([1.0, 2.0, 3.0])
    for i in range(3):
        (expected,) = torch.autograd.grad(weighted[i], features, retain_graph=True)
        torch.testing.assert_close(at_features[i], expected, rtol=1e-4, atol=1e-8)
    expected = torch.autograd.grad(weighted.sum(), list(net.decoders.parameters()))
    for p, wanted in zip(decoders.values(), expected, strict=True):
        torch.testing.assert_close(p, wanted, rtol=1e-4, atol=1e-7)
