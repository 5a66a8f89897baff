"""The parts of the page in HTML: a model's answer for an image, or the reason why there is none."""

from html import escape

from predict import FEW_SHOT_BELOW, MANY_SHOT_ABOVE, Answer, Model, Prediction

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


def failure(message: str) -> str:
    return f'<div class="lt-failure" role="alert"><b>No answer for this file</b><span>{escape(message)}</span></div>'


def result(model: Model, prediction: Prediction) -> str:
    sections = [_headline(model, prediction.top[0]), _bars(model, prediction.top), _votes(model, prediction)]
    if model.counts:
        sections.append(_tail(model, prediction.top[0]))
    return "".join(f'<section class="lt-card">{section}</section>' for section in sections)


def _percent(probability: float) -> str:
    return f"{100 * probability:.1f} %"


def _tone(model: Model, label: int) -> str:
    return model.group(label) or "all"


def _headline(model: Model, best: Answer) -> str:
    group = model.group(best.label)
    chip = f'<span class="lt-chip lt-{group}">{_GROUP_NAMES[group]}</span>' if group else ""
    return (
        f'<div class="lt-headline"><strong>{escape(best.name)}</strong>'
        f"<span>{_percent(best.probability)}</span>{chip}</div>"
    )


def _bars(model: Model, answers: list[Answer]) -> str:
    rows = "".join(
        f'<li class="lt-bar lt-{_tone(model, answer.label)}"><span class="lt-name">{escape(answer.name)}</span>'
        f'<span class="lt-track"><i style="width:{100 * answer.probability:.2f}%"></i></span>'
        f'<span class="lt-value">{_percent(answer.probability)}</span></li>'
        for answer in answers
    )
    return f'<h2>Likeliest classes</h2><ul class="lt-bars">{rows}</ul>'


def _votes(model: Model, prediction: Prediction) -> str:
    best = prediction.top[0].label
    cards = "".join(_vote(model, number, vote, best) for number, vote in enumerate(prediction.experts, start=1))
    asked = [vote for vote in prediction.experts if vote is not None]
    agreeing = sum(vote.label == best for vote in asked)
    summary = f"The answer comes from the mean of their logits; {agreeing} of {len(asked)} agree with it."
    return f'<h2>Each expert’s vote</h2><p class="lt-note">{summary}</p><div class="lt-votes">{cards}</div>'


def _vote(model: Model, number: int, vote: Answer | None, best: int) -> str:
    title = f"<small>Expert {number}</small>"
    if vote is None:
        return f'<div class="lt-vote lt-idle">{title}<b>not asked</b><span>the router was sure</span></div>'
    agrees = "agrees" if vote.label == best else "disagrees"
    return (
        f'<div class="lt-vote lt-{_tone(model, vote.label)} lt-{agrees}">{title}<b>{escape(vote.name)}</b>'
        f"<span>{_percent(vote.probability)}</span></div>"
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
        height = max(_FLOOR, (_HEIGHT - 26) * counts[label] / max(counts))
        own = " lt-own" if index == place else ""
        bars.append(
            f'<rect class="lt-{model.group(label)}{own}" x="{position * pitch:.2f}" y="{_HEIGHT - height:.2f}" '
            f'width="{max(pitch * 0.82, 0.8):.2f}" height="{height:.2f}" rx="{min(2.0, pitch / 4):.2f}">'
            f"<title>{escape(model.labels[label])}: {counts[label]:,} training images</title></rect>"
        )
    x = (shown.index(place) + 0.41) * pitch
    anchor = "start" if x < _WIDTH * 0.2 else "end" if x > _WIDTH * 0.8 else "middle"
    top = _HEIGHT - max(_FLOOR, (_HEIGHT - 26) * count / max(counts))
    images = f"{count:,} training image{'s' if count != 1 else ''}"
    marker = (
        f'<line class="lt-marker" x1="{x:.2f}" x2="{x:.2f}" y1="16" y2="{top:.2f}"/>'
        f'<text x="{x:.2f}" y="11" text-anchor="{anchor}">{escape(best.name)}: {images}</text>'
    )
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
        f'<svg class="lt-tail" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="Training images of each class, commonest first">{"".join(bars)}{marker}</svg>'
        f'<div class="lt-legend">{legend}</div>{caution}'
    )
