"""What follows a mention and says something of it: "knife: no", "the belly is covered"."""

import re

from vldnp.answers import lexicon as lex


def predicate(rest: list[str], more: bool, bare: bool) -> tuple[bool | None, int]:
    """What `rest`, between a mention and the next, says of it, and how many tokens say it.

    Args:
        more: another mention follows.
        bare: the mention is called bare.
    """
    skipped = 0
    if rest[:1] and rest[0] in {"of", "in", "on"}:  # "the breasts of the woman are covered"
        for n, token in enumerate(rest[:6]):
            if token in lex.COPULAS:
                skipped = n
                break
            if not token.isalnum():
                break
    elif rest[1:2] and rest[1] in lex.COPULAS and rest[0].isalpha() and len(rest) > 2:
        skipped = int(rest[0] not in lex.COPULAS | lex.NEGATORS)  # "the knife blade is not visible"
    elif rest[:1] == [","] and rest[1:2] and rest[1] in lex.HIDDEN:
        skipped = 1  # "her feet, covered by socks"
    rest = rest[skipped:]
    if rest in ([",", "no"], [",", "none"]) and not more:
        return True, skipped + 2
    first = rest[0] if rest else ""
    if first in {":", "=", "("}:
        n = next((n for n, token in enumerate(rest) if token not in lex.BEFORE_VALUES), 0)
        denied = _value(rest[n:], strict=first == "(", more=more)
        return denied, skipped + n + 3 if denied is not None else 0
    denied = _state(rest, more, bare)
    return denied, skipped + 4 if denied is not None else 0


def value_denies(rest: list[str]) -> bool:
    """Whether a value, with or without its colon, says no."""
    rest = [token for token in rest if token not in {":", "="}]
    return _value(rest) is True


def _value(rest: list[str], strict: bool = False, more: bool = False) -> bool | None:
    first, second, *_ = [*rest, "", ""]
    if first[:1].isdigit():
        share = "." in first or first.endswith("%")
        value = float(re.match(r"\d+(\.\d+)?", first.replace(",", "."))[0])
        value = value / 100 if first.endswith("%") else value
        return True if value == 0 or (share and value < 0.5) else None
    if first in {"no", "none", "nope"}:
        if second not in {"(", ","} and set(rest[1:4]) & lex.GARMENTS:
            return False  # "belly: no shirt"
        attached = second in {"(", ")", ",", *lex.PERCEIVED} or (second == "" and not more)
        if second in {"other", "others", "of"} or (strict and not attached):
            return None  # "skull (no knife)"
        return True
    if (first, second) == ("n", "a"):
        return True
    if first in lex.DENYING_VALUES:
        return True
    return _state(rest, more, False)


def _state(rest: list[str], more: bool, bare: bool) -> bool | None:
    """What a predicate says of its subject: "is not visible", "are covered by …", "in boots"."""
    first, second, third, *_ = [*rest, "", "", ""]
    if first in {"no", "none", "false"}:  # "knife none"
        return True if second in {"", ","} and not (second == "" and more) else None
    if first in {"not", "cannot", "never"}:
        if second in lex.HIDDEN:
            return False
        return True if second in lex.PERCEIVED or second == "clearly" else None
    if first in lex.COPULAS:
        while second in {"also", "therefore", "thus", "hence", "all", "both", "still"}:
            rest = [first, *rest[2:]]
            first, second, third, *_ = [*rest, "", "", ""]
        if second in {"not", "never", "neither", "cannot"}:
            if third in lex.HIDDEN or third in {"fully", "completely", "entirely"}:
                return False
            if third == "" and more:  # "a knife that is not bloody"
                return None
            seen = third in lex.PERCEIVED | {"", ",", "in", "on", "within", "part", "captured"}
            seen = seen or third.endswith("ly")
            return True if seen or first in {"do", "does", "did", "has", "have"} else None
        if second in {"cut", "cropped", "out", "off", "outside", "unclear", "nowhere", "neither"}:
            return True
        rest = rest[1:]
    first = rest[0] if rest else ""
    if first in {"cut", "cropped", "out", "outside", "off"}:
        return bool(set(rest[1:4]) & {"off", "out", "frame", "view", "picture", "image"}) or None
    while rest and (rest[0].endswith("ly") or rest[0] in {"all", "both", "also", "well"}):
        if rest[0] in lex.PARTLY:
            return None
        rest = rest[1:]
    first, second, *_ = [*rest, "", ""]
    if first in lex.ABSENT:
        return True
    worn = bool(set(rest[1:6]) & lex.GARMENTS)
    if first in {"in", "inside", "under", "underneath", "beneath", "behind", "within", "wearing"}:
        return True if worn and not bare and not set(rest) & {",", "and", "("} else None
    if first in lex.HIDDEN:
        if more and len(rest) == 1:  # "a blood covered knife"
            return None
        by = worn or set(rest[1:6]) & {"hair", "hands", "hand", "arms", "arm"}
        # "Covered in blood" is there to be seen, "covered with a shirt" is not.
        return None if first == "covered" and second in {"in", "with"} and not by else True
    return None
