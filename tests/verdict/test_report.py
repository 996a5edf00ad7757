"""A verdict in the files of others: HTML that stands alone, JUnit XML, and node data of Model Explorer."""

import html as parser
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

from export.causes.evidence import Cause
from export.measure.figures import BINS, Birth, Codes, Comparison, Figures, Logits, Needs
from export.measure.kinds import FLOAT, SIMULATION
from export.verdict.report import COLOURS, DARK, LEVELS, colour, html, junit, level, model_explorer
from export.verdict.saved import read_run, save_run
from export.verdict.verdict import Verdict
from refimpl.config import Config
from refimpl.errors import InputError

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\u2028\x00&\"'"


def verdict(layers=32, tokens=128, wrong=11, remarks=(), about=None):
    """A run of Baichuan2-7B in 5 parts, two sizes and two ways, wrong from a layer on."""
    rng, tensors, heads = np.random.default_rng(0), [], 32
    for run, count in ((f"prompt_ar{tokens}_cl4096", tokens), ("token_ar1_cl4096", 1)):
        for way in ("isolated", "chained"):
            names = ["model.embed_tokens"]
            for i in range(layers):
                names += [f"model.layers.{i}.self_attn.key", f"model.layers.{i}.self_attn.value"]
                names += [f"model.layers.{i}"] if i % 8 == 7 and i < layers - 1 else []
            for name in [*names, "lm_head"]:
                layer = int(name.split(".")[2]) if ".layers." in name else 0
                part = 1 if name == "model.embed_tokens" else 2 + min(layer // 8, 3)
                bad = layer >= wrong and (way == "chained" or (layer == wrong and name.endswith("key")))
                bad |= name == "lm_head" and way == "chained"
                scale = 50 if bad else 0.4
                tensors.append(Comparison(
                    f"{run}_{part}_of_5", way, name, SIMULATION, output=name, shape=(1, heads, count, 128),
                    needs=Needs(
                        4 * scale, scale, tokens=tuple((scale * rng.random(count)).tolist()),
                        heads=tuple(rng.random(heads).tolist()),
                        histogram=tuple(rng.integers(0, 4000, BINS).tolist()), reason="noise",
                    ),
                    device=Figures(
                        sqnr=30.0, cosine=0.99, max_abs=1.0, index=(0, 1, 2, 3), value=1.0, reference=2.0,
                        token_sqnr=tuple((40 * rng.random(count)).tolist()),
                        head_sqnr=tuple((40 * rng.random(heads)).tolist()),
                        token_cosine=tuple(rng.random(count).tolist()),
                        head_cosine=tuple(rng.random(heads).tolist()),
                    ),
                    cost=Figures(25.0, 0.99), total=Figures(20.0, 0.9),
                    codes=Codes(8, 0.1, 3.0, 0.01, tuple(rng.integers(0, 9, count).astype(float).tolist())),
                    born=Birth.UNKNOWN if not bad else Birth.HERE if way == "isolated" else Birth.INHERITED,
                    logits=Logits(0.1, 0.9, 0.05, 0.95) if name == "lm_head" else None,
                ))  # fmt: skip
    guilty = next(t for t in tensors if t.born == "here")
    causes = {guilty.name: Cause("RoPE", "RoPE has the base 1e+06, expected 10000")}
    return Verdict(tuple(tensors), SIMULATION, Config(), causes, tuple(remarks), about or {"prompt": 100})


class Page(HTMLParser):
    """What an HTML file would load, run and show."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.handlers, self.scripts, self.text, self.framed = [], [], [], [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "action", "srcset", "data"):
                self.links.append(value)
            if name.startswith("on"):
                self.handlers.append(name)
            if name == "class" and "first" in value.split():
                self.framed.append(dict(attributes)["title"])

    def handle_data(self, data):
        if self.tags and self.tags[-1] == "script":
            self.scripts.append(data)
        self.text += data


def test_html_stands_alone_and_is_small():
    text = html(verdict())
    page = Page(text)
    assert not page.links and not page.handlers and "http" not in text.replace("http-equiv", "")
    assert len(text.encode()) < 700_000
    (frame,) = page.framed
    assert frame.startswith("prompt_ar128_cl4096_3_of_5/isolated/model.layers.11.self_attn.key: 50, 30.0 dB")
    assert "Likely cause: RoPE has the base 1e+06" in page.text
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])
    assert len(data) == 2 * 2 * (1 + 64 + 3 + 1) and len(data[1][3]) == 128 and len(data[1][4]) == 32
    assert page.tags.count("table") >= 6 and "default-src 'none'" in text


def test_a_person_can_read_it():
    """Letters stand out from their cell's colour, columns are narrow, and what was not measured is no number."""
    text = html(verdict())
    light = {c: "#1c2733" for c in COLOURS if c not in DARK}
    for background, ink in {**dict.fromkeys(DARK, "#ffffff"), **light}.items():
        assert contrast(background, ink) > 3, background
    assert f"background:{COLOURS[0]};color:#fff" in text and f"background:{COLOURS[2]};color" not in text
    assert '<th title="self_attn.key">key' in text
    broken = replace(verdict().tensors[1], problem="NaN or infinity on one side", device=Figures())
    text = html(replace(verdict(), tensors=(broken,)))
    assert "<td>–<td>–<td>–<td>–" in text and "<td>nan" not in text and "<td>inf" not in text


def contrast(a, b):
    """Of two colours, as the Web Content Accessibility Guidelines define it: 3 is enough for large letters."""
    lights = []
    for one in (a, b):
        parts = [int(one[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
        lights.append(0.2126 * red + 0.7152 * green + 0.0722 * blue + 0.05)
    return max(lights) / min(lights)


def test_names_are_escaped():
    text = html(verdict(layers=8, wrong=3, remarks=[HOSTILE], about={HOSTILE: HOSTILE}))
    tensor = Comparison(HOSTILE, "isolated", "lm_head", FLOAT, problem=HOSTILE)
    text += html(Verdict((tensor,), FLOAT, Config(num_hidden_layers=1), {tensor.name: Cause(HOSTILE, HOSTILE)}))
    page = Page(text)
    assert page.tags.count("script") == 4 and "img" not in page.tags and not page.handlers
    assert "alert(1)" in parser.unescape(text)
    assert "\u2028" not in "".join(page.scripts)


def test_a_way_is_escaped():
    tensor = Comparison("g", HOSTILE, "lm_head", FLOAT, logits=Logits(0.1, 0.5, 0.1, 0.5))
    page = Page(html(Verdict((tensor,), FLOAT, Config(num_hidden_layers=1))))
    assert page.tags.count("script") == 2 and "img" not in page.tags and not page.handlers


@pytest.mark.parametrize("change", [
    {"way": HOSTILE}, {"kind": "else"}, {"born": "<b>"}, {"histogram": [1, 2]}, {"histogram": [-1] * BINS},
    {"lsb_over": None}, {"lsb_max": 3.0, "lsb_over": ...}, {"kl": ..., "top1": 0.5}, {"kl": 0.1, "top1": ...},
    {"rows": None}, {"sqnr": 10**400}, {"position": 10**400}, {"position": 0.5}, {"bits": True}, {"tokens": ["a"]},
    {"tokens": [10**400]}, {"index": [None]}, {"graph": "a\x1b[31m"}, {"problem": "a\nb"}, {"rows": -1.0}, {"x": 1},
    {"head_lsb": [-1.0]},
])  # fmt: skip
def test_a_damaged_run_is_refused_in_a_line(change, tmp_path):
    stored = json.loads(verdict(layers=1, wrong=0).to_json())
    stored["tensors"][-1] |= change
    stored["tensors"][-1] = {key: value for key, value in stored["tensors"][-1].items() if value is not ...}
    (tmp_path / "run.json").write_text(json.dumps(stored))
    with pytest.raises(InputError) as caught:
        read_run(tmp_path / "run.json")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    assert str(caught.value).count("run verify again") == 1


def test_a_run_says_nothing_twice_and_nothing_that_a_terminal_obeys(tmp_path):
    stored = json.loads(verdict(layers=1, wrong=0).to_json())
    stored |= {"remarks": ["\x1b[31m"], "causes": {stored["tensors"][0]["tap"]: {"name": "a", "text": "b\nc\x1b"}}}
    (tmp_path / "run.json").write_text(json.dumps(stored))
    read = read_run(tmp_path / "run.json")
    (tmp_path / "run.json").write_text(json.dumps(stored | {"tensors": stored["tensors"][:1] * 2}))
    with pytest.raises(InputError, match="it has a tensor twice; run verify again"):
        read_run(tmp_path / "run.json")
    assert all(text.isprintable() for text in (*read.remarks, *(str(cause) for cause in read.causes.values())))


def test_junit_says_what_failed():
    of = verdict(layers=16, wrong=11)
    root = ElementTree.fromstring(junit(of))
    assert root.tag == "testsuites"
    suites = {suite.get("name"): suite for suite in root}
    assert sum(int(suite.get("failures")) for suite in suites.values()) == len(of.failures)
    assert (
        sum(int(suite.get("tests")) for suite in suites.values()) == len(of.tensors) == len(root.findall(".//testcase"))
    )
    (case,) = [c for c in suites["prompt_ar128_cl4096_3_of_5/isolated"] if c.find("failure") is not None]
    assert case.get("name") == "model.layers.11.self_attn.key"
    assert "RoPE has the base" in case.find("failure").get("message") and "It begins in" in case.find("failure").text
    tensor = Comparison(HOSTILE, "isolated", "lm_head", FLOAT, problem=HOSTILE)
    ElementTree.fromstring(junit(Verdict((tensor,), FLOAT, Config(num_hidden_layers=1))))


def test_model_explorer_has_its_schema():
    of = verdict(layers=16)
    content = json.loads(model_explorer(of))
    assert set(content) == {tensor.graph for tensor in of.tensors}
    for data in content.values():
        assert set(data) == {"results", "thresholds"}
        assert all(set(item) == {"value", "bgColor"} for item in data["thresholds"])
        values = [item["value"] for item in data["thresholds"]]
        assert values == sorted(values) and values[-1] > 1e200
        assert all(set(result) == {"value"} and result["value"] >= 0 for result in data["results"].values())
    key = content["prompt_ar128_cl4096_3_of_5"]["results"]["model.layers.11.self_attn.key"]
    assert key == {"value": 50.0}


@pytest.mark.parametrize("excess, letter", [(0.0, "0"), (1.0, "i"), (1.0001, "j"), (0.9999, "i"), (2.0, "k"),
                                            (np.inf, "z"), (1e-9, "0"), (1e9, "z"), (np.nan, "z")])  # fmt: skip
def test_a_letter_keeps_which_side_of_the_limit(excess, letter):
    assert level(excess) == letter
    assert (COLOURS.index(colour(excess)) <= 3) == (LEVELS.index(letter) <= 18)


def test_a_run_of_32_layers_is_a_small_file(tmp_path):
    save_run(verdict(), tmp_path / "run.json")
    assert (tmp_path / "run.json").stat().st_size < 1_500_000
    assert html(read_run(tmp_path / "run.json")) == html(read_run(tmp_path / "run.json"))
    assert read_run(tmp_path / "run.json").summary == verdict().summary
