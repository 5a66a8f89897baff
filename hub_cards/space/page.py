"""The parts of the page in HTML: a model's answer for an image, or the reason why there is none."""

import base64
from html import escape

from predict import FEW_SHOT_BELOW, MANY_SHOT_ABOVE, Answer, Model, Neighbour, Prediction

_MOST_NAMES = 12  # of a set
MOST_BARS = 240  # in the drawing of the tail; with more classes, only every n-th is drawn
_GROUP_NAMES = {"many": "many-shot class", "medium": "medium-shot class", "few": "few-shot class"}
_WIDTH, _HEIGHT, _FLOOR = 640, 150, 3  # of that drawing, and of the smallest bar, in pixels


def header(model: Model) -> str:
    name = escape(model.name)
    card = f'<a href="{escape(model.card)}" target="_blank">Model card ↗</a>' if model.card else ""
    facts = [f"{len(model.labels):,} classes"]
    if model.counts:
        facts.append(f"{sum(model.counts):,} training images, {max(model.counts):,} to {min(model.counts):,} a class")
    return (
        f'<header class="lt-header"><h1>Long-tailed image recognition</h1>'
        f"<p><b>{name}</b> · {' · '.join(facts)} {card}</p></header>"
    )


def nothing_yet() -> str:
    return '<div class="lt-empty">Upload an image to see what each expert thinks of it.</div>'


def failure(title: str, message: str) -> str:
    return f'<div class="lt-failure" role="alert"><b>{escape(title)}</b><span>{escape(message)}</span></div>'


def result(model: Model, prediction: Prediction) -> str:
    """The answer. app.py makes its place a live region; of a new answer a screen reader reads the headline."""
    sections = [_headline(model, prediction), _bars(model, prediction.top), _votes(model, prediction)]
    if prediction.nearest:
        sections.append(_nearest(model, prediction.nearest))
    if model.counts:
        sections.append(_tail(model, prediction.top[0]))
    return "".join(
        f'<section class="lt-card" aria-live="{"off" if index else "polite"}">{section}</section>'
        for index, section in enumerate(sections)
    )


def _percent(probability: float) -> str:
    return f"{100 * probability:.1f} %"


def _tone(model: Model, label: int) -> str:
    return model.group(label) or "all"


def _headline(model: Model, prediction: Prediction) -> str:
    best = prediction.top[0]
    group = model.group(best.label)
    chip = f'<span class="lt-chip lt-{group}">{_GROUP_NAMES[group]}</span>' if group else ""
    return (
        f'<div class="lt-headline"><strong>{escape(best.name)}</strong>'
        f"<span>{_percent(best.probability)}</span>{chip}</div>{_judgement(model, prediction)}"
        f"{_explanation(prediction, model.is_calibrated)}"
    )


def _judgement(model: Model, prediction: Prediction) -> str:
    """That the image is of none of the classes, and the set of classes, if the model says so."""
    said = ""
    if prediction.rejected:
        said = (
            '<p class="lt-caution">None of the classes: this image looks unlike what the model has learned. The answer '
            "is only the nearest class.</p>"
        )
    if prediction.in_set is not None:
        names = ", ".join(escape(answer.name) for answer in prediction.in_set[:_MOST_NAMES])
        left = len(prediction.in_set) - _MOST_NAMES
        names += f" and {left:,} more" if left > 0 else ""
        share = f"{100 * model.confidence['coverage']:g} %"
        said += f'<p class="lt-note lt-set">In {share} of cases the true class is in such a set: <b>{names}</b>.</p>'
    return said


def _explanation(prediction: Prediction, calibrated: bool) -> str:
    """Why the ensemble's score is not the mean of what the experts say."""
    asked = [vote.probability for vote in prediction.experts if vote is not None]
    best = prediction.top[0].probability
    if len(asked) < 2:
        return ""
    above = round(best, 3) > round(sum(asked) / len(asked), 3)
    reason = " It can be above their mean, because a very sure expert counts for more." if above else ""
    meaning = (
        "It is calibrated: it was adjusted on validation images to how often such answers are right."
        if calibrated
        else "It is not calibrated: it does not say how often such answers are right."
    )
    return (
        '<p class="lt-note lt-why">This score is that of the experts together. Their logits are averaged, not their '
        f"percentages.{reason} {meaning}</p>"
    )


def _bars(model: Model, answers: list[Answer]) -> str:
    rows = "".join(
        f'<li class="lt-bar lt-{_tone(model, answer.label)}"><span class="lt-name" title="{escape(answer.name)}">'
        f"{escape(answer.name)}</span>"
        f'<span class="lt-track" aria-hidden="true"><i style="width:{100 * answer.probability:.2f}%"></i></span>'
        f'<span class="lt-value">{_percent(answer.probability)}</span></li>'
        for answer in answers
    )
    return f'<h2>Likeliest classes</h2><ul class="lt-bars">{rows}</ul>'


