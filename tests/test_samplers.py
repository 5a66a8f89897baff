import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, DataLoader

from data.order import in_pieces
from ride_bf.methods.samplers import LongTailedSampler, class_probabilities

COUNTS = [64, 16, 4, 1]
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(4), COUNTS))


def sampler(strategy="class_balanced", num_samples=8500, **options):
    return LongTailedSampler(LABELS, 4, strategy, num_samples, **options)


@pytest.mark.parametrize(
    ("strategy", "progress", "expected"),
    [
        ("instance", 0, [64 / 85, 16 / 85, 4 / 85, 1 / 85]),
        ("square_root", 0, [8 / 15, 4 / 15, 2 / 15, 1 / 15]),
        ("class_balanced", 0, [0.25] * 4),
        ("progressively_balanced", 0, [64 / 85, 16 / 85, 4 / 85, 1 / 85]),
        ("progressively_balanced", 1, [0.25] * 4),
        ("progressively_balanced", 0.5, [(64 / 85 + 0.25) / 2, (16 / 85 + 0.25) / 2, (4 / 85 + 0.25) / 2, 0.1308824]),
    ],
)
def test_class_frequencies(strategy, progress, expected):
    assert class_probabilities(COUNTS, strategy, progress) == pytest.approx(expected)
    drawing = sampler(strategy, num_epochs=101)
    drawing.set_epoch(round(100 * progress))
    drawn = LABELS[list(drawing)]
    assert len(drawn) == len(drawing) == 8500
    frequencies = np.bincount(drawn, minlength=4) / 8500
    deviation = np.sqrt(np.asarray(expected) * (1 - np.asarray(expected)) / 8500)
    assert (np.abs(frequencies - expected) < 4 * deviation).all()


def test_a_class_is_gone_through_before_an_image_comes_again():
    drawn = np.array(list(sampler(num_samples=200)))
    for label, count in enumerate(COUNTS):
        own = drawn[LABELS[drawn] == label]
        for start in range(0, len(own) - count + 1, count):
            assert len(set(own[start : start + count])) == count
    assert len({tuple(drawn[LABELS[drawn] == 2][i : i + 4]) for i in range(0, 40, 4)}) > 1, "each round is shuffled"


def test_order_depends_on_seed_and_epoch_alone():
    first, again, other_seed, other_epoch = sampler(), sampler(), sampler(seed=1), sampler()
    other_epoch.set_epoch(1)
    assert list(first) == list(first) == list(again)
    assert list(first) != list(other_seed)
    assert list(first) != list(other_epoch)
    resumed = sampler()
    resumed.set_epoch(1)
    assert list(resumed) == list(other_epoch)


def test_the_order_of_earlier_versions_is_kept():
    """Class by class: the class's places in the epoch get its shuffled rounds, one after the other."""
    rng = np.random.default_rng((5, 2))
    classes = rng.choice(4, size=300, p=class_probabilities(COUNTS, "square_root"))
    expected = np.empty(300, dtype=np.int64)
    for label in range(4):
        own, members = classes == label, np.flatnonzero(label == LABELS)
        rounds = [rng.permutation(members) for _ in range(-(-own.sum() // len(members)))]
        expected[own] = np.concatenate(rounds)[: own.sum()]
    drawing = sampler("square_root", num_samples=300, seed=5)
    drawing.set_epoch(2)
    assert list(drawing) == expected.tolist()


def test_an_order_is_given_in_pieces_of_python_numbers():
    order = np.random.default_rng(0).permutation(150_000)
    given = list(in_pieces(order))
    assert given == order.tolist()
    assert type(given[0]) is int


@pytest.mark.parametrize("strategy", ["square_root", "class_balanced", "progressively_balanced"])
def test_processes_share_an_epoch_without_overlap(strategy):
    whole = list(sampler(strategy, num_samples=96))
    shares = [
        [
            index
            for batch in BatchSamplerShard(BatchSampler(sampler(strategy, 96), 8, False), 3, rank)
            for index in batch
        ]
        for rank in range(3)
    ]
    batches = [[share[start : start + 8] for start in range(0, 32, 8)] for share in shares]
    put_together = [index for step in zip(*batches, strict=True) for batch in step for index in batch]
    assert put_together == whole


def test_the_prepared_loader_passes_the_epoch_on():
    from accelerate import Accelerator

    drawing = sampler(num_samples=10)
    loader = Accelerator(cpu=True).prepare(DataLoader(torch.arange(85), batch_size=10, sampler=drawing))
    loader.set_epoch(3)
    expected = sampler(num_samples=10)
    expected.set_epoch(3)
    assert next(iter(loader)).tolist() == list(expected)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"classes without images cannot be drawn: \[1\]"):
        LongTailedSampler(np.array([0, 2]), 3, "class_balanced", 10)
    with pytest.raises(ValueError, match="'balanced'"):
        sampler("balanced")
