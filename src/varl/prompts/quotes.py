"""The texts that a prompt puts in quotes: what a picture of it should show."""

from __future__ import annotations

import re
from collections.abc import Iterator

__all__ = ["quoted_words"]

Span = tuple[int, int]
"""Where the opening and the closing mark of a pair are."""
Opened = tuple[int, int, int]
"""Where a mark is that is open; the end of the shortened word that it begins, or 0; and the place in the stack of the
last mark, up to it, that begins none, or -1."""

_ESCAPED = "\ue000"
"""In place of \\": a mark of its own, so that one that is in another text takes no part of it."""
_INCH = re.compile(
    r"""(?<=[\d¼½¾⅓⅔⅛⅜⅝⅞])["\ue000](?!\w)|(?<=[\d¼½¾⅓⅔⅛⅜⅝⅞])["\ue000](?=[xX×]\s?\d)|(?<=\d\s)["\ue000](?=\s)"""
)
"""A straight double quote that stands for inches: 12" vinyl, 8"x10"."""
_OPEN = re.compile(r'["\ue000＂“„«‹「『]|(?<!\S)”(?=\S)|(?<!\w)[»›](?=\w)|(?<!\w)[`´](?=\S)')
_CLOSE = {
    '"': '"', _ESCAPED: _ESCAPED, "＂": "＂", "“": "”", "„": '[“”"]', "”": "”", "`": "[`´]", "´": "[`´]",
    "«": "»", "»": "«", "‹": "›", "›": "‹", "「": "」", "『": "』",
}  # fmt: skip
_CLOSING = {opening: re.compile(closing) for opening, closing in _CLOSE.items()}

_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u19e0-\u19ff\u3005-\u3007\u3040-\u318f\u31f0-\u31ff\u3400-\u4dbf"
    "\u4e00-\u9fff\ua9e0-\ua9ff\uaa60-\uaa7f\uac00-\ud7ff\uf900-\ufaff\uff66-\uffdc\U00020000-\U000323af]"
)
"""Letters of Thai, Lao, Myanmar, Khmer, Chinese, Japanese and Korean: words need no space around them, and no
apostrophe is beside them, so that a single mark is a quote."""
_SINGLE = re.compile(r"['‘’‚\n]")
_ALONE = re.compile(r"(?<=\w[ _])['‘’]n['’](?=[ _]\w)|(?<=[A-Z][ _])['‘’]N['’](?=[ _][A-Z])|(?<=[ _]n)['’](?=[ _]\w)")
"""Marks of words such as rock 'n' roll, which open and close nothing."""
_SHORTENED = re.compile(
    r"['‘’](?:\d0s|til|em|er|im|cause|cos|coz|cuz|n|tis|twas|twill|round|bout|neath|tween|gainst|ello|ere|ave|kay|nuff"
    r"|nother|fraid)(?!\w)",
    re.IGNORECASE,
)
"""Words that begin with an apostrophe, as '90s and 'til do; a quoted text may begin so too."""
_YEAR = re.compile(r"['‘]\d\d(?!\w)")
"""A year such as '99, if it is inside an open text; alone, a number in quotes."""
_ENDED = re.compile(
    r"(?:(?<=[sxz])|(?<=\w\win)|(?<=\b[no])|(?<=\b(?:ol|an|th|wi|mo|po))|(?<=\blil))['’](?=\s\w|['’](?![^\W_]))",
    re.IGNORECASE,
)
"""Marks that may end a word and not a text: the Girls' Guide, Livin' Large, Gone Fishin''."""
_FINAL = re.compile(rf"(?<=[^\W_]|[.,!?…)])(?<!{_UNSPACED.pattern})['’](?![^\W_])")
"""Marks that can end a text and begin none."""
FAR = 100
"""Characters up to which a mark is held to end a text that seemed to have ended before."""


def quoted_words(text: str) -> tuple[str, ...]:
    """The texts in quotes, in order; one entry a region.

    Quotes are single or double, straight or curly, also „German“, ”Swedish”, « French », ‹single› and 「Japanese」
    ones. A quote inside another pair is part of the outer text. Apostrophes (don't, the dogs' bowl, the '90s, rock 'n'
    roll), feet and inches (5'10", a 12" record) are no quotes; they may be in a text ('CLASS OF '99'). Blank pairs are
    left out. Single quotes pair within a line. A backslash before a straight mark is dropped.
    """
    text = text.replace("\\'", "'").replace('\\"', _ESCAPED)
    double = list(_double(text))
    found, after = [], 0
    for start, end in sorted([*double, *_single(text, double)], key=lambda span: (span[0], -span[1])):
        if start >= after:
            found.append(text[start + 1 : end].replace(_ESCAPED, '"').strip())
            after = end + 1
    return tuple(word for word in found if word)


