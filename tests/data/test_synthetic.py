"""Stories: the same bytes everywhere, varied, and well formed."""

import hashlib
import re

from glade.data.synthetic import stories, story


def test_the_same_bytes_everywhere() -> None:
    text = "\n".join(stories(100))
    assert hashlib.sha256(text.encode()).hexdigest() == HASH
    assert list(stories(3, seed=4)) == [story(i, seed=4) for i in range(3)]


HASH = "a26745e433f4dc5ed83791554fde385197fbfaac1073e63fc08bef2cdb0dee97"


def test_varied_and_well_formed() -> None:
    many = list(stories(2000))
    assert len(set(many)) == 2000 and set(many).isdisjoint(stories(2000, seed=1))
    text = "\n".join(many)
    assert not re.search(r"[{}|/=]| an? (?:an?|the) |\ba [aeio]| an [^aeio]|\bA [aeio]", text)
    assert all(len(s.split("\n")) == 3 and 300 < len(s) < 1000 and s.endswith((".", '"')) for s in many)
    assert len(set(re.findall(r"\w+", text.lower()))) > 350
