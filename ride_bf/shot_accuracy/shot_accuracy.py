"""Accuracy on the many-, medium- and few-shot classes, as a metric of the `evaluate` library."""

import datasets
import evaluate

from ride_bf.evaluation.metrics import shot_accuracy

_DESCRIPTION = """
Accuracy of a classifier trained on a long-tailed data set: over all images, as the mean over the classes, and by group
of classes. Many-shot classes have more than 100 training images, medium-shot classes 20 to 100, few-shot classes fewer
than 20. The accuracy of a group is the mean over its classes.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list` of `int`): predicted classes.
    references (`list` of `int`): true classes.
    class_counts (`list` of `int`): training images of each class, in the order of the classes.

Returns:
    `dict` of fractions: `accuracy`, `balanced_accuracy`, `many_shot_accuracy`, `medium_shot_accuracy`,
    `few_shot_accuracy` (a group without test images is left out) and `per_class_accuracy`, a list in which a class
    without test images is None.

Examples:
    >>> metric = evaluate.load("ride_bf/shot_accuracy")
    >>> results = metric.compute(predictions=[0, 0, 1, 1], references=[0, 0, 1, 2], class_counts=[500, 50, 5])
    >>> results["accuracy"]
    0.75
    >>> results["few_shot_accuracy"]
    0.0
    >>> results["per_class_accuracy"]
    [1.0, 1.0, 0.0]
"""

_CITATION = """
@inproceedings{liu2019large,
  title     = {Large-Scale Long-Tailed Recognition in an Open World},
  author    = {Liu, Ziwei and Miao, Zhongqi and Zhan, Xiaohang and Wang, Jiayun and Gong, Boqing and Yu, Stella X.},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year      = {2019}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class ShotAccuracy(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions, references, class_counts):
        return shot_accuracy(predictions, references, class_counts)
