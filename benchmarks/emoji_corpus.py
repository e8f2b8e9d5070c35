"""Emoji of six designs with their names as captions, 64×64 on white: what examples/emoji.safetensors learns from.

    pip install resvg-py==0.5.0                              # npm is needed too
    python benchmarks/emoji_corpus.py emoji

Writes ``emoji/training/DESIGN/NAME.png``, NAME.txt beside each, with a caption a line, and ``emoji/judge/NAME.png``, of
the design that training never sees. Equal versions give equal bytes; the folder is there whole or not at all.

Twemoji is held out: it has every emoji, all in one hand, and no other design of its makers is in the set, as is the
case for Noto and Fluent. By EfficientNet-Lite0's features images of the other designs are found again among its emoji
more often than among OpenMoji's, whose black outlines these features see first (benchmarks/README.md). OpenMoji and
EmojiOne v1 have a licence that asks for share-alike (CC BY-SA 4.0) and are left out, as are variants of skin tone.
"""

import argparse
import hashlib
import io
import json
import re
import subprocess
import tarfile
import tempfile
import unicodedata
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import resvg_py
from PIL import Image

NAMES = "emojibase-data@17.0.0"
DESIGNS = {
    "noto": "@iconify-json/noto@1.2.9",
    "noto v1": "@iconify-json/noto-v1@1.2.5",
    "fluent": "@iconify-json/fluent-emoji@1.2.7",
    "fluent flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "emojione": "@iconify-json/emojione@1.2.3",
    "fxemoji": "@iconify-json/fxemoji@1.2.2",
}
JUDGE = "@iconify-json/twemoji@1.2.5"
SHA256 = {
    NAMES: "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    DESIGNS["noto"]: "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
    DESIGNS["noto v1"]: "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
    DESIGNS["fluent"]: "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b",
    DESIGNS["fluent flat"]: "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    DESIGNS["emojione"]: "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
    DESIGNS["fxemoji"]: "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef",
    JUDGE: "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
}
"""Of the packages."""
COMPONENTS = 2
"""Group of emojibase for parts of emoji, such as skin tones."""
GROUPS = {"people": 1, "flags": 9}
"""Groups of emojibase that can be left out: each noun among the others is seen the more often."""
MAX_MEANINGS = 16
"""Emoji that share a keyword, beyond which it says too little to be a caption alone: "animal" has 122."""
KEYWORDS = 1
"""Of each image; the designs of one emoji have different ones."""


def fetch(package: str, scratch: Path) -> dict[str, Any]:
    """Fetch ``package``, check its digest, and parse all JSON files in it, by their path."""
    command = ["npm", "pack", package, "--json", "--silent"]
    answer = subprocess.run(command, cwd=scratch, check=True, capture_output=True, text=True).stdout
    data = (scratch / json.loads(answer)[0]["filename"]).read_bytes()
    if hashlib.sha256(data).hexdigest() != SHA256[package]:
        raise SystemExit(f"{package} is not the package that was used before: its SHA-256 differs")
    wanted = re.compile(r"package/(icons|chars|en/data|en/shortcodes/\w+)\.json")
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        files = {member.name: tar.extractfile(member) for member in tar if wanted.fullmatch(member.name)}
        return {name[len("package/") : -len(".json")]: json.load(file) for name, file in files.items() if file}


def slug(text: str) -> str:
    """Reduce a name to what stands in a file's name."""
    plain = unicodedata.normalize("NFKD", text.replace("’", "")).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")


