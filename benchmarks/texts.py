"""Real text from gensim's test data, cut once into parts that share no document.

    news        the Lee corpus: 300 documents of ABC news, one a line
    wikipedia   a dump of 106 articles of the English Wikipedia, as wiki markup

Both halves of CALIBRATION are for the statistics that quantization works from, both halves of EVALUATION for what
is measured. A document is in one of them or in none.
"""

import bz2
import re
import xml.etree.ElementTree as ET
from functools import cache

import torch
from torch import Tensor

from . import models

CALIBRATION, EVALUATION = "calibration", "evaluation"
SOURCES = ("news", "wikipedia")
WIKIPEDIA_FILE = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
# The first articles are measured on, the others calibrate: neighbours in the dump can be about the same things.
ARTICLES = {EVALUATION: slice(0, 53), CALIBRATION: slice(53, None)}
NEWS = {EVALUATION: models.EVALUATION, CALIBRATION: models.CALIBRATION}
# Of an article, its first paragraphs of prose: many subjects say more than a long text about one of them.
CHARACTERS = 2048
MARKUP = 32_000  # characters of markup that hold them in every article; parsing all of it takes minutes
PARAGRAPH = 200  # shorter ones are headings, captions, list items and what is left of tables


def documents(source: str, part: str) -> list[str]:
    """The documents of one source ("news" or "wikipedia") in one part (CALIBRATION or EVALUATION)."""
    models.require("gensim")
    if source == "news":
        return models.news(NEWS[part])
    return [text for text in map(_prose, _articles()[ARTICLES[part]]) if text]


def windows(tokenizer, source: str, part: str, count: int, length: int) -> Tensor:
    """The documents of a part in a row, cut into windows: (count, length) token ids.

    Raises ValueError if the part has fewer tokens than that.
    """
    ids = tokenizer("\n\n".join(documents(source, part)), return_tensors="pt", verbose=False)["input_ids"][0]
    if len(ids) < count * length:
        raise ValueError(f"{source}, {part}: {len(ids)} tokens are fewer than {count} windows of {length}")
    return ids[: count * length].reshape(count, length).to(torch.int64)


def sentences(source: str, part: str, count: int) -> list[str]:
    """The first sentence of each document, then the second of each, and so on, until there are `count`."""
    split = [[s.strip() for s in text.split(". ") if len(s.split()) > 4] for text in documents(source, part)]
    longest = max(map(len, split))
    return [found[i] for i in range(longest) for found in split if i < len(found)][:count]


@cache
def _articles() -> tuple[str, ...]:
    """The wiki markup of the dump's articles, in its order; redirects are none."""
    found = []
    with bz2.open(models.test_data(WIKIPEDIA_FILE)) as file:
        for _, page in ET.iterparse(file):
            namespace, _, tag = page.tag.rpartition("}")
            if tag != "page":
                continue
            name = f"{namespace}}}".__add__
            if page.find(name("redirect")) is None and page.findtext(name("ns")) == "0":
                found.append(page.findtext(f"{name('revision')}/{name('text')}"))
            page.clear()
    return tuple(found)


def _prose(markup: str) -> str:
    import mwparserfromhell

    text = mwparserfromhell.parse(markup[:MARKUP]).strip_code()
    paragraphs = [" ".join(line.split()) for line in text.splitlines()]
    # What begins with these, or holds brackets, is markup that is cut off or that the parser does not know.
    kept = [p for p in paragraphs if len(p) >= PARAGRAPH and not re.match(r"[|!{*#:]|Category:", p)]
    kept = [p for p in kept if "[[" not in p and "{{" not in p]
    return "\n".join(kept)[:CHARACTERS]
