"""Losses against literal implementations, decoding constants, flips, names of task sets."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from mas_core.config import UserError
from mas_core.tasks import (
    DOMAINS,
    TASKS,
    Batch,
    check_tasks,
    decode_batch,
    domains_of,
    sort_tasks,
    task_losses,
)

B, H, W = 3, 7, 6


@pytest.fixture
def pixels():
    """Outputs, targets and masks of random numbers; one image of the mask is all invalid."""
    generator = torch.Generator().manual_seed(0)

    def make(letter, empty=True):
        channels = TASKS[letter].channels
        output = torch.randn(B, channels, H, W, generator=generator, requires_grad=True)
        mask = (torch.rand(B, 1, H, W, generator=generator) < 0.7).float()
        if empty:
            mask[1] = 0
        if letter == "s":
            return output, torch.randint(0, 18, (B, H, W), generator=generator), mask
        return output, torch.randn(B, channels, H, W, generator=generator), mask

    return make


def close(value, expected):
    assert value.item() == pytest.approx(expected.item(), rel=2e-6)


def test_cross_entropy_ignores_class_zero(pixels):
    output, target, mask = pixels("s")
    total, count = 0.0, 0
    for b, y, x in itertools.product(range(B), range(H), range(W)):
        if target[b, y, x] > 0:
            total -= torch.log_softmax(output[b, :, y, x], 0)[target[b, y, x]]
            count += 1
    assert 0 < count < B * H * W
    close(TASKS["s"].loss(output, target, mask), total / count)
    close(TASKS["s"].loss(output, target, torch.zeros_like(mask)), total / count)  # no depth needed


def test_cross_entropy_of_an_unlabelled_batch_is_zero_with_zero_gradient(pixels):
    output, target, mask = pixels("s")
    loss = TASKS["s"].loss(output, torch.zeros_like(target), mask)
    loss.backward()
    assert loss == 0 and torch.equal(output.grad, torch.zeros_like(output))


def rotation_reference(output, target, mask):
    """Per image the least of nine masked means over the pixels that no shift pushes out."""
    channels, losses = output.shape[1], []
    for b in range(len(output)):
        shifts = []
        for dy, dx in itertools.product((-1, 0, 1), repeat=2):
            total, count = 0.0, 0
            for y, x in itertools.product(range(1, H - 1), range(1, W - 1)):
                if mask[b, 0, y, x] == 1:
                    error = (output[b, :, y + dy, x + dx] - target[b, :, y, x]).abs().sum()
                    total, count = total + error / channels, count + 1
            shifts.append(total / max(count, 1) + 0 * output[b].sum())
        losses.append(torch.stack(shifts).min())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("letter", "dn")
def test_rotation_loss_and_its_gradient_are_the_minimum_over_nine_shifts(pixels, letter):
    output, target, mask = pixels(letter)
    loss, expected = (
        TASKS[letter].loss(output, target, mask),
        rotation_reference(output, target, mask),
    )
    close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, output)
    (wanted,) = torch.autograd.grad(expected, output)
    torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-8)
    assert wanted[0].abs().sum() > 0 and wanted[1].abs().sum() == 0


@pytest.mark.parametrize("dy, dx", list(itertools.product((-1, 0, 1), repeat=2)))
def test_rotation_loss_finds_every_one_pixel_shift_image_by_image(pixels, dy, dx):
    _, target, _ = pixels("n")
    output = torch.roll(target, (dy, dx), (2, 3))
    mask = torch.ones(B, 1, H, W)
    assert TASKS["n"].loss(output, target, mask) == 0
    output[0] = torch.roll(target[0], (0, 2), (1, 2))  # two pixels are too many
    assert TASKS["n"].loss(output, target, mask) > 0.1


@pytest.mark.parametrize("letter", "erc")
def test_invalid_pixels_are_zeroed_but_counted(pixels, letter):
    output, target, mask = pixels(letter)
    valid = mask.expand_as(target) == 1
    expected = (output - target).abs()[valid].sum() / target.numel()
    close(TASKS[letter].loss(output, target, mask), expected)


@pytest.mark.parametrize("letter", "kta")
def test_plain_l1_ignores_the_mask(pixels, letter):
    output, target, mask = pixels(letter)
    expected = (output - target).abs().sum() / target.numel()
    close(TASKS[letter].loss(output, target, mask), expected)
    assert TASKS[letter].loss(output, target, 0 * mask) == TASKS[letter].loss(output, target, mask)


@pytest.mark.parametrize(
    "letter, raw, expected",
    [
        ("d", [[2500, 500]], [[[1.0, -1.0]]]),  # (v - 1500) / 1000
        ("e", [[56, 2447]], [[[-0.0248 / 239.1265, 2390.9752 / 239.1265]]]),
        ("k", [[50, 350]], [[[0.0, 3.0]]]),
        ("t", [[718, 65535]], [[[0.0, 64817 / 1070]]]),  # unsigned: no value is negative
        ("n", [[[255, 0, 127]]], [[[1.0]], [[-1.0]], [[2 * (127 / 255 - 0.5)]]]),
        ("r", [[[30, 60, 90]]], [[[(60 / 255 - 0.4962) / 0.2846]]]),
        ("c", [[[255, 0, 99]]], [[[(1 - 0.5175) / 0.1373]], [[-0.4987 / 0.0359]]]),
        ("a", [[[255, 0, 51]]], [[[1.0]], [[0.0]], [[0.2]]]),
    ],
)
def test_decoding_constants(letter, raw, expected):
    dtype = torch.uint16 if TASKS[letter].stored == "uint16" else torch.uint8
    target = TASKS[letter].decode(torch.tensor([raw], dtype=dtype))
    assert target.dtype == torch.float32
    torch.testing.assert_close(target, torch.tensor([expected]), rtol=1e-5, atol=1e-6)


def test_classes_stay_integers():
    raw = torch.tensor([[[0, 17], [3, 4]]], dtype=torch.uint8)
    target = TASKS["s"].decode(raw)
    assert target.dtype == torch.int64 and torch.equal(target, raw.long())


def raw_batch(depth):
    rgb = torch.arange(2 * 2 * 3, dtype=torch.uint8).view(1, 2, 2, 3) * 20
    return {
        "rgb": rgb,
        "depth_zbuffer": torch.tensor([depth], dtype=torch.uint16),
        "normal": rgb,
        "segment_semantic": torch.tensor([[[1, 2], [3, 0]]], dtype=torch.uint8),
    }


def test_mask_is_depth_below_two_to_the_thirteen():
    batch = decode_batch(raw_batch([[8191, 8192], [0, 65535]]), "d")
    assert batch.mask.tolist() == [[[[1.0, 0.0], [1.0, 0.0]]]]


def test_image_is_rgb_over_255_channels_first():
    batch = decode_batch(raw_batch([[1, 2], [3, 4]]), "d")
    assert batch.image.shape == (1, 3, 2, 2)
    assert batch.image[0, :, 0, 1].tolist() == pytest.approx([60 / 255, 80 / 255, 100 / 255])


def test_flip_mirrors_everything_and_turns_the_normals_x():
    raw = raw_batch([[1500, 9000], [2500, 3500]])
    plain = decode_batch(raw, "sdn", torch.tensor([False]))
    flipped = decode_batch(raw, "sdn", torch.tensor([True]))
    unflipped = decode_batch(raw, "sdn")
    for name in ("image", "mask"):
        assert torch.equal(getattr(flipped, name), getattr(plain, name).flip(-1))
        assert torch.equal(getattr(unflipped, name), getattr(plain, name))
    assert flipped.targets["s"].tolist() == [[[2, 1], [0, 3]]]
    assert flipped.mask.tolist() == [[[[0.0, 1.0], [1.0, 1.0]]]]
    assert torch.equal(flipped.targets["d"], plain.targets["d"].flip(-1))
    signs = torch.tensor([-1.0, 1.0, 1.0]).view(1, 3, 1, 1)
    assert torch.equal(flipped.targets["n"], plain.targets["n"].flip(-1) * signs)


def test_flips_are_image_by_image(batch):
    mixed, none = batch("sdnk"), batch("sdnk")
    assert mixed.mask.min() == 0 and 0.5 < mixed.mask.mean() < 1
    raw_again = {"d": none.targets["d"]}
    assert torch.equal(mixed.targets["d"], raw_again["d"])  # the fixture is deterministic
    images = torch.zeros(2, 2, 2, 3, dtype=torch.uint8)
    images[:, :, 0] = 255
    raw = {"rgb": images, "depth_zbuffer": torch.zeros(2, 2, 2, dtype=torch.uint16)}
    image = decode_batch(raw, "", torch.tensor([False, True])).image
    assert image[:, 0, 0].tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_task_losses_stand_in_the_order_of_the_outputs(batch):
    made = batch("kta")
    outputs = {a: torch.zeros_like(made.targets[a]) for a in "atk"}
    expected = [made.targets[a].abs().mean() for a in "atk"]
    losses = task_losses(outputs, made)
    torch.testing.assert_close(losses, torch.stack(expected))
    assert len(set(losses.tolist())) == 3


def test_half_precision_outputs_are_compared_in_float32(batch):
    made = batch("k")
    output = torch.randn_like(made.targets["k"]).bfloat16()
    expected = F.l1_loss(output.float(), made.targets["k"])
    assert task_losses({"k": output}, made)[0] == expected


def test_a_batch_counts_its_images(batch):
    assert len(batch("k", images=3)) == 3
    assert len(Batch(torch.zeros(5, 3, 2, 2), torch.ones(5, 1, 2, 2), {})) == 5


def test_nine_tasks_in_the_papers_letters():
    assert "".join(TASKS) == "sdnkterca" and set(DOMAINS) == {t.domain for t in TASKS.values()}
    assert [TASKS[a].channels for a in "sdnkterca"] == [18, 1, 3, 1, 1, 1, 1, 2, 3]
    assert sort_tasks("tkd") == "dkt"


@pytest.mark.parametrize(
    "letters, says",
    [("sdz", "unknown task 'z'"), ("sds", "'s' is repeated"), ("", "no task"), ("S", "'S'")],
)
def test_letters_that_are_no_task_set(letters, says):
    with pytest.raises(UserError, match=says):
        check_tasks(letters)


def test_domains_read_for_a_task_set():
    assert domains_of("k") == ("rgb", "depth_zbuffer", "keypoints2d")  # depth for the mask
    assert domains_of("a") == ("rgb", "depth_zbuffer")
    assert set(domains_of("sdnkterca")) == set(DOMAINS)
