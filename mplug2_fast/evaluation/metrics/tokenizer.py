"""Words of captions, as COCO's evaluation counts them.

COCO's evaluation uses the Stanford PTB tokenizer, in Java, and drops punctuation. `python` follows its rules for
English. `java` is the original program, from pycocoevalcap.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from mplug2_fast.errors import ConfigError, MPlug2Error

TOKENIZERS = {"python": "PTB rules in Python (mplug2_fast)", "java": "Stanford PTBTokenizer 3.4.1 (pycocoevalcap)"}
"""Name to description."""


def tokenize(texts: Sequence[str], tokenizer: str = "python") -> list[str]:
    """The words of each text in lower case, with spaces between them and without punctuation.

    Raises:
        ConfigError: there is no such tokenizer here.
        MPlug2Error: Java failed.
    """
    if tokenizer not in TOKENIZERS:
        raise ConfigError(f"no tokenizer {tokenizer!r}: choose one of {', '.join(TOKENIZERS)}")
    lines = [" ".join(text.split()) for text in texts]
    tokens = _by_java(lines) if tokenizer == "java" else map(ptb_tokens, lines)
    return [" ".join(token for token in each if token not in _DROPPED) for each in tokens]


def ptb_tokens(line: str) -> list[str]:
    """The tokens of a line, punctuation included."""
    return [_written(token) for token in _TOKEN.findall(line.translate(_CHARACTERS))]


def has_java() -> bool:
    """Whether the command `java` is found."""
    return shutil.which("java") is not None


def jar() -> Path | None:
    """The Java tokenizer, which comes with pycocoevalcap."""
    found = importlib.util.find_spec("pycocoevalcap")
    for folder in found.submodule_search_locations or () if found else ():
        if (path := Path(folder) / "tokenizer" / "stanford-corenlp-3.4.1.jar").exists():
            return path
    return None


def _by_java(lines: Sequence[str]) -> list[list[str]]:
    program = jar()
    if program is None or not has_java():
        missing = "pycocoevalcap, pip install 'mplug2-fast[evaluate]'" if program is None else "Java"
        raise ConfigError(f"the tokenizer java needs {missing}: install it, or use the tokenizer python")
    command = ["java", "-Dfile.encoding=UTF-8", "-cp", str(program), "edu.stanford.nlp.process.PTBTokenizer"]
    options = ["-preserveLines", "-lowerCase", "-encoding", "UTF-8"]
    try:
        done = subprocess.run([*command, *options], input="\n".join(lines).encode(), capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise MPlug2Error(f"the tokenizer java failed ({error}): use the tokenizer python") from error
    found = [line.split() for line in done.stdout.decode().split("\n")][: len(lines)]
    if len(found) != len(lines):
        raise MPlug2Error(f"the tokenizer java gave {len(found)} lines for {len(lines)}: use the tokenizer python")
    return found


def _written(token: str) -> str:
    """A token in the spelling of the Java program."""
    if token.startswith(".."):
        return "..."
    return _ENTITIES.get(token, token.lower().translate(_BRACKETS))


_DROPPED = {
    '"',
    "''",
    "'",
    "``",
    "`",
    "-LRB-",
    "-RRB-",
    "-LCB-",
    "-RCB-",
    ".",
    "?",
    "!",
    ",",
    ":",
    "-",
    "--",
    "...",
    ";",
}
"""Tokens that COCO's evaluation drops. The tokenizer writes brackets in lower case, so they stay."""

_CHARACTERS = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "–": " -- ", "—": " -- ", "…": " ... "})
_BRACKETS = str.maketrans({"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"})
_ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"'}

_ABBREVIATIONS = """
al apr aug ave bros capt co col corp dec dept dr est etc feb fig ft gen gov hon inc jan jr jul jun lt ltd mar messrs
mlle mme mr mrs ms mt nov oct prof rev sat sen sep sept sgt sr st tue tues vs wed
"""

_TOKEN = re.compile(
    rf"""
    (?:https?://|www\.)[^\s"<>()]+[^\s"<>().,!?;:']  # addresses
    | [\w.+-]+@\w[\w-]*(?:\.\w[\w-]*)+
    | @\w+
    | &(?:amp|lt|gt|quot);
    | [:;]-?[()] | \^_\^
    | \bc(?:\+\+|\#)
    | \b(?:can(?=not\b)|gon(?=na\b)|got(?=ta\b)|wan(?=na\b)|lem(?=me\b)|gim(?=me\b)|y'(?=all\b))  # written as one word
    | '(?:t(?=is\b|was\b)|n'|(?:\d\ds|em|cause|til)\b)
    | \bol'
    | [^\W\d_]+?(?=n't\b)  # can't: ca n't
    | n't\b
    | '(?:s|m|d|re|ve|ll)\b
    | ph\.d\.
    | no\.(?=[ ]?\d)
    | (?:\b[^\W\d_]\.)+(?=[ ]\S)  # initials
    | (?:[^\W\d_]\.){{2,}}(?!\w)
    | \b(?:{"|".join(_ABBREVIATIONS.split())})\.
    | (?-i:[A-Z]+&[A-Z]+)
    | [-+]?(?:\d+(?:[.,:/]?\d+)*|(?<!\w)\.\d+)(?![\w-])
    | \d{{1,3}}(?:,\d{{3}})+(?:-\w+)+
    | \w(?:\w|[-/.](?=\w)|'(?=\w)(?!(?:s|m|d|re|ve|ll|t|n')\b))*
    | \.\.+ | --+ | [!?]+
    | [^\s\U00010000-\U0010ffff]
    """,
    re.VERBOSE | re.IGNORECASE,
)
"""Alternatives in order of precedence. Characters beyond the basic plane, such as emoji, are no token."""
