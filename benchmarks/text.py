"""Brings real text in 28 European languages onto this machine: descriptions and manuals in Debian.

    python benchmarks/text.py [FOLDER]      on Debian 12, as any user; fetches 1.4 GB; ten minutes, 6 GB of disk

Writes ORIGIN.LANGUAGE.jsonl.zst into the folder, a document a line: id, text, lang (as declared), origin. A document
is a package description, a page of a manual, or some kilobytes of a program's messages. No text stands twice: one
that several languages have is English. Its paragraphs are lines. Many pages that are declared as translated are
English in part: the text is for measuring what finds that out. It follows the licences of its packages (GPL, LGPL,
GFDL, CC BY-SA, PostgreSQL, Python and others): measure with it, do not publish it.
"""

import gettext
import gzip
import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path

import zstandard

OFFICIAL = "bg cs da de el en es et fi fr ga hr hu it lt lv mt nl pl pt ro sk sl sv"
LANGUAGES = sorted([*OFFICIAL.split(), "ca", "eu", "gl", "nb", "pt-BR"])
"""Declared languages that are kept."""

IN_LANGUAGES = {
    "libreoffice-help-{}": "ca cs da de el en-us es et eu fi fr gl hu it nl pl pt pt-br sl sv",
    "libreoffice-l10n-{}": "bg ca cs da de el es et eu fi fr ga gl hr hu it lt lv nb nl pl pt pt-br ro sk sl sv",
    "manpages-{}": "cs da de el es fi fr hu it nb nl pl pt-br ro sv",
    "debian-reference-{}": "de en es fr it pt pt-br",
    "developers-reference-{}": "de fr it",
    "aptitude-doc-{}": "cs en es fi fr it nl",
    "gimp-help-{}": "ca cs de el en es fi fr it lt nl pt-br ro sv",
    "lilypond-doc-html-{}": "ca cs de es fr hu it nl pt",
    "manpages-{}-dev": "cs da de es fr it nl pl pt-br",
}
"""Packages by language; where there are next to no manuals, messages stand in for them."""

MANUALS = """
apt debhelper debian-handbook developers-reference devscripts dpkg dpkg-dev gnome-user-docs installation-guide-amd64
lilypond-doc-html linux-doc-6.1 man-db manpages manpages-dev passwd postgresql-doc-15 python3.11-doc accerciser
anjuta-common atril-common brasero-common cervisia cheese-common deja-dup engrampa-common eog eom-common
epiphany-browser-data evince-common evolution-common file-roller gedit-common gnome-applets-data gnome-boxes
gnome-calculator gnome-devel-docs gnome-dictionary gnome-system-monitor gnome-terminal-data gnote gthumb-data juk
kaddressbook kalarm kalzium-data kate5-data kdenlive-data khelpcenter kile-doc kleopatra kmail kmplot kmymoney-common
konqueror konversation-data krusader kstars-data kturtle mate-applets-common mate-calc-common mate-panel-common
mate-power-manager-common mate-system-monitor-common mate-terminal-common mate-utils-common okular orca
partitionmanager pitivi pluma-common seahorse shotwell-common skrooge-common tellico-doc totem-common umbrello-data
wesnoth-1.16-data zenity-common
"""
"""Packages that hold manuals in English, or in many languages; of desktop programs those with the most text."""

PACKAGES = [name.format(language) for name, languages in IN_LANGUAGES.items() for language in languages.split()]
PACKAGES += MANUALS.split()
PAGES = {
    "libreoffice-help": ["usr/share/libreoffice/help/{}/text/**/*.html"],
    "gnome": ["usr/share/help/{}/*/*.page", "usr/share/help/{}/*/*.docbook"],
    "kde": ["usr/share/doc/HTML/{}/*/*.docbook"],
    "debian-handbook": ["usr/share/doc/debian-handbook/html/{}/*.html"],
    "installation-guide": ["usr/share/doc/installation-guide-amd64/{}/*.html"],
    "debian-reference": ["usr/share/debian-reference/*.{}.html"],
    "aptitude": ["usr/share/doc/aptitude/html/{}/*.html"],
    "developers-reference": ["usr/share/developers-reference/{}/*.html", "usr/share/developers-reference/*.html"],
    "gimp": ["usr/share/gimp/2.0/help/{}/*.html"],
    "lilypond": [f"usr/share/doc/lilypond/html/Documentation/*/*{end}" for end in (".{}.html", ".html")],
    "man": ["usr/share/man/{}/man*/*.gz", "usr/share/man/man*/*.gz"],
    "code": [f"usr/share/doc/{x}/*.html" for x in ("postgresql-*/html", "python3.11/html/*", "linux-doc-6.1/html/**")],
}
"""Where the pages of an origin stand in its packages; {} is the language, English without it."""

