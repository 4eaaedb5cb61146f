"""The pool of the embedded default: English content words, from the data files of the pip package `wordfreq`.

Data: Speer 2022, wordfreq 3.1 (doi:10.5281/zenodo.7199437): every word with its frequency in centibels.
The package is not imported, so none of its dependencies is needed; its data are CC BY-SA 4.0.
`themed` adds the queries of `genret.catalogue.themes`: open-ended retrieval (OAR), no reference sets.
"""

from __future__ import annotations

import gzip
import importlib.metadata
import re
import statistics
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from genret.catalogue import themes
from genret.catalogue.fanout import FanoutTexts
from genret.types import InputError

PACKAGE, PACKAGE_VERSION = "wordfreq", "3.1.1"
INSTALL = f"pip install --no-deps {PACKAGE}=={PACKAGE_VERSION}"
WORDS = 321_180  # in the English list
TOKENS = 32  # more than a word or a theme has

# The rule of `content_words`. Zipf = log10 of occurrences per 10^9 words.
ZIPF = 2.5, 5.5  # rarer words are mostly noise, commoner ones grammar
LETTERS = 4, 14
SHORT_ZIPF = 4.2  # three letters pass from here: sea, ice, hat; below they are mostly initials
NEIGHBOURS = ("de", "es", "fr", "it", "pl")
ENGLISH = 0.8  # Zipf above the median of these languages: names and foreign words are as common there
FORM_ZIPF = 1.6  # of a word's commonest other form: names and initials have none
PART_ZIPF = 4.2  # of both parts of a compound, which needs no other form: sunlight, nightlife
SUFFIXES = tuple(
    "able al ance ency ence ety ful graphy hood ible ing ion ish ism ity ive less ly ment ness ology ous "
    "ship wear".split()
)  # a word of these needs no other form: tenderness

# Grammar, and verbs and adverbs too light to picture.
STOP_WORDS = frozenset(
    """
    able about above according across actually after again against ahead almost along already also although
    always among amongst another anybody anymore anyone anything anyway anywhere apart around aside asked
    away became because become becomes been before began begun behind being below beside besides best better
    between beyond both bring brought came cannot cant come comes could couldnt despite didnt does doesnt
    done dont down during each either else elsewhere enough especially even ever every everybody everyone
    everything everywhere except far fewer first former forth from further furthermore gave give given gives
    goes gone gonna gotta hadnt hasnt have havent held hence here hers herself himself however indeed inside
    instead into isnt itself just keep kept kinda knew know known knows last later latter least less lest let
    lets like likewise made make makes many maybe meanwhile might mine more moreover most mostly much must
    myself namely near nearly neither never nevertheless next nobody none nonetheless nothing notwithstanding
    nowhere often once only onto other others otherwise ought ours ourselves over overall perhaps please plus
    pretty quite ran rather really regarding said same sat seem seemed seen several shall shant she shes
    should shouldnt shown simply since some somebody somehow someone something sometime sometimes somewhat
    somewhere soon sorta still such sure take taken takes than that thats their theirs them themselves then
    thence there thereafter thereby therefore therein thereof these they theyre thing things this those
    though through throughout thus told took toward towards tried under unless unlike until upon used using
    usually various versus very want wanna wants wasnt went were werent what whatever whatsoever when whence
    whenever where whereas whereby wherein wherever whether which whichever while whilst whither whoever whole
    whom whomever whose will with within without won wont would wouldnt yeah yes youd youll your youre yours
    yourself yourselves youve
    add ago all and any are arse ask ass ate bet bit but buy can cut dick due etc fag far few for get got
    had has her him his hit how huh its job led let lot may met mid mrs nor not now off oct dec aug our
    out own pay per pre put rape run sat say see set sit tho the too try ugh use via was way who why won
    yea yet you
    """.split()
)
CRUDE = tuple(
    "asshole bitch cunt douche fagg fuck motherf nigg piss porn pussy rapis shit slut whore".split()
)

# Inflections by their looks, words of their own by sense.
NOT_INFLECTED = frozenset(
    """
    apply costly deadly drawing elderly evening feeling fishing friendly glasses kindly landing lively living
    lonely lovely meaning meeting monthly news nightly saving savings setting stranger surroundings
    understanding weekly
    """.split()
)


def themed(*, size: int = 16_000, count: int = 3_000, seed: int = 0) -> FanoutTexts:
    """The embedded default: `size` content words as the pool, `count` themes as the queries (OAR).

    seed: draws the themes and their split (`themes.write`); the pool does not depend on it.
    Raises InputError where `wordfreq` is missing or truncated, or a size is out of range.
    """
    written = themes.write(count, seed=seed)
    unseen = written.unseen()
    test = [theme for theme, part in zip(written.themes, written.split, strict=True) if part == 2]
    touched = sum(not unseen.isdisjoint(theme.values) for theme in test)
    return FanoutTexts(
        name="words",
        contents=read_words(size),
        queries=[theme.text for theme in written.themes],
        split=written.split,
        max_tokens=TOKENS,
        card={
            "contents": f"the {size} commonest content words of {PACKAGE} {PACKAGE_VERSION}, "
            "by the rule of genret.catalogue.words.content_words",
            "licence": "package Apache-2.0, word data CC BY-SA 4.0",
            "queries": f"{count} themes of two facets each, seed {seed}: see genret.catalogue.themes",
            "split": f"8:1:1; no pair of facet values occurs twice, and {touched} of {len(test)} test themes "
            f"hold one of the {len(unseen)} values that training lacks",
        },
    )


