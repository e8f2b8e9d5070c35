"""YAML and JSON that exhausts parsers, or that they raise odd exceptions for."""

LAUGHS = "\n".join(
    ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12))]
)
MERGES = "\n".join(
    ["a0: &a0 {k: 1}", *(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 12))]
)

YAML: dict[str, bytes] = {
    "lists that are nested too deeply": b"a: " + b"[" * 5000 + b"]" * 5000,
    "sections that are nested too deeply": b"a: " + b"{b: " * 5000 + b"1" + b"}" * 5000,
    "indented sections that are nested too deeply": b"".join(b" " * n + b"a:\n" for n in range(600)),
    "keys that are nested too deeply": b"? " * 3000 + b"a",
    "an anchor in itself": b"a: &a\n  b: *a\n",
    "a list in itself": b"a: &a [*a]\n",
    "a merge of itself": b"a: &a\n  <<: *a\n",
    "a billion laughs": LAUGHS.encode(),
    "a billion merges": MERGES.encode(),
    "an unknown anchor": b"a: *b\n",
    "a number of 6,000 digits": b"training: {images: " + b"1" * 6000 + b"}",
    "a number in base 60 of many digits": b"training: {images: 1" + b":59" * 3000 + b"}",
    "a fraction in base 60 of many digits": b"training: {images: 1" + b":59" * 3000 + b".5}",
    "a hexadecimal number of many digits": b"training: {images: 0x" + b"f" * 200_000 + b"}",
    "an empty binary number": b"training: {images: 0b_}",
    "a day that is none": b"training: {dataset: 2024-13-45}",
    "a NUL": b"training: {dataset: a\0b}",
    "an escape that is no character": b'training: {dataset: "\\UFFFFFFFF"}',
    "an escape that is half a character": b'training: {dataset: "\\uD800"}',
    "an equal sign": b"training: {dataset: =}",
    "a key given twice": b"preset: fast\npreset: large\n",
    "a number given twice": b"training: {1: 2, 0x1: 3}",
    "a key that is a list": b"[a]: 1\n",
    "a key that is a section": b"? {a: 1}\n: 2\n",
    "a tag of Python": b"a: !!python/object/apply:os.system [touch pwned]\n",
    "an empty number by its tag": b'a: !!int ""\n',
    "a day by its tag": b"a: !!timestamp x\n",
    "a truth by its tag": b"a: !!bool x\n",
    "bytes that are not UTF-8": b"training: {dataset: \xff\xfe\xfa}",
    "two documents": b"a: 1\n---\nb: 2\n",
    "a tabulator": b"training:\n\timages: 1\n",
    "an unclosed quote": b'training: {dataset: "a',
    "more than any configuration has": b"# comment\n" * 30_000,
    "many keys": b"".join(b"k%d: 1\n" % n for n in range(7_000)),
    "a text": b"hello",
    "a number": b"7",
    "keys that are numbers": b"1: 2\n",
    "no key": b"null: 2\n",
}
"""Files that are not a configuration."""

JSON: dict[str, bytes] = {
    "lists that are nested too deeply": b"[" * 100_000,
    "objects that are nested too deeply": b'{"a":' * 100_000,
    "a number of 6,000 digits": b'{"a": ' + b"1" * 6000 + b"}",
    "a NUL": b'{"a": "\0"}',
    "bytes that are not UTF-8": b'{"a": "\xff\xfe"}',
    "an unclosed quote": b'{"a',
    "nothing": b"",
    "a number": b"7",
}