MESSAGES_A_PAGE = 40

LEFT_PACKED = [f"--exclude={x}" for x in ("translations", "*.png", "*.jp*g", "*.gif", "*.svg*", "*.ogg", "*.pdf")]
"""What of a package is not unpacked: most of its bytes, and pages of Linux in other languages."""

MIN_CHARACTERS = 60
"""A shorter document is a heading, a shorter message a label of a button."""


def main() -> None:
    default = os.environ.get("MARATHON_SCRATCH", "~/.cache")
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else f"{default}/marathon-text").expanduser().resolve()
    tree, lists = folder / "packages/tree", folder / "packages/lists"
    bring(tree, lists)
    documents = (*descriptions(lists), *pages(tree), *messages(tree))
    tell(write(documents, folder))


def bring(tree: Path, lists: Path) -> None:
    """Downloads descriptions and packages with apt into folders of their own, and unpacks; installs nothing."""
    debs = tree.parent / "debs"
    for path in (tree, debs, lists / "partial"):
        path.mkdir(parents=True, exist_ok=True)
    # Without commas only, no spaces: apt takes the rest of the list for nothing.
    languages = ",".join(language.replace("-", "_") for language in LANGUAGES)
    apt = ["apt-get", "-q", "-o", f"Dir::State::lists={lists}", "-o", f"Dir::Cache={tree.parent}"]
    apt += ["-o", f"Acquire::Languages={languages}", "-o", "APT::Sandbox::User=root"]
    subprocess.run([*apt, "update"], check=True)
    subprocess.run([*apt, "download", *PACKAGES], check=True, cwd=debs)
    for deb in sorted(debs.glob("*.deb")):
        content = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", deb], stdout=subprocess.PIPE)
        subprocess.run(["tar", "-x", "-C", tree, *LEFT_PACKED], stdin=content.stdout, check=True)


def descriptions(lists: Path) -> Iterator[dict[str, str]]:
    """Package descriptions in the languages that they were translated to."""
    for path in sorted(lists.glob("*_i18n_Translation-*")):
        lang = declared(path.stem.rpartition("-")[2].replace("%5f", "_"))
        content = subprocess.run(["/usr/lib/apt/apt-helper", "cat-file", path], capture_output=True, check=True).stdout
        for entry in content.decode().split("\n\n"):
            head = re.match(r"Package: (.+)\nDescription-md5: (.+)\nDescription-\S+: (.*)\n?", entry)
            if head and lang in LANGUAGES:
                name, version, title = head.groups()
                paragraphs = (title, *unwrapped(entry[head.end() :]))
                yield document("descriptions", lang, f"{name}/{version[:8]}", "\n".join(paragraphs))


def unwrapped(lines: str) -> Iterator[str]:
    """Paragraphs of a description: a line that holds a dot ends one, list items and indented lines are their own."""
    paragraph = ""
    for line in [*lines.split("\n"), " ."]:
        if line == " ." or re.match(r"  | ?[-*+•·] ", line):
            if paragraph:
                yield paragraph
            paragraph = ""
        if line != " .":
            paragraph = f"{paragraph} {line.strip()}".strip()


def pages(tree: Path) -> Iterator[dict[str, str]]:
    """Pages of manuals as text, a handbook in one file by its chapters and sections."""
    for origin, patterns in PAGES.items():
        languages: dict[str, str] = {}
        for pattern in patterns:
            shape = re.escape(pattern).replace(r"\*\*/", "(?:.+/)?").replace(r"\*", "[^/]*")
            shape = shape.replace(r"\{\}", r"([a-zA-Z]{1,3}(?:[-_][a-zA-Z]+)?)")
            for path in sorted(tree.glob(pattern.replace("{}", "*"))):
                name = str(path.relative_to(tree))
                if found := re.fullmatch(shape, name):
                    languages.setdefault(name, declared(found[1]) if "{}" in pattern else "en")
        for name, lang in languages.items():
            for k, text in enumerate(texts_of(tree / name) if lang in LANGUAGES else []):
                yield document(origin, lang, f"{name}/{k}", text)


