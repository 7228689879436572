"""English for emoji names: from `:man_red_hair:` to "a man with red hair".

The names of the `emoji` package are labels, not phrases. A few general rules and a short list of exceptions
turn them into what a caption would say; a rule that helps one emoji alone is a line in `_RENAMED`.
"""

import re

# Labels that name no thing: symbols called by their meaning, adjectives, and names cut short.
_RENAMED = {
    "copyright": "copyright sign",
    "construction": "construction barrier",
    "dashing away": "dash of wind",
    "divide": "division sign",
    "dizzy": "dizzy symbol",
    "flower playing cards": "flower playing card",
    "foggy": "foggy city",
    "high voltage": "high voltage sign",
    "infinity": "infinity sign",
    "information": "information sign",
    "kaaba": "Kaaba",
    "litter in bin sign": "litter bin sign",
    "locked": "closed padlock",
    "locked with key": "closed padlock with a key",
    "locked with pen": "closed padlock with a pen",
    "milky way": "Milky Way",
    "minus": "minus sign",
    "mount fuji": "Mount Fuji",
    "multiply": "multiplication sign",
    "om": "om symbol",
    "plus": "plus sign",
    "prohibited": "prohibition sign",
    "radioactive": "radioactivity sign",
    "biohazard": "biohazard sign",
    "registered": "registered trademark sign",
    "restroom": "restroom sign",
    "rolling on the floor laughing": "face rolling on the floor laughing",
    "star-struck": "star-struck face",
    "Tokyo tower": "Tokyo Tower",
    "trade mark": "trademark sign",
    "unlocked": "open padlock",
    "warning": "warning sign",
    "wireless": "wireless symbol",
}
_ZODIAC = re.compile(
    "Aries|Taurus|Gemini|Cancer|Leo|Virgo|Libra|Scorpio|Ophiuchus|Sagittarius|Capricorn|Aquarius|Pisces"
)
_FAMILY = {"adult", "boy", "child", "girl", "man", "woman"}
_PROPER = {"Mount Fuji", "Mrs. Claus", "Mx Claus", "Santa Claus", "Tokyo Tower"}
_DEFINITE = {"Kaaba", "Milky Way", "Statue of Liberty", "sun"}
# Nouns that take no article in the singular; compared with the last word of the noun phrase.
_MASS = re.compile(
    "ZZZ|bacon|badminton|baggage|bowling|bread|broccoli|butter|camping|claim|control|cooking|"
    "coral|custard|customs|dango|falafel|fire|fog|food|garlic|hockey|ice|lacrosse|liquid|"
    "lowercase|luggage|mate|meat|money|oden|pong|popcorn|rice|sake|salt|shortcake|soap|"
    "spaghetti|sushi|tennis|thread|uppercase|water|wood|yarn"
)
_PLURAL = {"children", "men", "people", "skis", "women"}
_SINGULAR_S = {"leftwards", "rhinoceros", "rightwards"}
# Where the noun phrase ends and what is said about it begins ("person | lifting weights").
_MODIFIER = re.compile(
    r" (?:with|without|of|on|in|and|at|under|over|behind|for|up|down|pointed|tilted|\w+ing)\b.*"
)
# A vowel sound: letters read by their names (an SOS button, an x-ray), or a written vowel that is spoken.
_VOWEL_SOUND = re.compile(
    r"(?:[AEFHILMNORSX][A-Z]?|ATM|SOS)(?![A-Za-z!])|[xX]-ray|hour"
    r"|(?!one\b|uni(?!m)|eu|ewe|U\.S)[aeiouAEIOU]"
)
_COUNTRY_WITH_THE = re.compile(
    r".*(?:Emirates|Islands|Kingdom|Lands|Nations|Netherlands|Republic|States|Territories|Territory|Union)$"
    r"|Bahamas$|Comoros$|Gambia$|Isle of Man$|Maldives$|Philippines$"
)


def is_flag_of_a_place(emoji: str) -> bool:
    """Whether `emoji` is spelled with regional indicators, or as a black flag with a region's tags."""
    first, last = ord(emoji[0]), ord(emoji[-1])
    return 0x1F1E6 <= first <= 0x1F1FF or (first == 0x1F3F4 and last == 0xE007F)


def concept_of(emoji: str, name: str) -> str:
    """What an emoji shows, as a noun phrase without an article.

    Args:
      emoji: the characters.
      name: its English name in the `emoji` package, such as `:red_apple:`.

    Returns:
      for example "red apple", "flag of Japan", "man with red hair".
    """
    text = name.strip(":").replace("_", " ").replace("’", "'").replace("&", "and")
    if is_flag_of_a_place(emoji):
        return "flag of " + ("the " if _COUNTRY_WITH_THE.match(text) else "") + text
    if _ZODIAC.fullmatch(text):
        return f"zodiac sign {text}"
    if text.startswith("no ") and not text.startswith("no one"):
        return f"{text} sign"
    if text == "no one under eighteen":
        return "sign for no one under eighteen"
    text = re.sub(r"^(.*)(?: o'clock|-thirty)$", r"clock showing \g<0>", text)
    text = re.sub(r" (\w+) hair$", r" with \1 hair", text)
    text = re.sub(r"^(\w+) beard$", r"\1 with a beard", text)
    text = re.sub(r"^(\w+) bald$", r"bald \1", text)
    return _name_the_members(_RENAMED.get(text, text))


def _name_the_members(text: str) -> str:
    """Say "family of a man, a woman and a boy" for "family man woman boy"; kisses and couples alike."""
    found = re.fullmatch(r"(family|kiss|couple with heart) (.*)", text)
    if not found or not _FAMILY.issuperset(found[2].split()):
        return text
    members = [with_article(member) for member in found[2].split()]
    listed = " and ".join(filter(None, [", ".join(members[:-1]), members[-1]]))
    return f"{found[1]} of {listed}"


def with_article(phrase: str) -> str:
    """Put "a", "an", "the" or nothing before a noun phrase.

    Plurals, substances and proper names take no article; the one of its kind takes "the".
    """
    noun = _MODIFIER.sub("", phrase, count=1)
    last_word = noun.split()[-1]
    if phrase.startswith(("flag of ", "keycap ", "zodiac sign ")) or {phrase, noun} & _DEFINITE:
        return f"the {phrase}"
    if phrase in _PROPER or _MASS.fullmatch(last_word) or _is_plural(last_word):
        return phrase
    return ("an " if _VOWEL_SOUND.match(phrase) else "a ") + phrase


def _is_plural(word: str) -> bool:
    return word in _PLURAL or (
        word.endswith("s") and not word.endswith(("is", "ss", "us", "'s")) and word not in _SINGULAR_S
    )


def caption_of(style: str, concept: str) -> str:
    """Caption a picture: "an openmoji of a red apple"."""
    return f"{with_article(style)} of {with_article(concept)}"