def _double(text: str) -> Iterator[Span]:
    """Pairs of all marks but single quotes, none inside another."""
    at, barren = 0, set()  # kinds of which no mark closes any more: time is linear
    while opening := _OPEN.search(text, at):
        kind, at = opening[0], opening.end()
        if kind in barren or _INCH.match(text, opening.start()):
            continue
        closing = _CLOSING[kind].search(text, at)
        while closing and _inch_inside(text, closing.start()):
            closing = _CLOSING[kind].search(text, closing.end())
        if closing is None:
            barren.add(kind)
            continue
        yield opening.start(), closing.start()
        at = closing.end()


def _inch_inside(text: str, at: int) -> bool:
    """Whether a mark that could close is one of inches, as in "12" VINYL" and "5'10"": the next one only closes."""
    if not _INCH.match(text, at) or (after := text.find(text[at], at + 1)) < 0:
        return False
    return (text[after - 1].isalpha() or after == at + 1) and not text[after + 1 : after + 2].isalnum()


def _single(text: str, double: list[Span]) -> Iterator[Span]:
    """Pairs of single quotes that are not inside ``double``; also those inside one another.

    A mark closes the last one that is open, so that an apostrophe in front of a word, which nothing closes, takes no
    part of the text after it. If it may be the apostrophe of a word ('Livin' Large'), the pair is given, and again up
    to the next mark that closes, before any that opens: it has nothing else to close.
    """
    alone = {mark for match in _ALONE.finditer(text) for mark in range(*match.span())}
    opened: dict[bool, list[Opened]] = {False: [], True: []}  # straight and curly
    ended: dict[bool, Span | None] = {}  # the last pair, if its end may be an apostrophe
    inside = iter([*double, (len(text), len(text))])
    start, end = next(inside)
    for match in _SINGLE.finditer(text):
        at, mark = match.start(), match[0]
        while at > end:
            start, end = next(inside)
        if mark == "\n":
            opened, ended = {False: [], True: []}, {}
        elif at not in alone and not start < at < end:
            kind = mark != "'"
            stack, last = opened[kind], ended.get(kind)
            ends = last and (last[1] == at - 1 or _FINAL.match(text, at)) and (not stack or stack[-1][2] < 0)
            if last and ends:
                if not _apostrophe(text, last, at):
                    yield last[0], at
                    ended[kind] = (last[0], at) if _ENDED.match(text, at) else None
            elif _closes(text, at) and (begun := _begun(stack, text, at)):
                yield begun[0], at
                ended[kind] = (begun[0], at) if _ENDED.match(text, at) else None
            elif _opens(text, at):
                ended[kind] = None
                below = stack[-1][2] if stack else -1
                shortened = _SHORTENED.match(text, at)
                if below >= 0 and not _YEAR.match(text, stack[below][0]):
                    shortened = shortened or _YEAR.match(text, at)
                stack.append((at, shortened.end() if shortened else 0, below if shortened else len(stack)))


def _opens(text: str, at: int) -> bool:
    before, after = text[at - 1 : at] if at else "", text[at + 1 : at + 2]
    inside = before.isalnum() and not _UNSPACED.match(before)
    if inside and before.isalpha() and _UNSPACED.match(after):
        inside = False  # digits before are feet
    if inside or text[at] == "’":
        return False
    return text[at] == "‘" or not (after in ("", "'") or after.isspace())


def _closes(text: str, at: int) -> bool:
    before, after = text[at - 1 : at] if at else " ", text[at + 1 : at + 2]
    inside = after.isalnum() and not _UNSPACED.match(after) and not _UNSPACED.match(before)
    if inside or text[at] == "‚":
        return False
    return text[at] == "’" or not (before == "'" or before.isspace())


def _begun(stack: list[Opened], text: str, at: int) -> Opened | None:
    """What the mark at a place closes, taken from the stack."""
    if not stack or (text[at] == "‘" and text[stack[-1][0]] != "‚"):
        return None  # ‘ closes German quotes only
    _, shortened, whole = stack[-1]
    if shortened:
        # After a shortened word, the mark closes what was opened before it; alone, a possessive closes nothing.
        if whole >= 0:
            del stack[whole + 1 :]
        elif at > shortened and re.match(r"s['’]\s[a-z]", text[at - 1 : at + 3]):
            return None
    return stack.pop()


def _apostrophe(text: str, last: Span, at: int) -> bool:
    """Whether the mark at a place, after a pair that may have ended, is an apostrophe or feet, or may be."""
    start, end = last
    if at - end > FAR or text[at - 1].isdigit():
        return True
    if end == at - 1:
        return text[start - 1 : start] in ("'", "‘")  # ''a text in pairs of marks''
    if not _ENDED.match(text, at) or text[at + 1] in "'’":
        return False
    named = all(word[0].isupper() for word in text[end + 1 : at].split())
    return not (named and text[at + 2].islower())  # a pub 'The Farmers' Arms' on the hill
