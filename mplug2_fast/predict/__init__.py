"""From files to words: captions of videos and images, and answers to questions about them.

    captioner = Captioner("mplug2_caption.pth", dtype="bfloat16")
    for result in captioner.caption(["a.mp4", "b.mkv"]):
        print(result.path, result.text or result.error)

One bad file never stops the others: its `Result` carries an `error`. The next file is decoded in a thread while the
model works on the current one, or in worker processes. Runs over very many files are `mplug2_fast.bulk`'s.
"""

from mplug2_fast.predict.answerer import Answerer
from mplug2_fast.predict.captioner import Captioner
from mplug2_fast.predict.predictor import Alternative, Result

__all__ = ["Alternative", "Answerer", "Captioner", "Result"]
