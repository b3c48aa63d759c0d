"""Brings real text in 27 European languages onto this machine: package descriptions and manuals of Debian.

    python benchmarks/text.py [FOLDER]      on Debian 12, as any user; fetches 160 MB; three minutes, 1.2 GB of disk

Writes ORIGIN.LANGUAGE.jsonl.zst into the folder, a document a line: id, text, lang (as declared), origin. A document
is a package description, a page of a manual, or a catalogue of messages, and stands once in its language; its
paragraphs are lines. Many pages that are declared as translated are English in part or whole: the text is for
measuring what finds that out. Descriptions follow the licences of their packages: measure with them, do not publish.
"""

import gettext
import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import zstandard

OFFICIAL = "bg cs da de el en es et fi fr ga hr hu it lt lv mt nl pl pt ro sk sl sv"
LANGUAGES = sorted([*OFFICIAL.split(), "ca", "eu", "gl", "nb", "pt-BR"])
"""Declared languages that are kept."""

HELP = "ca cs da de el en-us es et eu fi fr gl hu it nl pl pt pt-br sl sv"
MESSAGES = "bg ga hr lt lv ro"
"""Languages that have next to no manuals: messages of LibreOffice stand in for them."""

PACKAGES = (
    ["gnome-user-docs", "debian-handbook", "installation-guide-amd64"]
    + [f"libreoffice-help-{language}" for language in HELP.split()]
    + [f"libreoffice-l10n-{language}" for language in MESSAGES.split()]
)
PAGES = {
    "libreoffice-help": "usr/share/libreoffice/help/{}/text/**/*.html",
    "gnome-user-docs": "usr/share/help/{}/*/*.page",
    "debian-handbook": "usr/share/doc/debian-handbook/html/{}/*.html",
    "installation-guide": "usr/share/doc/installation-guide-amd64/{}/*.html",
}
"""Where the pages of an origin stand in its packages; {} is the language in the spelling of that origin."""

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
        subprocess.run(["dpkg-deb", "-x", deb, tree], check=True)


def descriptions(lists: Path) -> Iterator[dict[str, str]]:
    """Package descriptions in the languages that they were translated to."""
    for path in sorted(lists.glob("*_i18n_Translation-*")):
        lang = declared(path.stem.rpartition("-")[2].replace("%5f", "_"))
        content = subprocess.run(["/usr/lib/apt/apt-helper", "cat-file", path], capture_output=True, check=True).stdout
        for entry in content.decode().split("\n\n"):
            head = re.match(r"Package: (.+)\nDescription-md5: (.+)\nDescription-\S+: (.*)\n?", entry)
            if head and lang in LANGUAGES:
                name, version, title = head.groups()
                text = "\n".join([title, *unwrapped(entry[head.end() :])])
                yield {
                    "id": f"descriptions/{lang}/{name}/{version[:8]}",
                    "text": text,
                    "lang": lang,
                    "origin": "descriptions",
                }


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
    """Pages of manuals as text."""
    for origin, pattern in PAGES.items():
        before, _, after = pattern.partition("{}")
        for folder in sorted((tree / before).iterdir()):
            lang = declared(folder.name)
            for path in sorted(folder.glob(after.lstrip("/"))) if lang in LANGUAGES else []:
                name = path.relative_to(folder).with_suffix("")
                text = Page(path.read_text(encoding="utf-8")).text
                yield {"id": f"{origin}/{folder.name}/{name}", "text": text, "lang": lang, "origin": origin}


def messages(tree: Path) -> Iterator[dict[str, str]]:
    """Longer messages of a program, a catalogue a document."""
    for path in sorted(tree.glob("usr/lib/libreoffice/program/resource/*/LC_MESSAGES/*.mo")):
        lang = declared(path.parts[-3])
        with path.open("rb") as file:
            found = gettext.GNUTranslations(file)._catalog.values()  # type: ignore[attr-defined]
        long = [" ".join(m.split()) for m in found if len(m) >= MIN_CHARACTERS and not m.startswith("Project-Id")]
        yield {
            "id": f"messages/{lang}/{path.stem}",
            "text": "\n".join(dict.fromkeys(long)),
            "lang": lang,
            "origin": "messages",
        }


def declared(name: str) -> str:
    """The language that a folder's name means: de-DE is de, C is en, pt_BR stays apart from pt."""
    language, _, region = name.replace("_", "-").partition("-")
    return {"C": "en"}.get(name, f"pt-{region}" if (language, region) == ("pt", "BR") else language)


class Page(HTMLParser):
    """Text of a page of HTML or Mallard, a line a paragraph, without what surrounds the page and without listings."""

    BLOCKS = "p div h1 h2 h3 h4 h5 h6 li td th dt dd tr table ul ol title item section note br"
    LEFT_OUT = "head script style header footer nav aside pre info"
    LEFT_OUT_CLASSES = "navheader navfooter docnav toc"

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
            self._parts.append(data.replace("\n", " "))


def write(documents: tuple[dict[str, str], ...], folder: Path) -> dict[str, dict[str, list[dict[str, str]]]]:
    """Writes a file for each origin and language; returns what stands in them."""
    found: dict[str, dict[str, list[dict[str, str]]]] = defaultdict(lambda: defaultdict(list))
    seen = set()
    for document in documents:
        if len(document["text"]) >= MIN_CHARACTERS and (key := (document["lang"], document["text"])) not in seen:
            seen.add(key)
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
        n_documents = sum(map(len, found[lang].values()))
        print(
            f"| {lang} | {n_documents} | "
            + " | ".join(f"{size[o]:.2f}" for o in origins)
            + f" | {sum(size.values()):.2f} |"
        )
    texts = {d["text"] for by_origin in found.values() for members in by_origin.values() for d in members}
    n_bytes = sum(len(text.encode()) for text in texts)
    print(f"\n{len(texts)} different documents, {n_bytes / 1e6:.1f} MB, {len(found)} languages")


if __name__ == "__main__":
    main()
