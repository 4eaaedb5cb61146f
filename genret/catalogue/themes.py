"""Themed queries: a grammar of facets that writes broad multi-word queries, each with several directions.

After the facets of R4T's open-ended queries (arXiv:2603.06397, data section: aesthetic, activity, season,
lifestyle, mood, cultural trend, functional need, hybrid; 2-6 words, themes and not items). Theirs were
written by a language model; these by `TEMPLATES`, so that anyone gets the same. A theme joins one value
of each of two facets: "rainy day in an old library" asks for rain and for books.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from genret.types import InputError

# A value is 1-2 words; a setting comes as a place phrase, and its noun follows the article.
FACETS: dict[str, tuple[str, ...]] = {
    facet: tuple(" ".join(value.split()) for value in values.split(","))
    for facet, values in {
        "aesthetic": """
            cottagecore, art deco, cyberpunk, gothic, minimalist, vintage, rustic, bohemian,
            steampunk, baroque, film noir, nautical, industrial, victorian, pastel, surreal,
            medieval, tropical, grunge, punk, elegant, whimsical, handmade, monochrome, neon,
            dark academia, space age, western, psychedelic, royal""",
        "activity": """
            baking bread, stargazing, distance running, camping, sailing, bird watching, making
            pottery, dancing, playing chess, fishing, cycling, gardening, painting, knitting,
            surfing, rock climbing, travelling alone, studying, moving house, storytelling,
            keeping diaries, horse riding, photography, brewing coffee, martial arts,
            volunteering, treasure hunting, making music, house repair, cooking outdoors,
            skiing, diving, learning languages, raising chickens, meditation, racing cars""",
        "season": """
            rainy day, snowy morning, summer night, autumn evening, spring afternoon, frosty
            night, hot afternoon, foggy dawn, stormy night, harvest day, winter evening, windy
            afternoon, lazy sunday, market day, moonlit night, misty morning, long weekend,
            school holiday, election day, monday morning, sunny morning, icy evening, humid
            night, busy weekday""",
        "mood": """
            cosy, melancholy, dreamy, playful, romantic, nostalgic, peaceful, eerie, tense,
            hopeful, lonely, joyful, mysterious, rebellious, restless, wistful, triumphant,
            sleepy, curious, tender, gloomy, festive, bold, wild, solemn, chaotic, homesick,
            daring, anxious, grateful""",
        "setting": """
            in an old library, in a seaside town, in a mountain cabin, in a crowded market, on a
            night train, in a desert camp, on a city rooftop, in a country kitchen, in an
            abandoned factory, in a botanical garden, in a busy harbour, on a forest trail, in a
            jazz club, in a hospital ward, on a space station, in a ruined castle, in a village
            square, on a river bank, in an artist studio, in a corner cafe, in a dusty attic, in
            a lighthouse, in a ski lodge, in a fishing village, in a temple courtyard, on a
            school playground, in a vineyard, on a subway platform, in a circus tent, in a
            boxing gym, on a dairy farm, in a concert hall, on a coral reef, in a car workshop,
            in a courtroom, in a science laboratory, in an airport lounge, on a pirate ship, on
            a film set, in a swamp""",
        "need": """
            keeping warm, saving money, staying focused, falling asleep, packing light, calming
            nerves, feeding guests, staying safe, healing slowly, starting over, getting
            organised, teaching children, cleaning up, losing weight, making friends, saying
            goodbye, learning fast, travelling cheaply, protecting nature, fixing things,
            growing food, beating boredom, finding courage, keeping secrets""",
        "culture": """
            japanese, mexican, nordic, moroccan, italian, indian, scottish, greek, roman,
            caribbean, turkish, french, ethiopian, korean, persian, hawaiian, egyptian, celtic,
            brazilian, thai, russian, viking, aztec, polynesian""",
        "occasion": """
            wedding, harvest festival, street market, family feast, funeral, homecoming, folk
            tale, carnival, tea party, holy day, dance contest, court banquet, craft fair,
            birthday party, graduation day, masked ball, game night, farewell dinner, street
            parade, first date, job interview, peace treaty, sports final, music festival""",
    }.items()
}

# {facet} stands for a value, {a facet} for the value with its article, or a setting's place phrase.
TEMPLATES: tuple[tuple[str, str, str], ...] = (
    ("season", "setting", "{season} {a setting}"),
    ("need", "setting", "{need} {a setting}"),
    ("occasion", "setting", "{occasion} {a setting}"),
    ("mood", "setting", "{mood} {setting}"),
    ("aesthetic", "setting", "{aesthetic} {setting}"),
    ("culture", "setting", "{culture} {setting}"),
    ("mood", "activity", "{mood} {activity}"),
    ("mood", "season", "{mood} {season}"),
    ("aesthetic", "season", "{aesthetic} {season}"),
    ("aesthetic", "occasion", "{aesthetic} {occasion}"),
    ("culture", "occasion", "{culture} {occasion}"),
    ("aesthetic", "culture", "{aesthetic} meets {culture}"),
    ("activity", "season", "{activity} on {a season}"),
    ("activity", "occasion", "{activity} for {a occasion}"),
    ("need", "activity", "{need} while {activity}"),
)


@dataclass(frozen=True)
class Theme:
    """A query of 2-6 words; facets and values: the two it joins."""

    text: str
    facets: tuple[str, str]
    values: tuple[str, str]


@dataclass(frozen=True, eq=False)
class Themes:
    """themes: Q of them; split: i8[Q], 0 train, 1 validation, 2 test."""

    themes: Sequence[Theme]
    split: np.ndarray

    def unseen(self, part: int = 2) -> frozenset[str]:
        """The facet values in `part` that no training theme holds."""
        held: dict[int, set[str]] = {0: set(), part: set()}
        for theme, its in zip(self.themes, self.split, strict=True):
            held.setdefault(int(its), set()).update(theme.values)
        return frozenset(held[part] - held[0])


def write(count: int = 3_000, *, seed: int = 0) -> Themes:
    """Writes `count` themes, each template its share, drawn and split 8:1:1 by `seed`.

    A pair of values occurs in one theme, so no validation or test theme shares its combination with
    training, nor its text. Of every facet one value is kept for test alone and one for validation
    alone: a theme with either goes there (to test, with both), which fills about two thirds of the
    two tenths; other themes, drawn by `seed`, fill the rest. So some test themes hold a value that
    training lacks, the others only a combination of values that it lacks.
    Raises InputError for a count that the grammar cannot write.
    """
    rng = np.random.default_rng(seed)
    pairs = [_pairs(*template) for template in TEMPLATES]
    share = -(-count // len(TEMPLATES))
    least = min(map(len, pairs))
    if not 10 * len(TEMPLATES) <= count <= least * len(TEMPLATES):
        problem = f"{count} themes of {len(TEMPLATES)} templates"
        raise InputError("count", problem, f"Pass {10 * len(TEMPLATES)} to {least * len(TEMPLATES)}.")
    drawn = [some[i] for some in pairs for i in rng.permutation(len(some))[:share]]
    themes = [drawn[i] for i in rng.permutation(len(drawn))[:count]]

    split = np.zeros(count, np.int8)
    kept: dict[int, set[str]] = {1: set(), 2: set()}
    for values in FACETS.values():
        for part, i in zip((2, 1), rng.permutation(len(values)), strict=False):
            kept[part].add(values[i])
    for part in (1, 2):  # test last: it prevails
        split[[not kept[part].isdisjoint(theme.values) for theme in themes]] = part
    for part in (2, 1):
        free = rng.permutation(np.flatnonzero(split == 0))
        split[free[: max(0, round(count / 10) - np.count_nonzero(split == part))]] = part
    return Themes(themes, split)


def _pairs(first: str, second: str, template: str) -> list[Theme]:
    """Every theme of a template."""
    return [
        Theme(template.format_map(_words(first, a) | _words(second, b)), (first, second), (a, b))
        for a in FACETS[first]
        for b in FACETS[second]
    ]


def _words(facet: str, value: str) -> dict[str, str]:
    """What a template may ask of a value: itself, and itself after an article or as a place phrase."""
    if facet == "setting":
        return {facet: value.split(" ", 2)[2], f"a {facet}": value}
    article = "an" if value[0] in "aeiou" else "a"
    return {facet: value, f"a {facet}": f"{article} {value}"}