def texts_of(path: Path) -> Iterator[str]:
    """Texts of a file: a manual page, a page of HTML or Mallard, or the sections of a handbook in DocBook."""
    if path.suffix == ".gz":
        yield plain(gzip.decompress(path.read_bytes()).decode(errors="replace"))
    else:
        source = re.sub(r"<!DOCTYPE[^>]*\[.*?\]>", "", path.read_text("utf-8", "replace"), flags=re.DOTALL)
        for section in re.split(r"(?=<(?:chapter|appendix|sect1)\b)", source):
            yield Page(section).text


def plain(source: str) -> str:
    """Text of a manual page in roff, without listings and tables; none of a page that is written in mdoc."""
    text, until = "", ""
    for line in [] if "\n.Dd " in source else source.split("\n"):
        request = re.match(r"[.']\s*([^\s\\]*)\s*(.*)", line)
        name, rest = request.groups() if request else ("", line)
        if until and name not in (until, "SH", "SS"):
            continue
        until = SET_AS_IS.get(name, "")
        if name in ENDS or not line.strip():
            text += "\n"
        if request:
            words = [(quoted or word).replace('""', '"') for quoted, word in re.findall(WORDS, rest)]
            rest = ("" if len(name) == 2 and name in ALTERNATE else " ").join(words) if name in WITH_TEXT else ""
        text += f" {rest}" + ("\n" if name in ("SH", "SS") else "")
    for escape, replacement in ESCAPES:
        text = re.sub(escape, replacement, text)
    return "\n".join(line for line in (" ".join(line.split()) for line in text.split("\n")) if line)


def messages(tree: Path) -> Iterator[dict[str, str]]:
    """Longer messages of programs, each once in its language; so many a document as make a page."""
    seen: set[tuple[str, str]] = set()
    for path in sorted(tree.glob("usr/**/LC_MESSAGES/*.mo")):
        lang = declared(path.parts[-3])
        with path.open("rb") as file:
            found = gettext.GNUTranslations(file)._catalog.values() if lang in LANGUAGES else ()  # type: ignore
        long = [" ".join(m.split()) for m in found if len(m) >= MIN_CHARACTERS and not m.startswith("Project-Id")]
        new = [m for m in dict.fromkeys(long) if (lang, m) not in seen]
        seen.update((lang, m) for m in new)
        for k in range(0, len(new), MESSAGES_A_PAGE):
            yield document("messages", lang, f"{path.stem}/{k}", "\n".join(new[k : k + MESSAGES_A_PAGE]))


def document(origin: str, lang: str, name: str, text: str) -> dict[str, str]:
    """A line of a file."""
    return {"id": f"{origin}/{lang}/{name}", "text": text, "lang": lang, "origin": origin}


def declared(name: str) -> str:
    """The language that a folder's name means: de-DE is de, C is en, pt_BR stays apart from pt."""
    language, _, region = name.replace("_", "-").partition("-")
    return {"C": "en"}.get(name, f"pt-{region}" if (language, region) == ("pt", "BR") else language)


# Roff, the markup of manual pages: macros that hold text, those of them that join their words, those that end a
# paragraph, those that begin what is set as it stands and what ends it, words of a macro, escapes.
ALTERNATE = ["BI", "BR", "IB", "IR", "RB", "RI"]
WITH_TEXT = [*ALTERNATE, "B", "I", "R", "SM", "SB", "SH", "SS", "IP", "UR", "UE", "MT", "ME"]
ENDS = ("SH", "SS", "PP", "P", "LP", "TP", "TQ", "IP", "HP", "RS", "RE", "br", "sp", "Sp")
SET_AS_IS = {"nf": "fi", "EX": "EE", "Vb": "Ve", "TS": "TE", "EQ": "EN", "de": ".", "ig": "."}
WORDS = r'"((?:[^"]|"")*)"?|((?:\\.|[^\s"])\S*)'
SIGNS = {"aq": "'", "bu": "•", "dq": '"', "em": "—", "en": "–", "ha": "^", "lq": "“", "rq": "”", "cq": "’", "ti": "~"}
ESCAPES: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    (r"\\[fFmM*nk](?:\[[^]]*\]|\(..|.)", ""),
    (r'\\["#].*|\\s(?:[-+]?\d+|\[[^]]*\])', ""),
    (r"\\[hvwlLDXZNbo]'[^']*'", ""),
    (r"\\(?:\[(.+?)\]|\((..))", lambda found: SIGNS.get(found[1] or found[2], "")),
    (r"\\[&|^,/)%:!acdtp{}]", ""),
    (r"\\[ ~0]", " "),
    (r"\\(.)", lambda found: {"e": "\\"}.get(found[1], found[1])),
]


