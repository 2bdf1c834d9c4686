"""From files to results: captions, answers, boxes, classes, rankings, and the results of any other task.

    captioner = Captioner("mplug2_caption.pth", dtype="bfloat16")
    for result in captioner.caption(["a.mp4", "b.mkv"]):
        print(result.path, result.text or result.error)

A bad file does not stop the others: its `Result` has an `error`. A thread or worker processes decode the next file
while the model computes. For runs over many files see `mplug2_fast.bulk`.
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