def read_words(size: int = 16_000) -> list[str]:
    """The `size` commonest English content words, commonest first.

    Raises InputError where `wordfreq` is missing or its files are not those published, and for a
    size that the rule of `content_words` cannot fill.
    """
    if size < 1:
        raise InputError("size", f"{size} words", "Pass 1 or more.")
    english = read_zipf("en")
    if len(english) != WORDS:
        raise InputError("words", f"{len(english)} English words, not {WORDS}", INSTALL)
    words = content_words(english, [read_zipf(language) for language in NEIGHBOURS])
    if size > len(words):
        raise InputError("size", f"{size} of {len(words)} words", f"Pass at most {len(words)}.")
    return words[:size]


def content_words(english: Mapping[str, float], others: Sequence[Mapping[str, float]]) -> list[str]:
    """The words of `english` (word -> Zipf, commonest first) that can stand for a thing, act or quality.

    Kept, in the order given, is a word
    - of the letters a-z, `LETTERS` long (three from `SHORT_ZIPF` on), and of a frequency within `ZIPF`;
    - neither in `STOP_WORDS` nor crude;
    - whose Zipf is `ENGLISH` or more above the median of `others`, 1 where a language lacks it;
    - that is no regular inflection (-s, -ed, -ing, -er and -est) of a word at least as common, and no
      adverb in -ly, `NOT_INFLECTED` apart;
    - that has a family: another form of `FORM_ZIPF` or more, or a suffix of `SUFFIXES`, or two parts.
    The third rule and the last keep names, initials and foreign words few.
    """
    kept = []
    for word, zipf in english.items():
        fits = LETTERS[0] <= len(word) <= LETTERS[1] or (len(word) == 3 and zipf >= SHORT_ZIPF)
        if not (fits and ZIPF[0] <= zipf <= ZIPF[1] and word.isascii() and word.isalpha()):
            continue
        if word in STOP_WORDS or word.startswith(CRUDE):
            continue
        elsewhere = statistics.median(other.get(word, 1.0) for other in others)
        if round(zipf - elsewhere, 3) < ENGLISH:  # Zipf comes in hundredths
            continue
        if word not in NOT_INFLECTED and _inflected(word, zipf, english):
            continue
        if word.endswith(SUFFIXES) or _compound(word, english):
            kept.append(word)
        elif any(english.get(form, 0) >= FORM_ZIPF for form in _forms(word)):
            kept.append(word)
    return kept


def _inflected(word: str, zipf: float, english: Mapping[str, float]) -> bool:
    """Is `word` a regular inflection of a word at least as common, or an adverb in -ly?"""

    def derives(suffix: str) -> bool:
        root = word.removesuffix(suffix)
        bases = {root, root + "e", re.sub("i$", "y", root), re.sub(r"(.)\1$", r"\1", root)}
        return root != word and len(root) > 2 and any(english.get(base, 0) >= zipf for base in bases)

    if not word.endswith("ss") and any(map(derives, ("s", "es", "ed", "ing"))):
        return True
    # Degrees come in pairs: with no common "bakest", a "baker" is no degree of "bake".
    pair = {"er": word[:-2] + "est", "est": word[:-3] + "er"}
    if any(english.get(other, 0) >= 2 and derives(suffix) for suffix, other in pair.items()):
        return True
    root = word.removesuffix("ly")
    bases = {root, root.removesuffix("al"), re.sub("i$", "y", root), root + "le"}
    least = ZIPF[0] if len(root) > 3 else zipf  # a short root may be chance: jelly
    return root != word and any(len(base) > 2 and english.get(base, 0) >= least for base in bases)


def _forms(word: str) -> Iterator[str]:
    """Other forms that `word` would have as a noun, verb or adjective of English."""
    stems = [word, word + word[-1]]
    if word.endswith(("e", "y", "s")):
        stems.append(word[:-1])
    if word.endswith("y"):
        stems.append(word[:-1] + "i")
        yield word[:-1]  # stormy
        yield word[:-2]  # foggy
    if word.endswith("f"):
        yield word[:-1] + "ves"
    for stem in stems:
        for suffix in ("s", "es", "ed", "ing", "er", "ly", "ness", "y", "ic", "al"):
            if stem + suffix != word:
                yield stem + suffix
    if word.endswith("s"):
        yield word[:-1]


def _compound(word: str, english: Mapping[str, float]) -> bool:
    """Is `word`, of seven letters or more, two common words of three or more, written as one?"""
    cuts = range(3, len(word) - 2)
    return len(word) > 6 and any(
        english.get(word[:cut], 0) >= PART_ZIPF and english.get(word[cut:], 0) >= PART_ZIPF for cut in cuts
    )


def read_zipf(language: str) -> dict[str, float]:
    """word -> Zipf frequency, commonest first, of wordfreq's large list of a language ("en", "de", ...).

    Raises InputError for a missing package, language or file, and for a truncated or foreign one.
    """
    try:
        distribution = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError as error:
        raise InputError("words", f"{PACKAGE} is not installed", INSTALL) from error
    return read_bands(Path(distribution.locate_file(f"wordfreq/data/large_{language}.msgpack.gz")))


def read_bands(path: Path) -> dict[str, float]:
    """`read_zipf` of a file: gzipped msgpack of a header and, by centibel, the words of that frequency."""
    import msgpack  # flax brings it

    try:
        with gzip.open(path, "rb") as file:
            header, *bands = msgpack.load(file, raw=False)
        if header != {"format": "cB", "version": 1}:
            raise ValueError(f"its header is {header!r}")
        return {word: (900 - band) / 100 for band, words in enumerate(bands) for word in words}
    except (OSError, EOFError, ValueError, TypeError, zlib.error, msgpack.UnpackException) as error:
        raise InputError(str(path), f"not readable as a word list ({error})", INSTALL) from error