class Page(HTMLParser):
    """Text of a page of HTML or Mallard, a line a paragraph, without what surrounds the page and without listings."""

    BLOCKS = "p div h1 h2 h3 h4 h5 h6 li td th dt dd tr table ul ol title item section note br para simpara term entry"
    LEFT_OUT = "head script style header footer nav aside pre info bookinfo programlisting screen literallayout"
    LEFT_OUT_CLASSES = "navheader navfooter docnav toc related sphinxsidebar footer nav_table"
    RCDATA_CONTENT_ELEMENTS = ()  # type: ignore[misc]  # a title in DocBook holds tags

    def __init__(self, source: str) -> None:
        super().__init__()
        self._blocks, self._tags_left_out = set(self.BLOCKS.split()), set(self.LEFT_OUT.split())
        self._classes_left_out = set(self.LEFT_OUT_CLASSES.split())
        self._parts: list[str] = []
        self._left_out, self._depth = "", 0
        self.feed(source)
        self.close()
        lines = (" ".join(line.split()) for line in "".join(self._parts).split("\n\n\n"))
        self.text = "\n".join(line for line in lines if line)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if not self._left_out:
            classes = (dict(attrs).get("class") or "").split()
            is_left_out = tag in self._tags_left_out or self._classes_left_out.intersection(classes)
            self._left_out = tag if is_left_out else ""
            self._parts += ["\n\n\n"] if tag in self._blocks else []
        self._depth += tag == self._left_out

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._parts += ["\n\n\n"] if tag in self._blocks else []

    def handle_endtag(self, tag: str) -> None:
        self._depth -= tag == self._left_out
        if not self._depth:
            self._left_out = ""
        self._parts += ["\n\n\n"] if tag in self._blocks else []

    def handle_data(self, data: str) -> None:
        if not self._left_out:
            # An entity of DocBook is the name of a program: its own name stands in for it.
            self._parts.append(re.sub(r"&([\w.-]+);", r"\1", data).replace("\n", " "))


def write(documents: tuple[dict[str, str], ...], folder: Path) -> dict[str, dict[str, list[dict[str, str]]]]:
    """Writes a file for each origin and language; returns what stands in them."""
    found: dict[str, dict[str, list[dict[str, str]]]] = defaultdict(lambda: defaultdict(list))
    seen = set()
    for document in sorted(documents, key=lambda document: document["lang"] != "en"):
        text = document["text"]
        if len(text) >= MIN_CHARACTERS and "\ufffd" not in text and text not in seen:
            seen.add(text)
            found[document["lang"]][document["origin"]].append(document)
    for lang, origins in found.items():
        for origin, members in origins.items():
            lines = "".join(json.dumps(d, ensure_ascii=False) + "\n" for d in members)
            path = folder / f"{origin}.{lang}.jsonl.zst"
            beside = path.with_suffix(".part")
            beside.write_bytes(zstandard.compress(lines.encode(), 6))
            beside.replace(path)
    return found


def tell(found: dict[str, dict[str, list[dict[str, str]]]]) -> None:
    """Prints documents and MB (UTF-8) by language and origin."""
    origins = sorted({origin for by_origin in found.values() for origin in by_origin})
    print("| lang | documents | " + " | ".join(origins) + " | MB |\n|" + "---|" * (len(origins) + 3))
    for lang in sorted(found):
        size = {o: sum(len(d["text"].encode()) for d in found[lang][o]) / 1e6 for o in origins}
        cells = " | ".join(f"{n:.2f}" for n in (*size.values(), sum(size.values())))
        print(f"| {lang} | {sum(map(len, found[lang].values()))} | {cells} |")
    texts = {d["text"] for by_origin in found.values() for members in by_origin.values() for d in members}
    n_bytes = sum(len(text.encode()) for text in texts)
    print(f"\n{len(texts)} different documents, {n_bytes / 1e6:.1f} MB, {len(found)} languages")


if __name__ == "__main__":
    main()
