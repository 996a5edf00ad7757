"""The READMEs' commands print what they show, and the Chinese README shows the same as the English one."""

import re

import pytest
from readme import PICTURE, ROOT, answer_late, blocks, commands, picture, run, same, with_htp

ENGLISH, CHINESE = ROOT / "README.md", ROOT / "README.zh.md"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder in which commands run as they do in a checkout."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "refimpl").symlink_to(ROOT / "refimpl")
    return folder


@pytest.mark.parametrize("file", ["README.md", "golden/cost/README.md"])
def test_commands_print_what_is_shown(file, place):
    for command, shown in commands(ROOT / file):
        if command.startswith("refimpl verify phone outputs"):
            answer_late(place / "phone", place / "outputs")
        printed = run(command, place)
        if command == "refimpl demo" and "not asked" not in printed:
            shown = with_htp(ROOT / file, shown)
        assert same(shown, printed), f"$ {command}\n{printed}\nin {file}:\n{shown}"


@pytest.mark.parametrize(
    ("shown", "printed", "agree"),
    [
        ("KL 0.034 nats", "KL 0.035 nats", True),  # one in the last digit
        ("KL 0.034 nats", "KL 0.036 nats", False),
        ("88.991  83.27% ± 0.58%", "89.2 83.1% ± 0.57%", True),
        ("88.991", "91.2", False),
        ("54 tensors agree; worst a, 1e-15 of 2e-14", "54 tensors agree; worst b, 4e-15 of 5e-14", True),
        ("54 tensors agree; worst a", "52 tensors agree; worst a", False),
        ("the author is now 李商隐", "the author is now 李白", False),
        ("model.layers.1.mlp", "model.layers.2.mlp", False),
        ("token_ar1_cl256_2_of_4", "token_ar1_cl256_3_of_4", False),
    ],
)
def test_what_counts_as_the_same(shown, printed, agree):
    assert same(shown, printed) is agree


def test_the_picture_is_the_verdict_that_the_readme_shows():
    assert PICTURE.read_text(encoding="utf-8") == picture(ENGLISH), "draw it anew: python tests/readme.py"


def bare(path):
    """The blocks of a README without comments, which may be in another language."""
    return [(language, re.sub(r"  +# .*", "", text)) for language, text in blocks(path)]


def test_the_chinese_readme_has_the_same_blocks():
    assert bare(CHINESE) == bare(ENGLISH), "copy the block that changed from README.md"


def test_the_chinese_readme_is_complete():
    """The same headings, tables and links in the same order; each links to the other at its top."""
    english, chinese = ENGLISH.read_text(encoding="utf-8"), CHINESE.read_text(encoding="utf-8")
    for pattern in (r"^(#+) ", r"^(\|) ", r"^(\d\.) ", r"\]\(([^)]+)\)"):
        pair = [re.findall(pattern, text, re.M) for text in (english, chinese)]
        pair = [["README" if found in ("README.md", "README.zh.md") else found for found in side] for side in pair]
        assert pair[0] == pair[1], pattern
    assert "](README.zh.md)" in english.split("\n\n")[1] and "](README.md)" in chinese.split("\n\n")[1]


def test_the_map_shows_every_room():
    linked = {
        ROOT / link.removesuffix("/README.md") for link in re.findall(r"\]\(([^)#]+)", ENGLISH.read_text("utf-8"))
    }
    packages = (ROOT / "kernels", ROOT / "refimpl", ROOT / "golden", ROOT / "export")
    rooms = {file.parent for package in packages for file in package.rglob("__init__.py")}
    assert not rooms - linked - {ROOT / "kernels" / "refimpl_kernels"}


@pytest.mark.parametrize("path", [ENGLISH, CHINESE])
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)#]+)", path.read_text(encoding="utf-8")):
        assert link.startswith("http") or (ROOT / link).exists(), link
