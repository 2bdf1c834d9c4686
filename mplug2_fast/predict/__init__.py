"""From files to results: captions, answers to questions, boxes, classes, rankings, and what any other task gives.

    captioner = Captioner("mplug2_caption.pth", dtype="bfloat16")
    for result in captioner.caption(["a.mp4", "b.mkv"]):
        print(result.path, result.text or result.error)

One bad file never stops the others: its `Result` carries an `error`. The next file is decoded in a thread while the
model works on the current one, or in worker processes. For runs over very many files see `mplug2_fast.bulk`.
"""

from mplug2_fast.predict.aliases import Answerer, Captioner, Classifier, Grounder, Matcher, TextGenerator
from mplug2_fast.predict.predictor import Predictor, Result
from mplug2_fast.predict.retriever import Match, Ranking, Retriever
from mplug2_fast.tasks import Alternative

__all__ = [
    "Alternative",
    "Answerer",
    "Captioner",
    "Classifier",
    "Grounder",
    "Match",
    "Matcher",
    "Predictor",
    "Ranking",
    "Result",
    "Retriever",
    "TextGenerator",
]
