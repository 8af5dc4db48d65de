"""One sentence for each stage: better than the stage before, worse, or not to be told apart, and by how much."""

from __future__ import annotations

from pathlib import Path

from pipeline.disk.artifact import WEIGHTS, Artifact
from pipeline.errors import UserError
from pipeline.evaluate.preferred import of_preference
from pipeline.evaluate.stored import Link, Results, RewardModel, Verdict, read_results
from pipeline.evaluate.wording import BETTER, UNCLEAR, WARNING, WORSE, capital, compare, nothing_held_out, too_few
from pipeline.language.say import say, say_again
from pipeline.measure.metric import QUESTION_ACCURACY, SHARE, Estimate, Metric, perplexity
from pipeline.stages import STAGES
from pipeline.stages.stage import Stage


def find(results: Results) -> dict[str, Verdict]:
    """Of every stage, in the language that is spoken."""
    found = {}
    for stage in results.chain:
        name, kind = stage.name, STAGES[stage.kind]
        if kind.ranks:
            found[name] = _reward(results.reward_models.get(name))
        elif kind.raises:
            found[name] = of_preference(results, name)
        elif kind.learnt == "answers" and QUESTION_ACCURACY.name in results.changes[name]:
            found[name] = _questions(results, name)
        elif kind.held_out_loss:
            found[name] = _loss(results, name, kind.held_out_loss)
        else:
            found[name] = _of_its_headline(stage, kind)
    return found


def read(run: Path) -> dict[tuple[str, str], Verdict]:
    """Of the last evaluation, by stage and sha256 of its adapter, where that adapter and the one it is compared with
    still lie in the run's folder."""
    try:
        results = read_results(run / "evaluation")
        chain = {stage.name: stage for stage in results.chain} if results else {}
        there = {name: Artifact(run / name).manifest() for name in chain}
    except UserError:
        return {}
    found = find(results) if results else {}
    same = {name for name, known in there.items() if known and known.files.get(WEIGHTS) == chain[name].adapter}
    return {
        (name, chain[name].adapter): found[name]
        for name in same
        if chain[name].parent not in chain or chain[name].parent in same
    }


def _loss(results: Results, name: str, metric: Metric) -> Verdict:
    parent, change = results.parents[name], results.changes[name].get(metric.name)
    if change is None:
        return nothing_held_out()
    before, after = (results.numbers[policy][metric.name].value for policy in (parent, name))
    values = {
        "n": change.n,
        "label": metric.heading,
        "before": metric.number(before),
        "after": metric.number(after),
        "change": metric.change(change),
        "was": f"{perplexity(before):.1f}",
        "now": f"{perplexity(after):.1f}",
    }
    if too_few(change):
        text = say(
            "On {n} held-out rows: too few to rely on. {label}: {before} to {after} ({change}), perplexity {was} to "
            "{now}.",
            **values | {"label": capital(metric.heading)},
        )
        return Verdict(word=UNCLEAR, text=text)
    word = metric.word(change) or UNCLEAR
    text = say(
        "{compared} on {n} held-out rows, {label}: {before} to {after} ({change}), perplexity {was} to {now}.",
        compared=compare(word, parent),
        **values,
    )
    return Verdict(word=word, text=text)


def _questions(results: Results, name: str) -> Verdict:
    asked, parent = QUESTION_ACCURACY, results.parents[name]
    change = results.changes[name][asked.name]
    before, after = (results.numbers[policy][asked.name] for policy in (parent, name))
    values = {
        "before": asked.written(before.value),
        "after": asked.written(after.value),
        "n": after.n,
        "change": asked.change(change),
    }
    if too_few(after):
        text = say("On {n} questions: too few to rely on. {before} to {after} answered right ({change}).", **values)
        return Verdict(word=UNCLEAR, text=text)
    word = asked.word(change) or UNCLEAR
    text = say(
        "{compared}: {before} to {after} of {n} questions answered right ({change}).",
        compared=compare(word, parent),
        **values,
    )
    return Verdict(word=word, text=text)


