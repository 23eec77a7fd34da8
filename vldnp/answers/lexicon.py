"""The words and marks by which an answer affirms and denies, and how a text becomes tokens."""

import re
import unicodedata


def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


NEGATORS = _set(
    "no not none without never cannot cant dont doesnt isnt arent neither nor nothing zero 0 lack "
    "lacks lacking absence unable devoid nobody nope fail fails failed unclear unlikely unsure "
    "doubt impossible nowhere"
)
"""These deny what follows them in their clause."""
HARMLESS = _set("only just merely simply doubt question less fewer more wonder")
"""A negator before these denies nothing: "not only", "no doubt", "not to mention"."""
ADJECTIVES = _set("no without zero 0")
"""Those that deny a thing and not what is said of it."""
PLACES = _set("on near beside around")
CONTRASTS = _set(
    "but however though although except besides apart aside yet only just instead while whereas "
    "yes unlike exception"
)
"""These end a denial: "no knife but a skull"."""
EXCEPTIONS = _set("except but excluding without minus besides apart exception")
CLAUSE_STARTS = _set("there i it this that he she they we you maybe perhaps possibly probably with")
"""After a comma or "and", these begin a new clause, which ends a denial."""
CONSEQUENCES = _set("so thus leaves")
NOT_CLAUSES = _set("including containing involving regarding concerning being clothing anything")
"""Words in -ing that begin no new clause."""
CONCESSIONS = _set("while although though whereas")
"""In their sentence, a comma and a determiner end a denial: "although there is no …, the …"."""
DETERMINERS = _set("a an the his her its their my")
SOME = _set("a an one two three four five several some many 1 2 3 4 5 6 7 8 9")
VERBS = _set("holds has have is are carries wields stands lies sits points shows wears aims")
COPULAS = _set(
    "is are was were can could may might would will do does did has have be being remain remains "
    "appear appears seem seems stay stays"
)
DENYING_VALUES = _set(
    "no none false absent missing never null nil nope unknown unclear negative unlikely low"
)
ABSENT = _set("absent missing nowhere invisible unseen undetected")
HIDDEN = _set("covered hidden concealed obscured clothed occluded dressed shod censored")
COVERING = _set(
    "cover covers covering hide hides hiding conceal conceals concealing obscure obscures "
    "obscuring mask masks masking"
)
PARTLY = _set("partially partly slightly barely half semi somewhat scarcely hardly")
GARMENTS = _set(
    "clothes clothing clothed garment garments attire outfit shirt shirts tshirt top tops blouse "
    "sweater jacket coat dress skirt pants trousers shorts jeans bra bras underwear panties briefs "
    "lingerie bikini swimsuit swimwear towel blanket sheet shoe shoes boot boots sock socks "
    "sandals sneakers heels slippers footwear stockings tights gloves robe cloth fabric cover "
    "covers covering coverings sleeve sleeves apron leggings hoodie suit uniform"
)
"""What covers a body: denying it denies nothing else ("no shirt, belly visible")."""
UNDER = _set("in inside under underneath beneath behind within by with")
PERCEIVED = _set(
    "visible seen present found shown detected depicted be apparent discernible identifiable "
    "identified displayed there evident exposed observed recognizable"
)
BEFORE_VALUES = _set(": = ( is confidence score probability prob conf")
JOINTS = _set(", and or nor a an the any his her their its both bare")
YES = _set("yes yep yeah correct")
SHORT_ANSWER = _set("it they there i is are does do can cannot not")
ASKING = _set("is are do does did can could which what any how has have")
MANY = _set("them these those above list listed mentioned parts items things symbols options")
FILLERS = _set(
    "of on from the list listed mentioned named given bare body restricted nine ten twelve 9 12 "
    "parts items things symbols weapons objects options them these those above"
)
LOOKED = _set("found find see saw spotted detected noticed are were")
MALE = _set("man men boy boys guy guys male males his he him gentleman father")
FEMALE = _set("woman women girl girls lady ladies female females her she mother")


# Tokens: words, numbers, and the marks that mean something.

_TOKEN = re.compile(r"\d+(?:[.,]\d+)*%?(?![^\W_])|[^\W_]+|[.!?;\n\]}()]|,|[:=]")
ENDS = frozenset(".!?;\n]}")
_BULLET = re.compile(r"^\s*(?:[-*+•◦▪·–]+\s+|\(?\w{1,2}[.)]\s+)")
_NO_MARK, _YES_MARK = "❌✗✘✖🚫❎☐⬜⛔", "✅✓✔☑☒"
_MARKS = re.compile(f"[{_NO_MARK}{_YES_MARK}]")
_BOXES = re.compile(
    r"<box>.*?</box>|<\|box_start\|>.*?<\|box_end\|>|<loc\d+>|<[^<>\n]{1,40}>"
    r"|[\[(]\s*-?\d[\d.]*(?:\s*,\s*-?\d[\d.]*)+\s*[\])]"
)


def tokens(text: str) -> list[str]:
    """Words, numbers and marks of one line or more; pictures' coordinates are left out."""
    text = unicodedata.normalize("NFKC", text).casefold().replace("’", "'").replace("\ufe0f", "")
    text = re.sub(r"\bcan't\b|\bcan not\b", "cannot", _BOXES.sub(" ", text))
    text = re.sub(r"n't\b", " not", text)
    text = re.sub(r"\b(?:e\.g|i\.e)\.", " such as ", text)
    text = re.sub(r"(?<=\d)\s+%", "%", text)
    text = re.sub(r"-(?=covered|soaked|stained)", "", text)
    text = re.sub(r"\[\s\](?=[^\S\n]*\w)", "☐", text)
    text = re.sub(r"\[[xv✓✔]\](?=[^\S\n]*\w)", "☑", text)
    found: list[str] = []
    for line in text.split("\n"):
        found += [*_TOKEN.findall(_plain(line)), "\n"]
    return found[:-1]


def words(text: str) -> tuple[str, ...]:
    """The words of a written form, as they are compared."""
    return tuple(token for token in tokens(text) if token[0].isalnum())


def _plain(line: str) -> str:
    """A line without bullets, with ticks and tables put into words."""
    if line.count("|") > 1:
        return _row(line)
    bare = _BULLET.sub("", line)
    if bare[:1] and _MARKS.match(bare.lstrip()):  # "☑ knife ☐ skull"
        bare = re.sub(f"[{_NO_MARK}]", " . no ", bare)
        bare = re.sub(f"[{_YES_MARK}]", " . yes ", bare)
    else:  # "knife ✓ skull ✗"
        bare = re.sub(f"[{_NO_MARK}]", " : no . ", bare)
        bare = re.sub(f"[{_YES_MARK}]", " : yes . ", bare)
    if re.match(r"\s*(#+\s.*|\*\*[^*:]+\*\*)\s*$", line) and not _MARKS.search(line):
        bare += ":"
    # "knife - none" reads like "knife: none".
    return re.sub(r"\s[-–—]+\s|[–—→]|->|=>", " : ", bare)


def _row(line: str) -> str:
    """A row of a table: every cell with each verdict of the row."""
    cells = [_MARKS.sub(lambda m: "no" if m[0] in _NO_MARK else "yes", c) for c in line.split("|")]
    cells = [cell.strip() for cell in cells if cell.strip(" -:*`")]
    verdict = re.compile(r"\W*(no|yes|none|not \w+|absent|present|visible|true|false|0|n/a)\W*$")
    verdicts = [cell for cell in cells if verdict.match(cell)]
    return " . ".join(f"{c} : {v}" for c in cells if c not in verdicts for v in verdicts or [""])