def _votes(model: Model, prediction: Prediction) -> str:
    best = prediction.top[0].label
    cards = "".join(_vote(model, number, vote, best) for number, vote in enumerate(prediction.experts, start=1))
    asked = [vote for vote in prediction.experts if vote is not None]
    agreeing = sum(vote.label == best for vote in asked)
    summary = f"{agreeing} of {len(asked)} agree with the answer."
    return f'<h2>Each expert’s vote</h2><p class="lt-note">{summary}</p><div class="lt-votes">{cards}</div>'


def _vote(model: Model, number: int, vote: Answer | None, best: int) -> str:
    title = f"<small>Expert {number}</small>"
    if vote is None:
        return f'<div class="lt-vote lt-idle">{title}<b>not asked</b><span>the router was sure</span></div>'
    agrees = "agrees" if vote.label == best else "disagrees"
    return (
        f'<div class="lt-vote lt-{_tone(model, vote.label)} lt-{agrees}">{title}'
        f'<b title="{escape(vote.name)}">{escape(vote.name)}</b>'
        f"<span>{_percent(vote.probability)}</span></div>"
    )


def _nearest(model: Model, images: list[Neighbour]) -> str:
    rows = "".join(
        f'<li class="lt-{_tone(model, image.label)}"><img alt="Training image of the class {escape(image.name)}" '
        f'src="data:image/jpeg;base64,{base64.b64encode(image.picture).decode()}">'
        f"<b>{escape(image.name)}</b><span>{image.similarity:.3f}</span></li>"
        for image in images
    )
    return (
        '<h2>Nearest training images</h2><p class="lt-note">Of the published ones, with their classes and the '
        "similarity of their features: 1 for equal features. Compare similarities of one model only.</p>"
        f'<ul class="lt-nearest">{rows}</ul>'
    )


def _tail(model: Model, best: Answer) -> str:
    """Draws the training images of each class, from the most common to the rarest, and marks the answer."""
    counts = model.counts
    order = sorted(range(len(counts)), key=lambda label: -counts[label])
    place = order.index(best.label)
    count, rank = counts[best.label], sum(other > counts[best.label] for other in counts) + 1
    step = -(-len(order) // MOST_BARS)
    shown = sorted({*range(0, len(order), step), place})
    pitch = _WIDTH / len(shown)
    bars = []
    for position, index in enumerate(shown):
        label = order[index]
        height = max(_FLOOR, (_HEIGHT - 10) * counts[label] / max(counts))
        own = " lt-own" if index == place else ""
        bars.append(
            f'<rect class="lt-{model.group(label)}{own}" x="{position * pitch:.2f}" y="{_HEIGHT - height:.2f}" '
            f'width="{max(pitch * 0.82, 0.8):.2f}" height="{height:.2f}" rx="{min(2.0, pitch / 4):.2f}">'
            f"<title>{escape(model.labels[label])}: {counts[label]:,} training images</title></rect>"
        )
    x = (shown.index(place) + 0.41) * pitch
    top = _HEIGHT - max(_FLOOR, (_HEIGHT - 10) * count / max(counts))
    images = f"{count:,} training image{'s' if count != 1 else ''}"
    marker = f'<line class="lt-marker" x1="{x:.2f}" x2="{x:.2f}" y1="0" y2="{top:.2f}"/>'
    label = f"Training images of each class, commonest first; {best.name} has {count:,}"
    legend = "".join(
        f'<span class="lt-key lt-{group}">{text}</span>'
        for group, text in (
            ("many", f"more than {MANY_SHOT_ABOVE} images"),
            ("medium", f"{FEW_SHOT_BELOW} to {MANY_SHOT_ABOVE}"),
            ("few", f"fewer than {FEW_SHOT_BELOW}"),
        )
    )
    caution = (
        f'<p class="lt-caution">The model learned this class from just {images}: check it.</p>'
        if model.group(best.label) == "few"
        else ""
    )
    return (
        f'<h2>How common this class was in training</h2><p class="lt-note">No. {rank:,} of {len(counts):,} classes by '
        f"training images.</p>"
        f'<p class="lt-count"><b>{escape(best.name)}</b>: {images}</p>'
        f'<svg class="lt-tail" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'preserveAspectRatio="none" aria-label="{escape(label)}">{"".join(bars)}{marker}</svg>'
        f'<div class="lt-legend">{legend}</div>{caution}'
    )