class Emoji:
    """The emoji of Unicode without variants of skin tone, and what each is called in each design."""

    def __init__(self, names: dict[str, Any], designs: dict[str, dict[str, Any]]) -> None:
        self.by_code = {_code(one["hexcode"]): one for one in names["en/data"] if one.get("group", 2) != COMPONENTS}
        self.meanings = Counter(tag for one in self.by_code.values() for tag in set(one.get("tags", ())))
        short = names["en/shortcodes/emojibase"].items()
        self.short = {_code(code): [called] if isinstance(called, str) else called for code, called in short}
        """Everyday names, such as car for automobile."""
        self.names = {one["label"].lower() for one in self.by_code.values()}
        self.names |= {called.replace("_", " ") for every in self.short.values() for called in every}
        self.codes: dict[str, str] = {}
        """Code points by name, in lower case without anything but letters and digits; the first name counts."""
        for code, one in self.by_code.items():
            self._add(code, one["label"], one["label"].replace("flag: ", "flag for "))
            self._add(code, one["label"].replace("flag: ", "flag for flag "))
            if "-" not in code:
                self._add(code, unicodedata.name(chr(int(code, 16)), one["label"]))
        tables = [design["chars"] for design in designs.values() if design["chars"]]
        shortcodes = ("emojibase", "github", "iamcal", "joypixels", "cldr")
        for table in [*tables, *(names[f"en/shortcodes/{one}"] for one in shortcodes)]:
            for code, called in table.items():
                if _code(code) in self.by_code:
                    self._add(_code(code), *([called] if isinstance(called, str) else called))

    def _add(self, code: str, *names: str) -> None:
        for name in names:
            self.codes.setdefault(slug(name).replace("-", ""), code)

    def icons(self, design: dict[str, Any]) -> dict[str, str]:
        """Find the SVG of each emoji that a ``design`` has, by code points."""
        found: dict[str, str] = {}
        for name, icon in design["icons"]["icons"].items():
            if (code := self.codes.get(name.replace("-", ""))) is not None:
                found.setdefault(code, _svg({**design["icons"], **icon}))
        for name, alias in design["icons"].get("aliases", {}).items():
            code, parent = self.codes.get(name.replace("-", "")), design["icons"]["icons"].get(alias["parent"])
            if code is not None and parent is not None and set(alias) == {"parent"}:
                found.setdefault(code, _svg({**design["icons"], **parent}))
        return found

    def captions(self, code: str, design: str, number: int) -> list[str]:
        """List the captions of an emoji in a ``design``, which is the one with this ``number``."""
        emoji = self.by_code[code]
        name = emoji["label"].lower().replace("flag: ", "flag of ")
        everyday = [] if "flag of" in name else [called.replace("_", " ") for called in self.short.get(code, ())]
        # A keyword that is another emoji's name would show that prompt the wrong images: pizza has the keyword cheese.
        words = sorted({tag for tag in emoji.get("tags", ()) if self.meanings[tag] <= MAX_MEANINGS} - self.names)
        first = number * KEYWORDS
        keywords = [words[place % len(words)] for place in range(first, first + min(KEYWORDS, len(words)))]
        return list(dict.fromkeys([name, *everyday, f"{name}, {design}", *keywords]))


def _code(hexcode: str) -> str:
    return hexcode.lower().replace("-fe0f", "")


def _svg(icon: dict[str, Any]) -> str:
    """Write the file of an ``icon``, in the middle of a square."""
    left, top, width, height = (icon.get(name, 0) for name in ("left", "top", "width", "height"))
    side = max(width, height)
    box = f"{left - (side - width) / 2} {top - (side - height) / 2} {side} {side}"
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {spaces} viewBox="{box}">{icon["body"]}</svg>'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--designs", nargs="+", choices=DESIGNS, default=list(DESIGNS), help="what training sees")
    parser.add_argument("--without", nargs="+", choices=GROUPS, default=[], help="groups that training does not see")
    args = parser.parse_args()
    if args.output.exists():
        raise SystemExit(f"{args.output} is there already: name another folder")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.output.parent) as folder, ThreadPoolExecutor(2) as pool:
        scratch, made = Path(folder), Path(folder) / "made"
        packages = {design: fetch(package, scratch) for design, package in DESIGNS.items()}
        judge = fetch(JUDGE, scratch)
        emoji = Emoji(fetch(NAMES, scratch), {**packages, "judge": judge})

        def write(path: Path, svg: str, captions: list[str]) -> bool:
            png = resvg_py.svg_to_bytes(svg_string=svg, width=args.size, background="white", skip_system_fonts=True)
            image = Image.open(io.BytesIO(png)).convert("RGB")
            if np.ptp(np.asarray(image)) == 0:  # a few drawings are white, or empty
                return False
            image.save(path.with_suffix(".png"))
            path.with_suffix(".txt").write_text("\n".join(captions) + "\n")
            return True

        unseen = {GROUPS[group] for group in args.without}
        for number, (design, package) in enumerate({**packages, "twemoji": judge}.items()):
            if package is not judge and design not in args.designs:
                continue
            target = made / ("judge" if package is judge else f"training/{slug(design)}")
            target.mkdir(parents=True)
            icons = emoji.icons(package)
            if package is not judge:
                icons = {code: icon for code, icon in icons.items() if emoji.by_code[code].get("group") not in unseen}
            names = [slug(emoji.by_code[code]["label"]) for code in icons]
            captions = [emoji.captions(code, design, number) for code in icons]
            written = pool.map(write, [target / name for name in names], icons.values(), captions)
            print(f"{design}: {sum(written):,} emoji")
        made.replace(args.output)


if __name__ == "__main__":
    main()
