"""Converters on small files of the official form: the written lines, and one clear line per malformed file."""

from __future__ import annotations

import json
import pickle
import zipfile
from io import BytesIO
from pathlib import Path
from random import Random

import pytest

from mplug2_fast.datasets import read_items
from mplug2_fast.datasets.converters import CONVERTERS, convert
from mplug2_fast.errors import DataError


def jsonl(*values):
    return "".join(json.dumps(value) + "\n" for value in values)


def rows(separator, *lines):
    return "".join(separator.join(map(str, line)) + "\n" for line in lines)


def tsv(*lines):
    return rows("\t", *lines)


def csv(*lines):
    return rows(",", *lines)


def pickled(value):
    return pickle.dumps(value, protocol=0)


def torch_file(value):
    """As torch.save writes it: a zip archive."""
    file = BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(value, protocol=2))
    return file.getvalue()


def old_torch_file(value):
    """As torch.save wrote it before version 1.6: pickles one after another."""
    parts = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, value, [])
    return b"".join(pickle.dumps(part, protocol=2) for part in parts)


def write(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(content, str | bytes):
            content = json.dumps(content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def video_info(split, *numbers):
    videos = [
        {
            "category": 9,
            "video_id": f"video{n}",
            "start time": 1.5,
            "end time": 9.0,
            "split": split,
        }
        for n in numbers
    ]
    sentences = [
        {"caption": f"caption {k} of {n} ", "video_id": f"video{n}", "sen_id": k} for n in numbers for k in (0, 1)
    ]
    return {"info": {"year": "2016"}, "videos": videos, "sentences": sentences}


MSRVTT = {
    "train_val_videodatainfo.json": {
        key: video_info("train", 0)[key] + video_info("validate", 7)[key] for key in ("videos", "sentences")
    },
    "test_videodatainfo.json": video_info("test", 9),
}
MSRVTT_LISTS = {
    "MSRVTT_train.9k.csv": "video_id\nvideo0\nvideo9\n",
    "MSRVTT_JSFUSION_test.csv": 'key,vid_key,video_id,sentence\nret0,msr7,video7,"a man, who sings"\n',
}


def captioned(number):
    captions = [f"caption {k} of {number}" for k in (0, 1)]
    return {"id": f"video{number}", "video": f"video{number}.mp4", "caption": captions}


def qa(number, video):
    return {"answer": "cat", "category_id": 3, "id": number, "question": "what runs?", "video_id": video}


def asked(number, video):
    return {"id": str(number), "video": video, "question": "what runs?", "answer": "cat"}


QA = {"train_qa.json": [qa(1, 1), qa(1, 1)], "val_qa.json": [qa(2, 1201)], "test_qa.json": [qa(3, 1301)]}
MSVD_MAPPING = {"youtube_mapping.txt": "-4ws_5_15 vid1\nabc_0_9 vid1201\nxyz_10_20 vid1301\n"}
MSVD = {
    "AllVideoDescriptions.txt": "# Descriptions\n\n-4ws_5_15 a squirrel eats\n-4ws_5_15 an animal\nabc_0_9 a man\n"
    "xyz_10_20 a dog\nzzz_0_1 a bird\n",
}
MSVD_ITEMS = {
    "train": [{"id": "-4ws_5_15", "video": "-4ws_5_15.avi", "caption": ["a squirrel eats", "an animal"]}],
    "val": [{"id": "abc_0_9", "video": "abc_0_9.avi", "caption": "a man"}],
    "test": [{"id": "xyz_10_20", "video": "xyz_10_20.avi", "caption": "a dog"}],
}


def karpathy(name, split, number, **fields):
    sentences = [{"tokens": ["a", "b"], "raw": f"A {word}.", "imgid": number} for word in ("b", "c")]
    return {"filename": name, "imgid": number, "split": split, "sentences": sentences, **fields}


def vqa(split, number, image):
    question = {"image_id": image, "question": "What is it?", "question_id": number}
    answers = [{"answer": word, "answer_confidence": "yes"} for word in ["net"] * 7 + ["racket"] * 3]
    annotation = {"question_id": number, "image_id": image, "multiple_choice_answer": "net", "answers": answers}
    return {
        f"v2_OpenEnded_mscoco_{split}2014_questions.json": {"questions": [question]},
        f"v2_mscoco_{split}2014_annotations.json": {"annotations": [annotation]},
    }


def gqa(**fields):
    return {"question": "Is it red?", "imageId": "2354786", "isBalanced": True, **fields}


INSTANCES = {
    "images": [{"id": 8, "file_name": "COCO_train2014_8.jpg", "width": 200, "height": 100}],
    "annotations": [{"id": 5, "image_id": 8, "bbox": [20, 10, 100, 50], "category_id": 1}],
}


def ref(split, *numbers):
    sentences = [{"sent_id": n, "sent": f"cat {n}", "raw": f"Cat {n}", "tokens": ["cat", str(n)]} for n in numbers]
    return {"ref_id": 1, "ann_id": 5, "image_id": 8, "split": split, "sentences": sentences, "file_name": "other.jpg"}


def snli_ve(pair, label):
    return {"Flickr30K_ID": "34160", "gold_label": label, "sentence1": "x", "sentence2": "A cat sits.", "pairID": pair}


KINETICS = csv(
    ("label", "youtube_id", "time_start", "time_end", "split"), ('"air drumming"', "-3B_x", 59, 69, "validate")
)
GROUNDED = {"image": "COCO_train2014_8.jpg", "text": "cat", "box": [0.35, 0.35, 0.5, 0.5]}
PHRASES = [("COCO_train2014_8.jpg", "x", [20, 10, 100, 50], "cat", [("r1", ["none"])])]

FORMS = [
    ("msrvtt-captions", MSRVTT, {"train": [captioned(0)], "val": [captioned(7)], "test": [captioned(9)]}),
    ("msrvtt-captions 7k", MSRVTT, {"train": [captioned(0), captioned(7)], "test": [captioned(9)]}),
    (
        "msrvtt-captions 1k-A",
        MSRVTT | MSRVTT_LISTS,
        {"train": [captioned(0), captioned(9)], "test": [captioned(7) | {"caption": "a man, who sings"}]},
    ),
    (
        "msrvtt-qa",
        QA,
        {
            "train": [asked(1, "video1.mp4")],
            "val": [asked(2, "video1201.mp4")],
            "test": [asked(3, "video1301.mp4")],
            "skipped": {"repeated annotations": 1},
        },
    ),
    (
        "msrvtt-qa 7k",
        QA,
        {
            "train": [asked(1, "video1.mp4"), asked(2, "video1201.mp4")],
            "test": [asked(3, "video1301.mp4")],
            "skipped": {"repeated annotations": 1},
        },
    ),
    (
        "msrvtt-qa 1k-A",
        {"test_qa.json": [qa(4, 7), qa(5, 9), qa(6, 30)]} | MSRVTT_LISTS,
        {
            "train": [asked(5, "video9.mp4")],
            "test": [asked(4, "video7.mp4")],
            "skipped": {"videos in neither list of the split": 1},
        },
    ),
    ("msvd-captions", MSVD | MSVD_MAPPING, MSVD_ITEMS | {"skipped": {"videos in no split": 1}}),
    (
        "msvd-captions",
        MSVD | {"train_list.txt": "-4ws_5_15\n", "val_list.txt": "abc_0_9\n", "test_list.txt": "xyz_10_20\n"},
        MSVD_ITEMS | {"skipped": {"videos in no split": 1}},
    ),
    (
        "msvd-captions",
        {
            "MSR Video Description Corpus.csv": csv(
                ("VideoID", "Start", "End", "WorkerID", "Source", "AnnotationTime", "Language", "Description"),
                ("abc", 0, 9, 1, "clean", 5, "English", '"a man, ""running"""'),
                ("abc", 0, 9, 1, "clean", 5, "German", "ein Mann"),
            ),
            "test_list.txt": "abc_0_9\n",
        },
        {"test": [{"id": "abc_0_9", "video": "abc_0_9.avi", "caption": 'a man, "running"'}]},
    ),
    (
        "msvd-captions",
        {"raw-captions.pkl": pickled({"abc_0_9": [["a", "man"], ["men"]]}), "train_list.txt": "abc_0_9\n"},
        {"train": [{"id": "abc_0_9", "video": "abc_0_9.avi", "caption": ["a man", "men"]}]},
    ),
    (
        "msvd-qa",
        QA | MSVD_MAPPING,
        {
            "train": [asked(1, "-4ws_5_15.avi")],
            "val": [asked(2, "abc_0_9.avi")],
            "test": [asked(3, "xyz_10_20.avi")],
            "skipped": {"repeated annotations": 1},
        },
    ),
    (
        "tgif-qa",
        {
            f"{split}_frameqa_question.csv": tsv(
                ("gif_name", "question", "answer", "type", "key"), ("tumblr_a", "what is worn ?", "hat", 0, 7)
            )
            for split in ("Train", "Test")
        },
        {
            split: [{"id": f"{split}-0", "video": "tumblr_a.gif", "question": "what is worn ?", "answer": "hat"}]
            for split in ("train", "test")
        },
    ),
    (
        "didemo",
        {
            "val_data.json": [
                {"annotation_id": n, "description": text, "video": video, "times": [[0, 1]], "num_segments": 6}
                for n, (video, text) in enumerate(
                    [("a@N.mov", "a cat sits"), ("b.mp4", "rain"), ("a@N.mov", "it runs ")]
                )
            ]
        },
        {
            "val": [
                {"id": "a@N.mov", "video": "a@N.mov", "caption": "a cat sits it runs"},
                {"id": "b.mp4", "video": "b.mp4", "caption": "rain"},
            ]
        },
    ),
    (
        "lsmdc",
        {
            "LSMDC16_annos_training.csv": tsv(
                ("1_UP_00.01-00.02", "00:00:01", "00:00:02", "00:00:01", "00:00:02", 'SOMEONE "waves.'),
                ("1_UP_00.01-00.02", "00:00:01", "00:00:02", "00:00:01", "00:00:02", "He nods."),
            ),
            "LSMDC16_challenge_1000_publictect.csv": tsv(("9_SO_FAR_00.01-00.02", 1, 2, 1, 2, "Rain.")),
        },
        {
            "train": [
                {
                    "id": "1_UP_00.01-00.02",
                    "video": "1_UP/1_UP_00.01-00.02.avi",
                    "caption": ['SOMEONE "waves.', "He nods."],
                }
            ],
            "test": [{"id": "9_SO_FAR_00.01-00.02", "video": "9_SO_FAR/9_SO_FAR_00.01-00.02.avi", "caption": "Rain."}],
        },
    ),
    (
        "vatex",
        {
            "vatex_training_v1.0.json": [{"videoID": "P-0_000122_000132", "enCap": ["a", "b"], "chCap": ["x"]}],
            "vatex_private_test_without_annotations.json": [{"videoID": "Q_000001_000011"}],
        },
        {
            "train": [{"id": "P-0_000122_000132", "video": "P-0_000122_000132.mp4", "caption": ["a", "b"]}],
            "private-test": [{"id": "Q_000001_000011", "video": "Q_000001_000011.mp4"}],
        },
    ),
    (
        "kinetics",
        {
            "train.csv": KINETICS,
            "test.csv": csv(("youtube_id", "time_start", "time_end", "split"), ("q", 0, 10, "test")),
        },
        {
            "train": [{"id": "-3B_x_000059_000069", "video": "-3B_x_000059_000069.mp4", "label": "air drumming"}],
            "test": [{"id": "q_000000_000010", "video": "q_000000_000010.mp4"}],
        },
    ),
    (
        "something-something-v2",
        {
            "something-something-v2-train.json": [
                {"id": "7", "label": "holding potato", "template": "Holding [something]", "placeholders": ["potato"]}
            ],
            "something-something-v2-test.json": [{"id": "9"}],
        },
        {
            "train": [{"id": "7", "video": "7.webm", "caption": "holding potato", "label": "Holding something"}],
            "test": [{"id": "9", "video": "9.webm"}],
        },
    ),
    (
        "coco",
        {
            "dataset_coco.json": {
                "images": [
                    karpathy("COCO_val2014_3.jpg", split, n, filepath="val2014", cocoid=n)
                    for n, split in enumerate(("restval", "train", "val"))
                ]
            }
        },
        {
            "train": [
                {"id": str(n), "image": "val2014/COCO_val2014_3.jpg", "caption": ["A b.", "A c."]} for n in (0, 1)
            ],
            "val": [{"id": "2", "image": "val2014/COCO_val2014_3.jpg", "caption": ["A b.", "A c."]}],
        },
    ),
    (
        "flickr30k",
        {"dataset_flickr30k.json": {"images": [karpathy("36979.jpg", "test", 4)], "dataset": "flickr30k"}},
        {"test": [{"id": "4", "image": "36979.jpg", "caption": ["A b.", "A c."]}]},
    ),
    (
        "vqav2",
        vqa("train", 458752000, 458752)
        | {
            "v2_OpenEnded_mscoco_test-dev2015_questions.json": {
                "questions": [{"image_id": 1, "question": "Why?", "question_id": 10}]
            }
        },
        {
            "train": [
                {
                    "id": "458752000",
                    "image": "train2014/COCO_train2014_000000458752.jpg",
                    "question": "What is it?",
                    "answers": {"net": 0.7, "racket": 0.3},
                }
            ],
            "test-dev": [{"id": "10", "image": "test2015/COCO_test2015_000000000001.jpg", "question": "Why?"}],
        },
    ),
    (
        "visual-genome",
        {
            "question_answers.json": [
                {"id": 1, "qas": [{"image_id": 1, "qa_id": 98, "question": "What color?", "answer": "Green."}]},
                {"id": 2, "qas": []},
            ],
            "image_data.json": [{"image_id": 1, "url": "https://x/rak248/VG_100K_2/1.jpg", "width": 800}],
        },
        {"train": [{"id": "98", "image": "VG_100K_2/1.jpg", "question": "What color?", "answers": {"green": 0.5}}]},
    ),
    (
        "gqa",
        {
            "train_all_questions_0.json": {"01": gqa(answer="yes", fullAnswer="Yes.")},
            "train_all_questions_1.json": {"02": gqa(answer="no")},
            "test_balanced_questions.json": {"03": gqa()},
        },
        {
            "train": [
                {"id": name, "image": "2354786.jpg", "question": "Is it red?", "answer": answer}
                for name, answer in (("01", "yes"), ("02", "no"))
            ],
            "test": [{"id": "03", "image": "2354786.jpg", "question": "Is it red?"}],
        },
    ),
    (
        "refcoco",
        {"refs(unc).p": pickled([ref("train", 1, 2), ref("testA", 3)]), "instances.json": INSTANCES},
        {
            "train": [GROUNDED | {"id": str(n), "text": f"cat {n}"} for n in (1, 2)],
            "testA": [GROUNDED | {"id": "3", "text": "cat 3"}],
        },
    ),
    (
        "snli-ve",
        {"snli_ve_dev.jsonl": jsonl(snli_ve("1#0", "neutral"), snli_ve("2#0", "-"))},
        {
            "val": [{"id": "1#0", "image": "34160.jpg", "text": "A cat sits.", "label": "neutral"}],
            "skipped": {"pairs without a gold label": 1},
        },
    ),
    (
        "nlvr2",
        {
            "train.json": jsonl(
                {"sentence": "Two dogs.", "identifier": "train-101-0-1", "directory": 39, "label": "False"}
            ),
            "dev.json": jsonl({"sentence": "A dog.", "identifier": "dev-8-1-0", "label": "True", "validation": {}}),
        },
        {
            "train": [
                {
                    "id": "train-101-0-1",
                    "images": [f"images/train/39/train-101-0-img{n}.png" for n in (0, 1)],
                    "text": "Two dogs.",
                    "label": False,
                }
            ],
            "val": [
                {
                    "id": "dev-8-1-0",
                    "images": [f"dev/dev-8-1-img{n}.png" for n in (0, 1)],
                    "text": "A dog.",
                    "label": True,
                }
            ],
        },
    ),
    (
        "glue-cola",
        {
            "train.tsv": tsv(("gj04", 1, "", "They left."), ("gj04", 0, "*", 'Left "they.')),
            "test.tsv": tsv(("index", "sentence"), (0, "He ran.")),
        },
        {
            "train": [
                {"id": "train-0", "text": "They left.", "label": "acceptable"},
                {"id": "train-1", "text": 'Left "they.', "label": "unacceptable"},
            ],
            "test": [{"id": "test-0", "text": "He ran."}],
        },
    ),
    (
        "glue-sst2",
        {"dev.tsv": tsv(("sentence", "label"), ("a fine film ", 1))},
        {"val": [{"id": "val-0", "text": "a fine film", "label": "positive"}]},
    ),
    (
        "glue-mrpc",
        {
            "msr_paraphrase_train.txt": b"\xef\xbb\xbf"
            + tsv(("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"), (1, 7, 8, "He ran.", "Ran he.")).encode()
        },
        {"train": [{"id": "train-0", "text": "He ran.", "text_pair": "Ran he.", "label": "equivalent"}]},
    ),
    (
        "glue-stsb",
        {
            "train.tsv": tsv(
                (
                    "index",
                    "genre",
                    "filename",
                    "year",
                    "old_index",
                    "source1",
                    "source2",
                    "sentence1",
                    "sentence2",
                    "score",
                ),
                (0, "main", "MSR", "2012", "0001", "none", "none", "A plane.", "An air plane.", "4.750"),
            )
        },
        {"train": [{"id": "train-0", "text": "A plane.", "text_pair": "An air plane.", "label": 4.75}]},
    ),
    (
        "glue-qqp",
        {
            "train.tsv": tsv(
                ("id", "qid1", "qid2", "question1", "question2", "is_duplicate"),
                *([n, 1, 2, "Why?", f"Why {n}?", 0] for n in range(200)),
                ("cut", "row"),
            )
        },
        {
            "train": [
                {"id": f"train-{n}", "text": "Why?", "text_pair": f"Why {n}?", "label": "not_duplicate"}
                for n in range(200)
            ],
            "skipped": {"rows with a wrong number of columns": 1},
        },
    ),
    (
        "glue-mnli",
        {
            "dev_mismatched.tsv": tsv(
                ("index", "genre", "sentence1", "sentence2", "label1", "gold_label"),
                (0, "x", "a", "b", "neutral", "neutral"),
            ),
            "test_matched.tsv": tsv(("index", "genre", "sentence1", "sentence2"), (0, "x", "c", "d")),
        },
        {
            "val-mismatched": [{"id": "val-mismatched-0", "text": "a", "text_pair": "b", "label": "neutral"}],
            "test-matched": [{"id": "test-matched-0", "text": "c", "text_pair": "d"}],
        },
    ),
    (
        "glue-qnli",
        {"train.tsv": tsv(("index", "question", "sentence", "label"), (0, "Who?", "He.", "not_entailment"))},
        {"train": [{"id": "train-0", "text": "Who?", "text_pair": "He.", "label": "not_entailment"}]},
    ),
    (
        "glue-rte",
        {"train.tsv": tsv(("index", "sentence1", "sentence2", "label"), (0, "a", "b", "entailment"))},
        {"train": [{"id": "train-0", "text": "a", "text_pair": "b", "label": "entailment"}]},
    ),
    (
        "glue-wnli",
        {"train.tsv": tsv(("index", "sentence1", "sentence2", "label"), (0, "a", "b", 1))},
        {"train": [{"id": "train-0", "text": "a", "text_pair": "b", "label": "entailment"}]},
    ),
    (
        "mplug2-retrieval",
        {
            "msrvtt_train.jsonl": jsonl(
                {"clip_name": "video1.mp4", "caption": "a"}, {"clip_name": "video1.mp4", "caption": ["b", "c"]}
            ),
            "didemo_test.jsonl": jsonl({"video": "x.avi", "caption": "d"}),
        },
        {
            "train": [{"id": "video1.mp4", "video": "video1.mp4", "caption": ["a", "b", "c"]}],
            "test": [{"id": "x.avi", "video": "x.avi", "caption": "d"}],
        },
    ),
    (
        "mplug2-qa",
        {"train.jsonl": jsonl({"video_id": "video1", "question": "who?", "answer": "man"})},
        {"train": [{"id": "train-0", "video": "video1.mp4", "question": "who?", "answer": "man"}]},
    ),
    (
        "mplug2-captions",
        {
            "msvd_train.jsonl": jsonl({"video_id": "v1", "caption": "a"}, {"video_id": "v1", "caption": "b"}),
            "msvd_test.jsonl": jsonl({"video_id": "v2", "golden_captions": ["c", "d"]}),
        },
        {
            "train": [{"id": "v1", "video": "v1.mp4", "caption": ["a", "b"]}],
            "test": [{"id": "v2", "video": "v2.mp4", "caption": ["c", "d"]}],
        },
    ),
    (
        "mplug2-image-pairs",
        {"coco_train.json": [{"image": "train2014/a.jpg", "caption": "a", "image_id": "coco_1"}]},
        {"train": [{"id": "train2014/a.jpg", "image": "train2014/a.jpg", "caption": "a"}]},
    ),
    (
        "mplug2-video-pairs",
        {
            "webvid_train.json": [
                {"video_id": "a.mp4", "caption": "x", "start_time": 2, "end_time": "00:01:04.5"},
                {"video_id": "b.mp4", "caption": "y"},
            ]
        },
        {
            "train": [
                {"id": "train-0", "video": "a.mp4", "start": 2.0, "end": 64.5, "caption": "x"},
                {"id": "train-1", "video": "b.mp4", "caption": "y"},
            ]
        },
    ),
    (
        "mplug2-vqa",
        {
            "vqa_train.json": [
                {
                    "dataset": "vqa",
                    "image": "a.jpg",
                    "question": "who?",
                    "question_id": 1,
                    "answer": ["man"] * 9 + ["boy"],
                    "ocr": [[[0, 0], "STOP"]],
                    "object_label": "sign&&man",
                },
                {"dataset": "vg", "image": "b.jpg", "question": "who?", "question_id": 1, "answer": "man"},
                {
                    "dataset": "gqa",
                    "image": "b.jpg",
                    "question": "who?",
                    "question_id": 1,
                    "answer": "man",
                    "object_label": "",
                },
            ],
            "vqa_test.json": [{"image": "c.jpg", "question": "why?", "question_id": 2}],
        },
        {
            "train": [
                {
                    "id": "1",
                    "image": "a.jpg",
                    "question": "who?",
                    "answers": {"man": 0.9, "boy": 0.1},
                    "ocr": [[[0, 0], "STOP"]],
                    "object_label": "sign&&man",
                },
                {"id": "vg-1", "image": "b.jpg", "question": "who?", "answers": {"man": 0.5}},
                {"id": "gqa-1", "image": "b.jpg", "question": "who?", "answers": {"man": 0.5}, "object_label": ""},
            ],
            "test": [{"id": "2", "image": "c.jpg", "question": "why?"}],
        },
    ),
    (
        "mplug2-coco-captions",
        {"coco_val.json": [{"filepath": "val2014", "filename": "a.jpg", "sentences": [{"raw": "x"}]}]},
        {"val": [{"id": "a", "image": "val2014/a.jpg", "caption": "x"}]},
    ),
    (
        "mplug2-entailment",
        {"ve_dev.json": [{"image": "1.jpg", "sentence": "s", "label": "entailment"}]},
        {"val": [{"id": "val-0", "image": "1.jpg", "text": "s", "label": "entailment"}]},
    ),
    (
        "mplug2-nlvr2",
        {"nlvr_train.json": [{"images": ["a.png", "b.png"], "sentence": "s", "label": "True"}]},
        {"train": [{"id": "train-0", "images": ["a.png", "b.png"], "text": "s", "label": True}]},
    ),
    (
        "mplug2-grounding",
        {
            "unc_train.pth": torch_file(PHRASES),
            "unc_testA.pth": old_torch_file(PHRASES),
            "instances.json": INSTANCES,
        },
        {split: [GROUNDED | {"id": f"{split}-0"}] for split in ("train", "testA")},
    ),
]


def written(path: Path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(("name", "files", "expected"), FORMS, ids=[form[0] for form in FORMS])
def test_official_files_become_items(name, files, expected, tmp_path):
    name, _, choice = name.partition(" ")
    converter, expected = CONVERTERS[name], dict(expected)
    write(tmp_path / "official", files)
    found = convert(converter, [tmp_path / "official"], tmp_path / "out", choice=choice or None)
    assert found.skipped == expected.pop("skipped", {})
    assert {split: written(path) for split, path in found.files.items()} == expected
    assert found.counts == {split: len(items) for split, items in expected.items()}
    assert set(found.files) <= set(converter.splits)
    for split in expected:
        assert len(read_items(tmp_path / "out", split)) == len(expected[split])
    fields = {
        "answers" if field == "answer" else field for items in expected.values() for item in items for field in item
    }
    assert set(converter.fields) <= fields <= {"id", "start", "end", "ocr", "object_label", *converter.fields}


def test_every_converter_is_tested():
    assert {form[0].partition(" ")[0] for form in FORMS} == CONVERTERS.keys()


class Evil:
    def __reduce__(self):
        return print, ("this must not be printed",)


TRAIN_QA = "train_qa.json"
INFO = "train_val_videodatainfo.json"
MALFORMED = [
    ("msrvtt-qa", {TRAIN_QA: ""}, "{}/train_qa.json: is empty: download it again"),
    ("msrvtt-qa", {TRAIN_QA: '[{"id": 1,\n oops}]'}, "{}/train_qa.json:2: not JSON: "),
    ("msrvtt-qa", {TRAIN_QA: b'["\xff"]'}, "{}/train_qa.json: not UTF-8 text: "),
    ("msrvtt-qa", {TRAIN_QA: "[" * 100_000}, "{}/train_qa.json: not an annotation file: its brackets are nested"),
    (
        "msrvtt-qa",
        {TRAIN_QA: {"questions": []}},
        "{}/train_qa.json: must be a list of objects, got {{'questions': []}}",
    ),
    ("msrvtt-qa", {TRAIN_QA: []}, "{}/train_qa.json: must be a list of objects, got []"),
    ("msrvtt-qa", {TRAIN_QA: [3]}, "{}/train_qa.json: [0]: must be an object with named fields, got 3"),
    (
        "msrvtt-qa",
        {TRAIN_QA: [{"id": 1, "video_id": 3, "question": "who?"}]},
        "{}/train_qa.json: [0]: has no answer; it has id, video_id, question. Is this the right annotation file?",
    ),
    ("msrvtt-qa", {TRAIN_QA: [qa(1, 1) | {"question": 5}]}, "{}/train_qa.json: [0]: question must be a text, got 5"),
    ("msrvtt-qa", {TRAIN_QA: [qa(1, 1), qa(1, 2)]}, "{}/train_qa.json: train has two different items with the id '1'"),
    ("msrvtt-qa 1k-A", QA, "msrvtt-qa needs MSRVTT_JSFUSION_test.csv (test-videos)"),
    (
        "msrvtt-captions",
        {INFO: video_info("train", 1) | {"sentences": [{"caption": "x", "video_id": "video2"}]}},
        "{}/train_val_videodatainfo.json: sentences[0]: unknown video_id 'video2': no entry of videos has it",
    ),
    (
        "msrvtt-captions",
        {INFO: video_info("training", 1)},
        "{}/train_val_videodatainfo.json: videos[0]: split must be one of train, validate, val, test, got 'training'",
    ),
    (
        "msrvtt-captions",
        {INFO: video_info("train", 1), "test_videodatainfo.json": video_info("train", 1)},
        "{}/test_videodatainfo.json: videos[0]: the video_id 'video1' is repeated: give each video once",
    ),
    ("msrvtt-captions", {INFO: [1]}, "{}/train_val_videodatainfo.json: must be an object with named fields, got [1]"),
    ("msrvtt-captions", MSRVTT_LISTS, "msrvtt-captions needs train_val_videodatainfo.json, test_videodatainfo.json"),
    ("msvd-captions", MSVD, "msvd-captions needs youtube_mapping.txt, or train_list.txt"),
    (
        "msvd-captions",
        MSVD | {"train_list.txt": "abc_0_9\nnone_0_1\n"},
        "{}/train_list.txt:2: unknown video 'none_0_1': {}/AllVideoDescriptions.txt has no caption of it",
    ),
    (
        "msvd-captions",
        MSVD | {"youtube_mapping.txt": "abc 1x"},
        "{}/youtube_mapping.txt:1: must be a clip, a space and",
    ),
    (
        "msvd-captions",
        MSVD | MSVD_MAPPING | {"raw-captions.pkl": pickled({})},
        "msvd-captions: {}/raw-captions.pkl: only one file can be captions, and {}/AllVideoDescriptions.txt is",
    ),
    (
        "msvd-captions",
        MSVD_MAPPING | {"raw-captions.pkl": pickled({"abc_0_9": [["a", 1]]})},
        "{}/raw-captions.pkl: abc_0_9 must be a text or a list of texts, got ['a', 1]",
    ),
    ("msvd-qa", QA, "msvd-qa needs youtube_mapping.txt (mapping)"),
    (
        "msvd-qa",
        {TRAIN_QA: [qa(1, 5)]} | MSVD_MAPPING,
        "{}/train_qa.json: [0]: unknown video_id 5: {}/youtube_mapping.txt",
    ),
    (
        "lsmdc",
        {"LSMDC16_annos_val.csv": tsv(("clip", 1, 2, 3, "a sentence"))},
        "{}/LSMDC16_annos_val.csv:1: has 5 columns, expected 6: clip, start_aligned",
    ),
    (
        "kinetics",
        {"train.csv": KINETICS.replace("59", "soon")},
        "{}/train.csv:2: time_start must be a number, got 'soon'",
    ),
    ("kinetics", {"train.csv": KINETICS.replace("69", "9")}, "{}/train.csv:2: time_end must be after time_start"),
    (
        "kinetics",
        {"train.csv": KINETICS.replace("youtube_id", "id")},
        "{}/train.csv:2: has no youtube_id; it has label",
    ),
    ("kinetics", {"train.csv": "label,youtube_id\n"}, "{}/train.csv: no items of Kinetics"),
    (
        "vqav2",
        {key: value for key, value in vqa("val", 1, 2).items() if "annotations" not in key},
        "vqav2 needs v2_mscoco_val2014_annotations.json (val-annotations)",
    ),
    (
        "vqav2",
        vqa("val", 1, 2) | {"v2_mscoco_val2014_annotations.json": {"annotations": [{"question_id": 7, "answers": []}]}},
        "{}/v2_mscoco_val2014_annotations.json: annotations[0].answers: must be a list of objects, got []",
    ),
    ("gqa", {"val_balanced_questions.json": {"07": gqa()}}, "{}/val_balanced_questions.json: 07: has no answer; "),
    (
        "refcoco",
        {"refs(unc).p": pickled([Evil()]), "instances.json": INSTANCES},
        "{}/refs(unc).p: holds __builtin__.print, and only lists, dicts, texts and numbers are read from pickles",
    ),
    ("refcoco", {"refs(unc).p": b"(lp0", "instances.json": INSTANCES}, "{}/refs(unc).p: not a pickle: "),
    (
        "refcoco",
        {"refs(unc).p": pickled([ref("val", 1) | {"image_id": 9}]), "instances.json": INSTANCES},
        "{}/refs(unc).p: [0]: unknown image_id 9: {}/instances.json does not have it",
    ),
    (
        "refcoco",
        {
            "refs(unc).p": pickled([ref("val", 1)]),
            "instances.json": INSTANCES | {"annotations": [{"id": 5, "bbox": [300, 10, 5, 5]}]},
        },
        "{}/refs(unc).p: [0]: the box [300, 10, 5, 5] has no area in the image of 200x100 pixels",
    ),
    (
        "snli-ve",
        {"snli_ve_dev.jsonl": jsonl(snli_ve("1", "neutral"), snli_ve("2", "maybe"))},
        "{}/snli_ve_dev.jsonl:2: gold_label must be one of entailment, neutral, contradiction, got 'maybe'",
    ),
    ("nlvr2", {"dev.json": "{'sentence': 1}\n"}, "{}/dev.json:1: not JSON: "),
    ("nlvr2", {"dev.json": "[1, 2]\n"}, "{}/dev.json:1: must be an object with named fields, got [1, 2]"),
    (
        "glue-sst2",
        {"train.tsv": tsv(("sentence", "label"), ("fine", 1), ("bad", 0, 0))},
        "{}/train.tsv:3: has 3 columns, expected 2: sentence, label",
    ),
    ("glue-sst2", {"train.tsv": tsv(("sentence", "label"), ("fine", 7))}, "{}/train.tsv:2: label must be one of 0, 1"),
    (
        "mplug2-nlvr2",
        {"nlvr_train.json": [{"images": ["a.png"], "sentence": "s", "label": "True"}]},
        "{}/nlvr_train.json: [0]: images must be two paths, got 1",
    ),
    (
        "mplug2-video-pairs",
        {"train.json": [{"video_id": "a", "caption": "x", "start_time": 3, "end_time": 2}]},
        "{}/train.json: train, id 'train-0': end must be after start, got start 3 and end 2",
    ),
    (
        "mplug2-grounding",
        {"unc_val.pth": torch_file([("a.jpg", "x")]), "instances.json": INSTANCES},
        "{}/unc_val.pth: [0]: must be (file, name, box, phrase, attributes)",
    ),
]


@pytest.mark.parametrize(("name", "files", "message"), MALFORMED, ids=[case[0] for case in MALFORMED])
def test_a_malformed_file_gives_one_clear_line(name, files, message, tmp_path):
    name, _, choice = name.partition(" ")
    write(tmp_path / "official", files)
    with pytest.raises(DataError) as caught:
        convert(CONVERTERS[name], [tmp_path / "official"], tmp_path / "out", choice=choice or None)
    assert str(caught.value).startswith(message.format(tmp_path / "official", tmp_path / "official"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


ODD_VALUES = (None, True, 3, -1, 1e400, "", "x", [], {}, [1], {"a": 1}, [[]], 10**30)


def places(value, place=()):
    """The keys that lead to each part of a JSON value."""
    yield place
    if isinstance(value, dict | list | tuple):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*place, key))


def changed(value, place, new):
    """A JSON value with another part at a place."""
    if not place:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[place[0]] = changed(value[place[0]], place[1:], new)
    return copy


def damaged(content, random):
    if isinstance(content, str | bytes):
        data = bytearray(content if isinstance(content, bytes) else content.encode())
        for _ in range(random.randint(1, 3)):
            data[random.randrange(len(data))] = random.choice(b'\t\n",#\r 0x.}]\x00\xff')
        return bytes(data[: random.randint(1, 2 * len(data))])
    return changed(content, random.choice(list(places(content))), random.choice(ODD_VALUES))


def test_damaged_files_are_converted_or_give_one_line(tmp_path):
    random = Random(0)
    refused = []
    for number in range(400):
        name, files, _ = random.choice(FORMS)
        name, _, choice = name.partition(" ")
        file = random.choice(list(files))
        folder = tmp_path / str(number)
        write(folder, files | {file: damaged(files[file], random)})
        try:
            convert(CONVERTERS[name], [folder], folder / "out", choice=choice or None)
        except DataError as error:
            refused.append(str(error))
    assert len(refused) > 200
    assert [message for message in refused if str(tmp_path) not in message or "\n" in message] == []


def test_media_are_found_by_path_name_or_stem_and_named_from_the_output(tmp_path):
    write(tmp_path / "official", {TRAIN_QA: [qa(n, n) for n in range(4)]})
    write(tmp_path / "media", {"video0.mp4": "", "sub/video1.mp4": "", "video2.webm": ""})
    found = convert(CONVERTERS["msrvtt-qa"], [tmp_path / "official"], tmp_path / "a/b", media=tmp_path / "media")
    paths = [item["video"] for item in written(tmp_path / "a/b/train.jsonl")]
    assert paths == [f"../../media/{name}" for name in ("video0.mp4", "sub/video1.mp4", "video2.webm", "video3.mp4")]
    assert (found.media, found.missing) == (4, ["video3.mp4"])


def test_kinetics_takes_a_part_of_the_whole_video_where_there_is_no_clip(tmp_path):
    write(tmp_path, {"train.csv": KINETICS, "media/-3B_x.mkv": ""})
    convert(CONVERTERS["kinetics"], [tmp_path / "train.csv"], tmp_path, media=tmp_path / "media")
    (item,) = written(tmp_path / "train.jsonl")
    assert (item["video"], item["start"], item["end"]) == ("media/-3B_x.mkv", 59.0, 69.0)


def test_a_file_of_another_name_is_given_with_its_role(tmp_path):
    write(tmp_path, {"mine.json": [qa(1, 1)]})
    with pytest.raises(
        DataError, match=r"mine\.json: not a file of msrvtt-qa, which reads train_qa\.json \(train\), .*"
    ):
        convert(CONVERTERS["msrvtt-qa"], [tmp_path / "mine.json"], tmp_path / "out")
    found = convert(CONVERTERS["msrvtt-qa"], [f"val={tmp_path / 'mine.json'}"], tmp_path / "out")
    assert found.counts == {"val": 1}


def test_options_that_cannot_be_met(tmp_path):
    write(tmp_path, {TRAIN_QA: [qa(1, 1)]})
    qa_files = [tmp_path / TRAIN_QA]
    with pytest.raises(DataError, match=r"no splits '2k': there is only official, 7k, 1k-A"):
        convert(CONVERTERS["msrvtt-qa"], qa_files, tmp_path, choice="2k")
    with pytest.raises(DataError, match="missing: no such folder: --media names"):
        convert(CONVERTERS["msrvtt-qa"], qa_files, tmp_path, media=tmp_path / "missing")
    with pytest.raises(DataError, match="nowhere: no such file or folder"):
        convert(CONVERTERS["msrvtt-qa"], [tmp_path / "nowhere"], tmp_path)
    convert(CONVERTERS["msrvtt-qa"], qa_files, tmp_path)
    with pytest.raises(DataError, match=r"train\.jsonl exists: name another folder, or overwrite it"):
        convert(CONVERTERS["msrvtt-qa"], qa_files, tmp_path)
    assert convert(CONVERTERS["msrvtt-qa"], qa_files, tmp_path, overwrite=True).counts == {"train": 1}
