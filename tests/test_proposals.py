"""Proposals of check_data: which classes and images look wrong though they can be read, and which do not."""

import numpy as np
import pytest

from ride_bf.evaluation.proposals import far_sizes, leaks, rare_formats, similar_names


@pytest.mark.parametrize(
    "names",
    [
        ["cat", "cats"],
        ["cat", "Cat"],
        ["cat", "CAT "],
        ["cat", "cat_"],
        ["fire_truck", "Fire Truck"],
        ["fire_truck", "firetruck"],
        ["fire-trucks", "FireTruck"],
        ["sports car", "sports_cars"],
        ["café", "cafe"],
        ["cafe\u0301", "caf\u00e9"],
        ["bus", "buses"],
        ["box", "Boxes"],
        ["berry", "berries"],
        ["horse", "horses"],
        ["potato", "potatoes"],
        ["glass", "glasses"],
        ["wolf", "wolves"],
        ["St. Bernard", "st_bernard"],
        ["ein/zwei", "ein_zwei"],
    ],
    ids=" = ".join,
)
def test_names_of_one_class(names):
    assert similar_names([names[0], "something else", names[1]]) == [names]
    assert similar_names(["something else", *reversed(names)]) == [names[::-1]]


@pytest.mark.parametrize(
    "names",
    [
        ["class1", "class2"],
        ["class_1_1", "class_11"],
        ["1.5", "15"],
        ["1-5", "1.5"],
        ["-1", "1"],
        ["car", "cat"],
        ["car", "care", "cars 2"],
        ["a", "A"],  # letters, as in EMNIST
        ["é", "e"],
        ["c", "c++", "c#"],
        ["bus", "bu"],
        ["glass", "glas"],
        ["gas", "ga"],
        ["iris", "iri"],
        ["class", "clas"],
        ["temperature -1", "temperature 1"],
        ["sun", "sunday"],
        ["мой", "мои"],  # in Cyrillic and Japanese script, a mark makes another letter
        ["かき", "がき"],
        ["crane (n02012849)", "crane (n03126707)"],
        ["Larus argentatus", "Larus argentata"],
    ],
    ids=" != ".join,
)
def test_names_of_different_classes(names):
    assert similar_names(names) == []


def test_several_names_are_one_group_and_many_are_fast():
    names = [f"species {number}" for number in range(8_000)]
    assert similar_names([*names, "Cats", "dog", "cat", "CAT"]) == [["Cats", "cat", "CAT"]]


class TestSizes:
    photographs = np.tile([[500, 375], [375, 500], [640, 480], [333, 500]], (25, 1))

    def found(self, *sizes):
        return far_sizes(np.concatenate([self.photographs, np.array(sizes).reshape(-1, 2)]))

    def test_usual_ones_are_not_far(self):
        assert self.found() == []
        assert self.found([1000, 750], [200, 150], [500, 200], [0, 0]) == []
        assert far_sizes(np.zeros((3, 2), dtype=int)) == []
        assert far_sizes(np.zeros((0, 2), dtype=int)) == []

    def test_far_ones_are_named_with_the_reason(self):
        found = self.found([40, 30], [8000, 6000], [2000, 60])
        assert found == [
            (100, "40 x 30 pixels, 1/156 of the median number of pixels"),
            (101, "8000 x 6000 pixels, 256 times the median number of pixels"),
            (102, "2000 x 60 pixels, an unusual shape"),
        ]

    def test_sizes_that_vary_widely_are_not_far(self):
        sides = np.exp(np.random.default_rng(0).normal(6, 1, 500)).round().astype(int)
        assert far_sizes(np.stack([sides, sides], axis=1)) == []


class TestFormats:
    def test_a_rare_one(self):
        formats = np.array(["JPEG"] * 150 + ["GIF"] + [""] * 40, dtype=object)
        assert rare_formats(formats) == [(150, "GIF; nearly all images are JPEG")]

    def test_several_common_ones_or_none(self):
        assert rare_formats(np.array(["JPEG"] * 100 + ["PNG"] * 80 + ["GIF"], dtype=object)) == []
        assert rare_formats(np.array(["", ""], dtype=object)) == []


class TestLeaks:
    names = ("lion", "tiger", "lynx", "puma")

    def found(self, counts, formats, sizes=None):
        labels = np.repeat(np.arange(len(counts)), counts)
        if sizes is None:  # all different
            sizes = np.stack([np.arange(len(labels)) + 100, np.full(len(labels), 90)], axis=1)
        return leaks(labels, np.asarray(formats, dtype=object), sizes, self.names)

    def test_the_class_with_its_own_format(self):
        (leak,) = self.found([10, 400, 6, 8], ["PNG"] * 9 + ["JPEG"] * (1 + 400 + 6 + 8))
        assert leak == {
            "class": "lion",
            "kind": "format",
            "value": "PNG",
            "images": 9,
            "of": 10,
            "share_in_other_classes": 0.0,
        }

    def test_a_large_class_does_not_make_the_small_ones_suspect(self):
        found = self.found([5000, 9, 6, 8], ["PNG"] * 5000 + ["JPEG"] * 23)
        assert [(leak["class"], leak["value"]) for leak in found] == [("lion", "PNG")]

    def test_a_size(self):
        sizes = np.stack([np.arange(40) + 100, np.full(40, 90)], axis=1)
        sizes[10:20] = 64, 48
        found = self.found([10, 10, 10, 10], ["JPEG"] * 40, sizes)
        assert [(leak["class"], leak["kind"], leak["value"]) for leak in found] == [("tiger", "size", "64 x 48 pixels")]

    def test_no_false_alarms(self):
        assert self.found([10, 10, 10, 10], ["JPEG"] * 40, np.tile([[32, 32]], (40, 1))) == []
        assert self.found([10, 4, 10, 10], ["JPEG"] * 10 + ["PNG"] * 4 + ["JPEG"] * 20) == [], "four by chance"
        assert self.found([10, 10, 10, 10], (["JPEG"] * 2 + ["PNG"] * 3) * 8) == []
        assert self.found([0, 0, 0, 0], []) == []
