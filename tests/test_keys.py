import hashlib
import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsearch import cli
from vsearch.config import UserError
from vsearch.keys import Keys, add_key, remove_key


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def test_a_key_opens_and_only_its_hash_is_stored(path: Path) -> None:
    keys = {name: add_key(path, name) for name in ("newsroom", "archive-2", "me@example.org")}
    assert len(set(keys.values())) == 3
    assert all(re.fullmatch(r"vs_[A-Za-z0-9_-]{43}", key) for key in keys.values())
    loaded = Keys.load(path)
    assert {loaded.name_of(key) for key in keys.values()} == set(keys)
    stored = json.loads(path.read_text())
    assert stored == {n: hashlib.sha256(k.encode()).hexdigest() for n, k in keys.items()}
    assert not any(key[3:] in path.read_text() for key in keys.values())


def test_nearly_a_key_opens_nothing(path: Path) -> None:
    key = add_key(path, "a")
    keys = Keys.load(path)
    digest = json.loads(path.read_text())["a"]
    near = ["", "a", digest, key[3:], key[:-1], key + "A", f" {key}", f"{key}\n", key.swapcase()]
    assert [keys.name_of(other) for other in near] == [None] * len(near)


@given(st.text(st.characters(), max_size=300))
def test_any_text_may_be_presented(text: str) -> None:
    assert Keys({"a": "0" * 64}).name_of(text) is None


@pytest.mark.parametrize("text", ["ключ", "\ud800", "\0", "vs_" + "ü" * 43, "v" * 50_000_000])
def test_foreign_and_huge_keys_are_refused_not_raised(text: str) -> None:
    assert Keys({"a": hashlib.sha256(b"vs_").hexdigest()}).name_of(text) is None


def test_every_key_is_compared_wherever_the_right_one_stands(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vsearch import keys as module

    made = [add_key(path, name) for name in "abcd"]
    loaded = Keys.load(path)
    compared: list[bytes] = []
    compare = module.hmac.compare_digest

    def counting(a: bytes, b: bytes) -> bool:
        compared.append(b)
        return compare(a, b)

    monkeypatch.setattr(module.hmac, "compare_digest", counting)
    for key in [*made, "wrong"]:
        compared.clear()
        loaded.name_of(key)
        assert len(set(compared)) == len(compared) == 4


def test_a_name_that_is_taken_is_replaced_only_on_demand(path: Path) -> None:
    first = add_key(path, "a")
    before = path.read_bytes()
    with pytest.raises(UserError, match="already"):
        add_key(path, "a")
    assert path.read_bytes() == before
    second = add_key(path, "a", replace=True)
    keys = Keys.load(path)
    assert (keys.name_of(first), keys.name_of(second)) == (None, "a")


def test_a_removed_key_opens_nothing_and_the_others_stay(path: Path) -> None:
    gone, stays = add_key(path, "gone"), add_key(path, "stays")
    remove_key(path, "gone")
    keys = Keys.load(path)
    assert (keys.name_of(gone), keys.name_of(stays)) == (None, "stays")
    with pytest.raises(UserError, match="no key named 'gone'"):
        remove_key(path, "gone")
    remove_key(path, "stays")
    assert len(Keys.load(path)) == 0
    assert Keys.load(path).name_of(stays) is None


@pytest.mark.parametrize("name", ["", " ", "-a", "a b", "a\nb", "ä", "a" * 65, "a/b", '"'])
def test_a_name_must_be_plain(path: Path, name: str) -> None:
    with pytest.raises(UserError, match="cannot name a key"):
        add_key(path, name)
    assert not path.exists()


def test_only_the_owner_reads_the_file_whatever_it_was(path: Path) -> None:
    path.write_text("{}")
    path.chmod(0o644)
    before = os.umask(0)
    try:
        add_key(path, "a")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(path.parent.iterdir()) == [path]


def test_a_link_stays_a_link(path: Path) -> None:
    real = path.with_name("real.json")
    path.symlink_to(real)
    key = add_key(path, "a")
    assert path.is_symlink() and Keys.load(real).name_of(key) == "a"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no JSON",
        b"\xff\xfe",
        b"[" * 100_000,
        b"[]",
        b'{"a": 1}',
        b'{"a": "short"}',
        b'{"a": "' + b"g" * 64 + b'"}',
        b'{"a": "' + b"0" * 64 + b'\\n"}',
    ],
)
def test_a_file_that_is_none_of_ours_is_refused_and_left_alone(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    for use in (lambda: Keys.load(path), lambda: add_key(path, "a"), lambda: remove_key(path, "a")):
        with pytest.raises(UserError, match=r"keys in .*keys\.json cannot be read"):
            use()
    assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


def test_a_missing_file_or_folder_is_one_sentence(path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: No such file"):
        Keys.load(path)
    with pytest.raises(UserError, match="cannot be written"):
        add_key(path.parent / "none" / "keys.json", "a")
    with pytest.raises(UserError, match="no key named"):
        remove_key(path, "a")
    assert not list(path.parent.iterdir())


def test_of_many_commands_at_once_none_loses_a_key(path: Path) -> None:
    """Each process tries until the file is free."""
    program = (
        "import sys, time; from vsearch.config import UserError; from vsearch.keys import add_key\n"
        "for n in range(8):\n"
        "    while True:\n"
        "        try: print(add_key(sys.argv[1], f'{sys.argv[2]}-{n}')); break\n"
        "        except UserError as error: assert 'being changed' in str(error); time.sleep(0.001)"
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(path), str(n)], stdout=subprocess.PIPE, text=True
        )
        for n in range(4)
    ]
    made = [key for process in started for key in process.communicate(timeout=120)[0].split()]
    assert [process.returncode for process in started] == [0] * 4
    keys = Keys.load(path)
    assert len(made) == len(keys) == 32
    assert None not in [keys.name_of(key) for key in made]


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["vsearch", "key", *words])
    try:
        cli.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_the_command_prints_the_key_once_and_takes_it_away(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    option = ("--keys", str(path))
    assert run(monkeypatch, "newsroom", *option) == 0
    said = capsys.readouterr()
    key = said.out.strip()
    assert said.out == f"{key}\n" and key not in said.err
    assert Keys.load(path).name_of(key) == "newsroom"
    assert run(monkeypatch, "newsroom", *option) == 2
    said = capsys.readouterr()
    assert not said.out and "--replace" in said.err
    assert run(monkeypatch, "newsroom", *option, "--replace", "--remove") == 2
    assert run(monkeypatch, "newsroom", *option, "--remove") == 0
    assert not capsys.readouterr().out
    assert Keys.load(path).name_of(key) is None
