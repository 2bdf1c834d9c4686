"""Metrics: values computed by hand, and small implementations that share no code with the libraries."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import pytest
import torch

from mplug2_fast.datasets import Item
from mplug2_fast.errors import ConfigError, DataError
from mplug2_fast.evaluation import METRICS, score, score_all, tokenize
from mplug2_fast.evaluation.metrics import tokenizer
from mplug2_fast.evaluation.metrics.answers import normalise_vqa
from mplug2_fast.evaluation.recall import ranks_of
from mplug2_fast.tasks import Alternative, Captioning

CAPTIONS = [
    ("a dog is running on the grass", ("a dog runs across the grass", "a brown dog is running", "the dog runs")),
    ("two men talk", ("two men are talking on a bench", "men talk on a bench")),
    ("a red car", ("a red car drives down a road", "a red car drives down a road", "a car")),
    ("", ("a cat sleeps", "a cat is sleeping")),
    ("a cat is sleeping", ("a cat sleeps", "a cat is sleeping")),
]


def items_of(captions: Sequence[Sequence[str]]) -> list[Item]:
    return [Item(str(number), video="a.mp4", caption=tuple(each)) for number, each in enumerate(captions)]


@pytest.fixture(scope="module")
def captioned() -> tuple[list[str], list[Item], dict[str, float]]:
    pytest.importorskip("pycocoevalcap", reason="the metrics of captions need the extra evaluate")
    found, right = zip(*CAPTIONS, strict=True)
    items = items_of(right)
    return list(found), items, score("captioning", found, items)


def ngrams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def naive_cider(found: list[list[str]], right: list[list[list[str]]]) -> list[float]:
    """CIDEr-D: sigma 6, n-grams of 1 to 4 words, clipped counts."""
    documents = Counter(
        gram for texts in right for gram in {g for t in texts for n in range(1, 5) for g in ngrams(t, n)}
    )

    def weights(words: list[str], n: int) -> dict[tuple[str, ...], float]:
        return {g: c * (math.log(len(right)) - math.log(max(1, documents[g]))) for g, c in ngrams(words, n).items()}

    def similarity(one: list[str], other: list[str], n: int) -> float:
        a, b = weights(one, n), weights(other, n)
        norm = math.hypot(*a.values()) * math.hypot(*b.values())
        # The scorer counts a text's length in pairs of words.
        gap = max(len(one) - 1, 0) - max(len(other) - 1, 0)
        dot = sum(min(value, b.get(gram, 0.0)) * b.get(gram, 0.0) for gram, value in a.items())
        return dot / norm * math.exp(-(gap**2) / 72) if norm else 0.0

    return [
        1000 * sum(similarity(one, other, n) for other in texts for n in range(1, 5)) / 4 / len(texts)
        for one, texts in zip(found, right, strict=True)
    ]


def naive_bleu(found: list[list[str]], right: list[list[list[str]]], longest: int) -> float:
    length = sum(map(len, found))
    reference = sum(
        min((abs(len(t) - len(one)), len(t)) for t in texts)[1] for one, texts in zip(found, right, strict=True)
    )
    logs = 0.0
    for n in range(1, longest + 1):
        hits = sum(
            min(count, max(ngrams(t, n)[gram] for t in texts))
            for one, texts in zip(found, right, strict=True)
            for gram, count in ngrams(one, n).items()
        )
        logs += math.log(hits / sum(ngrams(one, n).total() for one in found))
    return 100 * math.exp(logs / longest + min(0, 1 - reference / length))


def naive_rouge(one: list[str], texts: list[list[str]]) -> float:
    def common(a: list[str], b: list[str]) -> int:
        if not a or not b:
            return 0
        if a[-1] == b[-1]:
            return common(a[:-1], b[:-1]) + 1
        return max(common(a[:-1], b), common(a, b[:-1]))

    if not one:
        return 0.0
    precision = max(common(one, t) / len(one) for t in texts)
    recall = max(common(one, t) / len(t) for t in texts)
    return 100 * 2.44 * precision * recall / (recall + 1.44 * precision) if precision else 0.0


def test_captions_against_independent_implementations(captioned):
    found, items, values = captioned
    words, right = [text.split() for text in found], [[text.split() for text in item.caption] for item in items]
    scored = score_all("captioning", found, items, metrics=["cider", "bleu", "rouge_l"])
    assert scored.values == {name: values[name] for name in scored.values}
    assert scored.items["cider"] == pytest.approx(naive_cider(words, right))
    assert values["cider"] == pytest.approx(sum(naive_cider(words, right)) / len(items))
    for n in range(1, 5):
        assert values[f"bleu_{n}"] == pytest.approx(naive_bleu(words, right, n)), n
    assert scored.items["rouge_l"] == pytest.approx([naive_rouge(*pair) for pair in zip(words, right, strict=True)])
    assert scored.libraries["cider"].startswith("pycocoevalcap 1.")


def test_captions_by_hand(captioned):
    _, _, values = captioned
    assert values["exact_match"] == 20.0  # the last of five
    perfect = score("captioning", ["a cat sleeps", "two men talk"], items_of([["A cat sleeps."], ["two men talk!"]]))
    assert perfect["bleu_3"] == pytest.approx(100)
    assert perfect["rouge_l"] == pytest.approx(100)
    assert perfect["cider"] == pytest.approx(750)  # there is no n-gram of 4 words


def test_a_caption_that_is_given_twice_counts_twice(captioned):
    once = score("captioning", ["a b", "c d"], items_of([["a b", "x y"], ["c"]]), metrics=["cider"])["cider"]
    twice = score("captioning", ["a b", "c d"], items_of([["a b", "a b", "x y"], ["c"]]), metrics=["cider"])["cider"]
    assert twice > once


@pytest.mark.soak  # Java reads its table of paraphrases for 15 seconds
@pytest.mark.skipif(not tokenizer.has_java(), reason="there is no Java")
def test_meteor():
    pytest.importorskip("pycocoevalcap")
    scored = score_all("captioning", ["a dog runs", "xyz"], items_of([["a dog runs"], ["a cat"]]), metrics=["meteor"])
    assert scored.items["meteor"] == [100.0, 0.0]


SENTENCES = {
    "A man's dog can't jump; it's (really) big!": "a man 's dog ca n't jump it 's -lrb- really -rrb- big",
    "two T-shirts, 1,000 people at 10:30 & 3.5 o'clock...": "two t-shirts 1,000 people at 10:30 & 3.5 o'clock",
    "Mr. Smith from the U.S. cannot play rock 'n' roll.": "mr. smith from the u.s. can not play rock 'n' roll",
    "“cars”, trucks etc. — here…": "cars trucks etc. here",
    "he's gonna eat 1/2 of it?! 😀": "he 's gon na eat 1/2 of it ?!",
    "the dogs' house\n on #1 street": "the dogs house on # 1 street",
    "": "",
}


def test_words_of_captions():
    assert dict(zip(SENTENCES, tokenize(list(SENTENCES)), strict=True)) == SENTENCES
    with pytest.raises(ConfigError, match=r"^no tokenizer 'spacy': choose one of python, java$"):
        tokenize(["a"], "spacy")


@pytest.mark.skipif(
    not tokenizer.has_java() or tokenizer.jar() is None, reason="there is no Java, or no tokenizer for it"
)
def test_words_of_captions_against_java():
    assert dict(zip(SENTENCES, tokenize(list(SENTENCES), "java"), strict=True)) == SENTENCES


def asked(*answers: dict[str, float]) -> list[Item]:
    return [Item(str(i), video="a.mp4", question="?", answers=each) for i, each in enumerate(answers)]


@pytest.mark.parametrize(("agreeing", "value"), [(0, 0.0), (1, 30.0), (2, 60.0), (3, 90.0), (4, 100.0), (9, 100.0)])
def test_the_official_accuracy_of_vqa(agreeing, value):
    """The official examples: 1 of 10 annotators gives 0.3, 2 give 0.6, 3 give 0.9, 4 give 1."""
    weights = {"Two.": agreeing / 10, "the other": (10 - agreeing) / 10}
    names = [str(i) for i in range(10)]
    annotators = ["2" if i < agreeing else "other" for i in range(10)]
    nine = [[annotators[j] for j in range(10) if names[j] != name].count("2") for name in names]
    assert score("question_answering", ["2"], asked(weights))["vqa_accuracy"] == pytest.approx(value)
    assert value == pytest.approx(100 * sum(min(1, count / 3) for count in nine) / 10)


def test_answers_that_all_annotators_gave_are_compared_as_they_are():
    values = score(
        "question_answering", ["The dog", "dog"], asked({"The dog": 1.0}, {"The dog": 1.0}), metrics=["vqa_accuracy"]
    )
    assert values == {"vqa_accuracy": 50.0}


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("Yes, it is!", "yes it is"),
        ("black/white", "black white"),
        ("1,000 feet-high", "1000 feethigh"),
        ("3.50 a.m.", "3.50 am"),
        ("The two dogs and an apple", "2 dogs and apple"),
        ("none", "0"),
        ("dont know what's whos", "don't know what's who's"),
        ("couldnt've couldn'tve", "couldn't've couldn't've"),
        ("$5; (cash)", "$5 cash"),
        ("a\nb: c", "b: c"),
    ],
)
def test_answers_are_normalised_as_the_official_code_does_it(answer, normal):
    assert normalise_vqa(answer) == normal


def test_accuracy_of_answers():
    items = asked({"red": 1.0}, {"moves left": 0.7, "left": 0.3}, {"a": 0.5, "b": 0.5})
    values = score("question_answering", ["Red", "left", "b"], items)
    assert values["accuracy"] == pytest.approx(200 / 3)
    assert "accuracy@5" not in values
    several = [[Alternative(text, 0.0) for text in texts] for texts in (["x", "red"], ["y", "moves  left"], ["z"])]
    values = score("question_answering", several, items)
    assert (values["accuracy"], values["accuracy@5"]) == (0.0, pytest.approx(200 / 3))
    scored = score_all("question_answering", [None], asked({"red": 1.0}))
    assert (scored.values, scored.left_out) == (
        {"accuracy": 0.0},
        {"vqa_accuracy": "no item has answers of several annotators"},
    )


class Ranked(Captioning):
    """Any task whose captions are what is right."""

    name = "ranked"


def test_labels():
    pytest.importorskip("torchmetrics")
    right, found = list("11100000"), list("11010000")
    items = items_of([[label] for label in right])
    values = score(Ranked(), found, items, metrics=["f1", "matthews"])
    assert values["f1"] == pytest.approx(100 * 2 * 2 / (2 * 2 + 1 + 1))
    assert values["matthews"] == pytest.approx(100 * (2 * 4 - 1 * 1) / math.sqrt(3 * 3 * 5 * 5))
    items = items_of([["a"], ["b"], ["c"], ["c"]])
    values = score(Ranked(), ["a", "a", "c", None], items, metrics=["f1"])
    # a: 2/3, b: 0, c: 2/3; "" is a wrong class of its own
    assert values["f1"] == pytest.approx(100 * (2 / 3 + 0 + 2 / 3 + 0) / 4)


def test_numbers():
    pytest.importorskip("torchmetrics")
    items = [Item(str(i), text="a", label=label) for i, label in enumerate([1.0, 2.0, 3.0, 5.0, 9.0])]
    values = score(Ranked(), ["1", 3.0, "2", "8.5", None], items, metrics=["pearson", "spearman"])
    x, y = [1, 3, 2, 8.5], [1, 2, 3, 5]
    mx, my = sum(x) / 4, sum(y) / 4
    covariance = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    norm = math.sqrt(sum((a - mx) ** 2 for a in x) * sum((b - my) ** 2 for b in y))
    assert values["pearson"] == pytest.approx(100 * covariance / norm)
    assert values["spearman"] == pytest.approx(100 * (1 - 6 * 2 / (4 * 15)))
    with pytest.raises(DataError, match=r"^a prediction must be 1 number, got 'high'$"):
        score(Ranked(), ["high"], items[:1], metrics=["pearson"])


def test_retrieval():
    pytest.importorskip("torchmetrics")
    gallery = [str(i) for i in range(12)]
    rankings = [gallery, gallery, gallery, ["5"], []]
    items = items_of([["0", "1"], ["2"], ["11", "7"], ["6"], ["1"]])
    scored = score_all(Ranked(), rankings, items, metrics=["retrieval"])
    assert scored.items["rank"] == [1, 3, 8, math.inf, math.inf]
    assert scored.values == pytest.approx(
        {"recall@1": 20, "recall@5": 40, "recall@10": 60, "mrr": 20 * (1 + 1 / 3 + 1 / 8), "median_rank": 8}
    )


def test_ranks_of_equal_scores():
    """In the order of the results; pairs that were not compared rank last and are never found by chance."""
    right = torch.eye(3).bool()
    assert ranks_of(torch.full((3, 3), 0.5), right) == [1, 2, 3]
    assert ranks_of(torch.tensor([[1.0, -100, -100], [2.0, -100, -100], [-100, 1.0, -100]]), right) == [1, 3, 3]


def test_boxes():
    one, other = (0.5, 0.5, 0.4, 0.4), (0.6, 0.5, 0.4, 0.4)  # shared 0.3 · 0.4, union 0.2, hull 0.5 · 0.4
    items = [Item(str(i), image="a.png", box=one) for i in range(4)]
    scored = score_all(Ranked(), [one, other, "0.1 0.1, 0.2 0.2", None], items, metrics=["boxes"])
    assert scored.items["iou"] == pytest.approx([100, 60, 0, 0], abs=1e-4)
    far = 0.16 + 0.04, 0.7 * 0.7
    assert scored.items["giou"] == pytest.approx([100, 60, 100 * (far[0] / far[1] - 1), -100], abs=1e-4)
    assert scored.values["accuracy@0.5"] == 50.0


def test_boxes_against_counted_pixels():
    """Overlaps of boxes on a grid, counted cell by cell."""
    generator = torch.Generator().manual_seed(0)
    low = torch.randint(0, 10, (20, 2, 2), generator=generator)
    high = low + torch.randint(1, 10, (20, 2, 2), generator=generator)
    boxes = torch.cat(((low + high) / 40, (high - low) / 20), dim=2).tolist()
    items = [Item(str(i), image="a.png", box=tuple(pair[1])) for i, pair in enumerate(boxes)]
    found = score_all(Ranked(), [tuple(pair[0]) for pair in boxes], items, metrics=["boxes"]).items
    for i in range(20):
        grid = torch.zeros(2, 20, 20, dtype=torch.bool)
        for k in range(2):
            grid[k, low[i, k, 0] : high[i, k, 0], low[i, k, 1] : high[i, k, 1]] = True
        union, hull = grid.any(0).sum(), (high[i].amax(0) - low[i].amin(0)).prod()
        iou = grid.all(0).sum() / union
        assert found["iou"][i] == pytest.approx(100 * float(iou), abs=1e-3)
        assert found["giou"][i] == pytest.approx(100 * float(iou - (hull - union) / hull), abs=1e-3)


def test_bad_input_is_one_clear_error(monkeypatch):
    item = Item("a", video="a.mp4", caption=("x",))
    with pytest.raises(ConfigError, match=r"^no metric 'cidr': choose from cider, bleu, "):
        score("captioning", ["x"], [item], metrics=["cidr"])
    with pytest.raises(ConfigError, match=r"^there are 2 predictions for 1 items$"):
        score("captioning", ["x", "y"], [item])
    with pytest.raises(DataError, match=r"^the item b has no caption to compare with$"):
        score("captioning", ["x"], [Item("b", video="b.mp4")], metrics=["exact_match"])
    with pytest.raises(DataError, match=r"^there are no items to score$"):
        score("captioning", [], [])
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ConfigError, match=r"^the metric meteor needs Java, and there is no command java: install it$"):
        score("captioning", ["x"], [item], metrics=["meteor"])


def test_tasks_name_metrics_that_exist():
    from mplug2_fast.tasks import TASKS

    assert {name for task in TASKS.values() for name in task.metrics} <= METRICS.keys()