def _of_its_headline(stage: Link, kind: Stage) -> Verdict:
    """By the first of the numbers that the stage takes of itself, before and after."""
    before, after = stage.before, stage.after
    metric = next((metric for metric in kind.headlines if metric.name in before and metric.name in after), None)
    if metric is None:
        return _of_its_rivals(stage, kind)
    told = say(
        "{label} {before} to {after}",
        label=metric.said,
        before=metric.written(before[metric.name]),
        after=metric.written(after[metric.name]),
    )
    gain = Estimate.among(after, f"{metric.name}_gain")
    if gain is None or gain.low is None:
        return Verdict(word=UNCLEAR, text=say("{told}; how far chance reaches is not known.", told=capital(told)))
    word = metric.word(gain) or UNCLEAR
    compared = {BETTER: say("Better than before"), WORSE: say("Worse than before")}.get(word)
    compared = compared or say("Not to be told from before")
    text = say("{compared}: {told} ({change}).", compared=compared, told=told, change=metric.change(gain))
    return Verdict(word=word, text=text)


def _of_its_rivals(stage: Link, kind: Stage) -> Verdict:
    """By how far it is over a simpler rule, where there is nothing before it to compare with."""
    measured = [metric for metric in kind.headlines if metric.name in stage.after]
    if not measured:
        return nothing_held_out()
    first = measured[0]
    told = f"{capital(first.said)} {first.written(stage.after[first.name])}"
    over = next((metric for metric in measured if metric.name.startswith("over_")), None)
    gain = Estimate.among(stage.after, over.name) if over else None
    if over is None or gain is None:
        return Verdict(word=UNCLEAR, text=say("{told}; there is nothing to compare it with.", told=told))
    text = say("{told}; {label} {change}.", told=told, label=over.said, change=over.change(gain))
    return Verdict(word=over.word(gain) or UNCLEAR, text=text)


def _reward(found: RewardModel | None) -> Verdict:
    if found is None:
        return nothing_held_out()
    text = say(
        "Ranks {share} of {n} held-out pairs right; choosing the longer answer gets {longer}, a bag of words {words}. "
        "Calibration error {error}.",
        share=SHARE.shown(found.accuracy),
        n=found.accuracy.n,
        longer=SHARE.written(found.longer_wins.value),
        words=SHARE.written(found.bag_of_words.value),
        error=f"{found.ece:.2f}",
    )
    text = say(" ").join(filter(None, [text, _of_the_heads(found)]))
    if too_few(found.accuracy):
        told = say("On {n} held-out pairs: too few to rely on. {text}", n=found.accuracy.n, text=text)
        return Verdict(word=UNCLEAR, text=told)
    if found.flags:
        flags = say(" and ").join(say_again(flag) for flag in found.flags)
        return Verdict(word=WARNING, text=say("{text} It {flags}.", text=text, flags=flags))
    if found.over_words.above:
        return Verdict(word=BETTER, text=say("Better than both simple rules. {text}", text=text))
    more = say("A bag of words is not clearly worse, so it may have learnt little but vocabulary.")
    return Verdict(word=BETTER, text=say("Better than choosing the longer answer. {text} {more}", text=text, more=more))


def _of_the_heads(found: RewardModel) -> str:
    """By how much the heads differ, and whether that tells errors; "" where there is one."""
    own, other, over = (
        found.disagreement.get(name) for name in ("deviation", "deviation_swapped", "agreed_over_disputed")
    )
    if own is None:
        return ""
    told = [say("Its heads differ by {value} on held-out answers.", value=f"{own.value:.2f}")]
    if other is not None:
        value = f"{other.value:.2f}"
        told.append(say("On answers that were given to another prompt they differ by {value}.", value=value))
    if over is not None:
        points, range_ = SHARE.number(over.value), SHARE.range(over, sign=True)
        told.append(
            say(
                "The half of the pairs on which they agree most is ranked right {points} points more often than the "
                "other half, 95 %: {range}.",
                points=points,
                range=range_,
            )
        )
    return say(" ").join(told)
