"""What the logits of a trained network are worth: calibrated probabilities, sets of classes, and "none of the classes".

The numbers behind it are measured by `python -m ride_bf.calibrate` on images that the network was not trained on. They
are in `RideBfConfig.confidence` and change no logits. Shapes are written with B images and C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

# Scores (B,) of belonging to some known class, from logits (B, C): the largest logit (Hendrycks et al.: Scaling
# Out-of-Distribution Detection for Real-World Settings, 2022), the negative energy (Liu et al.: Energy-based
# Out-of-distribution Detection, 2020), and the largest probability (Hendrycks, Gimpel: A Baseline for Detecting
# Misclassified and Out-of-Distribution Examples, 2017).
KNOWN_SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "max_logit": lambda logits: logits.amax(dim=1),
    "energy": lambda logits: logits.logsumexp(dim=1),
    "max_probability": lambda logits: logits.softmax(dim=1).amax(dim=1),
}


@dataclass(frozen=True, kw_only=True)
class Confidence:
    """How to read logits. A value is a number for all classes, or a list (C,).

    Attributes:
        temperature: the logits of an image are divided by it before the softmax. A list has one for each predicted
            class. All logits of an image are divided by one number, so their order does not change.
        coverage: the share of images whose set of classes holds the true one; None: there are no sets.
        set_thresholds: a class is in the set of an image if its probability, without the temperature, is at least this.
        calibrated_on: "validation", or "train" for images that the network was trained on: then it is still too sure.
        reject_known: the share of known images that may be rejected as "none of the classes"; None: none are.
        known_score, known_threshold: an image is rejected if this score, a name in `KNOWN_SCORES`, is below this.

    Raises TypeError for an unknown name and ValueError for values that cannot be.
    """

    temperature: float | list[float] = 1.0
    coverage: float | None = None
    set_thresholds: float | list[float] | None = None
    calibrated_on: str = "validation"
    reject_known: float | None = None
    known_score: str | None = None
    known_threshold: float | None = None

    def __post_init__(self):
        if not all(value > 0 for value in _values(self.temperature)):
            raise ValueError(f"confidence: temperature must be positive, not {self.temperature}")
        if (self.coverage is None) != (self.set_thresholds is None):
            raise ValueError("confidence: coverage and set_thresholds belong together; give both or none")
        if self.coverage is not None and not 0 < self.coverage < 1:
            raise ValueError(f"confidence: coverage must be between 0 and 1, not {self.coverage}")
        if len({value is None for value in (self.reject_known, self.known_score, self.known_threshold)}) > 1:
            raise ValueError("confidence: reject_known, known_score and known_threshold belong together")
        if self.known_score is not None and self.known_score not in KNOWN_SCORES:
            raise ValueError(f"confidence: no known_score is called {self.known_score!r}; there are {[*KNOWN_SCORES]}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any] | None, num_labels: int) -> Confidence:
        """Makes it from `RideBfConfig.confidence`; None stands for the plain softmax.

        Raises ValueError for unknown names, for a list that does not have `num_labels` numbers, and as above.
        """
        values = dict(values or {})
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise ValueError(f"confidence has unknown entries {unknown}; it may have {known}")
        for name, value in values.items():
            if isinstance(value, list | tuple) and len(value) != num_labels:
                raise ValueError(
                    f"confidence: {name} has {len(value)} numbers, and the network {num_labels} classes; it was "
                    "calibrated for others: pass confidence=None"
                )
        return cls(**values)

    def as_dict(self) -> dict[str, Any]:
        """The entries that are not None, for `RideBfConfig.confidence`."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @property
    def has_temperature(self) -> bool:
        """Whether the probabilities differ from the plain softmax. If not, no temperature was found to be better."""
        return any(value != 1 for value in _values(self.temperature))

    def temperatures(self, logits: Tensor) -> Tensor:
        """The temperature (B, 1) of each image, from its logits (B, C)."""
        return _for_each_class(self.temperature, logits)[logits.argmax(dim=1, keepdim=True)]

    def calibrated_logits(self, logits: Tensor) -> Tensor:
        """Logits (B, C) in float32 whose softmax is calibrated, from those of the network. They have the same order."""
        logits = logits.float()
        return logits / self.temperatures(logits)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Calibrated probabilities (B, C) in float32, from logits (B, C)."""
        return self.calibrated_logits(logits).softmax(dim=1)

    def prediction_sets(self, logits: Tensor) -> Tensor:
        """Which classes are in the set of an image, bool (B, C), from logits (B, C). The likeliest always is.

        Raises ValueError if no coverage has been calibrated.
        """
        if self.set_thresholds is None:
            raise ValueError("the model has no sets of classes: run python -m ride_bf.calibrate MODEL --coverage 0.9")
        logits = logits.float()
        likely = logits.softmax(dim=1) >= _for_each_class(self.set_thresholds, logits)
        return likely | (logits >= logits.amax(dim=1, keepdim=True))

    def rejected(self, logits: Tensor) -> Tensor:
        """Which images are of none of the classes, bool (B,), from logits (B, C).

        Raises ValueError if no share of rejected images has been calibrated.
        """
        if self.known_score is None:
            raise ValueError("the model rejects no images: run python -m ride_bf.calibrate MODEL --reject_known 0.05")
        return KNOWN_SCORES[self.known_score](logits.float()) < self.known_threshold


def _values(value: float | list[float]) -> list[float]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _for_each_class(value: float | list[float], logits: Tensor) -> Tensor:
    """A number or a list as float32 (C,) on the device of logits (B, C)."""
    return logits.new_tensor(_values(value)).expand(logits.shape[1])


__all__ = ["KNOWN_SCORES", "Confidence"]
